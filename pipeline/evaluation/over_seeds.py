"""Statistics over the seeds of a recipe: the spread of a figure, and a test of two recipes over seeds and images.

Two recipes were trained with several seeds each, and all nets answered the same images. Seeds and images are both
drawn from more that there could be, so both are random: with hits h [S, N] in 0..1, h[s, n] = mean + seed effect[s] +
image effect[n] + rest[s, n]. The variance of the mean over S and N is V = V_seed + V_image - V_rest, where
V_seed = var(means of the seeds) / S, V_image = var(means of the images) / N, and V_rest = var(rest) / (S N), which both
contain. The interval is that of t with Satterthwaite's degrees of freedom, V^2 / (V_seed^2 / (S - 1) + V_image^2 /
(N - 1)).

Source: the analysis of many readers and many cases, with seeds as readers and images as cases: Dorfman, Berbaum & Metz
(Investigative Radiology 1992), Hillis (Statistics in Medicine 2007) for the degrees of freedom; Satterthwaite
(Biometrics Bulletin 1946). A bootstrap over seeds and images (Owen, Annals of Applied Statistics 2007) estimates the
same V, but resamples of three seeds have no tails: its intervals are too short, which t corrects.

Letters: S seeds, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.evaluation.comparing import LEVEL, Rows, answers, answers_at, frontier_of, report_of
from pipeline.evaluation.frontier import dominated, merit
from pipeline.family import Evaluated

Table2D = NDArray[np.float64]  # [S, N], hits of each seed on each image


@dataclass(frozen=True)
class Spread:
    """A figure over n seeds: mean, standard deviation (over n - 1), and the t interval low..high of the mean.

    The last three are None for one seed.
    """

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SeedGroup:
    """Nets of one recipe, by rising seed."""

    name: str
    nets: Sequence[Evaluated]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(seed_of(net) for net in self.nets)


@dataclass(frozen=True)
class GroupSide:
    """A group under one policy: the spreads of top-1 in 0..1 on the common images and of the mean MACs."""

    name: str
    policy: str
    seeds: tuple[int, ...]
    top1: Spread
    macs: Spread


@dataclass(frozen=True)
class Estimate:
    """A difference a - b with its t interval low..high at LEVEL, degrees of freedom, and two-sided p.

    df is None if every seed and every image says the same: then nothing varies.
    """

    difference: float
    low: float
    high: float
    df: float | None
    p_value: float

    @property
    def resolution(self) -> float:
        """Half the interval: the smallest difference that differs from 0."""
        return (self.high - self.low) / 2

    @property
    def resolved(self) -> bool:
        """Whether the difference is above the resolution."""
        return self.p_value < 1 - LEVEL


@dataclass(frozen=True)
class GroupTest:
    """Two groups under one policy each, on num_images.

    paired: both have the same seeds, and the differences by seed are tested; else the groups' seeds are independent.
    over_seeds: for these images, only seeds are drawn. over_both: for new seeds and new images, which is the verdict.
    """

    a: GroupSide
    b: GroupSide
    num_images: int
    paired: bool
    over_seeds: Estimate
    over_both: Estimate


@dataclass(frozen=True)
class GroupAtCost:
    """Two groups at the same mean MACs: mean top-1 in 0..1 over seeds, and the difference over seeds and images."""

    macs: float
    top1_a: float
    top1_b: float
    over_both: Estimate


def in_words(a: SeedGroup, b: SeedGroup, found: Estimate, num_images: int) -> str:
    """The verdict on a difference a - b of top-1 as a sentence, in points (1 point is 0.01) +- half the interval."""
    counts = sorted({len(a.nets), len(b.nets)})
    seeds = " and ".join(map(str, counts))
    x, y = 100 * abs(found.difference), 100 * found.resolution
    if not found.resolved:
        return f"the difference of {x:.2f} points is below what {seeds} seeds resolve ({y:.2f} points)"
    better, worse = (a, b) if found.difference > 0 else (b, a)
    return (
        f"{better.name} is better than {worse.name} by {x:.2f} ± {y:.2f} points ({seeds} seeds, {num_images:,} images)"
    )


def spread(values: Sequence[float]) -> Spread:
    """The spread of a figure, one value for each seed."""
    mean = fmean(values)
    if len(values) == 1:
        return Spread(1, mean)
    sd = stdev(values)
    half = _quantile(len(values) - 1) * sd / sqrt(len(values))
    return Spread(len(values), mean, sd, mean - half, mean + half)


def seed_of(net: Evaluated) -> int:
    """The seed that the net was trained with."""
    return int(str(net.recipe.get("seed", 1)))


def policies(a: SeedGroup, b: SeedGroup, policy_a: str | None = None, policy_b: str | None = None) -> GroupTest:
    """Compares a policy of each group (None: its default) on the images that all nets were evaluated on.

    Raises ConfigError for an unknown policy, for a group of one seed, and if an evaluation has no answers by image.
    """
    _check(a, b)
    reports_a = [report_of(net, policy_a, "--policy-a") for net in a.nets]
    reports_b = [report_of(net, policy_b, "--policy-b") for net in b.nets]
    all_hits = _common(
        [
            *(answers(net, report.policy) for net, report in zip(a.nets, reports_a, strict=True)),
            *(answers(net, report.policy) for net, report in zip(b.nets, reports_b, strict=True)),
        ]
    )
    hits_a, hits_b = all_hits[: len(a.nets)], all_hits[len(a.nets) :]
    paired = a.seeds == b.seeds
    return GroupTest(
        a=_side(a, reports_a[0].policy, hits_a, [report.macs_mean for report in reports_a]),
        b=_side(b, reports_b[0].policy, hits_b, [report.macs_mean for report in reports_b]),
        num_images=all_hits.shape[1],
        paired=paired,
        over_seeds=over_seeds(hits_a, hits_b, paired=paired),
        over_both=over_both(hits_a, hits_b, paired=paired),
    )


def _side(group: SeedGroup, policy: str, hits: Table2D, macs: Sequence[float]) -> GroupSide:
    return GroupSide(group.name, policy, group.seeds, spread(hits.mean(axis=1).tolist()), spread(macs))


def at_equal_cost(a: SeedGroup, b: SeedGroup) -> list[GroupAtCost]:
    """Compares the groups at the mean cost of each policy on either frontier, from the cost at which every net can run.

    Each net is mixed from the policies of its own frontier, as in `comparing.at_equal_cost`.
    """
    _check(a, b)
    least = max(frontier_of(net)[0].macs_mean for net in (*a.nets, *b.nets))
    comparisons = []
    for macs in sorted({macs for group in (a, b) for macs in _costs(group) if macs >= least}):
        hits = _common([answers_at(net, frontier_of(net), macs) for net in (*a.nets, *b.nets)])
        hits_a, hits_b = hits[: len(a.nets)], hits[len(a.nets) :]
        both = over_both(hits_a, hits_b, paired=a.seeds == b.seeds)
        comparisons.append(GroupAtCost(macs, float(hits_a.mean()), float(hits_b.mean()), both))
    return comparisons


def _costs(group: SeedGroup) -> list[float]:
    """The mean costs over seeds of the policies that no other one of the group beats in the mean."""
    names = [name for name in _by_name(group.nets[0]) if all(name in _by_name(net) for net in group.nets)]
    macs = [fmean(_by_name(net)[name][0] for net in group.nets) for name in names]
    beaten = dominated(macs, [fmean(_by_name(net)[name][1] for net in group.nets) for name in names])
    return [cost for cost, is_beaten in zip(macs, beaten, strict=True) if not is_beaten]


def _by_name(net: Evaluated) -> dict[str, tuple[float, float]]:
    return {report.policy: (report.macs_mean, merit(report.kind, report.top1)) for report in net.reports}


def _check(*groups: SeedGroup) -> None:
    for group in groups:
        if len(group.nets) < 2:
            raise ConfigError(
                f"{group.name}: one seed has no spread; give at least two seeds of each recipe, or one net of each",
                key="source",
                subject=group.name,
            )


def over_seeds(a: Table2D, b: Table2D, *, paired: bool) -> Estimate:
    """The difference of the means over seeds, on these images: Student's t of the differences by seed if `paired`.

    Else Welch's t (Biometrika 1947). a, b [S, N] each.
    """
    samples = [(a - b).mean(axis=1)] if paired else [a.mean(axis=1), b.mean(axis=1)]
    variances = [float(each.var(ddof=1)) / len(each) for each in samples]
    parts = [(variance, len(each) - 1) for variance, each in zip(variances, samples, strict=True)]
    return _estimate(float(a.mean() - b.mean()), sum(variances), parts)


def over_both(a: Table2D, b: Table2D, *, paired: bool) -> Estimate:
    """The difference of the means over seeds and images: see the head of this file. a, b [S, N] each.

    If not `paired`, the groups' seeds are independent, and each group has a V_seed and a V_rest of its own.
    """
    samples = [a - b] if paired else [a, b]
    num_images = a.shape[1]
    parts = [(float(each.mean(axis=1).var(ddof=1)) / len(each), len(each) - 1) for each in samples]
    images = float((a.mean(axis=0) - b.mean(axis=0)).var(ddof=1)) / num_images
    rest = sum(_rest(each) for each in samples)
    seeds = sum(variance for variance, _ in parts)
    variance = max(seeds, images, seeds + images - rest)
    return _estimate(float(a.mean() - b.mean()), variance, [*parts, (images, num_images - 1)])


def _rest(hits: Table2D) -> float:
    """V_rest of one sample [S, N]."""
    seeds, images = hits.shape
    rest = hits - hits.mean(axis=1, keepdims=True) - hits.mean(axis=0, keepdims=True) + hits.mean()
    return float((rest**2).sum() / ((seeds - 1) * (images - 1) * seeds * images))


def _estimate(difference: float, variance: float, parts: Sequence[tuple[float, int]]) -> Estimate:
    """The t interval of a difference whose variance has these parts, each with its degrees of freedom."""
    from scipy.stats import t

    if variance == 0:
        return Estimate(difference, difference, difference, None, 0.0 if difference else 1.0)
    df = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    error = sqrt(variance)
    half = _quantile(df) * error
    return Estimate(difference, difference - half, difference + half, df, float(2 * t.sf(abs(difference) / error, df)))


def _quantile(df: float) -> float:
    """How many standard errors the interval reaches to each side."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, df))


def _common(answered: Sequence[tuple[Rows, NDArray[np.float64]]]) -> Table2D:
    """The hits of each net on the images that all have answered, [S, N] in the same order."""
    rows = reduce(np.intersect1d, [rows for rows, _ in answered])
    if len(rows) < 2:
        raise ConfigError("the evaluations have fewer than two images in common", key="evaluations")
    return np.stack([_in_order(own, hits, rows) for own, hits in answered])


def _in_order(own: Rows, hits: NDArray[np.float64], rows: Rows) -> NDArray[np.float64]:
    """The hits of images `own` at `rows`, which are among them."""
    order = np.argsort(own)
    found: NDArray[np.float64] = hits[order[np.searchsorted(own, rows, sorter=order)]]
    return found
