"""`compute.max_batch_per_worker: auto`: finds by trying how many images a worker can have in memory at once.

Each rank takes one step on random images with a copy of the training state, and communicates with no other rank. If
memory runs out on any rank, all ranks halve their micro-batches and try again. The state itself, the random numbers and
the images of the data set are not touched, so the run equals one whose recipe gives the number that was found. The copy
and some images stay as a margin for what a real step needs besides, such as the buffers of the communication.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

from pipeline import ranks
from pipeline.data.augment import mix_operations
from pipeline.data.config import DataConfig
from pipeline.errors import ConfigError
from pipeline.runs.files import read_json, write_json
from pipeline.training.memory import oom_message, returning_freed_memory
from pipeline.training.plan import TrainingPlan
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, StepFunction, num_micros, split, train_step

FILE = "max_batch.json"  # in the run folder
BESIDES = 2  # times a rank's normalised images: memory of their augmentation


@dataclass(frozen=True)
class Need:
    """What a step needs: the fewest and the most images of a rank, their largest side, and how few a micro-batch has.

    fewest_at_once: 2 for a net or an augmentation that cannot work on a single image, else 1.
    """

    rows: tuple[int, int]
    side_px: int
    fewest_at_once: int = 1

    def micros(self, max_batch: int | None) -> int:
        """Micro-batches of a step. Raises ConfigError if one would be empty on some rank."""
        return num_micros(self.rows, ranks.world(), max_batch)

    def largest(self, max_batch: int | None) -> int:
        """Images of the largest micro-batch."""
        return -(-self.rows[1] // self.micros(max_batch))

    def allows(self, max_batch: int) -> bool:
        """Whether every rank's micro-batches are large enough with so many images at once."""
        return self.rows[0] // -(-self.rows[1] // max_batch) >= self.fewest_at_once

    def halved(self, max_batch: int | None) -> int | None:
        """Half as many images in memory; None if some rank's micro-batches would be too small."""
        half = self.largest(max_batch) // 2
        return half if half and self.allows(half) else None


@dataclass(frozen=True)
class Fit:
    """The images that fit into memory at once; None: the whole share of a rank.

    failed: how many images did not fit, with the rank and the message of torch, in the order of trying.
    """

    max_batch: int | None
    failed: Sequence[tuple[int, int, str]] = ()

    def text(self, batch_size: int) -> str:
        """What was found, as a sentence for people."""
        tried = "; ".join(f"{images} images on rank {rank} ({message})" for images, rank, message in self.failed)
        return (
            f"out of memory with {tried}: each worker now has at most {self.max_batch} images in memory at once; the "
            f"batch of {batch_size} images and its learning rate stay, BatchNorm takes its statistics of these images"
        )


def fewest_at_once(net: nn.Module, data: DataConfig) -> int:
    """The fewest images of a micro-batch with which this net and these augmentations work."""
    normed = any(isinstance(module, BatchNorm1d | BatchNorm2d | BatchNorm3d) for module in net.modules())
    return 2 if normed or mix_operations(data.augment) else 1


def fit(
    plan: TrainingPlan, state: TrainState, need: Need, start: int | None = None, *, take_step: StepFunction = train_step
) -> Fit:
    """The largest of `start`, its half, its quarter ... with which a step fits into the memory of every rank.

    On a CPU it is half of that where something did not fit. start: images in memory at once; None, or too few for this
    net: the whole share of a rank. `state` is not changed.
    Collective. Raises ConfigError if the smallest micro-batch does not fit.
    """
    max_batch = start if start is not None and need.allows(start) else None
    failed = list[tuple[int, int, str]]()
    on_cpu = plan.device.type == "cpu"
    while True:
        with returning_freed_memory() if on_cpu else nullcontext():
            messages = ranks.gather(_rehearse(plan, state, need, max_batch, take_step))
        found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if not found:
            spare = need.halved(max_batch) if failed and on_cpu else None  # the heap of a step is less compact
            return Fit(max_batch if spare is None else spare, tuple(failed))
        failed.append((need.largest(max_batch), *found[0]))
        smaller = need.halved(max_batch)
        if smaller is None:
            raise _too_large(plan, need, failed[-1])
        max_batch = smaller


