"""What every rank does: restore, feed, train, evaluate. The only user of ray.train's report.

A rank 0 writes the journal, the checkpoints and the evaluations; the rest take part in every collective.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import config as configs
from pipeline import family as families
from pipeline import lease, ranks, run_config
from pipeline.data.bad import BadImages
from pipeline.data.dali import EvalLoader, TrainLoader
from pipeline.data.index import ImageIndex, Splits, open_splits
from pipeline.errors import AdaptNetError, CheckpointError, ConfigError, ResourceError
from pipeline.family import Family, Fitted, Report
from pipeline.journal import Journal, SystemSampler
from pipeline.provenance import write_whole
from pipeline.robustness import Attack, Attacked, Sweep
from pipeline.run_config import RunConfig
from pipeline.training import checkpoint, memory, optim, state, step
from pipeline.training.checkpoint import Checkpointer, Storage
from pipeline.training.evaluate import Batches, Evaluator, calibrate, choose, evaluate, restored
from pipeline.training.loop import Plan, device_of, train
from pipeline.training.state import TrainState
from pipeline.training.step import Micro, Task

FINAL = "final"  # the evaluation after training


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
        _leave(error, run_dir)
        raise
    except (MemoryError, RuntimeError) as error:
        words = memory.words_if_spent(error)
        if words is None:
            raise
        spent = _spent(run_config.from_mapping(order.recipe, "the driver's recipe"), words)
        _leave(spent, run_dir)
        raise spent from error


def _leave(error: AdaptNetError, run_dir: Path) -> None:
    with suppress(OSError):  # the disk may be full: that is then the error that is raised
        write_json(run_dir / f"error-{ranks.rank()}.json", {"kind": type(error).__name__, **_error_facts(error)})


def _error_facts(error: AdaptNetError) -> dict[str, Any]:
    names = ("step", "checkpoint")
    return {"message": str(error), **{name: getattr(error, name) for name in names if hasattr(error, name)}}


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
        self.family: Family = families.find(self.config.family.name)
        self.fingerprint = run_config.fingerprint(self.config, self.splits.train.identity)
        self.storage: Storage = checkpoint.open_storage(self.config.checkpoint, self.run_dir)
        self.bad = BadImages(self.splits.train, self.config.data.max_bad_share)
        self.remarks: list[dict[str, Any]] = []  # events of this rank, not yet in the journal
        self.attempt = ranks.agree(_next_attempt(self.run_dir) if ranks.rank() == 0 else 0)
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
        changed = checkpoint.check_fingerprint(meta["fingerprint"], self.fingerprint, allowed, self.storage.where(name))
        mapping = checkpoint.read(folder)
        state.restore(current, mapping)
        self.bad.merge(mapping["bad"])
        self._event("resumed", step=current.step, checkpoint=self.storage.where(name), changed=changed)
        before = meta.get("workers", ranks.world())
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
        apart = optim.parameters_apart(current.optimizers)
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
            remarks=(*remarks, *self.family.remarks(config.family, config.data.largest_side_px)),
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
            write_json(
                folder / "about.json",
                {
                    "checkpoint": self.storage.where(best),
                    "step": meta["step"],
                    "data": self.splits.val.identity,
                    "root": str(self.config.data.root),
                },
            )
            assert self.journal is not None
            final = {key.replace("eval/", "final/", 1): value for key, value in metrics_of(reports).items()}
            self.journal.metrics(current.step, final)

    def _conclude(self, current: TrainState, finished: bool) -> None:
        """Rank 0 says in status.json and in the journal what the run has come to."""
        if self.saver is None:
            return
        best = self.saver.best()
        status = {
            "finished": finished,
            "step": current.step,
            "fingerprint": self.fingerprint,
            "best": best,
            "last": checkpoint.name_of(current.step),
        }
        write_json(self.run_dir / "status.json", status)
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

    def _meta(self, current: TrainState) -> dict[str, Any]:
        first = self.family.policies(self.config.family, current.net)[0].name
        return {
            "step": current.step,
            "images_seen": current.images_seen,
            "epoch": current.images_seen / len(self.splits.train),
            "fence": self.order.fence,
            "workers": ranks.world(),
            "fingerprint": self.fingerprint,
            "recipe": configs.as_mapping(self.config),
            "classes": list(self.splits.train.classes),
            "metrics": self.latest if self.evaluated_at == current.step else {},
            "best_key": f"eval/{first}/top1",
        }

    def _check_fence(self) -> None:
        if not lease.is_current(self.run_dir, self.order.fence):
            raise ResourceError(f"{self.run_dir}: another driver took this run over; this one stops without saving")

    def _evaluator(self, *, latency: bool) -> Evaluator:
        return evaluator(self.config, self.device, len(self.splits.train.classes), latency=latency)

    def _eval_loader(self, split: ImageIndex) -> EvalLoader:
        return eval_loader(self.config, split, self.device, self._threads)


def placed(net: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The net where it computes, its weights laid out as the images are."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return net.to(device).to(memory_format=layout)


def check_policies(config: RunConfig, splits: Splits) -> None:
    """Before training, not after it: the policies asked for are there, can work, and have images to be fitted on."""
    family, num_classes = families.find(config.family.name), len(splits.train.classes)
    net = family.build(config.family, num_classes).eval()
    policies = choose(family.policies(config.family, net), config.evaluation.policies)
    example = torch.zeros(1, 3, config.data.side_for_eval, config.data.side_for_eval)
    for policy in policies:
        if isinstance(policy, Fitted):
            policy.check(net, example)
    if len(splits.held_out) == 0:
        calibrate(policies, net, None, evaluator(config, torch.device("cpu"), num_classes, latency=False))


def evaluator(config: RunConfig, device: torch.device, num_classes: int, *, latency: bool) -> Evaluator:
    """How the recipe's nets are evaluated on this device."""
    return Evaluator(
        data=config.data,
        device=device,
        num_classes=num_classes,
        autocast=step.use_bf16(config.training.precision, device),
        channels_last=config.training.channels_last,
        latency_batches=config.evaluation.latency_batches,
        latency_repeats=config.evaluation.latency_repeats if latency else 0,
    )


