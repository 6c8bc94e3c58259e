"""The shape of a net as a pure function of its alphas: factors, sides in pixels, limit, and weights of two branches.

An adaptor combines a branch of half its input's side and a branch of the whole side, both resized to a learned size:
y = (1 - b) · R(half) + b · R(whole), with b = sigmoid(alpha) unless a limit acts. Letters: N adaptors, H×W pixels.
Source: Liu et al., ECCV 2020 (arXiv 2008.00892). Differences from the released code: there is no state on
functions, so that a process can hold any number of nets; the running length starts at each image's own height and
width, not at a declared side, so that small and non-square images keep their shape; the penalty is computed from the
present alphas (there from those of the previous forward); the alphas are read once per update (there twice per adaptor
and forward).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.compat.torch import version_of

SMALLER, LARGER = 0.5, 1.0  # factors of the two branches
EPSILON = 1e-4  # initial alphas of an unreachable target start at ln EPSILON

Size = tuple[int, int]  # height, width
Rule = Literal["local", "global"]


@dataclass(frozen=True)
class Rules:
    """How alphas become sizes and weights; constant once a net is built.

    fixed [N]: the factor by which the fixed layers between the previous adaptor and this one multiply the side.
    residual [N]: whether the two weights sum to 2, as in a residual cell (which at alpha = 0 is then the ordinary
    residual sum), instead of 1.
    """

    fixed: tuple[float, ...]
    residual: tuple[bool, ...]
    rule: Rule = "local"
    limit_px: int | None = None


@dataclass(frozen=True)
class ShapePlan:
    """The penalty in (0, 1] and the output size of each adaptor, [N]; plain numbers, so a forward reads no tensor."""

    penalty: float
    sizes: tuple[Size, ...]

    @property
    def sides_px(self) -> tuple[int, ...]:
        """The longer side of each adaptor's output, [N]."""
        return tuple(max(size) for size in self.sizes)


def factor(alpha: float) -> float:
    """The factor by which an adaptor multiplies the side, without a limit: from 1/2 to 1, 3/4 at alpha = 0.

    NaN counts as 1/2: the weights and so the loss are NaN then, and training reports where it diverged.
    """
    sigmoid = 0.5 * (1 + math.tanh(alpha / 2))
    return SMALLER if math.isnan(alpha) else SMALLER + (LARGER - SMALLER) * sigmoid


def plan(alphas: Sequence[float], size: Size, rules: Rules) -> ShapePlan:
    """The plan for images of `size`; a pure function of its arguments."""
    factors = [factor(alpha) for alpha in alphas]
    p = penalty(factors, max(size), rules)
    shrunk = [p * s for s in factors]
    heights, widths = (sides(length, shrunk, rules) for length in size)
    return ShapePlan(p, tuple(zip(heights, widths, strict=True)))


def penalty(factors: Sequence[float], side_px: int, rules: Rules) -> float:
    """p, equal for all adaptors, with side · Π (p · s) = limit; 1 if the last side is below the limit without it.

    It limits the last side only, not the sides before it, so it does not limit memory. If p · s is below 1/2, b is
    outside [0, 1]. side_px is the longer side of the image.
    """
    length = side_px * math.prod(factors) * math.prod(rules.fixed)
    if rules.limit_px is None or length < rules.limit_px:
        return 1.0
    return float((rules.limit_px / length) ** (1 / len(factors)))


def sides(side_px: int, factors: Sequence[float], rules: Rules) -> list[int]:
    """The side after each adaptor, [N], at least 1.

    Rule "local" truncates the running length at each adaptor, so that each loses at least one pixel. Rule "global"
    keeps the running length real and rounds only the results (half to even).
    """
    length: float = side_px
    found = []
    for fixed, s in zip(rules.fixed, factors, strict=True):
        length = length * fixed * s
        if rules.rule == "local":
            length = math.trunc(length)
        found.append(max(1, round(length)))
    return found


def blend(alphas: Tensor, p: float) -> Tensor:
    """b, the weight of the larger branch before doubling, [N], such that 1/2 + b/2 is p times the factor of alpha.

    No gradient flows through p or the sizes: dL/dalpha = p · sigmoid'(alpha) · <dL/dy, R(whole) - R(half)>.
    """
    return torch.sigmoid(alphas) * p + SMALLER / (LARGER - SMALLER) * (p - 1)


def weights(alphas: Tensor, p: float, total: Tensor) -> Tensor:
    """Weights [N, 2] of the smaller and the larger branch; they sum to `total` [N], 2 in residual cells, else 1."""
    b = blend(alphas, p)
    return torch.stack([total * (1 - b), total * b], dim=1)


def initial_alpha(side_px: int, target_px: int, adaptors: int) -> float:
    """The alpha with which equal adaptors lead from `side_px` to `target_px` before truncation.

    ln EPSILON, where the gradient is almost zero, if halving at every adaptor does not reach the target.
    Source: the released code, which returns NaN if the target is not below the side.
    """
    assert target_px < side_px
    if side_px * SMALLER**adaptors > target_px:
        return math.log(EPSILON)
    q = (target_px / side_px) ** (1 / adaptors)
    return math.log((q - SMALLER) / (LARGER - q) + EPSILON)


@dataclass(frozen=True)
class _Reading:
    """The values of the alphas read from a tensor at one version, and the plans computed from them."""

    alphas: Tensor
    version: int | None
    values: tuple[float, ...]
    plans: dict[Size, ShapePlan] = field(default_factory=dict)


class Shape(nn.Module):
    """Owns the alphas [N] (None in a net of fixed shape) and computes each plan once per update of them.

    The alphas stay in fp32 when the net is cast to a shorter type, because rounding them to bf16 changes sizes. Changes
    are detected by the tensor's version counter. Optimizers and load_state_dict increment it; writes through `.data`
    and torch's fused optimizers do not.
    """

    def __init__(self, alphas: Sequence[float], rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        values = tuple(float(np.float32(alpha)) for alpha in alphas)
        self.alphas = nn.Parameter(torch.tensor(values)) if values else None
        total = [2.0 if residual else 1.0 for residual in rules.residual]
        self.register_buffer("total", torch.tensor(total), persistent=False)
        self._reading: _Reading | None = None
        if self.alphas is not None:
            self._reading = _Reading(self.alphas, version_of(self.alphas), values)

    def plan(self, size: Size) -> ShapePlan:
        """The plan for images of `size`; reads the alphas, which waits for the device, only if they changed."""
        if self.alphas is None:
            return ShapePlan(1.0, ())
        reading = self._read(self.alphas)
        if size not in reading.plans:
            reading.plans[size] = plan(reading.values, size, self.rules)
        return reading.plans[size]

    def weights(self, p: float) -> Tensor:
        """The weights [N, 2] of the two branches in fp32 or fp64, differentiable in the alphas."""
        total = self.get_buffer("total")
        return total.new_empty(0, 2) if self.alphas is None else weights(self.alphas, p, total)

    def _read(self, alphas: Tensor) -> _Reading:
        known, version = self._reading, version_of(alphas)
        if known is None or known.alphas is not alphas or known.version != version or version is None:
            known = _Reading(alphas, version, tuple(alphas.detach().double().tolist()))
            self._reading = known
        return known

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Shape:
        def without_rounding(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device)

        super()._apply(without_rounding, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, object]:
        """A copy reads its alphas again, because its tensors have their own versions."""
        return {**self.__dict__, "_reading": None}
