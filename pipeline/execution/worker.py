"""The work of one rank: prepare, restore, train, finish. Only this module uses ray.train's report.

Rank 0 writes the journal, the checkpoints and the results (`Rank0`). The other ranks write nothing (`NoWriter`) and
take part in every collective. `open_writer` is the only place that distinguishes them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from pipeline import config as configs
from pipeline import cost, ranks, run_config
from pipeline import family as families
from pipeline.data import expectation, probe
from pipeline.data.bad import BadImages
from pipeline.data.dali import DecodedEvalBatch, EvalLoader, TrainLoader
from pipeline.data.index import ImageIndex, Splits, open_splits
from pipeline.errors import AdaptNetError, CheckpointError, ConfigError, JsonValue, ResourceError
from pipeline.evaluation.evaluate import Evaluator, calibrate, choose, device_name, evaluate
from pipeline.evaluation.from_weights import FINAL, chosen_on, eval_loader, evaluator, metrics_of, placed
from pipeline.execution import teaching
from pipeline.execution.teaching import PinnedTeacher
from pipeline.execution.watched import WatchAddress, watched
from pipeline.family import AnyFamily, load_pretrained
from pipeline.run_config import RunConfig
from pipeline.runs import lease, records
from pipeline.runs.beats import COMPILING, LONG, Beats
from pipeline.runs.files import read_json, write_json
from pipeline.runs.journal import Journal, SystemSampler, unreadable
from pipeline.runs.records import About, Meta, Status
from pipeline.training import (
    arithmetic,
    checkpoint,
    fitting,
    loop,
    memory,
    optim,
    profiling,
    speed,
    state,
    step,
    weights_file,
)
from pipeline.training.arithmetic import Arithmetic, Chosen, Timed
from pipeline.training.checkpoint import Checkpointer, Storage
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import device_of
from pipeline.training.plan import TrainingPlan, precision_of, use_bf16
from pipeline.training.profiling import StepProfiler
from pipeline.training.state import TrainState
from pipeline.training.step import MicroBatch, StepFunction

ARITHMETIC = "arithmetic.json"  # in the run folder: the precision and compilation that the run has chosen
EVALUATING = 3.0  # what follows the last batch gives no sign


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver sends to every rank, as plain values; recipe: a RunConfig with absolute paths.

    fence: the number of the driver. allow_changed: fingerprint keys that may differ from those of the checkpoint.
    watch: where the driver hears this rank's guardian. teacher: the folder of the trained teacher, if there is one.
    """

    recipe: Mapping[str, JsonValue]
    run_dir: str
    fence: int
    allow_changed: tuple[str, ...] = ()
    under_ray: bool = True
    watch: WatchAddress | None = None
    teacher: str | None = None


def work(worker: WorkerConfig, beats: Beats | None = None) -> None:
    """Trains the run in `worker.run_dir` from its newest complete checkpoint, or from step 0, and evaluates it.

    Returns when the run is finished or has stopped on request; `status.json` records which. An AdaptNetError goes to
    error-<rank>.json for the driver and raised. Running out of memory counts too: ResourceError if more workers would
    help, else ConfigError, because another try would run out again. beats: the driver's, if it does this work itself.
    Collective.
    """
    run_dir = Path(worker.run_dir)
    try:
        with ExitStack() as stack:
            _run(worker, beats or _guarded(worker, stack), stack)
    except AdaptNetError as error:
        records.leave_error(error, run_dir, ranks.rank())
        raise
    except (IsADirectoryError, NotADirectoryError) as error:
        misplaced = ResourceError(
            f"{error.filename2 or error.filename}: {error.strerror}, where a file of the run belongs; remove it",
            key="run folder",
            subject=error.filename2 or error.filename,
        )
        records.leave_error(misplaced, run_dir, ranks.rank())
        raise misplaced from error
    except (MemoryError, RuntimeError) as error:
        message = memory.oom_message(error)
        if message is None:
            raise
        config = run_config.from_mapping(worker.recipe, "the driver's recipe", stored=True)
        known = fitting.remembered(run_dir)
        described = out_of_memory(config, message, halved=known is not None and known.rows is None)
        records.leave_error(described, run_dir, ranks.rank())
        raise described from error


