"""Removes high frequencies from images: a control for nets that are compared with ARRN at low resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field

from pipeline.config import Side
from pipeline.data.augment.operation import ImageOperation
from pipeline.data.philox import Ints, Purpose, SampleKeys, uniform
from pipeline.errors import JsonValue

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def _falling(sides: tuple[int, ...]) -> tuple[int, ...]:
    if list(sides) != sorted(set(sides), reverse=True):
        raise ValueError("sides must fall")
    return sides


class LowPass(ImageOperation):
    """An image may keep only the frequencies that a smaller image can hold."""

    name: ClassVar[str] = "low_pass"
    order: ClassVar[int] = 20
    purpose: ClassVar[int] = Purpose.LOW_PASS
    stage: ClassVar[Literal["uint8", "normalised"]] = "normalised"

    low_pass_px: Annotated[tuple[Side, ...], AfterValidator(_falling)] = ()  # falling sides; empty: off
    low_pass: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability of each further step down low_pass_px

    @property
    def active(self) -> bool:
        """Whether `low_pass_px` has any side."""
        return bool(self.low_pass_px)

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """`low_pass` changes nothing without `low_pass_px`."""
        return {} if values["low_pass_px"] else {"low_pass": "low_pass_px is empty"}

    def draw(self, keys: SampleKeys, side_px: int) -> Ints:
        """How far down `low_pass_px` each image goes, [b]: one step with probability p, each further one with p again.

        0 leaves an image as it is.
        """
        drawn = uniform(keys.words(self.purpose)[0])
        levels: Ints = (drawn[:, None] < self.low_pass ** np.arange(1, len(self.low_pass_px) + 1)).sum(1)
        return levels

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Filters images [B, 3, S, S] by the level that was drawn for each, [B]."""
        return low_pass(images, drawn, self.low_pass_px)


def low_pass(images: Tensor, levels: Tensor, sides_px: Sequence[int]) -> Tensor:
    """Images [B, 3, S, S] that keep what a picture of sides_px[level - 1] pixels can hold; level 0 changes nothing.

    Both axes keep that many frequencies of the cosine transform, as if ARRN's filter had reduced the picture to that
    side and enlarged it again. levels [B].
    """
    side = images.shape[-1]
    filters = _projections(side, tuple(sides_px), images.device)[levels].unsqueeze(1)  # [B, 1, S, S]
    filtered = filters @ images.contiguous() @ filters.transpose(-1, -2)
    return filtered.contiguous(memory_format=_memory_format_of(images))


@cache
def _projections(side_px: int, sides_px: tuple[int, ...], device: torch.device) -> Tensor:
    """The projections onto each side's lowest frequencies, [levels + 1, S, S]; the first is the identity."""
    import torch

    samples, frequencies = np.arange(side_px)[None] + 0.5, np.arange(side_px)[:, None]
    cosines = math.sqrt(2 / side_px) * np.cos(np.pi / side_px * frequencies * samples)  # orthonormal DCT-II
    cosines[0] /= math.sqrt(2)
    lowest = (cosines[: min(px, side_px)] for px in sides_px)
    projections = [np.eye(side_px), *(rows.T @ rows for rows in lowest)]
    return torch.from_numpy(np.stack(projections).astype(np.float32)).to(device)


def _memory_format_of(images: Tensor) -> torch.memory_format:
    import torch

    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


OPERATION = LowPass
