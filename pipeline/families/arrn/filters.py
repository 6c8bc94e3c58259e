"""The pair of filters of a Laplacian residual: D low-passes and downsamples, U interpolates back.

Both are separable: X -> M X Mᵀ. Letters: B images, C channels, H×W and h×w pixels, N fine and M coarse
samples of an axis. Skipping is exact for a pair with D·U = I, D·1 = 1 and U·1 = 1; `dct` and `box` are such pairs.
Source: Demeule et al., arXiv 2412.06195; its experiments use the Kaiser filter (6 zero crossings, beta 14.77).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.blocks import is_channels_last

Filter = Literal["dct", "box", "kaiser"]
Matrix = NDArray[np.float64]
ZERO_CROSSINGS, BETA, ROLLOFF = 6, 14.769656459379492, 0.99
FEW_CHANNELS = 8  # with fewer, a product along the channel axis is slower than a copy to the other layout


class FilterPair:
    """D and U of one kind between any two sizes, in fp32 (fp64 for fp64 input) also under autocast. Caches matrices."""

    def __init__(self, kind: Filter) -> None:
        self.kind: Filter = kind
        self._cache: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x [B, C, H, W] resized to `size`: by D if that is smaller, by U if larger; both axes must agree."""
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            if size == tuple(x.shape[-2:]):
                return x
            return self._box(x, size) if self.kind == "box" and _whole(x, size) else self._matrices(x, size)

    def rest(self, x: Tensor, low: Tensor) -> Tensor:
        """x [B, C, H, W] minus low [B, C, h, w] enlarged; on a GPU in channels_last by the product itself."""
        size = (x.shape[-2], x.shape[-1])
        if not x.is_cuda or self.kind == "box" or x.dtype != low.dtype or x.shape[1] < FEW_CHANNELS:
            return x - self.resize(low, size)
        if size == tuple(low.shape[-2:]) or not (is_channels_last(x) and is_channels_last(low)):
            return x - self.resize(low, size)
        with torch.autocast(x.device.type, enabled=False):
            whole = x.permute(0, 2, 3, 1).reshape(-1, size[1], x.shape[1])
            return _of_columns(torch.baddbmm(whole, *self._factors(low, size, -1)), size)

    def _box(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if size[0] > x.shape[-2]:
            return F.interpolate(x, size, mode="nearest-exact")
        return F.avg_pool2d(x, (x.shape[-2] // size[0], x.shape[-1] // size[1]))

    def _matrices(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        rows, columns = self._matrix(x, x.shape[-2], size[0]), self._matrix(x, x.shape[-1], size[1])
        if not is_channels_last(x):
            return torch.matmul(rows, torch.matmul(x, columns.t()))
        if x.shape[1] < FEW_CHANNELS:
            x = torch.matmul(rows, torch.matmul(x.contiguous(), columns.t()))
            return x.contiguous(memory_format=torch.channels_last)
        return _of_columns(torch.bmm(*self._factors(x, size)), size)

    def _factors(self, x: Tensor, size: tuple[int, int], sign: int = 1) -> tuple[Tensor, Tensor]:
        """The factors of the second product that resizes x, in channels_last: [B*h, w, W] and [B*h, W, C]."""
        batch, channels, height, width = x.shape
        rows, columns = self._matrix(x, height, size[0]), self._matrix(x, width, size[1], sign)
        x = torch.bmm(rows.expand(batch, *rows.shape), x.permute(0, 2, 3, 1).reshape(batch, height, width * channels))
        return columns.expand(batch * size[0], *columns.shape), x.view(batch * size[0], width, channels)

    def _matrix(self, like: Tensor, old: int, new: int, sign: int = 1) -> Tensor:
        """The matrix [new, old] of one axis, times `sign`."""
        key = (old * sign, new, like.dtype, like.device)
        if key in self._cache:
            return self._cache[key]
        with torch.inference_mode(False):  # the matrix may be used in a later training step
            made = torch.from_numpy(sign * matrix(self.kind, old, new)).to(like.device, like.dtype)
        if type(made) is Tensor:  # not a tracer's fake tensor
            self._cache[key] = made
        return made

    def __getstate__(self) -> dict[str, object]:
        return {"kind": self.kind, "_cache": {}}


def _of_columns(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B*H, W, C] -> [B, C, H, W]"""
    return x.view(-1, *size, x.shape[2]).permute(0, 3, 1, 2)


def _whole(x: Tensor, size: tuple[int, int]) -> bool:
    return all(max(old, new) % min(old, new) == 0 for old, new in zip(x.shape[-2:], size, strict=True))


def matrix(kind: Filter, old: int, new: int) -> Matrix:
    """The filter from `old` to `new` samples of an axis, [new, old] f64, with samples at pixel centres.

    Every row sums to 1.

    dct: keeps the lowest frequencies of the cosine transform; skipping is exact for any two sizes.
    box: each fine sample belongs to the coarse sample that contains it; D takes their mean, U repeats it.
    kaiser: a windowed sinc over mirrored borders, with normalised rows; skipping is only nearly exact. These are
    torchaudio's defaults, which have the paper's zero crossings and beta; its zero padding would break D·1 = 1.
    """
    if kind == "dct":
        few = min(old, new)
        return math.sqrt(new / old) * _cosines(new)[:few].T @ _cosines(old)[:few]
    if kind == "box":
        member = (np.arange(max(old, new)) * 2 + 1) * min(old, new) // (2 * max(old, new))  # [fine]
        spread = np.eye(min(old, new))[member]  # U, [fine, coarse]
        return spread if new > old else (spread / spread.sum(0)).T
    return _kaiser(old, new)


def _cosines(size: int) -> Matrix:
    """The orthonormal DCT-II, [frequencies, samples]."""
    frequencies, samples = np.arange(size)[:, None], np.arange(size)[None] + 0.5
    found = math.sqrt(2 / size) * np.cos(np.pi / size * frequencies * samples)
    found[0] /= math.sqrt(2)
    return found


def _kaiser(old: int, new: int) -> Matrix:
    cutoff = min(old, new) * ROLLOFF
    reach = math.ceil(ZERO_CROSSINGS * old / cutoff) + 1
    source = np.arange(-reach, old + reach)
    t = cutoff * ((source + 0.5)[None] / old - (np.arange(new) + 0.5)[:, None] / new)
    window = np.i0(BETA * np.sqrt(np.clip(1 - (t / ZERO_CROSSINGS) ** 2, 0, None))) / np.i0(BETA)
    weights = np.where(np.abs(t) < ZERO_CROSSINGS, np.sinc(t) * window, 0)
    folded = source % (2 * old)  # mirrored at the borders
    folded = np.where(folded < old, folded, 2 * old - 1 - folded)
    found: Matrix = weights @ np.eye(old)[folded]
    return np.asarray(found / found.sum(1, keepdims=True))
