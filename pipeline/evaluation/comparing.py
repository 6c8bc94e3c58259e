"""Compares two trained nets on the same images, under one policy each and at equal cost.

Source: McNemar (Psychometrika 1947) in its exact form: of the images that only one net gets right, under the null each
net is equally likely to be that one. Intervals are percentiles of a paired bootstrap over images (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.evaluation.frontier import dominated, merit
from pipeline.family import Evaluated, Report
from pipeline.figures import hits

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
AT_ONCE = 100  # resamples in memory
Hits = NDArray[np.float64]  # [N], how often an image is classified correctly, in 0..1: 0 or 1 for one policy
Rows = NDArray[np.int64]  # [N], of the split


@dataclass(frozen=True)
class Side:
    """One net under one policy: top-1 on the common images, mean MACs per image on its own images."""

    name: str
    policy: str
    top1: float
    macs: float


@dataclass(frozen=True)
class PairedTest:
    """A paired test of two policies on num_images.

    only_a, only_b: images that only one of them gets right. difference: a - b of top-1 in 0..1, with the interval
    low..high. p_value: McNemar's.
    """

    a: Side
    b: Side
    num_images: int
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class AtCost:
    """Both nets at the same mean MACs: top-1 in 0..1, and the difference a - b with its interval low..high."""

    macs: float
    top1_a: float
    top1_b: float
    difference: float
    low: float
    high: float


def policies(a: Evaluated, b: Evaluated, policy_a: str | None = None, policy_b: str | None = None) -> PairedTest:
    """Compares a policy of each net (None: its default) on the images in both evaluations.

    Raises ConfigError for an unknown policy, and if an evaluation has no answers by image.
    """
    report_a, report_b = report_of(a, policy_a, "--policy-a"), report_of(b, policy_b, "--policy-b")
    hits_a, hits_b = _common(answers(a, report_a.policy), answers(b, report_b.policy))
    only_a, only_b = int((hits_a > hits_b).sum()), int((hits_b > hits_a).sum())
    low, high = interval(hits_a - hits_b)
    return PairedTest(
        a=Side(a.name, report_a.policy, float(hits_a.mean()), report_a.macs_mean),
        b=Side(b.name, report_b.policy, float(hits_b.mean()), report_b.macs_mean),
        num_images=len(hits_a),
        only_a=only_a,
        only_b=only_b,
        difference=float((hits_a - hits_b).mean()),
        low=low,
        high=high,
        p_value=mcnemar(only_a, only_b),
    )


def at_equal_cost(a: Evaluated, b: Evaluated) -> list[AtCost]:
    """Compares the nets' frontiers at the cost of each policy on either one, from the cost that both can run at.

    Between two policies of its frontier a net runs one of them on a random share of the images, so that the mean cost
    is met: its top-1 is then on the line between them. Above its most expensive policy the curve is flat.
    """
    front_a, front_b = frontier_of(a), frontier_of(b)
    least = max(front_a[0].macs_mean, front_b[0].macs_mean)
    costs = sorted({report.macs_mean for report in (*front_a, *front_b) if report.macs_mean >= least})
    comparisons = []
    for macs in costs:
        hits_a, hits_b = _common(answers_at(a, front_a, macs), answers_at(b, front_b, macs))
        difference = hits_a - hits_b
        means = float(hits_a.mean()), float(hits_b.mean()), float(difference.mean())
        comparisons.append(AtCost(macs, *means, *interval(difference)))
    return comparisons


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided p that a and b are equally often the only one that is right; 1 if neither ever is."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def interval(differences: Hits) -> tuple[float, float]:
    """The bounds of the mean of differences [N], at LEVEL, over resampled images."""
    from scipy.stats import bootstrap

    if np.all(differences == differences[0]):  # every resample is the same
        return float(differences[0]), float(differences[0])
    bounds = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=AT_ONCE,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def report_of(net: Evaluated, policy: str | None, option: str) -> Report:
    """The report of a policy, by default the first one. Raises ConfigError with this option as its key."""
    by_name = {report.policy: report for report in net.reports}
    if policy is not None and policy not in by_name:
        raise ConfigError(
            f"policy {policy}: {net.name} was not evaluated under it, but under: {', '.join(by_name)}",
            key=option,
            subject=policy,
        )
    return net.reports[0] if policy is None else by_name[policy]


def frontier_of(net: Evaluated) -> list[Report]:
    """The undominated policies, cheapest first."""
    beaten = dominated([r.macs_mean for r in net.reports], [merit(r.kind, r.top1) for r in net.reports])
    best = [report for report, is_beaten in zip(net.reports, beaten, strict=True) if not is_beaten]
    return sorted(best, key=lambda report: report.macs_mean)


def answers(net: Evaluated, policy: str) -> tuple[Rows, Hits]:
    """(rows [N], hits [N]) of a policy. Raises ConfigError if there are no answers by image."""
    arrays = net.details(policy)
    if arrays is None:
        raise ConfigError(
            f"{net.name}: its evaluation has no answers by image for {policy}; make one here with `adaptnet evaluate`",
            key="evaluations",
            subject=f"{net.name} {policy}",
        )
    return arrays["rows"], hits(arrays)


def answers_at(net: Evaluated, frontier: Sequence[Report], macs: float) -> tuple[Rows, Hits]:
    """(rows [N], hits [N]) of the net at this mean cost, on its frontier."""
    cheaper = [report for report in frontier if report.macs_mean <= macs]
    more_expensive = [report for report in frontier if report.macs_mean > macs]
    rows, hits = answers(net, cheaper[-1].policy)
    if not more_expensive:
        return rows, hits
    share = (macs - cheaper[-1].macs_mean) / (more_expensive[0].macs_mean - cheaper[-1].macs_mean)
    other_rows, other_hits = answers(net, more_expensive[0].policy)
    assert np.array_equal(rows, other_rows)  # an evaluation runs every policy on the same images
    return rows, (1 - share) * hits + share * other_hits


def _common(a: tuple[Rows, Hits], b: tuple[Rows, Hits]) -> tuple[Hits, Hits]:
    """The hits of both on their common rows, in the same order."""
    _, places_a, places_b = np.intersect1d(a[0], b[0], assume_unique=True, return_indices=True)
    if len(places_a) == 0:
        raise ConfigError("the two evaluations have no image in common", key="evaluations")
    return a[1][places_a], b[1][places_b]
