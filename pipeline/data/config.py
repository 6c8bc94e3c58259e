"""The keys under `data:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config import Config, FilePath, Share, Side, Threads, fault, is_stored, meant
from pipeline.data.augment import AugmentConfig
from pipeline.data.crop_geometry import CropGeometry, for_evaluation
from pipeline.errors import JsonValue

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LEAST_STD = 0.01
Epoch = Annotated[int, Field(ge=0, le=1_000_000)]
StandardDeviation = Annotated[float, Field(gt=0)]


def _of_pixels(means: tuple[float, float, float]) -> str | None:
    if all(0 <= mean <= 1 for mean in means):
        return None
    return "each mean is that of pixels in 0..1; divide one of pixels in 0..255 by 255"


def _spread(stds: tuple[float, float, float]) -> str | None:
    if all(LEAST_STD <= std <= 1 for std in stds):
        return None
    return (
        f"each standard deviation is that of pixels in 0..1, within {LEAST_STD}..1; divide one of pixels in 0..255 by "
        "255, and give it itself, not what to multiply by"
    )


def _several(sides: tuple[int, ...]) -> str | None:
    return "two sides or more, each once" if len(sides) == 1 or len(set(sides)) < len(sides) else None


class DataConfig(Config):
    """Where the images are and how they become batches."""

    root: FilePath  # class folders with train/ and val/, a plain class folder, or tar shards
    index: FilePath | None = None  # folder of the index; null: beside the data if writable, else in the user's cache
    validation_share: Annotated[float, Field(gt=0, lt=1)] = (
        0.1  # share of the images, drawn by seed, for a root without a val split
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the training images set aside for calibration
    side_px: Side = 224  # side of a training image
    side_schedule: tuple[
        tuple[Annotated[int, Field(ge=0, le=1_000_000)], Side], ...
    ] = ()  # progressive resizing: (from epoch, side_px), epochs rising
    side_choices: Annotated[tuple[Side, ...], meant(_several)] = ()  # each batch draws its side among these; empty: off
    aug_repeats: Annotated[int, Field(ge=1, le=64)] = (
        1  # copies of an image in a batch, each augmented anew; an epoch then shows 1/aug_repeats of the images
    )
    eval_side_px: Side | None = None  # side of an evaluated image; null: side_px
    eval_resize_px: Side | None = None  # shorter side before the centre crop; null: side x 256/224
    augment: AugmentConfig = AugmentConfig()
    mean: Annotated[tuple[float, float, float], meant(_of_pixels)] = (
        IMAGENET_MEAN  # mean of each channel, for pixels in 0..1
    )
    std: Annotated[tuple[StandardDeviation, StandardDeviation, StandardDeviation], meant(_spread)] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of resized images, antialiased
    shuffle: Literal["full", "block"] = "full"  # block: lanes read whole shards, for cold or networked storage
    sampling: Literal["natural", "balanced"] = "natural"  # balanced: every class has the same share of each epoch
    lanes: Annotated[int, Field(ge=1, le=65_536)] = (
        64  # block: readers with their own shards and window, for any number of workers
    )
    window: Annotated[int, Field(ge=1, le=10_000_000)] = 2048  # block: images among which one lane shuffles
    decoder: Literal["auto", "cpu", "gpu"] = "auto"  # auto: gpu if the run computes on a GPU
    fancy_upsampling: bool = True  # on a GPU; false: less work, but JPEGs are off by 0.25 levels, 53 at most
    hw_decoder_load: Share = 0.65  # share of a GPU's JPEGs for its hardware decoder
    # decoded images stay in each worker's memory; auto: if they take an eighth of its share of the node's, or less
    in_memory: Literal["auto"] | bool = "auto"
    decode_threads: Threads | None = None  # per worker; null: the worker's CPUs
    io_threads: Threads = 8  # concurrent reads, per worker
    read_ahead: Threads = 4  # batches that are read before they are needed
    max_bad_share: Share = 0.01  # share of the images; above it the run fails

    @field_validator("side_schedule")
    @classmethod
    def _epochs_rise(cls, schedule: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        epochs = [epoch for epoch, _ in schedule]
        if epochs != sorted(set(epochs)):
            raise ValueError("epochs must rise")
        return schedule

    @model_validator(mode="after")
    def _meant(self, info: ValidationInfo) -> DataConfig:
        if self.sampling == "balanced" and self.shuffle == "block":
            raise fault("sampling", "balanced picks images from the whole set, shuffle: block reads shard by shard")
        if is_stored(info):
            return self
        if self.eval_resize_px is not None and self.eval_resize_px < self.side_for_eval:
            raise fault(
                "eval_resize_px",
                f"below the side of an evaluated image ({self.side_for_eval} px), which is cut from it",
            )
        return self

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason."""
        reasons = {} if values["shuffle"] == "block" else dict.fromkeys(("lanes", "window"), "shuffle is not block")
        return reasons | (
            {"side_schedule": "side_choices draws the side of every batch"} if values.get("side_choices") else {}
        )

    def side_at(self, epoch: int) -> int:
        """Side in pixels of the training images of `epoch`."""
        due = [side for start, side in self.side_schedule if start <= epoch]
        return due[-1] if due else self.side_px

    @property
    def sides_px(self) -> tuple[int, ...]:
        """The sides that training images have in some epoch, rising."""
        return tuple(sorted(set(self.side_choices or (self.side_px, *(side for _, side in self.side_schedule)))))

    @property
    def largest_side_px(self) -> int:
        """The largest side of a training image in any epoch."""
        return max(self.sides_px)

    def eval_geometry(self, image_sizes: NDArray[np.int32]) -> CropGeometry:
        """What evaluation cuts from images of `image_sizes` [b, 2]."""
        return for_evaluation(image_sizes, side_px=self.side_for_eval, resize_px=self.resize_for_eval)

    @property
    def side_for_eval(self) -> int:
        """Side in pixels of an evaluated image."""
        return self.eval_side_px or self.side_px

    @property
    def resize_for_eval(self) -> int:
        """Shorter side in pixels to which evaluation resizes an image before the centre crop."""
        return self.eval_resize_px or round(self.side_for_eval * 256 / 224)
