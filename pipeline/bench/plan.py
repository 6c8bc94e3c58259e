"""The resources that a recipe needs on a number of nodes, from a model of measured parts.

Letters: W workers, B images of a step over all of them, b = B / W, r images/s of one worker, P parameters.
A step takes B / (W r) if communication overlaps with computation. A ring all-reduce sends and receives
2 (W - 1) / W · 4 P bytes at each worker (Patarasuk & Yuan 2009), so with a network of n bytes/s per worker a step takes
at least that over n. All workers together compute B images in the longer of these two times. Storage must deliver the
bytes of as many images, and each worker's cores must decode its share. Rank 0 writes one checkpoint per save interval
and the values of one log point per log interval.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from pipeline import family as families
from pipeline.config import Duration
from pipeline.data.config import DataConfig
from pipeline.data.dali import TrainLoader
from pipeline.data.index import ImageIndex, open_splits
from pipeline.errors import ConfigError, DataError
from pipeline.execution import teaching
from pipeline.run_config import RunConfig
from pipeline.runs.records import Meta
from pipeline.training import checkpoint, state
from pipeline.training.distillation import Teacher, TrainedTeacher
from pipeline.training.loop import device_of
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import TrainingPlan
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, train_step

INDEX_BYTES = 4 * 4 + 2 * 8 + 8  # bytes of one image: shard, label, height, width; offset, length; name's hash
WARM, TIMED = 2, 5  # steps
OTHER_METRICS = 13  # values of a log point besides the step's own: rates, shares, memory, lr, epoch, bad images
DECODED = 512  # images over which decoding is measured


@dataclass(frozen=True)
class Images:
    """The training images: their number, their classes and the mean size of an encoded one (None: unknown)."""

    count: int
    classes: int
    mean_bytes: float | None = None


@dataclass(frozen=True)
class MachineProfile:
    """Measured on one machine: bytes of the state and of an image's activations, rates of computing and decoding."""

    parameters: int
    state_bytes: int  # parameters, gradients, moments and moving average in memory
    checkpoint_bytes: int
    activation_bytes: float  # saved for the backward pass, per image
    images_per_s: float | None = None  # rate of one worker
    decoded_per_s: float | None = None  # rate of one core
    device: str = "here"  # where it was measured, for people
    metrics: int = 0  # values of a log point


@dataclass(frozen=True)
class ResourcePlan:
    """The needs of a run by the module's formula. A field is None if its inputs were neither measured nor given."""

    workers: int
    rows: int  # images of one worker in a step
    micro_rows: int  # images of one worker in memory at once
    steps: int
    memory_bytes: float  # memory of a worker for state and activations, without the libraries' own
    gradient_bytes: float  # sent and received by a worker in a step
    checkpoint_bytes: int
    index_bytes: int
    images_per_s: float | None
    step_s: float | None
    communication_s: float | None
    read_bytes_per_s: float | None
    decode_cores: float | None  # per worker
    save_every_s: float | None
    metrics_per_s: float | None  # written to the journal, and then to the tracker
    total_s: float | None

    @property
    def save_bytes_per_s(self) -> float | None:
        """Checkpoint traffic of rank 0, the only rank that saves."""
        return self.checkpoint_bytes / self.save_every_s if self.save_every_s else None

    @property
    def limit(self) -> str | None:
        """What bounds a step: "computing" or the "network"; None if either time is unknown."""
        if self.step_s is None or self.communication_s is None:
            return None
        return "network" if self.communication_s >= self.step_s else "computing"


