"""Thresholds that meet a budget of MACs: an image exits at the first exit where its confidence reaches the threshold.

Letters: n held-out images, E exits. Shares of images per exit are geometric, P_k = q^k / Σ_j q^j, so that one number q
moves images between the first exit (q -> 0) and the last (q -> ∞). Source: Yang et al., CVPR 2020 (arXiv 2003.07326),
and the code released with it, which sweeps q; here q is solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, floor
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import meant
from pipeline.errors import ConfigError

FEWEST_MACS = 1000.0
LOG_Q = (-200.0, 200.0)  # where nearly all images exit at the first, or at the last exit
ROUNDING = 1e-6  # added before a number of images is rounded down, so that n/E survives floating-point error


def _a_budget(budget: float) -> str | None:
    if budget <= 1 or budget >= FEWEST_MACS:
        return None
    return "above 1 a budget is in MACs per image, as in 2e7; write a share of the whole net's as 0.5"


Budget = Annotated[float, Field(gt=0, le=1e15), meant(_a_budget)]  # above 1: MACs per image, else a share


def budget_name(budget: float) -> str:
    """E.g. budget-0.5 for half of the full net, budget-20M for 20 million MACs per image."""
    return f"budget-{budget:g}" if budget <= 1 else f"budget-{budget / 1e6:g}M"


def each_once(budgets: Sequence[float]) -> None:
    """Raises ValueError if two budgets have the same name."""
    if len({budget_name(budget) for budget in budgets}) < len(budgets):
        raise ValueError(f"budgets (={list(budgets)}): each may occur once")


def shares(log_q: float, num_exits: int) -> list[float]:
    """The share of the images that exit at each exit, [E], summing to 1."""
    powers = [log_q * k for k in range(num_exits)]
    weights = [exp(power - max(powers)) for power in powers]
    return [weight / sum(weights) for weight in weights]


def solve(budget: float, costs: Sequence[float]) -> float:
    """log q at which the expected cost is `budget`; costs [E], rising: the MACs of an image that exits at each exit.

    Raises ConfigError if the budget is outside the range of the costs.
    """
    if not costs[0] <= budget <= costs[-1]:
        raise ConfigError(
            f"family.budgets: {budget / 1e6:.6g} million MACs per image cannot be met; this net takes between "
            f"{costs[0] / 1e6:.6g} (all images at the first exit) and {costs[-1] / 1e6:.6g} (all at the last), as "
            f"shares {costs[0] / costs[-1]:.3g} to 1",
            key="family.budgets",
            subject=f"{budget:g}",
        )
    low, high = LOG_Q
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle, costs) < budget else (low, middle)
    return (low + high) / 2


def lowered(log_q: float, budget: float, spent: Callable[[float], float]) -> float:
    """The largest log q up to `log_q` at which the measured mean cost, spent(log q), is at most `budget`.

    The measured cost exceeds the expected one because batches carry along images that have exited; it is lower if no
    image can exit at some classifier, which then does not run.
    """
    if spent(log_q) <= budget:
        return log_q
    low, high = LOG_Q[0], log_q
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    return low


def expected(log_q: float, costs: Sequence[float]) -> float:
    """Mean cost of an image with the shares of images per exit that q gives."""
    return sum(share * cost for share, cost in zip(shares(log_q, len(costs)), costs, strict=True))


def thresholds(confidences: Tensor, wanted: Sequence[float]) -> list[float | None]:
    """The confidence from which an image exits at each exit but the last, [E - 1]; None: no image exits there.

    confidences [n, E] f32; wanted [E], the share of all n images that should exit at each exit. Exit by exit, the
    least confident image of its share sets the threshold, and all images that reach it exit. Ties exit too, so an exit
    may take more than its share and too few images may remain for a later one. In that case, and if the share is less
    than one image, no image exits.
    Source: the rule of the released code, which reproduces its numbers.
    """
    left = torch.ones(len(confidences), dtype=torch.bool)
    chosen: list[float | None] = []
    for exit_, share in enumerate(wanted[:-1]):
        count = floor(len(confidences) * share + ROUNDING)
        ranked = confidences[left, exit_].sort(descending=True).values
        if not 0 < count <= len(ranked):
            chosen.append(None)
            continue
        threshold = float(ranked[count - 1])
        chosen.append(threshold)
        left &= confidences[:, exit_] < threshold
    return chosen
