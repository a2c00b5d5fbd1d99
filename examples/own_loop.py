"""One's own training loop, on two workers with four shards: python examples/own_loop.py.

The loop's body runs once for every batch of every shard that the worker carries; when the last one
of a step has been given to `worker.step`, gradients are exchanged and the parameters updated. The
same file on 1, 2, 3 or 4 workers gives the same parameters, bit for bit.
"""

from functools import partial

import torch
from torch import nn

import penstock
from penstock import feed


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)
    )


def train(worker: penstock.Worker) -> None:
    network, _ = worker.prepare(make_network, partial(torch.optim.AdamW, lr=2e-3))
    loss_of = nn.CrossEntropyLoss()
    for batch in worker.batches("train", epochs=2, batch_size=32):
        loss = loss_of(network(batch.x), batch.y)
        worker.step(loss)
        if worker.global_step % 50 == 0:
            worker.report(batch_loss=loss.item())
            worker.checkpoint()
    found = worker.evaluate("test", loss=loss_of)
    if worker.rank == 0:
        print(f"accuracy {found.accuracy:.4f}")


if __name__ == "__main__":
    run = penstock.launch(
        train, workers=2, shards=4, train=feed.mnist(split="train"), test=feed.mnist(split="test")
    )
    print(run.url, run.result["status"])