def _too_large(plan: TrainingPlan, need: Need, failed: tuple[int, int, str]) -> ConfigError:
    images, rank, message = failed
    return ConfigError(
        f"compute.max_batch_per_worker (=auto): rank {rank} is out of memory ({message}) with {images} images of "
        f"{need.side_px} px at once, and a micro-batch cannot be smaller: a step of training.batch_size "
        f"(={plan.batch_size}) gives a worker {need.rows[0]} to {need.rows[1]} images, and this net needs "
        f"{need.fewest_at_once} at once. Use smaller images (data.side_px), a smaller net, training.precision=bf16, or "
        "a device with more memory",
        key="compute.max_batch_per_worker",
        subject=images,
    )


def _rehearse(
    plan: TrainingPlan, state: TrainState, need: Need, max_batch: int | None, take_step: StepFunction
) -> str | None:
    """How memory runs out in a step of a copy of the state; None if it does not. Communicates with no rank."""
    micros = need.micros(max_batch)
    with ranks.alone(), torch.random.fork_rng(_gpus(plan.device)):
        message = _message(plan, state, need, micros, take_step)
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(plan.device)
    return message


def _gpus(device: torch.device) -> Sequence[torch.device]:
    return [device] if device.type == "cuda" else []


def _message(plan: TrainingPlan, state: TrainState, need: Need, micros: int, take_step: StepFunction) -> str | None:
    """What `_rehearse` returns. The copy and its images are freed on return."""
    try:
        current = copy.deepcopy(state)
        images = _random_images(plan, current.net, need, micros)
        besides = [torch.empty_like(micro.images) for micro in images for _ in range(BESIDES)]
        take_step(replace(plan, forward=current.net), current, images, Meter())
        del besides
    except (MemoryError, RuntimeError) as error:
        message = oom_message(error)
        if message is None:
            raise
        return message
    return None


def _random_images(plan: TrainingPlan, net: nn.Module, need: Need, micros: int) -> Sequence[MicroBatch]:
    """A rank's largest share of a step, as micro-batches."""
    rows, side, device = need.rows[1], need.side_px, plan.device
    layout = torch.channels_last if plan.training.channels_last else torch.contiguous_format
    generator, dtype = torch.Generator(device).manual_seed(0), next(net.parameters()).dtype
    images = torch.randn(rows, 3, side, side, device=device, dtype=dtype, generator=generator)
    images = images.contiguous(memory_format=layout)
    labels = torch.arange(rows, device=device) % plan.num_classes
    return [MicroBatch(images[part], labels[part], labels[part]) for part in split(rows, micros)]


@dataclass(frozen=True)
class Remembered:
    """What an earlier start has found. rows: the share of a rank for which it was tried; None: it is to be tried."""

    max_batch: int | None
    rows: tuple[int, int] | None


def remembered(run_dir: Path) -> Remembered | None:
    """What an earlier start of the run has found; None if there was none."""
    try:
        saved = read_json(run_dir / FILE)
    except (OSError, ValueError):
        return None
    if not isinstance(saved, dict) or "max_batch_per_worker" not in saved:
        return None
    found, rows = saved["max_batch_per_worker"], saved.get("rows")
    if found is not None and not (isinstance(found, int) and found > 0):
        return None
    tried = [each for each in rows if isinstance(each, int)] if isinstance(rows, list) else []
    return Remembered(found, (tried[0], tried[1]) if len(tried) == 2 else None)


def remember(run_dir: Path, max_batch: int | None, rows: tuple[int, int] | None) -> None:
    """Writes what `remembered` reads."""
    write_json(run_dir / FILE, {"max_batch_per_worker": max_batch, "rows": list(rows) if rows else None})


def remembering(run_dir: Path, need: Need, max_batch: int | None, take_step: StepFunction) -> StepFunction:
    """`take_step`; if it runs out of memory, the next start begins with half of `max_batch`, and tries that.

    Every rank that runs out writes the same; nothing if half is too little for the net.
    """

    def step(plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch], meter: Meter, /) -> float:
        try:
            return take_step(plan, state, micros, meter)
        except (MemoryError, RuntimeError) as error:
            half = None if oom_message(error) is None else need.halved(max_batch)
            if half is not None:
                remember(run_dir, half, None)
            raise

    return step
