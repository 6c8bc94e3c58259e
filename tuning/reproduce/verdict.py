"""The rule of the verdict: where the 95 % interval of a difference lies, seen from the threshold.

An interval is that of `over_seeds.over_both`, over seeds and images; of figures that have one value for each seed, over
seeds. Letters: S seeds, N images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation import over_seeds
from pipeline.evaluation.over_seeds import Spread, spread

ClaimVerdict = Literal["confirmed", "refuted", "not resolved"]
Values = NDArray[np.float64]  # [S, N]; [S, 1] for one value of each seed


@dataclass(frozen=True)
class MeasuredDifference:
    """a - b over `seeds`: the spreads of both sides over seeds, and low..high, None for fewer than two seeds."""

    seeds: tuple[int, ...]
    num_images: int
    a: Spread
    b: Spread
    difference: float
    low: float | None = None
    high: float | None = None


def difference(seeds: tuple[int, ...], a: Values, b: Values) -> MeasuredDifference:
    """The difference of a and b, [S, N] each, of the same seeds and images."""
    means = [spread(side.mean(axis=1).tolist()) for side in (a, b)]
    found = MeasuredDifference(seeds, a.shape[1], means[0], means[1], float(a.mean() - b.mean()))
    if len(seeds) < 2:
        return found
    of_both = over_seeds.over_both if a.shape[1] > 1 else over_seeds.over_seeds
    estimate = of_both(a, b, paired=True)
    return MeasuredDifference(seeds, a.shape[1], means[0], means[1], found.difference, estimate.low, estimate.high)


def judge(
    found: MeasuredDifference | None, *, more_than: float | None = None, less_than: float | None = None
) -> ClaimVerdict:
    """Confirmed if the interval lies wholly on the claimed side, refuted if wholly on the other, else not resolved.

    One of the thresholds is given. None, and a single seed, which has no interval, are never resolved.
    """
    if found is None or found.low is None or found.high is None:
        return "not resolved"
    if more_than is not None:
        above, below = found.low > more_than, found.high < more_than
    else:
        assert less_than is not None
        above, below = found.high < less_than, found.low > less_than
    return "confirmed" if above else "refuted" if below else "not resolved"


def overall(verdicts: Iterable[ClaimVerdict]) -> ClaimVerdict:
    """Of a claim: refuted if one of its statements is, confirmed if all are, else not resolved."""
    found = set(verdicts)
    if "refuted" in found:
        return "refuted"
    return "confirmed" if found == {"confirmed"} else "not resolved"
