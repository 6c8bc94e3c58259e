"""Thresholds that make a net keep to a budget: images leave at the first exit whose confidence reaches its threshold.

Letters: n held-out images, E exits. Shares of images per exit are geometric, P_k = q^k / Σ_j q^j, so that one number q
moves the net between its first exit (q -> 0) and its last (q -> ∞). Source: Yang et al., CVPR 2020 (arXiv 2003.07326),
and the code released with it, which sweeps q; here q is solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, floor

import torch
from torch import Tensor

from pipeline.errors import ConfigError

LOG_Q = (-200.0, 200.0)  # where all but nothing leaves at the first, or at the last exit
ROUNDING = 1e-6  # added before a share of images is rounded down, so that n/E is not lost to binary fractions


def shares(log_q: float, num_exits: int) -> list[float]:
    """The share of the images that leaves at each exit, [E], summing to 1."""
    powers = [log_q * k for k in range(num_exits)]
    weights = [exp(power - max(powers)) for power in powers]
    return [weight / sum(weights) for weight in weights]


def solve(budget: float, costs: Sequence[float]) -> float:
    """log q at which the expected cost is `budget`; costs [E], rising, of an image that leaves at each exit.

    Raises ConfigError where the budget lies outside the costs.
    """
    if not costs[0] <= budget <= costs[-1]:
        raise ConfigError(
            f"family.budgets: {budget / 1e6:.6g} million MACs per image are out of reach; this net spends between "
            f"{costs[0] / 1e6:.6g} (all images at the first exit) and {costs[-1] / 1e6:.6g} (all at the last), as "
            f"shares {costs[0] / costs[-1]:.3g} to 1"
        )
    low, high = LOG_Q
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle, costs) < budget else (low, middle)
    return (low + high) / 2


def lowered(log_q: float, budget: float, spent: Callable[[float], float]) -> float:
    """log q, or a smaller one whose images cost no more than `budget` in the mean: spent(log q).

    What batches carry along is above what is expected; classifiers that no image can leave by are below it.
    """
    if spent(log_q) <= budget:
        return log_q
    low, high = LOG_Q[0], log_q
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    return low


def expected(log_q: float, costs: Sequence[float]) -> float:
    """Mean cost of an image under the shares of q."""
    return sum(share * cost for share, cost in zip(shares(log_q, len(costs)), costs, strict=True))


def thresholds(confidences: Tensor, wanted: Sequence[float]) -> list[float | None]:
    """The confidence from which an image leaves at each exit but the last, [E - 1]; None: none leaves there.

    confidences [n, E] f32; wanted [E], the share of all n images that each exit is to take. Exit by exit, the least
    confident of the images it takes sets its threshold, and all that reach it leave: ties too, so that an exit may
    take more than its share and a later one find too few images left. Then, and where the share is less than one
    image, none leaves; this is the released code's rule, kept for its numbers.
    """
    left = torch.ones(len(confidences), dtype=torch.bool)
    found: list[float | None] = []
    for exit_, share in enumerate(wanted[:-1]):
        count = floor(len(confidences) * share + ROUNDING)
        ranked = confidences[left, exit_].sort(descending=True).values
        if not 0 < count <= len(ranked):
            found.append(None)
            continue
        threshold = float(ranked[count - 1])
        found.append(threshold)
        left &= confidences[:, exit_] < threshold
    return found
