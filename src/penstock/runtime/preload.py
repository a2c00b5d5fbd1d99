"""What a fork server imports for workers, by name: importing this imports none of it."""

TARGET = "penstock.runtime.entry:main"
"""What a worker process calls."""

PRELOAD = (
    "penstock.runtime.entry",
    "penstock.runtime.loop",
    "penstock.runtime.optimizers",
    "torch.optim",
    "safetensors.torch",
)
"""Modules that workers need; nothing of them starts a thread."""