def eval_loader(config: RunConfig, split: ImageIndex, device: torch.device, threads: int) -> EvalLoader:
    """This rank's share of a split, each image once over all ranks."""
    return EvalLoader(
        split,
        config.data,
        batch_size=max(1, config.evaluation.batch_size // ranks.world()),
        rank=ranks.rank(),
        world=ranks.world(),
        device=device,
        threads=threads,
    )


def assess(
    config: RunConfig,
    weights: Path,
    splits: Splits,
    wanted: Sequence[str] | None,
    store: Path,
    known: Sequence[Mapping[str, Any]] = (),
    *,
    attack: Attack | None = None,
    sweep: Sweep | None = None,
) -> Sequence[Report]:
    """Runs the net with `weights` (safetensors) on the val split, in this process, under the `wanted` policies.

    `known` are stored reports whose calibration stands; other policies are fitted on the held-out images. Images are
    tampered with as `attack` says, and reduced to the sides of `sweep`, only after that.
    """
    from safetensors.torch import load_file

    device = device_of(config.compute.device)
    family = families.find(config.family.name)
    net = family.build(config.family, len(splits.val.classes))
    families.load(net, load_file(weights))
    how = evaluator(config, device, len(splits.val.classes), latency=True)
    net = placed(net, device, how.channels_last).eval()
    policies = restored(choose(family.policies(config.family, net), wanted or config.evaluation.policies), known)
    if sweep is not None:
        sweep.check(net, config.data.side_for_eval)
    threads = config.data.decode_threads or torch.get_num_threads()
    fitted = all(policy.state() for policy in policies if isinstance(policy, Fitted))
    held_out = None if fitted or not len(splits.held_out) else eval_loader(config, splits.held_out, device, threads)
    policies = calibrate(policies, net, held_out, how)
    policies = sweep.of(policies) if sweep is not None else policies
    batches: Batches = eval_loader(config, splits.val, device, threads)
    if attack is not None:
        batches = Attacked(batches, net, how, attack)
    return evaluate(net, policies, batches, how, store=store)


def metrics_of(reports: Sequence[Report]) -> dict[str, float]:
    """What goes to the tracker of each report: `eval/<policy>/top1` and its like."""
    values: dict[str, float] = {}
    for report in reports:
        found = {
            "top1": report.top1,
            "top5": report.top5,
            "ece": report.ece,
            "gmacs": report.macs_mean / 1e9,
            "gmacs_p95": report.macs_p95 / 1e9,
            "full_share": report.full_share,
        }
        values |= {f"eval/{report.policy}/{key}": value for key, value in found.items() if value is not None}
    return values


def _next_attempt(run_dir: Path) -> int:
    attempt = attempts(run_dir) + 1
    write_json(run_dir / "attempt.json", {"attempt": attempt})
    return attempt


def attempts(run_dir: Path) -> int:
    """How often the run in this folder has been started."""
    path = run_dir / "attempt.json"
    return int(json.loads(path.read_text())["attempt"]) if path.exists() else 0


def write_json(path: Path, value: Any) -> None:
    """Writes `value` aside and moves it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1))


def read_status(run_dir: Path) -> dict[str, Any]:
    """What the run had come to when it last ended by itself; empty where it never did."""
    path = run_dir / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def error_left(run_dir: Path) -> AdaptNetError | None:
    """The error that a rank left in the run folder, of its own kind; None where there is none."""
    from pipeline import errors

    for path in sorted(run_dir.glob("error-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(errors, found.pop("kind"), CheckpointError)
        message = found.pop("message")
        error: AdaptNetError = kind(message, **found)
        return error
    return None