def plan(
    config: RunConfig, workers: int, images: Images, cost: MachineProfile, *, network_bytes_per_s: float | None
) -> ResourcePlan:
    """The plan of `config` on `workers` workers. Raises ConfigError if a step has fewer images than workers."""
    batch = config.training.batch_size
    if workers > batch:
        raise ConfigError(
            f"training.batch_size (={batch}) is below the number of workers (={workers}): each worker needs an "
            "image of every step; use fewer nodes, or a larger batch with its learning rate",
            key="training.batch_size",
            subject=batch,
        )
    rows = ceil(batch / workers)
    micro = min(rows, config.compute.max_batch or rows)
    micro = ceil(rows / ceil(rows / micro))
    steps = max(1, round(config.training.epochs * images.count / batch))
    gradients = 2 * (workers - 1) / workers * 4 * cost.parameters
    sending = gradients / network_bytes_per_s if network_bytes_per_s is not None else None
    rate = cost.images_per_s
    step_s = rows / rate if rate is not None else None
    slower = max(step_s, sending or 0.0) if step_s is not None else None
    total_rate = batch / slower if slower is not None else None
    return ResourcePlan(
        workers=workers,
        rows=rows,
        micro_rows=micro,
        steps=steps,
        memory_bytes=cost.state_bytes + micro * cost.activation_bytes,
        gradient_bytes=gradients,
        checkpoint_bytes=cost.checkpoint_bytes,
        index_bytes=INDEX_BYTES * images.count,
        images_per_s=total_rate,
        step_s=step_s,
        communication_s=sending,
        read_bytes_per_s=_product(total_rate, images.mean_bytes),
        decode_cores=total_rate / workers / cost.decoded_per_s if total_rate and cost.decoded_per_s else None,
        save_every_s=_interval(config.checkpoint.every, batch, images, total_rate),
        metrics_per_s=_per(cost.metrics, _interval(config.logging.every, batch, images, total_rate)),
        total_s=steps * slower if slower is not None else None,
    )


def _product(one: float | None, other: float | None) -> float | None:
    return one * other if one is not None and other is not None else None


def _per(count: int, seconds: float | None) -> float | None:
    return count / seconds if seconds and count else None


def _interval(every: Duration, batch: int, images: Images, rate: float | None) -> float | None:
    """Seconds between two events that are due `every` so often; None if that depends on an unknown rate."""
    if every.unit == "minutes":
        return 60 * every.value
    if rate is None:
        return None
    return every.value * (images.count if every.unit == "epochs" else batch) / rate


def images_of(config: RunConfig) -> tuple[Images, ImageIndex] | None:
    """The recipe's training images and their index; None if they cannot be read on this machine."""
    try:
        train = open_splits(config.data, config.seed).train
    except DataError:
        return None
    return Images(len(train), len(train.classes), float(train.length.mean())), train


def measure(
    config: RunConfig, num_classes: int, rows: int, *, train: ImageIndex | None, timed: bool = True
) -> MachineProfile:
    """Measures a training step of `rows` random images on this machine's device; its time only if `timed`.

    Measures decoding as well if `train` images are given.
    """
    device = here(config)
    if device.type == "cpu":
        keep_freed_memory()
    plan, current = _fresh(config, num_classes, device)
    plan = replace(plan, teacher=_teacher(config, num_classes, current, device))
    micros = [_random(config, num_classes, rows, device)]
    saved = _activations(plan, current, micros[0])
    rate, logged = _rate(plan, current, micros, rows, TIMED if timed else 1)
    parameters = sum(parameter.numel() for parameter in current.net.parameters())
    held = [*current.net.parameters(), *current.net.buffers(), *(current.ema.parameters() if current.ema else ())]
    held += plan.teacher.net.parameters() if isinstance(plan.teacher, TrainedTeacher) else ()
    moments = [t for o in current.optimizers.values() for s in o.state.values() for t in s.values() if _is(t)]
    return MachineProfile(
        parameters=parameters,
        state_bytes=sum(t.nbytes for t in (*held, *moments)) + 4 * parameters,
        checkpoint_bytes=_saved_bytes(current),
        activation_bytes=saved / rows,
        images_per_s=rate if timed else None,
        decoded_per_s=_decoding(config.data, train) if train is not None else None,
        metrics=logged + OTHER_METRICS,
        device=f"on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'this CPU'}",
    )


def here(config: RunConfig) -> torch.device:
    """The device of this machine on which a plan is measured; the run itself may be elsewhere."""
    return device_of("auto" if config.compute.device == "cuda" else config.compute.device)


