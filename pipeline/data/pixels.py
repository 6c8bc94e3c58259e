"""Pixels as nets take them: scaled and normalised, on the device. B images of side S."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels / 255 - mean) / std by channel.

    images uint8 [B, S, S, 3]; returns f32 [B, 3, S, S], channels_last; the argument is not changed.
    """
    count, height, width, channels = images.shape
    scale, shift = _affine(tuple(mean), tuple(std), width, images.device)
    rows = images.reshape(count, height, width * channels).float()  # long rows: a CPU is slow at steps of 3
    return rows.mul_(scale).add_(shift).view(images.shape).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand of each number in a row of pixels, kept on the device: a copy makes the host wait."""
    scale = torch.tensor([1 / (255 * s) for s in std]).repeat(width)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).repeat(width)
    return scale.to(device), shift.to(device)
