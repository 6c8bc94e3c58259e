"""The keys under `data:`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class AugmentConfig(Config):
    """What the training stream does to an image; all of it a pure function of (seed, epoch, sample index)."""

    crop: Literal["random-resized", "random-pad", "none"] = "random-resized"
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area, random-resized
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width : height of the window, random-resized
    pad_px: Annotated[int, Field(ge=0)] = 4  # zeros on each side before a window of side_px, random-pad (CIFAR)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability of a horizontal flip
    low_pass_px: tuple[Annotated[int, Field(ge=1)], ...] = ()  # falling sides; an image may keep only what fits one
    low_pass: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability of each further step down low_pass_px
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0  # Beta(alpha, alpha) of MixUp; 0 is off
    cutmix_alpha: Annotated[float, Field(ge=0)] = 0.0  # with both on, each batch takes one of them by a fair draw


class DataConfig(Config):
    """Where the images are and how they become batches."""

    root: Path  # class folders with train/ and val/, a plain class folder, or tar shards
    index: Path | None = None  # where the index lies; null: beside the data if writable, else in the user's cache
    validation_share: Annotated[float, Field(gt=0, lt=1)] = (
        0.1  # only for a root without a val split: its share, by seed
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of training images kept for calibration, not trained on
    side_px: Annotated[int, Field(ge=1)] = 224  # side of a training image
    side_schedule: tuple[tuple[int, int], ...] = ()  # progressive resizing: (from epoch, side_px), epochs rising
    eval_side_px: Annotated[int, Field(ge=1)] | None = None  # side of an evaluated image; null: side_px
    eval_resize_px: Annotated[int, Field(ge=1)] | None = (
        None  # shorter side before the centre crop; null: side x 256/224
    )
    augment: AugmentConfig = AugmentConfig()
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in 0..1, by channel
    std: tuple[float, float, float] = IMAGENET_STD
    shuffle: Literal["full", "block"] = "full"  # block: whole shards by lane, for cold or networked storage
    lanes: Annotated[int, Field(ge=1)] = 64  # block: walkers, each with its own shards and window; never the world size
    window: Annotated[int, Field(ge=1)] = 2048  # block: images that one lane shuffles among
    decoder: Literal["auto", "cpu", "gpu"] = "auto"  # auto: gpu where the run computes on a GPU
    decode_threads: Annotated[int, Field(ge=1)] | None = None  # per worker; null: the worker's CPUs
    io_threads: Annotated[int, Field(ge=1)] = 8  # reads under way at once, per worker
    read_ahead: Annotated[int, Field(ge=1)] = 4  # batches read before they are asked for
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01  # of the images in the index; more ends the run

    @model_validator(mode="after")
    def _rules(self) -> DataConfig:
        epochs = [epoch for epoch, _ in self.side_schedule]
        if epochs != sorted(set(epochs)):
            raise ValueError(f"side_schedule: epochs must rise, found {epochs}")
        if not 0 < self.augment.scale[0] <= self.augment.scale[1] <= 1:
            raise ValueError(f"augment.scale (={list(self.augment.scale)}) must rise within (0, 1]")
        if not 0 < self.augment.ratio[0] <= self.augment.ratio[1]:
            raise ValueError(f"augment.ratio (={list(self.augment.ratio)}) must be positive and rise")
        if list(self.augment.low_pass_px) != sorted(set(self.augment.low_pass_px), reverse=True):
            raise ValueError(f"augment.low_pass_px (={list(self.augment.low_pass_px)}): sides must fall")
        return self

    def side_at(self, epoch: int) -> int:
        """Side in pixels of the training images of `epoch`."""
        due = [side for start, side in self.side_schedule if start <= epoch]
        return due[-1] if due else self.side_px

    @property
    def largest_side_px(self) -> int:
        """Of all that is trained on."""
        return max([self.side_px, *(side for _, side in self.side_schedule)])

    @property
    def side_for_eval(self) -> int:
        return self.eval_side_px or self.side_px

    @property
    def resize_for_eval(self) -> int:
        return self.eval_resize_px or round(self.side_for_eval * 256 / 224)