def _teacher(config: RunConfig, num_classes: int, current: TrainState, device: torch.device) -> Teacher | None:
    """The recipe's teacher. Raises ConfigError if it has another number of classes."""
    folder = teaching.locate(config, Path("runs") / config.name)
    pinned = None if folder is None else teaching.pin(folder, num_classes)
    return teaching.open_teacher(config, pinned, current.net, device)[0]


def _is(value: object) -> bool:
    return isinstance(value, Tensor)


def _fresh(config: RunConfig, num_classes: int, device: torch.device) -> tuple[TrainingPlan, TrainState]:
    family, training = families.find(config.family.name), config.training
    current = state.fresh(
        family,
        config.family,
        training,
        num_classes=num_classes,
        seed=config.seed,
        device=device,
        channels_last=training.channels_last,
    )
    plan = TrainingPlan(
        family=family,
        config=config.family,
        training=training,
        seed=config.seed,
        num_classes=num_classes,
        device=device,
        forward=current.net,
        batch_size=training.batch_size,
        epochs_per_step=1e-3,
    )
    return plan, current


def _random(config: RunConfig, num_classes: int, rows: int, device: torch.device) -> MicroBatch:
    side = config.data.side_px
    layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
    images = torch.randn(rows, 3, side, side, device=device).contiguous(memory_format=layout)
    labels = torch.arange(rows, device=device) % num_classes
    return MicroBatch(images, labels, labels)


def _activations(plan: TrainingPlan, current: TrainState, micro: MicroBatch) -> int:
    """Bytes that the forward pass saves for the backward pass: each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in current.net.parameters()}
    saved: dict[int, int] = {}  # bytes by address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.autocast):
            output = current.net(micro.images)
            loss = plan.family.loss(plan.config, output, micro.targets, plan.training.loss.criterion).total
    total = sum(saved.values())
    del loss, output
    return total


def _rate(
    plan: TrainingPlan, current: TrainState, micros: list[MicroBatch], rows: int, steps: int
) -> tuple[float, int]:
    """Images/s, and the number of values that a step logs. Afterwards the optimizers hold their moments.

    A single step is not warmed up: its rate is not asked for.
    """
    times, meter, plan = [], Meter(), replace(plan, batch_size=rows)
    warm = WARM if steps > 1 else 0
    for _ in range(warm + steps):
        start = time.perf_counter()
        train_step(plan, current, micros, meter)
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
        times.append(time.perf_counter() - start)
    return rows / median(times[warm:]), len(meter.flush())


def _saved_bytes(current: TrainState) -> int:
    """The size of a checkpoint on disk."""
    with TemporaryDirectory(prefix="adaptnet-plan-") as folder:
        path = Path(folder) / "step-00000000"
        meta = Meta(step=0, recipe={}, fingerprint={}, classes=())
        mapping = {name: checkpoint.to_cpu(value) for name, value in state.to_mapping(current).items()}
        checkpoint.write(path, mapping, meta)
        return sum(file.stat().st_size for file in path.iterdir())


def _decoding(config: DataConfig, train: ImageIndex) -> float:
    """Images/s of the training loader on one thread."""
    batch = min(64, len(train))
    with _loader(config, train, batch) as loader:
        batches = iter(loader)
        next(batches)
        start, count = time.perf_counter(), 0
        while count < min(DECODED, 8 * len(train)):
            count += len(next(batches).labels)
        return count / (time.perf_counter() - start)


@contextmanager
def _loader(config: DataConfig, train: ImageIndex, batch: int) -> Iterator[TrainLoader]:
    device = torch.device("cpu")
    settings = config.model_copy(update={"decoder": "cpu", "in_memory": False})
    with TrainLoader(train, settings, seed=0, batch_size=batch, rank=0, world=1, device=device, threads=1) as loader:
        yield loader


def given(
    cost: MachineProfile,
    *,
    images_per_s: float | None = None,
    decoded_per_s: float | None = None,
    device: str | None = None,
) -> MachineProfile:
    """`cost` with the rates that the user has measured elsewhere."""
    return replace(
        cost,
        images_per_s=images_per_s or cost.images_per_s,
        decoded_per_s=decoded_per_s or cost.decoded_per_s,
        device=device or cost.device,
    )
