"""`Worker`: what a training function sees of its process, the same for a Job's loop and one's own.

    def train(worker):
        network, optimizer = worker.prepare(MyNetwork(), partial(torch.optim.AdamW, lr=3e-4))
        for batch in worker.batches("train", epochs=10, batch_size=32):
            worker.step(loss(network(batch.x), batch.y))

A worker carries one or more shards. `batches` hands out one batch of each of them per optimizer
step, and while a shard's batch is out, the process has that shard's random state, buffers and (with
`Averaging`) parameters; so what a shard computes does not depend on who carries it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from penstock.cluster.channel import Message
from penstock.errors import JobError, NetworkError, UserError, did_you_mean
from penstock.exchange import into_forward, tree
from penstock.exchange.agreement import Clip, Outcome
from penstock.exchange.averaging import AveragingAgreement
from penstock.exchange.gradients import GradientAgreement
from penstock.exchange.group import Group
from penstock.exchange.reduction import Reduction
from penstock.exchange.words import gather_words
from penstock.feed import Source
from penstock.job import AllReduce, Averaging
from penstock.plan import Plan
from penstock.runtime import saving
from penstock.runtime.batches import Batch, Cursor, Feed
from penstock.runtime.checkpoint import Checkpoint, prune
from penstock.runtime.evaluation import Evaluation
from penstock.runtime.fused import fuse
from penstock.runtime.recorder import Recorder
from penstock.runtime.saving import Prepared, Progress
from penstock.runtime.scoring import score
from penstock.runtime.shards import (
    RandomState,
    ShardBuffers,
    merged_buffers,
    seed,
)
from penstock.runtime.store import Store
from penstock.runtime.supply import Bounds, Supply
from penstock.watch.trace import Trace

PROGRESS_EVERY_S = 0.1
SHARES_EVERY_S = 2.0
"""How often what each stage of the feed did with its time is written."""


class Interrupt(BaseException):
    """Unwinds a training function after the driver asked to stop and a checkpoint was written."""


@dataclass(frozen=True)
class Settings:
    """How a worker works, beside what its plan fixes."""

    strategy: AllReduce | Averaging
    keep: int = 3
    scalars_every: int = 1
    histograms_every: int = 0
    clip: Clip = field(default_factory=Clip)
    trace: bool = False


class Worker:
    """One process of a run.

    Attributes:
        rank, world_size: of this process among all.
        shards: the shards it carries, a range of 0 to num_shards - 1.
        device: where its network and batches are.
        resumed: whether the run goes on from a checkpoint.
        memory: JSON values that checkpoints keep; for a loop's own state.
        after_step: functions called with the worker after every step, on all workers alike; when
            all parameters are updated, unless a function has an attribute `settles` that is true:
            it waits itself (`settle`) for what it reads.
    """

    def __init__(
        self,
        group: Group,
        plan: Plan,
        sources: Mapping[str, Source],
        settings: Settings,
        store: Store,
        saved: Checkpoint | None,
        send: Callable[[Message], None],
        receive: Callable[[], list[Message]],
        trace: Trace | None = None,
    ) -> None:
        self.rank, self.world_size = group.rank, group.world_size
        self.num_shards = plan.shards
        self.shards = tree.assign(plan.shards, group.world_size)[group.rank]
        self.device = torch.device(plan.device)
        self.resumed = saved is not None
        self.after_step: list[Callable[[Worker], None]] = []
        self.plan = plan
        self._group, self._settings, self._store, self._saved = (
            group,
            settings,
            store,
            saved,
        )
        self._send, self._receive, self._trace = send, receive, trace
        self._feeds = {
            name: Feed(
                name,
                source,
                plan.manifests[name],
                self.shards,
                plan.shards,
                plan.seed,
                self.device,
            )
            for name, source in sources.items()
        }
        self._prepared: Prepared | None = None
        self._progress = Progress()
        self._evaluated_before: dict[str, int] = {}
        self._recorder: Recorder | None = None
        self._active: int | None = None
        self._out: _Out | None = None
        self._in_step, self._between_steps = False, True
        self._save, self._agreed_save = False, False
        self._checkpointed_at = -1
        self._schedule_every: int | Literal["epoch"] = 1
        self._wish: str | None = None
        self.stopped: str | None = None
        """Why training ends before its last epoch, or None; equal on all workers."""
        self._shown_at = self._noted_at = 0.0
        self._bounds = Bounds()
        self._shown: dict[str, Any] = {"epochs": 0, "steps_per_epoch": 0}

    @property
    def global_step(self) -> int:
        """Optimizer steps done, and the one that the last `step` belongs to."""
        under_way = self._in_step and self._out is None
        return self._progress.step + under_way

    @property
    def examples(self) -> int:
        """Records trained on so far, all shards together, as far as exchanged."""
        return self._progress.examples

    @property
    def loss(self) -> float:
        """Mean loss over all shards' examples in the last exchange; NaN before the first."""
        return math.nan if self._progress.loss is None else self._progress.loss

    @property
    def memory(self) -> dict[str, Any]:
        return self._progress.memory

    def prepare(
        self,
        network: torch.nn.Module | Callable[[], torch.nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer] | torch.optim.Optimizer,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        schedule_every: int | Literal["epoch"] = 1,
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Readies a network for training; once in a run, on all workers.

        Arguments:
            network: a module, or a function that makes one (called under the job's seed). All
                workers begin with rank 0's parameters.
            optimizer: what makes it from parameters, or one of this network's parameters.
            schedule: what makes a torch learning-rate schedule from the optimizer.
            schedule_every: optimizer steps from one step of the schedule to the next, or "epoch".

        Returns:
            The network on this worker's device, and the optimizer; both in the checkpoint's state
            when the run is resumed.
        """
        if self._prepared is not None:
            raise UserError("worker.prepare was called twice", hint="one network for each run")
        self._schedule_every = schedule_every
        seed(self.plan.seed, 0)
        module = network if isinstance(network, torch.nn.Module) else network()
        module.to(self.device).train()
        for tensor in [*module.parameters(), *module.buffers()]:
            whole = tensor.data.contiguous()
            self._group.broadcast(whole, root=0).wait()
            if not tensor.is_contiguous():
                tensor.data.copy_(whole)
        made = (
            optimizer
            if isinstance(optimizer, torch.optim.Optimizer)
            else optimizer(module.parameters())
        )
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not trained:
            raise NetworkError("the network has no parameter to train")
        in_groups = {id(p) for group in made.param_groups for p in group["params"]}
        missing = [name for name, p in trained if id(p) not in in_groups]
        if missing:
            raise NetworkError(
                f"the optimizer does not have parameter {missing[0]}",
                hint="freeze it (requires_grad_(False)) or give the optimizer all parameters",
            )
        fuse(made)
        self._prepared = Prepared(
            module,
            trained,
            made,
            schedule(made) if schedule else None,
            self._agreement(module, trained, made),
            ShardBuffers(module, len(self.shards)),
            [RandomState.seeded(self.plan.seed, 1, shard) for shard in self.shards],
            self.shards,
            self.num_shards,
        )
        agreement = self._prepared.agreement
        self.plan = self.plan.with_network(
            agreement.borders(),
            sum(p.numel() for _, p in trained),
            agreement.exchange_bytes,
        )
        if self._saved is not None:
            self._progress = saving.restore(self._prepared, self._saved)
            self._evaluated_before = dict(self._progress.evaluated)
            self._checkpointed_at = self._progress.step
        if self.rank == 0:
            self._recorder = Recorder(
                self._store.url,
                self._settings.scalars_every,
                self._settings.histograms_every,
                self._progress.step if self.resumed else None,
            )
            self._send({"event": "prepared", "plan": self.plan.to_dict()})
        if not self.resumed:  # so that a run can be resumed from its first moment on
            self._checkpoint(None)
        return module, made

    def steps_per_epoch(self, name: str, examples_per_step: int) -> int | None:
        """Optimizer steps until every record of a source was seen once.

        None in the first epoch on data that nobody has counted yet: a Spark DataFrame.

        Arguments:
            examples_per_step: of each shard.
        """
        return self._feed(name).steps_per_epoch(examples_per_step)

    def epochs_done(self, name: str = "train") -> int | None:
        """How many epochs of a source are done, if one has just ended; else None."""
        cursor = self._progress.cursors.get(name)
        return None if cursor is None or cursor.step else cursor.epoch

    def batches(
        self, name: str = "train", *, epochs: int, batch_size: int = 32, accumulate: int = 1
    ) -> Iterator[Batch]:
        """Batches of this worker's shards; each record once per epoch. See the module's words.

        When resumed, goes on where the checkpoint was written.

        Arguments:
            name: of the source.
            epochs: how often each record is seen.
            batch_size: records per shard and batch.
            accumulate: batches per shard and optimizer step.
        """
        feed = self._feed(name)
        cursor = self._cursor(name, batch_size, accumulate)
        self._shown = {"source": name, "epochs": epochs}
        self._noted_at = time.perf_counter()
        supply: Supply | None = None
        steps: int | None = None
        try:
            while cursor.epoch < epochs and self.stopped is None:
                if supply is None:
                    supply = Supply(feed, partial(feed.requests, cursor, epochs))
                    steps = feed.steps_per_epoch(batch_size * accumulate)
                    self._shown["steps_per_epoch"] = steps
                self._begin_step()
                yield from self._hand_out(supply)
                self._commit()
                cursor.step += 1
                ended = cursor.step == steps if steps else not self._anywhere(supply.more)
                if ended and steps is None:  # by now all has been read
                    self._note_shares(supply)
                    supply.close()
                    supply = None
                    if feed.rows is None:
                        self._learn_manifest(feed)
                    counted = feed.steps_per_epoch(batch_size * accumulate)
                    self._shown["steps_per_epoch"] = counted
                if ended:
                    cursor.epoch, cursor.step = cursor.epoch + 1, 0
                    self._end_epoch()
                if supply and time.perf_counter() - self._noted_at > SHARES_EVERY_S:
                    self._note_shares(supply)
                self._after_step()
        finally:
            if supply is not None:
                self._note_shares(supply)
                supply.close()

    def step(self, loss: torch.Tensor) -> None:
        """Backward for the batch that is out, and with the step's last one exchange and update.

        The exchange goes on while the loop's body does; the update is made when the loop asks for
        its next batch.

        Arguments:
            loss: one number, the mean over the batch.
        """
        out, prepared = self._out, self._need_prepared()
        if out is None:
            raise UserError(
                "worker.step was called without a batch of worker.batches, or twice for one",
                hint="for batch in worker.batches(...): worker.step(loss)",
            )
        if loss.dim() != 0:
            raise NetworkError(
                f"the loss has shape {tuple(loss.shape)}; expected one number, the mean over the "
                "batch",
                hint="loss.mean()",
            )
        self._out, trace = None, self._trace
        if trace is not None:
            trace.then("backward")
        prepared.agreement.backward(loss, out.batch.size, out.ends_shard)
        if trace is not None:
            trace.then("loop after backward")

    def stop(self, reason: str) -> None:
        """Asks all workers to end training after this step (or the next exchange)."""
        self._wish = self._wish or reason

    def report(self, **scalars: float) -> None:
        """Writes scalars to the run's events at the current step (rank 0's are kept)."""
        if self._recorder is not None:
            self._recorder.scalars(self.global_step, scalars)

    def checkpoint(self, metric: float | None = None) -> None:
        """Asks for a checkpoint after this step (or the next exchange); one asking is enough.

        In a function of `after_step`, where all workers must ask alike, it is written at once.

        Arguments:
            metric: higher is better; the checkpoint with the highest is kept beside the last ones.
        """
        if self._between_steps:
            self._checkpoint(metric)
        else:
            self._save = True

    def settle(self) -> None:
        """Waits until all parameters and the optimizer's state are as the last step has left them.

        Needed, where `AllReduce.into_forward` is used, by who has kept a parameter or looks into
        `optimizer.state` after a batch has come and before the network is called. Through the
        network (`network.layer.weight`, `network.parameters()`) parameters are not read too early,
        and functions of `after_step` are called when all is settled.
        """
        self._need_prepared().agreement.settle()

    def evaluate(
        self,
        name: str = "test",
        *,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        task: str | None = "classification",
        top_k: tuple[int, ...] = (1,),
        batch_size: int = 256,
        network: Callable[[Any], torch.Tensor] | None = None,
    ) -> Evaluation:
        """Scores the network on all records of a source, exactly. Collective.

        The network has all shards' mean parameters and buffers meanwhile, and is in eval mode.

        Arguments:
            loss: also the mean of this over all records.
            task: "classification", "regression", or None for the loss alone.
            top_k: accuracies to give, for classification.
            network: what is called with features instead of the network itself.
        """
        prepared, feed, trace = self._need_prepared(), self._feed(name), self._trace
        if trace is not None:
            trace.begin(f"evaluation on {name}")
        if self._recorder is not None:
            self._recorder.pause()
        buffers = merged_buffers(self._group, prepared.buffers, self.shards, self.num_shards)
        with prepared.agreement.merged(), prepared.buffers.replaced(buffers):
            evaluation = score(
                self._group,
                prepared.network,
                network or prepared.network,
                feed,
                self.num_shards,
                loss=loss,
                task=task,
                top_k=top_k,
                batch_size=batch_size,
            )
        if feed.rows is None:
            self._learn_manifest(feed)
        self._progress.evaluated[name] = self.global_step
        if self._recorder is not None:
            if self._evaluated_before.get(name) != self.global_step:  # else it is in the events
                self._recorder.scalars(
                    self.global_step, {f"{name}/{k}": v for k, v in evaluation.numbers().items()}
                )
            self._recorder.go_on()
            self._send(
                {
                    "event": "evaluated",
                    "source": name,
                    "step": self.global_step,
                    "evaluation": evaluation.to_dict(),
                }
            )
        if trace is not None:
            trace.end()
        return evaluation

    def conclude(self) -> None:
        """Ends training with one more exchange where shards stand apart. Collective."""
        self._count(self._need_prepared().agreement.conclude())

    def finish(self) -> None:
        """Concludes, unless interrupted, and writes the last checkpoint. Collective."""
        if self._prepared is None:
            return
        if self._in_step:
            raise UserError(
                f"the loop over worker.batches was left in the middle of step {self.global_step}",
                hint="worker.stop(reason) instead of break: it ends the loop of all workers alike",
            )
        for name, feed in self._feeds.items():
            if feed.bad.count:
                words = {"source": name, "count": feed.bad.count, "line": feed.bad.line()}
                self._send({"event": "bad_records", **words})
        if self.stopped != "interrupted":
            self.conclude()
            self._checkpoint(None, again=True)
        if self._recorder is not None:
            self._send_progress()
            self._recorder.close()

    def _agreement(
        self,
        network: torch.nn.Module,
        trained: list[tuple[str, torch.nn.Parameter]],
        optimizer: torch.optim.Optimizer,
    ) -> GradientAgreement | AveragingAgreement:
        strategy, clip, trace = self._settings.strategy, self._settings.clip, self._trace
        goes_on = self._goes_into_forward(network, optimizer)
        if trace is not None:
            optimizer.register_step_pre_hook(lambda *_: trace.begin("update"))
            optimizer.register_step_post_hook(lambda *_: trace.end())
        if isinstance(strategy, Averaging):
            return AveragingAgreement(
                self._group,
                trained,
                optimizer,
                self.shards,
                self.num_shards,
                every=strategy.every,
                average_state=strategy.average_optimizer_state,
                clip=clip,
                where=self._where,
            )
        agreement = GradientAgreement(
            self._group,
            trained,
            optimizer,
            self.shards,
            self.num_shards,
            bucket_bytes=strategy.bucket_bytes,
            borders=self.plan.borders,
            clip=clip,
            where=self._where,
            into_forward=goes_on,
        )
        if goes_on:
            into_forward.watch(network, optimizer, [p for _, p in trained], agreement.settle)
        return agreement

    def _goes_into_forward(
        self, network: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> bool:
        """Whether the exchange may go on into the next forward, and there is something to gain."""
        if isinstance(self._settings.strategy, Averaging):
            return False
        asked = self._settings.strategy.into_forward
        if asked is None and self._group.all_reduce_s(1) is None:  # there is one host
            return False
        why = into_forward.obstacle(network, optimizer, self._settings.clip)
        if asked and why:
            raise JobError(
                f"strategy.into_forward: {why}",
                hint="leave it out: it is then used where it can be",
            )
        return asked is not False and not why

    def _where(self, i: int) -> str:
        return f"step {self._progress.step + 1}, shard {self.shards[i]} on rank {self.rank}"

    def _need_prepared(self) -> Prepared:
        if self._prepared is None:
            raise UserError(
                "there is no network yet", hint="call worker.prepare(network, optimizer) first"
            )
        return self._prepared

    def _feed(self, name: str) -> Feed:
        if name not in self._feeds:
            known = sorted(self._feeds)
            raise UserError(
                f"there is no source {name!r}; there are {', '.join(known) or 'none'}",
                hint=did_you_mean(name, known) or f"penstock.launch(train, {name}=...)",
            )
        return self._feeds[name]

    def _cursor(self, name: str, batch_size: int, accumulate: int) -> Cursor:
        """Where the source stands; an epoch that has begun goes on with the same batches."""
        cursor = self._progress.cursors.setdefault(name, Cursor(batch_size, accumulate))
        if cursor.step and (cursor.batch_size, cursor.accumulate) != (batch_size, accumulate):
            raise JobError(
                f"{name}: batch_size {batch_size} and accumulate {accumulate}; this epoch began "
                f"with {cursor.batch_size} and {cursor.accumulate}, and {cursor.step} steps of it "
                "are done",
                hint="another batch size can begin with an epoch, not within one",
            )
        cursor.batch_size, cursor.accumulate = batch_size, accumulate
        return cursor

    def _enter(self, i: int) -> None:
        """The process gets the i-th own shard's random state and buffers."""
        if self._active == i:
            return
        prepared = self._need_prepared()
        if self._active is not None:
            prepared.random[self._active] = RandomState.capture()
        prepared.random[i].restore()
        prepared.buffers.activate(i)
        self._active = i

    def _begin_step(self) -> None:
        self._in_step, self._between_steps = True, False
        if self._trace is not None:
            self._trace.step(self._progress.step + 1)
        if self._recorder is not None:
            self._recorder.before_step(self._progress.step + 1, self._need_prepared().agreement)

    def _hand_out(self, supply: Supply) -> Iterator[Batch]:
        """The batches of one step, each with its shard's state in place."""
        agreement, trace = self._need_prepared().agreement, self._trace
        deliveries, entered, ends = supply.step(), None, False
        while not ends:
            if trace is not None:
                trace.begin("feed")
            delivery = next(deliveries)
            ends = delivery.ends_step
            if delivery.i != entered:
                entered = delivery.i
                self._enter(entered)
                agreement.activate(entered)
            batch, made = delivery.take(), False
            if trace is not None:
                trace.end()
            if batch is not None:
                self._out = _Out(batch, delivery.ends_shard)
                if trace is not None:
                    trace.begin("forward")
                yield batch
                if trace is not None:
                    trace.end()
                made, self._out = self._out is None, None
            if delivery.ends_shard and not made:
                agreement.skip()

    def _anywhere(self, mine: bool) -> bool:
        """Whether it is so for some worker. Collective."""
        votes = torch.tensor([int(mine)])
        self._group.all_reduce(votes, Reduction("max"), sync=True).wait()
        return bool(votes.item())

    def _learn_manifest(self, feed: Feed) -> None:
        """What nobody had counted before is read: all learn its manifest. Collective."""
        parts = gather_words(self._group, feed.parts())
        feed.settle([part for rank in parts for part in rank])
        self.plan = replace(self.plan, manifests=self.plan.manifests | {feed.name: feed.manifest})
        if self._recorder is not None:
            self._send({"event": "planned", "plan": self.plan.to_dict()})

    def _end_epoch(self) -> None:
        schedule = self._need_prepared().schedule
        if schedule is not None and self._schedule_every == "epoch":
            schedule.step()

    def _commit(self) -> None:
        """Ends the step: exchange and update."""
        prepared, step = self._need_prepared(), self._progress.step + 1
        for message in self._receive():
            if message.get("do") == "stop":
                self.stop("interrupted")
        if self._trace is not None:
            self._trace.begin("exchange and update")
        outcome = prepared.agreement.commit(step, stop=self._wish is not None, save=self._save)
        if self._trace is not None:
            self._trace.end()
        self._progress.step, self._in_step = step, False
        self._count(outcome)
        rates = [float(group["lr"]) for group in prepared.optimizer.param_groups]
        every = self._schedule_every
        if prepared.schedule is not None and every != "epoch" and step % every == 0:
            prepared.schedule.step()
        if outcome is not None:
            self._save, self._agreed_save = False, outcome.save
            if outcome.stop:
                self.stopped = self._agree_why()
        if self._recorder is not None:
            self._show(prepared, outcome, rates)

    def _count(self, outcome: Outcome | None) -> None:
        if outcome is not None and outcome.examples:
            self._progress.examples += outcome.examples
            self._progress.loss = outcome.loss

    def _agree_why(self) -> str:
        """The wish of the lowest rank that has one."""
        wishes: list[str | None] = gather_words(self._group, self._wish)
        if "interrupted" in wishes:
            return "interrupted"
        return next(wish for wish in wishes if wish)

    def _show(self, prepared: Prepared, outcome: Outcome | None, rates: list[float]) -> None:
        assert self._recorder is not None
        self._recorder.after_step(
            self.global_step,
            outcome,
            rates,
            prepared.trained,
            prepared.agreement,
        )
        now = time.perf_counter()
        if now - self._shown_at > PROGRESS_EVERY_S:
            self._shown_at = now
            self._send_progress()

    def _note_shares(self, supply: Supply) -> None:
        """Writes what each stage of the feed has done with its time."""
        if self._recorder is None:
            return
        now = time.perf_counter()
        shares = supply.shares()
        self._bounds.add(shares, now - self._noted_at)
        self._noted_at = now
        self._recorder.scalars(
            self.global_step,
            {
                f"feed/{stage}/{what}": value
                for stage, each in shares.items()
                for what, value in asdict(each).items()
            },
        )

    def _send_progress(self) -> None:
        assert self._recorder is not None
        cursor = self._progress.cursors.get(self._shown.get("source", ""), Cursor(0, 0))
        self._send(
            {
                "event": "progress",
                "step": self.global_step,
                "epoch": cursor.epoch,
                "step_in_epoch": cursor.step,
                "loss": self.loss,
                "examples": self.examples,
                "examples_per_s": self._recorder.examples_per_s,
                "bounded_by": self._bounds.worst,
                **self._shown,
            }
        )

    def _after_step(self) -> None:
        self._between_steps = True
        for function in self.after_step:
            if not getattr(function, "settles", False):
                self.settle()
            function(self)
        if self._agreed_save or self.stopped == "interrupted":
            self._agreed_save = False
            self._checkpoint(None)
        if self.stopped == "interrupted":
            raise Interrupt

    def _checkpoint(self, metric: float | None, *, again: bool = False) -> None:
        prepared, progress = self._need_prepared(), self._progress
        if self._checkpointed_at == self.global_step and metric is None and not again:
            return
        if self._trace is not None:
            self._trace.begin("checkpoint")
        if self._active is not None:
            prepared.random[self._active] = RandomState.capture()
        if self._recorder is not None:
            self._recorder.pause()
            self._recorder.flush()
        if metric is not None and (progress.best is None or metric > progress.best[1]):
            progress.best = [self.global_step, metric]
        saving.save(prepared, progress, self.plan, self._group, self._store, metric)
        self._checkpointed_at = self.global_step
        if self._recorder is not None:
            best = None if progress.best is None else int(progress.best[0])
            prune(self._store, self._settings.keep, best)
            self._recorder.go_on()
            self._send({"event": "checkpointed", "step": self.global_step})
        if self._trace is not None:
            self._trace.end()


@dataclass(frozen=True)
class _Out:
    """A batch that is with the training function."""

    batch: Batch
    ends_shard: bool
