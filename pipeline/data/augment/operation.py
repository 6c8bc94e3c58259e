"""The interface of an augmentation: its keys under `data.augment`, its draw and what it does to images.

An operation is one module of this package that assigns its class to `OPERATION`. The class is a pydantic model whose
fields are the keys that a user sets; nothing else has to be changed. Draws are pure functions of the random numbers
that the sample stream gives (`SampleKeys`, or a generator per micro-batch), so images do not depend on the number of
workers. b images, B of a micro-batch, S their side, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.philox import Ints, SampleKeys
from pipeline.errors import JsonValue

if TYPE_CHECKING:
    from torch import Tensor


class Operation(Config, ABC):
    """One augmentation; `name` is unique, and operations of one interface run in the order of `order`."""

    name: ClassVar[str]
    order: ClassVar[int] = 100
    excludes: ClassVar[Mapping[str, str]] = {}  # operations that may not be active at the same time, and why

    @property
    def active(self) -> bool:
        """Whether the keys enable the operation."""
        return True

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """The operation's keys that change nothing under these values of `data.augment`, each with the reason."""
        return {}


class Crop(Operation):
    """Cuts a window from the image and makes a square of it; chosen by `data.augment.crop`, which is its `name`."""

    @abstractmethod
    def windows(self, keys: SampleKeys, side_px: int, height: Ints, width: Ints) -> Ints:
        """y, x, height, width of the window [b, 4] in images of `height` and `width` [b].

        Images of size 0 may get any window; it is not used.
        """

    def geometry(self, windows: NDArray[np.int32], image_sizes: NDArray[np.int32], side_px: int) -> CropGeometry:
        """How a window [b, 4] in images of `image_sizes` [b, 2] becomes a square: it is resized, unless overridden."""
        sizes = np.full((len(windows), 2), side_px, dtype=np.int32)
        return CropGeometry(windows, sizes, np.zeros_like(sizes), side_px)


class ImageOperation(Operation):
    """Changes images one by one, on the device.

    purpose: the operation's own last word of Philox's counter; no other operation has the same.
    stage: "uint8" images [B, S, S, 3], or "normalised" f32 [B, 3, S, S], channels_last or not.
    on_host: draws stay on the host, so that `apply` can read them without waiting for the device.
    """

    purpose: ClassVar[int]
    stage: ClassVar[Literal["uint8", "normalised"]]
    on_host: ClassVar[bool] = False

    @abstractmethod
    def draw(self, keys: SampleKeys, side_px: int) -> NDArray[np.generic]:
        """What is done to each image: an array [b, ...] that `apply` gets as a tensor, on the device or on the host."""

    @abstractmethod
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The changed images; the argument is left as it was."""


class MixOperation(Operation):
    """Mixes the images of a micro-batch and their targets. Of several active ones, each micro-batch draws one."""

    @abstractmethod
    def mix(
        self, images: Tensor, labels: Tensor, num_classes: int, numbers: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mixed images [B, 3, S, S] and targets [B, K] f32; labels [B] i64."""
