"""What every rank does: restore, feed, train, evaluate. The only user of ray.train's report.

A rank 0 writes the journal, the checkpoints and the evaluations; the rest take part in every collective.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import config as configs
from pipeline import family as families
from pipeline import ranks, run_config
from pipeline.data.bad import BadImages
from pipeline.data.dali import EvalLoader, TrainLoader
from pipeline.data.index import ImageIndex, Splits, open_splits
from pipeline.errors import AdaptNetError, CheckpointError, ConfigError, ResourceError
from pipeline.evaluation.evaluate import Evaluator, calibrate, choose, evaluate
from pipeline.evaluation.from_weights import FINAL, eval_loader, evaluator, metrics_of, placed
from pipeline.family import AnyFamily
from pipeline.run_config import RunConfig
from pipeline.runs import lease, records
from pipeline.runs.files import write_json
from pipeline.runs.journal import Journal, SystemSampler
from pipeline.runs.records import About, Meta, Status
from pipeline.training import checkpoint, memory, optim, state, step
from pipeline.training.checkpoint import Checkpointer, Storage
from pipeline.training.loop import Plan, device_of, train
from pipeline.training.state import TrainState
from pipeline.training.step import Micro, Task


@dataclass(frozen=True)
class Order:
    """What the driver hands to every rank; plain values, so that it travels to other nodes."""

    recipe: Mapping[str, Any]  # RunConfig, with absolute paths
    run_dir: str
    fence: int
    allow_changed: tuple[str, ...] = ()
    under_ray: bool = True


def work(order: Order) -> None:
    """Trains the run in `order.run_dir` from its newest complete checkpoint, or from nothing, and evaluates it.

    Returns when the run is finished or was asked to stop; `status.json` says which. An AdaptNetError is left in
    `error.json` for the driver and raised. Memory that is spent is one as well, a ResourceError where fewer workers
    than the most share the batch, else a ConfigError: another try would spend it again. Collective.
    """
    run_dir = Path(order.run_dir)
    try:
        with ExitStack() as stack:
            Run(order, run_dir, stack).go()
    except AdaptNetError as error:
        records.leave_error(error, run_dir, ranks.rank())
        raise
    except (MemoryError, RuntimeError) as error:
        words = memory.words_if_spent(error)
        if words is None:
            raise
        spent = _spent(run_config.from_mapping(order.recipe, "the driver's recipe"), words)
        records.leave_error(spent, run_dir, ranks.rank())
        raise spent from error


def _spent(config: RunConfig, words: str) -> AdaptNetError:
    kind = ResourceError if ranks.world() < config.compute.most_workers else ConfigError
    world, trained, evaluated = ranks.world(), config.training.batch_size, config.evaluation.batch_size
    rows = min(trained // world, config.compute.max_batch_per_worker or trained)
    return kind(
        f"{socket.gethostname()}: memory is spent ({words}). A worker trains on {rows} images of "
        f"{config.data.largest_side_px} px at once, of training.batch_size (={trained}), and evaluates "
        f"{evaluated // world} of {config.data.side_for_eval} px, of evaluation.batch_size (={evaluated}). Make these "
        f"smaller, or set compute.max_batch_per_worker below {rows}: a step then takes its images in parts. `adaptnet "
        "plan` says what a recipe needs; the same command goes on from the newest checkpoint"
    )


@dataclass
class Run:
    """One rank's part of a run, from the recipe to the final reports. It is the loop's `Events`."""

    order: Order
    run_dir: Path
    stack: ExitStack
    latest: dict[str, float] = field(default_factory=dict)  # newest evaluation metrics
    evaluated_at: int = -1  # the step that they are of
    damaged: set[str] = field(default_factory=set)  # checkpoints that were passed over
    bad_written: int = 0  # bad images that bad_images.json names

    def __post_init__(self) -> None:
        self.config: RunConfig = run_config.from_mapping(self.order.recipe, "the driver's recipe")
        self.device = self._device()
        self.splits: Splits = open_splits(self.config.data, self.config.seed)
        self._check_sizes()
        self.family: AnyFamily = families.find(self.config.family.name)
        self.fingerprint = run_config.fingerprint(self.config, self.splits.train.identity)
        self.storage: Storage = checkpoint.open_storage(self.config.checkpoint, self.run_dir)
        self.bad = BadImages(self.splits.train, self.config.data.max_bad_share)
        self.remarks: list[dict[str, Any]] = []  # events of this rank, not yet in the journal
        self.attempt = ranks.agree(records.next_attempt(self.run_dir) if ranks.rank() == 0 else 0)
        self.journal = self._journal()
        self.saver: Checkpointer | None = None

    # --- the course of a run

    def go(self) -> None:
        config = self.config
        name = ranks.agree(self._newest() if ranks.rank() == 0 else None)
        current = self._fresh(adopt=name is None)
        if name is not None:
            self._restore(current, name)
        task = self._task(current)
        for remark in task.remarks:
            self._event("remark", text=remark)
        if ranks.rank() == 0:
            root = self.storage.root if isinstance(self.storage, checkpoint.LocalStorage) else self.run_dir / "staging"
            self.saver = Checkpointer(self.storage, root, config.checkpoint, self.damaged)
        plan = self._plan(task)
        self._event("started", step=current.step, total_steps=plan.total_steps, workers=ranks.world())
        with self._train_loader(current.step) as loader:
            finished = train(task, current, self._micros(loader, task), plan, self)
        if self.saver is not None:
            self.saver.wait()
        if finished:
            self._evaluate_best(current)
        self._conclude(current, finished)
        ranks.barrier()

    def _fresh(self, *, adopt: bool) -> TrainState:
        """The state at step 0, from other weights where the recipe names them and `adopt` says so."""
        training = self.config.training
        weights = checkpoint.weights_at(training.start_from) if adopt and training.start_from is not None else None
        current = state.fresh(
            self.family,
            self.config.family,
            training,
            num_classes=len(self.splits.train.classes),
            seed=self.config.seed,
            device=self.device,
            channels_last=self.config.training.channels_last,
            weights=weights,
        )
        if training.sync_batchnorm and self.device.type == "cuda":
            current.net = nn.SyncBatchNorm.convert_sync_batchnorm(current.net)  # type: ignore[no-untyped-call]
        elif training.sync_batchnorm:
            self.remarks.append(
                {"kind": "remark", "text": "training.sync_batchnorm needs a GPU; statistics stay local"}
            )
        return current

    def _restore(self, current: TrainState, name: str) -> None:
        """Loads the newest checkpoint that is whole, the same on every rank; checks that it is of this recipe."""
        folder = self.storage.fetch(name)
        meta = checkpoint.read_meta(folder)
        allowed = self.order.allow_changed
        saved = run_config.translated(meta.fingerprint)
        changed = checkpoint.check_fingerprint(saved, self.fingerprint, allowed, self.storage.where(name))
        mapping = checkpoint.read(folder)
        state.restore(current, mapping)
        self.bad.merge(mapping["bad"])
        self._event("resumed", step=current.step, checkpoint=self.storage.where(name), changed=changed)
        before = meta.workers or ranks.world()
        if before != ranks.world() and not self._batchnorm_over_all:
            rows = self.config.training.batch_size / ranks.world()
            text = f"{before} workers before, {ranks.world()} now: BatchNorm takes its statistics over {rows:g} images"
            self._event("remark", text=f"{text} of a step, not {self.config.training.batch_size / before:g}")

    def _newest(self) -> str | None:
        def pass_over(name: str, why: str) -> None:
            self.damaged.add(name)
            self._event("damaged-checkpoint", name=name, why=why)

        return checkpoint.newest_good(self.storage, pass_over)

    def _task(self, current: TrainState) -> Task:
        config, training = self.config, self.config.training
        apart = optim.parameters_outside_ddp(current.optimizers)
        forward, remarks = step.wrap(current.net, training, self.device, apart)
        return Task(
            family=self.family,
            config=config.family,
            training=training,
            seed=config.seed,
            num_classes=len(self.splits.train.classes),
            device=self.device,
            epochs_per_step=training.batch_size / len(self.splits.train),
            forward=forward,
            remarks=(*remarks, *self.family.warnings(config.family, config.data.largest_side_px)),
            autocast=step.use_bf16(training.precision, self.device),
            channels_last=self.config.training.channels_last,
        )

    def _plan(self, task: Task) -> Plan:
        config = self.config
        return Plan(
            total_steps=max(1, round(config.training.epochs / task.epochs_per_step)),
            epochs_per_step=task.epochs_per_step,
            batch_size=config.training.batch_size,
            log_every=config.logging.every,
            save_every=config.checkpoint.every,
            evaluate_every=config.evaluation.every,
        )

    def _train_loader(self, start_step: int) -> TrainLoader:
        return TrainLoader(
            self.splits.train,
            self.config.data,
            seed=self.config.seed,
            batch_size=self.config.training.batch_size,
            rank=ranks.rank(),
            world=ranks.world(),
            device=self.device,
            threads=self._threads,
            start_step=start_step,
            bad=self.bad,
            on_event=lambda kind, **facts: self.remarks.append({"kind": kind, **facts}),
        )

    def _micros(self, loader: TrainLoader, task: Task) -> Iterator[Sequence[Micro]]:
        compute = self.config.compute
        rows = loader.stream.row_bounds(ranks.world())
        parts = step.num_micros(rows, ranks.world(), compute.max_batch_per_worker)
        for batch in loader:
            yield step.prepare(task, self.config.data, batch, parts)

    # --- the loop's events

    def log(self, at: int, values: Mapping[str, float]) -> None:
        """Writes metrics and what the ranks had to remark; agrees on the bad images. Collective."""
        for found, remarks in ranks.gather((self.bad.state(), self.remarks)):
            self.bad.merge(found)
            for remark in remarks:
                self._event(**remark)
        self.remarks = []
        if ranks.rank() == 0 and len(self.bad) > self.bad_written:
            write_json(self.run_dir / "bad_images.json", self.bad.report())
            self.bad_written = len(self.bad)
        if self.journal is not None:
            self.journal.metrics(at, {**values, "data/bad_images": float(len(self.bad))})

    def evaluate(self, current: TrainState) -> None:
        """The first policy on the val split. Collective."""
        if len(self.splits.val) == 0:
            return
        ranks.take_from_rank_0(current.best_net.buffers())  # BatchNorm's statistics, which DDP shares at the next step
        policies = self.family.policies(self.config.family, current.best_net)[:1]
        reports = evaluate(
            current.best_net, policies, self._eval_loader(self.splits.val), self._evaluator(latency=False)
        )
        current.net.train()
        self.latest, self.evaluated_at = metrics_of(reports), current.step
        if self.journal is not None:
            self.journal.metrics(current.step, self.latest)

    def save(self, current: TrainState, *, wait: bool) -> None:
        """Saves the state, in a thread unless `wait`; tells Ray. Collective."""
        if self.saver is not None:
            self._check_fence()
            assert self.journal is not None
            where = self.saver.save(current, self._meta(current), {"bad": self.bad.state()}, wait=wait)
            self.journal.event("checkpoint", step=current.step, where=where)
            self.journal.sync()
        if self.order.under_ray:
            import ray.train

            ray.train.report({"step": current.step, **self.latest})

    def last_good(self) -> str | None:
        names = self.storage.names()
        return self.storage.where(names[-1]) if names else None

    def wants_to_stop(self) -> bool:
        return (self.run_dir / "stop").exists() or not lease.is_current(self.run_dir, self.order.fence)

    # --- the end

    def _evaluate_best(self, current: TrainState) -> None:
        """Every policy on the val split, for the best checkpoint's net. Collective."""
        best = ranks.agree(self.saver.best_whole() if self.saver is not None else None)
        if best is None:  # the loop saves at its end
            raise CheckpointError(f"{self.storage.where('')}: no checkpoint is whole any more; give the command again")
        if len(self.splits.val) == 0:
            self._event("remark", text="there is no val split, so nothing was evaluated")
            return
        net, family, config, meta = checkpoint.load_net(self.storage.fetch(best))
        net = placed(net, self.device, self.config.training.channels_last)
        how = self._evaluator(latency=True)
        policies = choose(family.policies(config, net), self.config.evaluation.policies)
        held_out = self._eval_loader(self.splits.held_out) if len(self.splits.held_out) else None
        policies = calibrate(policies, net, held_out, how)
        folder = self.run_dir / "evaluations" / FINAL
        reports = evaluate(net, policies, self._eval_loader(self.splits.val), how, store=folder)
        if ranks.rank() == 0:
            root, where = str(self.config.data.root), self.storage.where(best)
            about = About(checkpoint=where, step=meta.step, data=self.splits.val.identity, root=root)
            records.write_about(folder, about)
            assert self.journal is not None
            final = {key.replace("eval/", "final/", 1): value for key, value in metrics_of(reports).items()}
            self.journal.metrics(current.step, final)

    def _conclude(self, current: TrainState, finished: bool) -> None:
        """Rank 0 says in status.json and in the journal what the run has come to."""
        if self.saver is None:
            return
        best = self.saver.best()
        last = checkpoint.name_of(current.step)
        records.write_status(self.run_dir, Status(finished, current.step, self.fingerprint, best, last))
        self._event("finished" if finished else "stopped", step=current.step, best=best)

    # --- parts

    def _device(self) -> torch.device:
        device = device_of(self.config.compute.device)
        if device.type == "cuda" and self.order.under_ray:
            import ray.train.torch

            found = ray.train.torch.get_device()
            assert isinstance(found, torch.device)
            return found
        return torch.device("cuda", 0) if device.type == "cuda" else device

    @property
    def _batchnorm_over_all(self) -> bool:
        return self.config.training.sync_batchnorm and self.device.type == "cuda"

    @property
    def _threads(self) -> int:
        return self.config.data.decode_threads or max(1, int(self.config.compute.cpus_per_worker))

    def _check_sizes(self) -> None:
        images, world = len(self.splits.train), ranks.world()
        if images < world:
            raise ConfigError(
                f"compute.workers (={world}): the train split of {self.config.data.root} has {images} images"
            )

    def _journal(self) -> Journal | None:
        """Rank 0's journal; on local rank 0 of each node also one of system metrics, filled by a thread."""
        journal = None
        if ranks.rank() == 0:
            journal = Journal(self.run_dir / "journal", attempt=self.attempt, fence=self.order.fence)
            self.stack.callback(journal.close)
        node, local_rank = self._place()
        if local_rank == 0:
            system = Journal(self.run_dir / "journal", f"node{node}", attempt=self.attempt, fence=self.order.fence)
            self.stack.callback(system.close)
            self.stack.enter_context(SystemSampler(system, self.config.logging.system_every_s))
        return journal

    def _place(self) -> tuple[int, int]:
        """(number of this node, number of this rank on it)."""
        if not self.order.under_ray:
            return 0, 0
        import ray.train

        context = ray.train.get_context()
        return context.get_node_rank(), context.get_local_rank()

    def _event(self, kind: str, **facts: Any) -> None:
        if self.journal is not None:
            self.journal.event(kind, **facts)

    def _meta(self, current: TrainState) -> Meta:
        first = self.family.policies(self.config.family, current.net)[0].name
        return Meta(
            step=current.step,
            images_seen=current.images_seen,
            epoch=current.images_seen / len(self.splits.train),
            fence=self.order.fence,
            workers=ranks.world(),
            fingerprint=self.fingerprint,
            recipe=configs.as_mapping(self.config),
            classes=tuple(self.splits.train.classes),
            metrics=dict(self.latest) if self.evaluated_at == current.step else {},
            best_key=f"eval/{first}/top1",
        )

    def _check_fence(self) -> None:
        if not lease.is_current(self.run_dir, self.order.fence):
            raise ResourceError(f"{self.run_dir}: another driver took this run over; this one stops without saving")

    def _evaluator(self, *, latency: bool) -> Evaluator:
        return evaluator(self.config, self.device, len(self.splits.train.classes), latency=latency)

    def _eval_loader(self, split: ImageIndex) -> EvalLoader:
        return eval_loader(self.config, split, self.device, self._threads)
