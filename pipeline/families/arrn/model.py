"""Adaptive-resolution residual networks: a chain of Laplacian residuals; low-resolution images skip the first ones.

A residual adds to the low-pass of its input what its layers compute from the rest, low-passed and with its mean
removed: r_{n+1} = A_n(D r_n + D b_n(r_n - U D r_n) - mean). For an image of lower resolution the rest is 0, b_n(0) is
constant and adds nothing: the residual need not run, and only the linear map A_n remains.
Letters: B images, C_n channels, K classes, N residuals; x images of 3 channels, r signals inside the chain.
Source: Demeule et al., arXiv 2412.06195, reconstructed from its poster and reviews, because neither code nor equations
are public. These choices are ours: one linear map between any two resolutions; DCT filters by default, with which
skipping is exact; layers that repeat the border; linear maps that preserve the variance at initialisation; an ordinary
stage at R_N before the pooling. Without that stage the head would see only the mean colour, as every residual's mean
is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.blocks import take
from pipeline.errors import ConfigError
from pipeline.families.arrn.config import ArrnConfig
from pipeline.families.arrn.filters import FilterPair
from pipeline.families.arrn.inner import Stack, matrix_of

LEAST_ROWS = 2  # minimum rows of a residual in training, so that every parameter has a gradient on every rank


@dataclass(frozen=True)
class ArrnOutput:
    """logits [B, K]; levels [B] i64: the number of residuals that each image skipped."""

    logits: Tensor
    levels: Tensor


def build(config: ArrnConfig, num_classes: int) -> Arrn:
    """The net on CPU, its weights drawn from torch's default generator."""
    return Arrn(config, num_classes)


class Affine(NamedTuple):
    """An affine map of channels: weight [C', C], bias [C']."""

    weight: Tensor
    bias: Tensor

    def then(self, layer: nn.Conv2d) -> Affine:
        """This map followed by a 1x1 convolution, as one map.

        Uses sums of products instead of a matrix product, which the MAC counter would add to the cost of an image: the
        composition happens once for a batch.
        """
        assert layer.bias is not None
        outer = matrix_of(layer)
        return Affine((outer[:, :, None] * self.weight).sum(1), (outer * self.bias).sum(1) + layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x, self.bias)

    def linear(self, x: Tensor) -> Tensor:
        """The map without its bias."""
        return self._apply(x, None)

    def _apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.to(self.weight.dtype), self.weight[:, :, None, None], bias)


def affine(layer: nn.Conv2d) -> Affine:
    """A 1x1 convolution as a map of channels."""
    assert layer.bias is not None
    return Affine(matrix_of(layer), layer.bias)


