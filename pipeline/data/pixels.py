"""What happens to pixels on the device: scaling, mirroring, low-pass, MixUp, CutMix. B images of side S, K classes.

MixUp and CutMix have torchvision v2's mathematics (the partner of an image is the one before it in the micro-batch);
their numbers come from Philox(seed, step, micro), so they depend on nothing else.
Source: Zhang et al., mixup (ICLR 2018); Yun et al., CutMix (ICCV 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.config import AugmentConfig
from pipeline.data.stream import Purpose, key_words


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], flips: Tensor | None = None) -> Tensor:
    """(pixels / 255 - mean) / std by channel, mirrored where `flips` [B] says so.

    images uint8 [B, S, S, 3]; returns f32 [B, 3, S, S], channels_last; the argument is left as it was.
    """
    if flips is not None:
        images = mirror(images, flips)
    count, height, width, channels = images.shape
    scale, shift = _affine(tuple(mean), tuple(std), width, images.device)
    rows = images.reshape(count, height, width * channels).float()  # long rows: a CPU is slow at steps of 3
    return rows.mul_(scale).add_(shift).view(images.shape).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand of each number in a row of pixels, kept on the device: a copy there makes the host wait."""
    scale = torch.tensor([1 / (255 * s) for s in std]).repeat(width)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).repeat(width)
    return scale.to(device), shift.to(device)


def mirror(images: Tensor, flips: Tensor) -> Tensor:
    """Images [B, S, S, 3] with those mirrored that `flips` [B] names."""
    if images.is_cuda:  # where the host would have to wait for the positions of the flips
        return torch.where(flips[:, None, None, None], images.flip(2), images)
    chosen = flips.nonzero()[:, 0]
    mirrored = images.index_select(0, chosen).permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # fast as channels_last
    return images.index_copy(0, chosen, mirrored)


def low_pass(images: Tensor, levels: Tensor, sides_px: Sequence[int]) -> Tensor:
    """Images [B, 3, S, S] that keep what a picture of sides_px[level - 1] pixels can hold; those of level 0 stay.

    Both axes keep that many frequencies of the cosine transform, as a picture brought down to that side and back up by
    ARRN's filter does: for nets that are to be compared with it at low resolution. levels [B].
    """
    side = images.shape[-1]
    filters = _low_passes(side, tuple(sides_px), images.device)[levels].unsqueeze(1)  # [B, 1, S, S]
    found = filters @ images.contiguous() @ filters.transpose(-1, -2)
    return found.contiguous(memory_format=_memory_format_of(images))


@cache
def _low_passes(side_px: int, sides_px: tuple[int, ...], device: torch.device) -> Tensor:
    """The projections onto each side's lowest frequencies, [levels + 1, S, S]; the first is the identity."""
    samples, frequencies = np.arange(side_px)[None] + 0.5, np.arange(side_px)[:, None]
    cosines = math.sqrt(2 / side_px) * np.cos(np.pi / side_px * frequencies * samples)  # orthonormal DCT-II
    cosines[0] /= math.sqrt(2)
    kept = (cosines[: min(px, side_px)] for px in sides_px)
    found = [np.eye(side_px), *(rows.T @ rows for rows in kept)]
    return torch.from_numpy(np.stack(found).astype(np.float32)).to(device)


def _memory_format_of(images: Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def mix(
    images: Tensor, labels: Tensor, num_classes: int, augment: AugmentConfig, seed: int, step: int, micro: int
) -> tuple[Tensor, Tensor]:
    """A micro-batch after MixUp or CutMix, each with its targets [B, K] f32; as it was where both alphas are 0.

    images [B, 3, S, S], labels [B] i64. Where both are on, a fair draw takes one.
    """
    draw = np.random.Generator(np.random.Philox(key=key_words(seed, step), counter=[0, micro, 0, Purpose.MIX]))
    first = draw.random() < 0.5
    if augment.mixup_alpha > 0 and (first or augment.cutmix_alpha == 0):
        return mixup(images, labels, num_classes, share=draw.beta(augment.mixup_alpha, augment.mixup_alpha))
    if augment.cutmix_alpha > 0:
        share = draw.beta(augment.cutmix_alpha, augment.cutmix_alpha)
        return cutmix(images, labels, num_classes, box=box_of(share, (draw.random(), draw.random()), images.shape[-2:]))
    return images, labels


def mixup(images: Tensor, labels: Tensor, num_classes: int, *, share: float) -> tuple[Tensor, Tensor]:
    """`share` of each image and of its target, the rest from the image before it."""
    return torch.lerp(images.roll(1, 0), images, share), _mixed_targets(labels, num_classes, share)


def cutmix(
    images: Tensor, labels: Tensor, num_classes: int, *, box: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Each image with `box` (left, top, right, bottom) from the image before it; targets by area."""
    left, top, right, bottom = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    height, width = images.shape[-2:]
    return mixed, _mixed_targets(labels, num_classes, 1 - (right - left) * (bottom - top) / (width * height))


def box_of(share: float, centre: tuple[float, float], size: Sequence[int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of CutMix's box: 1 - share of an image of `size` (height, width), cut at its edges.

    centre: (x, y) in [0, 1).
    """
    height, width = size
    x, y = int(centre[0] * width), int(centre[1] * height)
    half = 0.5 * math.sqrt(1 - share)
    dx, dy = int(half * width), int(half * height)
    return max(x - dx, 0), max(y - dy, 0), min(x + dx, width), min(y + dy, height)


def _mixed_targets(labels: Tensor, num_classes: int, share: float) -> Tensor:
    targets = F.one_hot(labels, num_classes).float()
    return torch.lerp(targets.roll(1, 0), targets, share)
