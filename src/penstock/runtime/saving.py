"""What of a worker goes into a checkpoint, and back.

Every worker writes its shards' files, rank 0 what all share; when all have finished, rank 0 seals.
A run resumed on another number of workers reads the files of the shards it carries then.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from penstock.errors import RunError
from penstock.exchange.averaging import AveragingAgreement, State
from penstock.exchange.gradients import GradientAgreement
from penstock.exchange.group import Group
from penstock.exchange.words import gather_words
from penstock.plan import Plan
from penstock.runtime import checkpoint
from penstock.runtime.batches import Cursor
from penstock.runtime.checkpoint import Checkpoint, File, Tensors
from penstock.runtime.shards import RandomState, ShardBuffers, merged_buffers
from penstock.runtime.store import Store


@dataclass
class Progress:
    """Where training stands; equal on all workers.

    Arguments:
        step: optimizer steps done.
        examples: records trained on, all shards together, as far as exchanged.
        loss: mean over all shards' examples in the last exchange; None before the first.
        steps_apart: steps since the shards last agreed.
        cursors: by source.
        best: step and metric of the best checkpoint, or None.
        evaluated: the step of each source's last evaluation.
        memory: JSON values of the loop (best score, patience).
    """

    step: int = 0
    examples: int = 0
    loss: float | None = None
    steps_apart: int = 0
    cursors: dict[str, Cursor] = field(default_factory=dict)
    best: list[float] | None = None
    evaluated: dict[str, int] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """What `asdict` gave."""
        cursors = {name: Cursor(**cursor) for name, cursor in values["cursors"].items()}
        return cls(**(values | {"cursors": cursors}))


@dataclass
class Prepared:
    """A network under training on one worker."""

    network: torch.nn.Module
    trained: list[tuple[str, torch.nn.Parameter]]
    optimizer: torch.optim.Optimizer
    schedule: Any
    agreement: GradientAgreement | AveragingAgreement
    buffers: ShardBuffers
    random: list[RandomState]
    own: range
    shards: int


def save(
    prepared: Prepared,
    progress: Progress,
    plan: Plan,
    group: Group,
    store: Store,
    metric: float | None,
) -> None:
    """Writes and seals a checkpoint. Collective; returns when it is sealed."""
    step, agreement, own = progress.step, prepared.agreement, prepared.own
    if group.rank == 0:
        checkpoint.unseal(store, step)
    buffers = merged_buffers(group, prepared.buffers, own, prepared.shards)
    files: list[File] = []
    with agreement.merged():
        network: Tensors = {name: p.detach() for name, p in prepared.network.named_parameters()}
        if group.rank == 0:
            files.append(
                checkpoint.write_tensors(store, step, "network.safetensors", network | buffers)
            )
    for i, shard in enumerate(own):
        tensors = {f"random.{k}": t for k, t in prepared.random[i].to_tensors().items()}
        tensors |= {f"buffers.{k}": t for k, t in prepared.buffers.of(i).items()}
        numbers: dict[str, Any] = {}
        if isinstance(agreement, AveragingAgreement) and not agreement.agreed:
            data, state = agreement.parameters_of(i), agreement.state_of(i)
            trained = prepared.trained
            tensors |= {f"parameters.{name}": t for (name, _), t in zip(trained, data, strict=True)}
            own_tensors, numbers = _optimizer_state(trained, state)
            tensors |= own_tensors
            numbers["seen"] = agreement.seen(i)
        files.append(
            checkpoint.write_tensors(store, step, checkpoint.shard_file(shard), tensors, numbers)
        )
    if group.rank == 0:
        if agreement.agreed:
            tensors, numbers = _optimizer_state(prepared.trained, prepared.optimizer.state)
            files.append(
                checkpoint.write_tensors(store, step, "optimizer.safetensors", tensors, numbers)
            )
        values: dict[str, Any] = {
            "progress": asdict(replace(progress, steps_apart=agreement.steps_apart)),
            "plan": plan.to_dict(),
            "groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in prepared.optimizer.param_groups
            ],
            "schedule": prepared.schedule.state_dict() if prepared.schedule else None,
        }
        files.append(checkpoint.write_json(store, step, "state.json", _plain(values, "state")))
    everyone = _gather_files(files, group)
    if group.rank == 0:
        checkpoint.seal(store, step, everyone, metric)
    group.barrier()


def restore(prepared: Prepared, saved: Checkpoint) -> Progress:
    """Puts a worker where the checkpoint was written; bit for bit, on any number of workers."""
    state = saved.json()
    progress = Progress.from_dict(state["progress"])
    network, _ = saved.tensors("network.safetensors")
    load_network(prepared.network, network, parameters_only=True)
    _load_groups(prepared.optimizer, state["groups"])
    if prepared.schedule is not None:
        prepared.schedule.load_state_dict(state["schedule"])
    agreement, trained = prepared.agreement, prepared.trained
    common: tuple[Tensors, Any] | None = None
    if saved.has("optimizer.safetensors"):
        common = saved.tensors("optimizer.safetensors")
        if isinstance(agreement, GradientAgreement):
            prepared.optimizer.state.clear()
            prepared.optimizer.state.update(_state_from(trained, *common))
    for i, shard in enumerate(prepared.own):
        tensors, numbers = saved.tensors(checkpoint.shard_file(shard))
        prepared.random[i] = RandomState.from_tensors(_under("random.", tensors))
        prepared.buffers.load(i, _under("buffers.", tensors))
        if isinstance(agreement, AveragingAgreement):
            if common is None:
                data = [tensors[f"parameters.{name}"] for name, _ in trained]
                agreement.load(i, data, _state_from(trained, tensors, numbers), numbers["seen"])
            else:
                data = [network[name] for name, _ in trained]
                agreement.load(i, data, _state_from(trained, *common), (0, 0.0))
    if isinstance(agreement, AveragingAgreement):
        agreement.steps_apart = progress.steps_apart
    return progress


def load_network(
    network: torch.nn.Module, tensors: Tensors, *, parameters_only: bool = False
) -> None:
    """Copies a checkpoint's network into a module.

    Raises:
        RunError: names or shapes differ; the message names the first.
    """
    targets: dict[str, torch.Tensor] = dict(network.named_parameters())
    if not parameters_only:
        targets |= dict(network.named_buffers())
    with torch.no_grad():
        for name, target in targets.items():
            if name not in tensors or tensors[name].shape != target.shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise RunError(
                    f"the network has {name} {tuple(target.shape)}; the checkpoint has {found}",
                    hint="this run was trained with another network",
                )
            target.copy_(tensors[name])


def _optimizer_state(
    trained: list[tuple[str, torch.nn.Parameter]], state: State
) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for name, p in trained:
        more = checkpoint.split_state(state.get(p, {}), f"optimizer.{name}/")
        tensors |= more[0]
        numbers |= more[1]
    return tensors, numbers


def _state_from(
    trained: list[tuple[str, torch.nn.Parameter]], tensors: Tensors, numbers: dict[str, Any]
) -> State:
    state: State = {}
    by_name = dict(trained)
    for key, value in [*tensors.items(), *(numbers or {}).items()]:
        if key.startswith("optimizer."):
            name, _, field_name = key.removeprefix("optimizer.").rpartition("/")
            p = by_name[name]
            if isinstance(value, torch.Tensor):
                value = (value.to(p.device) if value.dim() else value).clone()
            state.setdefault(p, {})[field_name] = value
    return state


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _load_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    if len(groups) != len(optimizer.param_groups):
        raise RunError(
            f"the checkpoint's optimizer has {len(groups)} groups of parameters, the job's "
            f"{len(optimizer.param_groups)}",
            hint="resume with the optimizer that the run began with",
        )
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for key, value in values.items():
            now = group.get(key)
            if isinstance(now, tuple):
                value = tuple(value)
            elif isinstance(now, torch.Tensor):
                value = now.new_tensor(value)
            group[key] = value


def _plain(value: Any, path: str) -> Any:
    """The value as JSON has it, exactly; tensors of one number as numbers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{path}[{n}]") for n, v in enumerate(value)]
    raise RunError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold",
        hint="optimizers, schedules and worker.memory may keep numbers, words, lists and tensors",
    )


def _gather_files(files: list[File], group: Group) -> list[File]:
    """Everyone's finished files, in the order of ranks."""
    everyone = gather_words(group, [vars(file) for file in files])
    return [File(**values) for rank in everyone for values in rank]