class Residual(nn.Module):
    """A Laplacian residual: `inner` is b_n, `project` A_n, `pair` D and U."""

    def __init__(self, layers: str, inputs: int, outputs: int, gain: float, pair: FilterPair) -> None:
        super().__init__()
        self.pair = pair
        self.inner = Stack(layers, inputs, "replicate", first_skip=False)
        self.project = nn.Conv2d(inputs, outputs, 1)
        _init(self.inner)
        _init_linear(self.project)
        for weight in self.inner.gains:
            nn.init.constant_(weight, gain)

    def forward(
        self, low: Tensor, rest: Tensor, kept: int, scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The next signal from low [b, C_n, h, w] = D r and rest [b', C_n, H, W] = r - U D r, where b = kept <= b'.

        Rows of `rest` beyond b run only so that every parameter has a gradient; the second result is their sum times 0.
        scales: as in `Stack`.
        """
        h = self.inner(rest, kept, scales)
        idle = zero_of(h[kept:]) if len(h) > kept else None
        return self.joined(low, h[:kept]), idle

    def joined(self, low: Tensor, h: Tensor) -> Tensor:
        """The next signal from low and from h [b, C_n, H, W], the output of `inner` for the rest."""
        h = self.pair.resize(h, _size(low))
        if not h.is_cuda:
            return affine(self.project)(low + (h - h.mean(dim=(2, 3), keepdim=True)))
        centre = h.sum(dim=(2, 3), keepdim=True) * (-1 / (h.shape[2] * h.shape[3]))  # minus the mean
        return affine(self.project)(low + h + centre)  # added: the gradient of a subtracted mean takes two whole maps


class Arrn(nn.Module):
    """Stem, residuals, final stage, head: `stem`, `residuals`, `final`, `head`, `norm`, `fc`."""

    def __init__(self, config: ArrnConfig, num_classes: int) -> None:
        super().__init__()
        plan = config.plan
        self.ladder, self.probabilities = plan.ladder, config.probabilities
        self.pairs = [FilterPair(kind) for kind in config.kinds]
        self.stem = nn.Conv2d(3, plan.widths[0], 1)
        steps = zip(plan.inner, plan.widths, plan.widths[1:], strict=False)
        self.residuals = nn.ModuleList(
            Residual(*step, config.residual_gain, pair) for step, pair in zip(steps, self.pairs, strict=False)
        )
        self.final = Stack(plan.final, plan.widths[-1], "zeros", first_skip=True)
        self.head = nn.Conv2d(plan.widths[-1], config.head_width, 1, bias=False)
        self.norm = nn.BatchNorm2d(config.head_width)
        self.fc = nn.Linear(config.head_width, num_classes)
        self.drop_path, self.dropout = config.drop_path, config.dropout
        _init_linear(self.stem)
        _init(nn.ModuleList([self.final, self.head]))

    def draw_noise(self, num_images: int) -> Tensor | None:
        """Uniform numbers [B, N] for Laplacian dropout; None if nothing is random.

        With drop_path or dropout there are further ones: for each block that adds its input, and for each feature of
        the head. They are on the CPU, so that batch sizes can be derived from them without waiting for the device.
        """
        further = sum(self._skips()) + self.fc.in_features if self.drop_path or self.dropout else 0
        return torch.rand(num_images, len(self.residuals) + further) if any(self.probabilities) or further else None

    def forward(self, images: Tensor, noise: Tensor | None = None) -> ArrnOutput:
        """Residual n runs on the images that do not skip it.

        An image skips the residuals above its resolution and, in training or with `noise`, the leading ones that are
        dropped for it; nothing is rescaled. With gradients each residual runs on at least LEAST_ROWS rows: rows of
        dropped images fill up, multiplied by 0. Raises ConfigError for images smaller than the last resolution of the
        ladder.
        """
        if noise is None and self.training:
            noise = self.draw_noise(len(images))
        first = self.level(images)
        x = self.at_side(images, self.ladder[first])
        scales, shares = self._dropped(noise, images.device)
        levels = [max(level, first) for level in self._drawn(noise, len(images))]
        counts = list(accumulate(levels.count(n) for n in range(len(self.ladder))))
        if len(set(levels)) == 1:
            r, idle = self._chain(x, first, counts, scales)
        else:
            order = torch.tensor(levels).argsort(stable=True)
            entering = sent(order, x.device)
            r, idle = self._chain(take(x, entering), first, counts, None if scales is None else scales[entering])
            r = take(r, sent(order.argsort(), r.device))
        logits = self.answer(r, scales, shares)
        logits = logits if idle is None else logits + idle.to(logits.dtype)
        return ArrnOutput(logits, sent(torch.tensor(levels), images.device))

    def answer(self, r: Tensor, scales: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        """Logits [B, K] from the last residual's output [B, C_N, ...] at R_N; scales, shares: as from `_dropped`."""
        y = self.final(r, r.shape[0], None if scales is None else scales[:, sum(self._skips()[:-1]) :])
        y = F.silu(self.norm(self.head(y))).mean(dim=(2, 3))  # [B, head width]
        logits: Tensor = self.fc(y if shares is None else y * shares.to(y.dtype))
        return logits

    def _skips(self) -> list[int]:
        """The number of blocks that add their input, of each residual and of the final stage: [N + 1]."""
        return [cast(Residual, residual).inner.num_skips for residual in self.residuals] + [self.final.num_skips]

    def _dropped(self, noise: Tensor | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What each block adds is multiplied by scales [B, blocks], and each feature by shares [B, head width].

        Block l of L is dropped with l/L · drop_path; what is kept is divided by its probability. None for 1.
        Source: Huang et al., ECCV 2016 (arXiv 1603.09382), the linear rule.
        """
        if noise is None or not (self.drop_path or self.dropout):
            return None, None
        count = sum(self._skips())
        _, blocks, features = torch.split(noise, [len(self.residuals), count, self.fc.in_features], dim=1)
        survival = 1 - torch.linspace(0, 1, count + 1, device=noise.device)[1:] * self.drop_path
        scales, shares = (blocks < survival) / survival, (features >= self.dropout) / (1 - self.dropout)
        return (
            sent(scales, device) if self.drop_path and count else None,
            sent(shares, device) if self.dropout else None,
        )

    def _drawn(self, noise: Tensor | None, count: int) -> list[int]:
        """The number of residuals that each image drops: the length of the leading run of noise below p_n."""
        if noise is None or not self.residuals:
            return [0] * count
        levels = noise[:, : len(self.residuals)].cpu()
        dropped = levels < torch.tensor(self.probabilities, dtype=noise.dtype)  # [B, N]
        found: list[int] = dropped.long().cumprod(1).sum(1).tolist()
        return found

    def _chain(
        self, x: Tensor, first: int, counts: list[int], scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Maps images x [B, 3, ...] at R_first, in the order in which they enter, to r [B, C_N, ...] at R_N.

        counts[n] images run residual n; scales [B, blocks] are those of `_dropped`, in the same order. An image enters
        the chain at its level as W x + b, the composition of all linear maps above. The second result is the zero from
        idle rows, to be added to the logits.
        """
        top_up = min(LEAST_ROWS, len(x)) if torch.is_grad_enabled() else 0
        entry, r, idle = affine(self.stem), None, []
        by_stack = [None] * len(self.residuals) if scales is None else torch.split(scales, self._skips(), dim=1)
        for n, residual in enumerate(self.residuals):
            assert isinstance(residual, Residual)
            if n >= first:
                x, r, zero = self._step(n, x, r, entry, counts[n], top_up, by_stack[n])
                idle += [zero]
            elif top_up:
                size = (residual.project.in_channels, *scaled(x, self.ladder[n]))
                idle += [zero_of(residual.inner(entry.weight.new_zeros(top_up, *size), 0))]
            if len(x):
                entry = entry.then(residual.project)
        rows = [] if r is None else [r]
        found = [zero for zero in idle if zero is not None]
        return _cat([*rows, entry(x)] if len(x) else rows), torch.stack(found).sum() if found else None

    def _step(
        self, n: int, x: Tensor, r: Tensor | None, entry: Affine, kept: int, top_up: int, scales: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Images that have not entered, signals that have, both at R_{n+1}, and the zero of idle rows, if any."""
        residual = self.residuals[n]
        assert isinstance(residual, Residual)
        pair, low, rest = residual.pair, [], []
        size = scaled(x if r is None else r, self.ladder[n + 1])
        if r is not None:
            low.append(pair.resize(r, size))
            rest.append(pair.rest(r, low[0]))
        joining = kept - (0 if r is None else len(r))
        run = joining + max(0, top_up - kept)
        smaller = pair.resize(x, size) if len(x) else x
        if run:  # on 3 channels, because the linear maps commute with the filters
            rest.append(entry.linear(x[:run] - pair.resize(smaller[:run], _size(x))))
        if joining:
            low.append(entry(smaller[:joining]))
        if low:
            r, zero = residual(_cat(low), _cat(rest), kept, scales)
            return smaller[joining:], r, zero
        return smaller, None, zero_of(residual.inner(rest[0], 0)) if rest else None

    def level(self, images: Tensor) -> int:
        """How many residuals images [B, 3, H, W] skip because of their resolution.

        Raises ConfigError for images smaller than the last resolution of the ladder.
        """
        side = min(images.shape[-2:])
        if side < self.ladder[-1]:
            raise ConfigError(
                f"images of {images.shape[-1]} x {images.shape[-2]} px: the shorter side must have at least "
                f"{self.ladder[-1]} px, the last of {list(self.ladder)}; use larger images or a longer ladder",
                key="images",
                subject=side,
            )
        return max((n for n, rung in enumerate(self.ladder) if rung >= side), default=0)

    def at_side(self, images: Tensor, side_px: int) -> Tensor:
        """images [B, 3, H, W] resized to a shorter side of side_px, by the filters of each resolution in between."""
        while (side := min(images.shape[-2:])) != side_px:
            if side > side_px:
                target = max(side_px, *(rung for rung in (0, *self.ladder) if rung < side))
            else:
                target = min(side_px, *(rung for rung in (side_px, *self.ladder) if rung > side))
            finer = max((n for n, rung in enumerate(self.ladder) if rung >= max(side, target)), default=0)
            images = self.pairs[min(finer, len(self.pairs) - 1)].resize(images, scaled(images, target))
        return images


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """A few numbers of the host on the device, without waiting for it."""
    return numbers.to(device, non_blocking=True)


def scaled(x: Tensor, side_px: int) -> tuple[int, int]:
    """Height and width of x [..., H, W] scaled to a shorter side of side_px, rounded to the nearest."""
    side = min(x.shape[-2:])
    height, width = ((2 * length * side_px + side) // (2 * side) for length in x.shape[-2:])
    return height, width


def zero_of(rows: Tensor) -> Tensor:
    """0 times the sum of rows, []: adds them to the autograd graph without changing any value."""
    return 0 * rows.float().sum()


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _init(net: nn.Module) -> None:
    """Convolutions from N(0, 2 / (k² · C_in)), biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _init_linear(layer: nn.Conv2d) -> None:
    """Initialises a map that preserves the mean square of signals: weights from N(0, 1 / C_in), biases 0."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
