"""What the planner finds, beside known ways to split a network: modelled milliseconds of a step.

    data parallel   the batch split, parameters copied, gradients added up everywhere
    ZeRO            the same, but parameters, gradients and state lie in parts
    Megatron        matrices split by columns and rows inside a host, data parallel between hosts
    penstock        what the search finds; `from` says if a known way was the best of all
    bound           no way in which repeated layers are split alike takes less (where the search ran
                    out of time, a bound that is less sharp)

No machine is measured: all are priced by the same model (penstock.plan.search.price) on a made-up
cluster of --flops a device and links of so many bits per second between all devices of a host, and
between hosts. The search itself is measured: seconds with what it spends on presets, of them HiGHS.

    python benchmarks/planner.py [--networks vgg16,gpt6,gpt24,recommender] [--mesh 8,2x8,8x8,128x8]
        [--gbit 1,10,100] [--flops 1e13] [--per-device N] [--time-limit 60] [--gap 0.01]
        [--untied SECONDS]

With --untied the search runs once more, for so many seconds, with no repeated layers tied: the last
column says how far the step is above what no way takes less than, be layers split alike or not.

Batches grow with the cluster: --per-device examples on each device, or those of the network.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from penstock.exchange.cost import Link
from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.search.search import Found, Search

LATENCY_S, MESSAGE_S = 20e-6, 1e-6
OPERATOR_S = 5e-6
FLOPS_PER_BYTE = 10
"""Of a device, between what it computes and what its memory moves."""


class Network(NamedTuple):
    """How a network and a batch of it are made, and how many examples a device has."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    per_device: int


def _images(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(size, 3, 224, 224), torch.empty(size, dtype=torch.int64)


def _texts(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.empty(size, 1024, dtype=torch.int64)
    return tokens, tokens.clone()


def _clicks(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(size, 39, dtype=torch.int64), torch.empty(size, dtype=torch.int64)


def _rows(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(size, 2048), torch.empty(size, dtype=torch.int64)


NETWORKS = {
    "vgg16": Network(zoo.vgg16, _images, 32),
    "gpt6": Network(functools.partial(zoo.gpt, layers=6), _texts, 8),
    "gpt24": Network(functools.partial(zoo.gpt, width=1024, heads=16, layers=24), _texts, 4),
    "recommender": Network(zoo.recommender, _clicks, 256),
    # Small enough to be solved with nothing tied.
    "mlp": Network(functools.partial(zoo.mlp, 2048, [2048] * 8, 10), _rows, 128),
    "gpt2": Network(functools.partial(zoo.gpt, layers=2), _texts, 8),
    "gpt3": Network(functools.partial(zoo.gpt, layers=3), _texts, 8),
}


def step_of(network: Network, size: int) -> Graph:
    """The step of a network for a batch of this size, captured without memory."""
    with torch.device("meta"):
        module, batch = network.make(), network.batch(size)
    return capture(module, F.cross_entropy, batch, functools.partial(torch.optim.AdamW, lr=1e-3))


def cluster(mesh: tuple[int, int], gbit: float, flops_per_s: float) -> Cluster:
    """All links alike."""
    link = Link(LATENCY_S, gbit * 1e9 / 8, MESSAGE_S)
    device = Device(
        "made up", {"float32": flops_per_s}, flops_per_s / FLOPS_PER_BYTE, 1 << 50, OPERATOR_S
    )
    return Cluster(*mesh, device, link, link)


def mesh_of(text: str) -> tuple[int, int]:
    """Hosts and devices of "8" or "2x8"."""
    numbers = [int(number) for number in text.split("x")]
    return (1, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def row(name: str, mesh: str, gbit: float, found: Found, untied: Found | None) -> str:
    """A row of the table.

    Arguments:
        untied: what is found where no layers are tied.
    """
    best_s = min(known.step_s for _, known in found.presets.values())
    assert found.price.step_s <= best_s, "the search is worse than a known way"
    cells = [
        name,
        mesh,
        f"{gbit:g}",
        *(f"{1e3 * known.step_s:.2f}" for _, known in found.presets.values()),
        f"**{1e3 * found.price.step_s:.2f}**",
        f"{best_s / found.price.step_s:.2f}",
        found.origin,
        f"{1e3 * found.bound_s:.2f}",
        f"{100 * found.gap:.1f} %" + (" (time)" if found.timed_out else ""),
        f"{found.price.held_bytes / 1e9:.2f}",
        f"{found.seconds:.1f}",
        f"{found.solver_s:.1f}",
        str(found.binaries),
    ]
    if untied is not None:
        above = max(0.0, found.price.step_s / untied.bound_s - 1)
        cells.append(f"{100 * above:.2f} %" + (" (time)" if untied.timed_out else ""))
    return f"| {' | '.join(cells)} |"


HEADER = (
    "network", "mesh", "Gbit/s", "data parallel", "ZeRO", "Megatron", "penstock", "times best",
    "from", "bound", "gap", "GB a rank", "search s", "HiGHS s", "binaries",
)  # fmt: skip
UNTIED = "above the untied optimum"
UNTIED_GAP = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="vgg16,gpt6,gpt24,recommender")
    parser.add_argument("--mesh", default="8,2x8,8x8,128x8")
    parser.add_argument("--gbit", default="1,10,100")
    parser.add_argument("--flops", type=float, default=1e13)
    parser.add_argument("--per-device", type=int)
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--untied", type=float, metavar="SECONDS")
    from collectives import hardware  # type: ignore[import-not-found]

    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{hardware()}; devices of {options.flops:g} FLOP/s and "
        f"{options.flops / FLOPS_PER_BYTE:g} B/s of memory; milliseconds of a step\n"
    )
    header = HEADER if options.untied is None else (*HEADER, UNTIED)
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for name in options.networks.split(","):
        network = NETWORKS[name]
        for mesh in options.mesh.split(","):
            hosts, devices = mesh_of(mesh)
            size = hosts * devices * (options.per_device or network.per_device)
            graph = step_of(network, size)
            for gbit in map(float, options.gbit.split(",")):
                machines = cluster((hosts, devices), gbit, options.flops)
                found = Search(graph, machines).find(
                    gap=options.gap, time_limit_s=options.time_limit
                )
                untied = None
                if options.untied is not None:
                    untied = Search(graph, machines, max_choices=sys.maxsize).find(
                        gap=UNTIED_GAP, time_limit_s=options.untied
                    )
                print(row(name, mesh, gbit, found, untied), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
