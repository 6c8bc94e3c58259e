"""Mirrors images from left to right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.augment.operation import ImageOperation
from pipeline.data.philox import Purpose, SampleKeys, uniform
from pipeline.errors import JsonValue

if TYPE_CHECKING:
    from torch import Tensor


class Flip(ImageOperation):
    """Each image is mirrored with the same probability.

    Source of flip_alternates: Jordan, arXiv 2404.00498: of two epochs each image is seen from both sides.
    """

    name: ClassVar[str] = "flip"
    order: ClassVar[int] = 10
    purpose: ClassVar[int] = Purpose.FLIP
    stage: ClassVar[Literal["uint8", "normalised"]] = "uint8"

    flip: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability of a horizontal flip
    flip_alternates: bool = False  # drawn for the first epoch only; every odd epoch mirrors the others

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """`flip_alternates` changes nothing where nothing is flipped."""
        return {"flip_alternates": "flip is 0"} if values["flip"] == 0 else {}

    @property
    def active(self) -> bool:
        """Whether `flip` is above 0."""
        return self.flip > 0

    def draw(self, keys: SampleKeys, side_px: int) -> NDArray[np.bool_]:
        """Which images [b] are mirrored."""
        if not self.flip_alternates:
            return uniform(keys.words(self.purpose)[0]) < self.flip
        first = SampleKeys(keys.seed, np.zeros_like(keys.epochs), keys.rows)
        mirrored: NDArray[np.bool_] = (uniform(first.words(self.purpose)[0]) < self.flip) ^ (keys.epochs % 2 == 1)
        return mirrored

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Mirrors images [B, S, S, 3] where `drawn` [B] is true."""
        return mirror(images, drawn)


def mirror(images: Tensor, flips: Tensor) -> Tensor:
    """Images [B, S, S, 3] with those mirrored where `flips` [B] is true."""
    import torch

    if images.is_cuda:  # where the host would have to wait for the positions of the flips
        return torch.where(flips[:, None, None, None], images.flip(2), images)
    chosen = flips.nonzero()[:, 0]
    mirrored = images.index_select(0, chosen).permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # fast as channels_last
    return images.index_copy(0, chosen, mirrored)


OPERATION = Flip