def out_of_memory(config: RunConfig, message: str, *, halved: bool = False) -> AdaptNetError:
    """The error of a rank that ran out of memory: ResourceError if more workers would help, else ConfigError.

    halved: whether the next start tries half as many images at once.
    """
    kind = ResourceError if ranks.world() < config.compute.most_workers else ConfigError
    world, trained, evaluated = ranks.world(), config.training.batch_size, config.evaluation.batch_size
    rows = _rows(config)
    way_out = f"set compute.max_batch_per_worker below {rows} or to auto, which splits a step"
    if config.compute.max_batch_per_worker == "auto":
        again = "the same command resumes with half as many at once"
        way_out = again if halved else "give compute.max_batch_per_worker as a number"
    return kind(
        f"{socket.gethostname()}: out of memory ({message}). A worker trains on {rows} images of "
        f"{config.data.largest_side_px} px at once, of training.batch_size (={trained}), and evaluates "
        f"{evaluated // world} of {config.data.side_for_eval} px, of evaluation.batch_size (={evaluated}). Make these "
        f"smaller, or {way_out}. "
        "`adaptnet plan` estimates what a recipe needs; the same command resumes from the newest checkpoint",
        key="training.batch_size",
        subject=trained,
    )


def _rows(config: RunConfig) -> int:
    """The images that a worker has in memory at once by its recipe."""
    return min(config.training.batch_size // ranks.world(), config.compute.max_batch or config.training.batch_size)


def _guarded(worker: WorkerConfig, stack: ExitStack) -> Beats:
    """This rank's signs of progress, read by a guardian if the driver listens."""
    if worker.watch is None:
        return Beats()
    config = run_config.from_mapping(worker.recipe, "the driver's recipe")
    return stack.enter_context(watched(worker.watch, ranks.rank(), config.compute.hang_after_s))


def _run(worker: WorkerConfig, beats: Beats, stack: ExitStack) -> None:
    """One rank's part of a run, from the recipe to the final reports. Collective."""
    beats.enter("opening the images", LONG)
    context = prepare(worker)
    beats.enter("opening the checkpoints", LONG)
    writer = open_writer(context, stack)
    _sample_system(context, ranks.agree(writer.attempt), stack)
    events = RunEvents(context, writer, BadImages(context.splits.train, context.config.data.max_bad_share), beats)
    beats.enter("restoring", LONG)
    current = restore(context, events)
    beats.enter("choosing how to compute", COMPILING)
    context = events.context = settle(context, current, events)
    finished = train(context, current, events)
    beats.enter("the final evaluation", LONG)
    finish(context, current, events, finished=finished)
    ranks.barrier()


# ---- prepare


@dataclass(frozen=True)
class RunContext:
    """What a rank knows of its run before training; equal on all ranks but for the device."""

    worker: WorkerConfig
    run_dir: Path
    config: RunConfig
    family: AnyFamily
    device: torch.device
    splits: Splits
    storage: Storage
    fingerprint: Mapping[str, JsonValue]
    teacher: PinnedTeacher | None = None
    decoder_fault: str = ""  # why the CPU of this node decodes instead of its GPU

    @property
    def threads(self) -> int:
        """Threads that decode images on this rank."""
        return self.config.data.decode_threads or max(1, int(self.config.compute.cpus or 1))

    @property
    def syncs_batchnorm(self) -> bool:
        """Whether BatchNorm's statistics are over the images of all ranks."""
        return self.config.training.sync_batchnorm and self.device.type == "cuda"

    @property
    def fixed_sizes(self) -> bool:
        """Whether the maps of all steps have the same sizes."""
        return len(self.config.data.sides_px) == 1 and not self.family.varying(self.config.family)

    @property
    def benchmarks_cudnn(self) -> bool:
        """Whether cuDNN chooses its algorithms by timing them."""
        wanted = self.config.compute.cudnn_benchmark
        return self.device.type == "cuda" and (self.fixed_sizes if wanted == "fixed-sizes" else wanted)

    def evaluator(self, *, latency: bool) -> Evaluator:
        return evaluator(self.config, self.device, len(self.splits.train.classes), latency=latency)

    def eval_loader(self, split: ImageIndex) -> EvalLoader:
        return eval_loader(self.config, split, self.device, self.threads)

    def check_fence(self) -> None:
        """Raises ResourceError if another driver has taken the run over."""
        if not lease.is_current(self.run_dir, self.worker.fence):
            raise ResourceError(
                f"{self.run_dir}: another driver took this run over; this one stops without saving",
                key="lease.json",
                subject=self.run_dir,
            )


def prepare(worker: WorkerConfig) -> RunContext:
    """Opens the data and the storage. Raises ConfigError if there are fewer training images than ranks."""
    config, run_dir = run_config.from_mapping(worker.recipe, "the driver's recipe", stored=True), Path(worker.run_dir)
    splits = open_splits(config.data, config.seed)
    images, world = len(splits.train), ranks.world()
    if images < world:
        raise ConfigError(
            f"compute.workers (={world}): the train split of {config.data.root} has {images} images",
            key="compute.workers",
            subject=world,
        )
    device = _device(config, under_ray=worker.under_ray)
    teacher = None if worker.teacher is None else teaching.pin(Path(worker.teacher), splits.train.classes)
    fingerprint = run_config.fingerprint(teaching.identified(config, teacher), splits.train.identity)
    fault = probe.fault(config.data, device)
    if fault:
        config = config.model_copy(update={"data": config.data.model_copy(update={"decoder": "cpu"})})
    return RunContext(
        worker=worker,
        run_dir=run_dir,
        config=config,
        family=families.find(config.family.name),
        device=device,
        splits=splits,
        storage=checkpoint.open_storage(config.checkpoint, run_dir),
        fingerprint=fingerprint,
        teacher=teacher,
        decoder_fault=fault,
    )


def _device(config: RunConfig, *, under_ray: bool) -> torch.device:
    device = device_of(config.compute.device)
    if device.type == "cuda" and under_ray:
        import ray.train.torch

        of_worker = ray.train.torch.get_device()
        assert isinstance(of_worker, torch.device)
        return of_worker
    return torch.device("cuda", 0) if device.type == "cuda" else device


def _sample_system(context: RunContext, attempt: int, stack: ExitStack) -> None:
    """On local rank 0 of each node, starts a thread that writes system metrics to a journal of the node."""
    node, local_rank = _place(context.worker)
    if local_rank == 0:
        name, fence = f"node{node}", context.worker.fence
        journal = Journal(context.run_dir / "journal", name, attempt=attempt, fence=fence)
        stack.callback(journal.close)
        every_s = context.config.logging.system_every_s
        stack.enter_context(SystemSampler(journal, every_s, _visible_gpus(context.device)))


def _visible_gpus(device: torch.device) -> list[str] | None:
    """The GPUs that this process sees, as nvidia-smi names them; None on a CPU, or if torch does not say."""
    if device.type != "cuda":
        return None
    found = [getattr(torch.cuda.get_device_properties(n), "uuid", None) for n in range(torch.cuda.device_count())]
    return [f"GPU-{uuid}" for uuid in found] if found and all(found) else None


def _place(worker: WorkerConfig) -> tuple[int, int]:
    """(number of this node, number of this rank on it)."""
    if not worker.under_ray:
        return 0, 0
    import ray.train

    ray_context = ray.train.get_context()
    return ray_context.get_node_rank(), ray_context.get_local_rank()


# ---- what rank 0 writes


class Writer(Protocol):
    """Writes what a run leaves in its folder and its storage, if this is rank 0. No method is collective.

    attempt: the number of this start of the run, from 1; 0 on other ranks. newest: the name of the newest complete
    checkpoint when the run started; None on other ranks or if there is none.
    """

    attempt: int
    newest: str | None

    def event(self, kind: str, step: int | None = None, **facts: object) -> None:
        """Appends an event to the journal."""
        ...

    def metrics(self, at: int, values: Mapping[str, float]) -> None:
        """Appends metrics of the step `at` to the journal."""
        ...

    def bad_images(self, bad: BadImages) -> None:
        """Writes bad_images.json if there are new ones."""
        ...

    def save(self, current: TrainState, meta: Meta, extra: Mapping[str, object], *, wait: bool) -> None:
        """Saves a checkpoint, in a thread unless `wait`; `extra` goes into state.pt."""
        ...

    def flush(self) -> None:
        """Waits until the last checkpoint is on disk."""
        ...

    def best(self) -> str | None:
        """The name of the best undamaged checkpoint."""
        ...

    def about(self, folder: Path, about: About) -> None:
        """Writes about.json of an evaluation."""
        ...

    def arithmetic(self, training: TrainingConfig) -> None:
        """Writes the settings that a new run has chosen."""
        ...

    def max_batch(self, max_batch: int | None, rows: tuple[int, int]) -> None:
        """Writes the images that were found to fit into memory at once."""
        ...

    def status(self, current: TrainState, *, finished: bool) -> None:
        """Writes status.json and the journal's last event."""
        ...


class NoWriter:
    """The writer of all ranks but rank 0."""

    attempt = 0
    newest: str | None = None

    def event(self, kind: str, step: int | None = None, **facts: object) -> None: ...

    def metrics(self, at: int, values: Mapping[str, float]) -> None: ...

    def bad_images(self, bad: BadImages) -> None: ...

    def save(self, current: TrainState, meta: Meta, extra: Mapping[str, object], *, wait: bool) -> None: ...

    def flush(self) -> None: ...

    def best(self) -> str | None:
        return None

    def about(self, folder: Path, about: About) -> None: ...

    def arithmetic(self, training: TrainingConfig) -> None: ...

    def max_batch(self, max_batch: int | None, rows: tuple[int, int]) -> None: ...

    def status(self, current: TrainState, *, finished: bool) -> None: ...


@dataclass
class Rank0:
    """The writer of rank 0."""

    context: RunContext
    journal: Journal
    saver: Checkpointer
    attempt: int
    newest: str | None
    bad_written: int = 0  # bad images in bad_images.json

    def event(self, kind: str, step: int | None = None, **facts: object) -> None:
        self.journal.event(kind, step, **facts)

    def metrics(self, at: int, values: Mapping[str, float]) -> None:
        self.journal.metrics(at, values)

    def bad_images(self, bad: BadImages) -> None:
        """Writes bad_images.json if there are new ones."""
        if len(bad) > self.bad_written:
            write_json(self.context.run_dir / "bad_images.json", bad.report())
            self.bad_written = len(bad)

    def save(self, current: TrainState, meta: Meta, extra: Mapping[str, object], *, wait: bool) -> None:
        """Saves a checkpoint, in a thread unless `wait`."""
        self.context.check_fence()
        where = self.saver.save(current, meta, extra, wait=wait)
        self.event("checkpoint", step=current.step, where=where)
        self.journal.sync()

    def flush(self) -> None:
        """Waits until the last checkpoint is on disk."""
        self.saver.wait()

    def best(self) -> str | None:
        """The name of the best undamaged checkpoint."""
        return self.saver.best_whole()

    def about(self, folder: Path, about: About) -> None:
        records.write_about(folder, about)

    def arithmetic(self, training: TrainingConfig) -> None:
        """Writes the settings that a new run has chosen."""
        chosen = {"precision": training.precision, "compile": training.compile}
        write_json(self.context.run_dir / ARITHMETIC, chosen)

    def max_batch(self, max_batch: int | None, rows: tuple[int, int]) -> None:
        fitting.remember(self.context.run_dir, max_batch, rows)

    def status(self, current: TrainState, *, finished: bool) -> None:
        """Writes status.json and the journal's last event."""
        best = self.saver.best() if finished or self.saver.scored else None  # none is best before an evaluation
        last = checkpoint.name_of(current.step)
        status = Status(finished, current.step, self.context.fingerprint, best, last)
        records.write_status(self.context.run_dir, status)
        self.event("finished" if finished else "stopped", step=current.step, best=best)


def open_writer(context: RunContext, stack: ExitStack) -> Writer:
    """Rank 0's writer, which counts the start of the run; on other ranks one that writes nothing.

    Raises CheckpointError if all checkpoints are damaged.
    """
    if ranks.rank() != 0:
        return NoWriter()
    run_dir, storage = context.run_dir, context.storage
    attempt = records.next_attempt(run_dir)
    journal = Journal(run_dir / "journal", attempt=attempt, fence=context.worker.fence)
    stack.callback(journal.close)
    if lost := unreadable(journal.path):
        journal.event("warning", text=f"{journal.path}: {lost} of its lines are damaged and are left out")
    damaged: set[str] = set()

    def pass_over(name: str, why: str) -> None:
        damaged.add(name)
        journal.event("damaged-checkpoint", name=name, why=why)

    newest = checkpoint.newest_good(storage, pass_over)
    staging = storage.root if isinstance(storage, checkpoint.LocalStorage) else run_dir / "staging"
    saver = Checkpointer(storage, staging, context.config.checkpoint, damaged)
    return Rank0(context, journal, saver, attempt, newest)


# ---- restore


def restore(context: RunContext, events: RunEvents) -> TrainState:
    """The state of the newest checkpoint, the same on every rank; that of step 0 if there is none. Collective.

    Raises CheckpointError if the checkpoint belongs to another recipe.
    """
    name = ranks.agree(events.writer.newest)
    current = _fresh(context, events, pretrained=name is None)
    if name is None:
        return current
    folder, where = context.storage.fetch(name), context.storage.where(name)
    meta, mapping = checkpoint.read_meta(folder), checkpoint.read(folder)
    saved, allowed = run_config.translated(meta.fingerprint), context.worker.allow_changed
    extended = partial(context.config.training.why_not_extended, meta.epoch)
    changed = checkpoint.check_fingerprint(saved, context.fingerprint, allowed, where, extended)
    state.restore(current, mapping)
    events.bad.merge(mapping["bad"])
    events.best_key = meta.best_key
    saved_training = configs.section(meta.recipe, "training")
    events.arithmetic = arithmetic.of_checkpoint(context.config.training, saved_training, context.device)
    events.writer.event("resumed", step=current.step, checkpoint=where, changed=changed)
    _warn_of_batchnorm(context, events.writer, meta.workers or ranks.world())
    return current


def _warn_of_batchnorm(context: RunContext, writer: Writer, before: int) -> None:
    world, batch_size = ranks.world(), context.config.training.batch_size
    if before != world and not context.syncs_batchnorm:
        text = f"{before} workers before, {world} now: BatchNorm takes its statistics over {batch_size / world:g}"
        writer.event("warning", text=f"{text} images of a step, not {batch_size / before:g}")


def _fresh(context: RunContext, events: RunEvents, *, pretrained: bool) -> TrainState:
    """The state at step 0; with `training.start_from`'s weights if the recipe names them and `pretrained` is set."""
    config, training = context.config, context.config.training

    def prepare(net: nn.Module) -> None:
        if pretrained and training.start_from is not None:
            facts, remark = _start_from(context, net, training.start_from)
            events.remember("started-from", None, **facts)
            if remark:
                events.remember("warning", text=remark)

    current = state.fresh(
        context.family,
        config.family,
        training,
        num_classes=len(context.splits.train.classes),
        seed=config.seed,
        device=context.device,
        channels_last=training.channels_last,
        prepare=prepare,
    )
    if context.syncs_batchnorm:
        current.net = nn.SyncBatchNorm.convert_sync_batchnorm(current.net)  # type: ignore[no-untyped-call]
    elif training.sync_batchnorm:
        events.remember("warning", text="training.sync_batchnorm needs a GPU; statistics stay local")
    return current


def _start_from(context: RunContext, net: nn.Module, path: Path) -> tuple[dict[str, object], str | None]:
    """Fills the net with the weights at `path`. Returns what was used, for the log, and what does not suit them."""
    found, config = weights_file.read(path), context.config
    new_head = config.training.new_head
    loaded = load_pretrained(context.family, config.family, net, found.tensors, new_head=new_head)
    used = len(found.tensors) - len(loaded.left_out)
    facts = {"entry": found.entry, "left_out": list(loaded.left_out), "initial": list(loaded.initial)}
    suits = expectation.remark(found.expected or loaded.expected, config.data, sides=False)
    return {"weights": str(path), "tensors": used, **{key: value for key, value in facts.items() if value}}, suits


# ---- settle


def settle(context: RunContext, current: TrainState, events: RunEvents) -> RunContext:
    """The context with what the recipe leaves open: as before the checkpoint, else as rank 0 timed it. Collective."""
    config, device = context.config, context.device
    chosen = events.arithmetic or ranks.agree(_chosen_before(context))
    if chosen is None:
        found = _choose(context, current)
        events.writer.arithmetic(arithmetic.settled(config.training, found.arithmetic, device))
        if found.seconds:
            events.writer.event("arithmetic", text=found.text)
        chosen = found.arithmetic
    training = arithmetic.settled(config.training, chosen, device)
    return replace(context, config=config.model_copy(update={"training": training}))


def _chosen_before(context: RunContext) -> Arithmetic | None:
    """What an earlier start without a checkpoint has chosen, so that it is not timed again; None if there was none."""
    try:
        saved = read_json(context.run_dir / ARITHMETIC)
    except (OSError, ValueError):
        return None
    return arithmetic.of_checkpoint(context.config.training, saved, context.device) if isinstance(saved, dict) else None


def _choose(context: RunContext, current: TrainState) -> Chosen:
    """How a new run computes. Collective."""
    config, training, device, family = context.config, context.config.training, context.device, context.family
    rows = min(-(-training.batch_size // ranks.world()), config.compute.max_batch or training.batch_size)
    side_px, seen = config.data.side_px, training.epochs * len(context.splits.train) / ranks.world()
    image = torch.zeros(1, 3, side_px, side_px, device=device)
    length = arithmetic.length_of(current.net, image, images=seen, rows=rows)
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    shape = (length.timed_rows, 3, side_px, side_px)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).contiguous(memory_format=layout)
    targets = torch.arange(len(images), device=device) % len(context.splits.train.classes)
    timed = Timed(family, config.family, current.net, images, targets)
    return arithmetic.choose(training, length, timed, fixed_sizes=context.fixed_sizes)


# ---- train


def train(context: RunContext, current: TrainState, events: RunEvents) -> bool:
    """Trains until the end of the plan or a request to stop; True at the end. Collective."""
    config = context.config
    torch.backends.cudnn.benchmark = context.benchmarks_cudnn
    plan, warnings = _plan(context, current)
    teacher, facts = teaching.open_teacher(config, context.teacher, current.net, context.device)
    plan = replace(plan, teacher=teacher)
    if facts:
        events.writer.event("teacher", None, **facts)
    if config.training.scaling is not None:
        events.writer.event("learning-rate", text=config.training.scaling)
    small = config.training.above(len(context.splits.train))
    warnings = [*([small] if small else ()), *warnings]
    for text in (*warnings, *context.family.warnings(config.family, config.data.largest_side_px)):
        events.writer.event("warning", text=text)
    if context.decoder_fault:
        text = f"{socket.gethostname()}: decoding a JPEG on the GPU failed ({context.decoder_fault}); the CPU decodes"
        events.remember("warning", text=text)
    facts = _facts(context, current) if ranks.rank() == 0 else {}  # the journal of rank 0 has the event
    events.writer.event("started", step=current.step, total_steps=plan.total_steps, **facts)
    with _train_loader(context, current.step, events) as loader:
        rows = loader.stream.row_bounds(ranks.world())
        need = fitting.Need(rows, config.data.largest_side_px, fitting.fewest_at_once(current.net, config.data))
        max_batch = _max_batch(context, plan, current, loader, need, events)
        batches = _micro_batches(context, plan, loader, max_batch)
        take_step: StepFunction = step.train_step
        if config.compute.max_batch_per_worker == "auto":
            take_step = fitting.remembering(context.run_dir, need, max_batch, take_step)
        if config.profile and ranks.rank() == 0:
            finished = _train_profiled(context, plan, current, batches, events, take_step)
        else:
            finished = loop.train(plan, current, batches, events, beats=events.beats, take_step=take_step)
    events.beats.enter("saving", LONG)
    events.writer.flush()
    return finished


def _facts(context: RunContext, current: TrainState) -> dict[str, object]:
    """What is trained, on what and how: the facts of the event `started`, for people and trackers."""
    config, training, splits, net = context.config, context.config.training, context.splits, current.net
    side_px = config.data.side_for_eval
    image = torch.zeros(1, 3, side_px, side_px, device=context.device)
    autocast = use_bf16(training.precision, context.device)
    return {
        "workers": ranks.world(),
        "device": device_name(context.device),
        "precision": precision_of(context.device, autocast=autocast),
        "compile": training.compile is True,
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "net": {
            "family": config.family.name,
            "parameters": sum(each.numel() for each in net.parameters()),
            "macs": cost.measure(deepcopy(net), image).macs,
            "side_px": side_px,
        },
        "data": {
            "root": str(config.data.root),
            "classes": len(splits.train.classes),
            "train_images": len(splits.train),
            "val_images": len(splits.val),
            "train": splits.train.identity,
            "val": splits.val.identity if len(splits.val) else "",
        },
    }


def _max_batch(
    context: RunContext,
    plan: TrainingPlan,
    current: TrainState,
    loader: TrainLoader,
    need: fitting.Need,
    events: RunEvents,
) -> int | None:
    """The images in memory at once: the recipe's number, or the one that was found by trying. Collective."""
    config = context.config
    if config.compute.max_batch_per_worker != "auto":
        return config.compute.max_batch
    events.beats.enter("trying how many images fit", COMPILING)
    known = ranks.agree(fitting.remembered(context.run_dir))
    if known is not None and known.rows == need.rows:  # a start that tries again could find another number
        return known.max_batch
    loader.fill()  # what it needs is not left for the step
    found = fitting.fit(plan, current, need, known.max_batch if known else None)
    events.writer.max_batch(found.max_batch, need.rows)
    if found.failed:
        events.writer.event("max-batch", step=current.step, text=found.text(plan.batch_size))
    return found.max_batch


def _train_profiled(
    context: RunContext,
    plan: TrainingPlan,
    current: TrainState,
    batches: Iterator[Sequence[MicroBatch]],
    events: RunEvents,
    take_step: StepFunction,
) -> bool:
    """`loop.train` with the first steps profiled, on one rank. Collective."""
    steps, folder = context.config.profile, context.run_dir / profiling.FOLDER

    def done(at: int, table: str | None) -> None:
        short = f"the training ended before the profile of {steps} steps began"
        text = f"{short}; nothing was written" if table is None else f"trace and table are in {folder}\n{table}"
        events.writer.event("profile", step=at, text=text)

    with StepProfiler(steps, context.device, context.run_dir, done, events.beats) as profiler:
        profiled, take = profiler.batches(batches), profiler.around(take_step)
        return loop.train(plan, current, profiled, events, beats=events.beats, take_step=take)


def _plan(context: RunContext, current: TrainState) -> tuple[TrainingPlan, Sequence[str]]:
    """The plan, and a warning for each requested feature that is not available here. Collective."""
    config, training = context.config, context.config.training
    outside_ddp = optim.parameters_outside_ddp(current.optimizers)
    forward, warnings = step.wrap(current.net, training, context.device, outside_ddp)
    epochs_per_step = training.batch_size / len(context.splits.train)
    weights = training.loss.weights(context.splits.train.class_counts)
    plan = TrainingPlan(
        family=context.family,
        config=config.family,
        training=training,
        seed=config.seed,
        num_classes=len(context.splits.train.classes),
        device=context.device,
        forward=forward,
        batch_size=training.batch_size,
        epochs_per_step=epochs_per_step,
        total_steps=max(1, round(training.epochs / epochs_per_step)),
        log_every=config.logging.every,
        save_every=config.checkpoint.every,
        evaluate_every=config.evaluation.every,
        class_weights=None if weights is None else weights.to(context.device),
        macs=speed.macs_by_side(current.net, config.data.sides_px, context.device),
    )
    return replace(plan, peak_macs_per_s=_peak(plan)), warnings


def _peak(plan: TrainingPlan) -> float:
    """The MACs a second that the devices of all ranks reach, if they are like that of rank 0. Collective."""
    mine = speed.matrix_peak(plan.device, autocast=plan.autocast) if ranks.rank() == 0 else 0.0
    return ranks.world() * ranks.agree(mine)


def _train_loader(context: RunContext, start_step: int, events: RunEvents) -> TrainLoader:
    return TrainLoader(
        context.splits.train,
        context.config.data,
        seed=context.config.seed,
        batch_size=context.config.training.batch_size,
        rank=ranks.rank(),
        world=ranks.world(),
        device=context.device,
        threads=context.threads,
        start_step=start_step,
        bad=events.bad,
        on_event=events.remember,
    )


def _micro_batches(
    context: RunContext, plan: TrainingPlan, loader: TrainLoader, max_batch: int | None
) -> Iterator[Sequence[MicroBatch]]:
    """The micro-batches of each step, of at most `max_batch` images."""
    parts = step.num_micros(loader.stream.row_bounds(ranks.world()), ranks.world(), max_batch)
    for batch in loader:
        yield step.micro_batches(plan, context.config.data, batch, parts)


@dataclass(frozen=True)
class BeatingLoader:
    """A split's batches, each of which is a sign of progress."""

    loader: EvalLoader
    beats: Beats

    @property
    def unreadable(self) -> Sequence[str]:
        return self.loader.unreadable

    def __iter__(self) -> Iterator[DecodedEvalBatch]:
        return self.beats.over(self.loader)


@dataclass
class RunEvents:
    """The callbacks of the training loop. evaluated_at: the step of `latest`, the metrics of the newest evaluation."""

    context: RunContext
    writer: Writer
    bad: BadImages
    beats: Beats
    latest: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    best_key: str | None = None  # metric of the checkpoint that is resumed; a resumed run chooses by the same metric
    arithmetic: Arithmetic | None = None  # how the run computed before its checkpoint
    remembered: list[tuple[str, int | None, dict[str, object]]] = field(
        default_factory=list
    )  # this rank's events that no journal has yet

    def remember(self, kind: str, step: int | None = None, **facts: object) -> None:
        """Keeps an event of this rank until the next `log` sends it to rank 0."""
        self.remembered.append((kind, step, facts))

    def log(self, at: int, values: Mapping[str, float]) -> None:
        """Writes metrics and all ranks' events; merges the ranks' bad images. Collective."""
        for bad, remembered in ranks.gather((self.bad.state(), self.remembered)):
            self.bad.merge(bad)
            for kind, step_of_event, facts in remembered:
                self.writer.event(kind, step_of_event, **facts)
        self.remembered = []
        self.writer.bad_images(self.bad)
        self.writer.metrics(at, {**values, "data/bad_images": float(len(self.bad))})

    def evaluate(self, current: TrainState) -> None:
        """Runs the first policy on the val split, and on held-out images, by which the best is chosen. Collective."""
        context, net = self.context, current.best_net
        if len(context.splits.val) == 0 and len(context.splits.held_out) == 0:
            return
        ranks.take_from_rank_0(net.buffers())  # BatchNorm's statistics, which DDP shares at the next step
        policies = context.family.policies(context.config.family, net)[:1]
        found: dict[str, float] = {}
        with self.beats.during("an evaluation", EVALUATING):
            for name, split in (("eval", context.splits.val), ("held_out", context.splits.held_out)):
                if len(split):
                    reports = evaluate(net, policies, self.eval_loader(split), context.evaluator(latency=False))
                    found |= {key.replace("eval/", f"{name}/", 1): value for key, value in metrics_of(reports).items()}
        current.net.train()
        self.latest, self.evaluated_at = found, current.step
        self.writer.metrics(current.step, self.latest)

    def save(self, current: TrainState, *, wait: bool) -> None:
        """Saves the state, in a thread unless `wait`, and reports to Ray. Collective."""
        with self.beats.during("saving", LONG):
            self.writer.save(current, self._meta(current), {"bad": self.bad.state()}, wait=wait)
        if self.context.worker.under_ray:
            import ray.train

            with self.beats.during("reporting to Ray"):
                ray.train.report({"step": current.step, **self.latest})

    def eval_loader(self, split: ImageIndex) -> BeatingLoader:
        """The loader of a split, each of whose batches is a sign of progress."""
        return BeatingLoader(self.context.eval_loader(split), self.beats)

    def last_good(self) -> str | None:
        names = self.context.storage.names()
        return self.context.storage.where(names[-1]) if names else None

    def wants_to_stop(self) -> bool:
        run_dir = self.context.run_dir
        return (run_dir / "stop").exists() or not lease.is_current(run_dir, self.context.worker.fence)

    def _meta(self, current: TrainState) -> Meta:
        context = self.context
        first = context.family.policies(context.config.family, current.net)[0].name
        return Meta(
            step=current.step,
            images_seen=current.images_seen,
            epoch=current.images_seen / len(context.splits.train),
            fence=context.worker.fence,
            workers=ranks.world(),
            fingerprint=context.fingerprint,
            recipe=configs.as_mapping(context.config),
            classes=tuple(context.splits.train.classes),
            metrics=dict(self.latest) if self.evaluated_at == current.step else {},
            best_key=self.best_key or f"{'held_out' if len(context.splits.held_out) else 'eval'}/{first}/top1",
        )


# ---- finish


def finish(context: RunContext, current: TrainState, events: RunEvents, *, finished: bool) -> None:
    """Evaluates the best checkpoint if the run is finished, and writes its status. Collective."""
    if finished:
        _evaluate_best(context, current, events)
    events.writer.status(current, finished=finished)


def _evaluate_best(context: RunContext, current: TrainState, events: RunEvents) -> None:
    """Runs every policy of the best checkpoint's net on the val split. Collective."""
    splits, storage, writer = context.splits, context.storage, events.writer
    best = ranks.agree(writer.best())
    if best is None:  # the loop saves at its end
        where = storage.where("")
        raise CheckpointError(f"{where}: every checkpoint is damaged; run the same command again", key="checkpoints")
    if len(splits.val) == 0:
        writer.event("warning", text="there is no val split, so nothing was evaluated")
        return
    net, family, config, meta = checkpoint.load_net(storage.fetch(best))
    net = placed(net, context.device, context.config.training.channels_last)
    names = [policy.name for policy in family.policies(config, net)]
    last = storage.meta(storage.names()[-1]).metrics
    how = replace(
        context.evaluator(latency=True),
        chosen_on=chosen_on(context.config.checkpoint.best or meta.best_key or ""),
        last_top1={name: last[key] for name in names if (key := f"eval/{name}/top1") in last},
    )
    policies = choose(family.policies(config, net), context.config.evaluation.policies)
    held_out = events.eval_loader(splits.held_out) if len(splits.held_out) else None
    policies = calibrate(policies, net, held_out, how)
    folder = context.run_dir / "evaluations" / FINAL
    reports = evaluate(net, policies, events.eval_loader(splits.val), how, store=folder)
    root, where = str(context.config.data.root), storage.where(best)
    writer.about(folder, About(checkpoint=where, step=meta.step, data=splits.val.identity, root=root))
    final = {key.replace("eval/", "final/", 1): value for key, value in metrics_of(reports).items()}
    writer.metrics(current.step, final)
