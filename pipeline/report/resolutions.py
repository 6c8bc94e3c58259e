"""Accuracy against resolution, as evaluated by `adaptnet evaluate --sides`, for nets of any family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.evaluation.robustness import RESIZED
from pipeline.family import Evaluated, Report
from pipeline.figures import Cell, Figure, Lines, Series, Table
from pipeline.report.cells import NO, YES
from pipeline.report.general import TOP1

MOST_LINES = 8  # above this number of curves, only those of each net's first policy are drawn


@dataclass(frozen=True)
class AccuracyBySide:
    """A net under one policy at several resolutions.

    up_again: the images are reduced and brought back to their own side. reports {side in pixels: report}.
    """

    net: Evaluated
    policy: str
    up_again: bool
    reports: dict[int, Report] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name, e.g. "resnet50 · native · up again"."""
        return f"{self.net.name} · {self.policy}{' · up again' if self.up_again else ''}"


def resolutions(nets: Sequence[Evaluated]) -> list[Figure]:
    """Accuracy by side as a picture and a table; empty if no such evaluation is stored."""
    curves = [curve for net in nets for curve in _curves(net)]
    if not curves:
        return []
    first = {(curve.net.name, curve.up_again): curve for curve in reversed(curves)}
    drawn = curves if len(curves) <= MOST_LINES else [curve for curve in curves if curve in first.values()]
    omitted = "" if drawn == curves else f" Of {len(curves)} curves, those of each net's first policy are drawn."
    return [
        Lines(
            "accuracy-by-side",
            "Accuracy against resolution",
            "Images are reduced to each side (bilinear, antialiased) before the net sees them, or reduced and brought "
            f"back to their own size (up again). The policies keep their thresholds.{omitted}",
            "side of the images (px)",
            TOP1,
            [_series(curve) for curve in drawn],
        ),
        _table(curves),
    ]


def _curves(net: Evaluated) -> Iterator[AccuracyBySide]:
    """The curves in the order of the net's policies; each includes the images' own side and the lower ones."""
    own = {report.policy: report for report in net.reports}
    curves: dict[tuple[str, bool], AccuracyBySide] = {}
    for report in (report for reports in net.swept.values() for report in reports):
        policy, up_again = str(report.settings.get("policy")), bool(report.settings.get("up_again"))
        if report.kind == RESIZED and policy in own:
            new = AccuracyBySide(net, policy, up_again, {net.side_px: own[policy]})
            curve = curves.setdefault((policy, up_again), new)
            curve.reports[int(report.settings["side_px"])] = report
    order = list(own)
    yield from sorted(curves.values(), key=lambda curve: (order.index(curve.policy), curve.up_again))


def _series(curve: AccuracyBySide) -> Series:
    sides = sorted(curve.reports)
    top1 = [100 * curve.reports[side].top1 for side in sides]
    return Series(curve.name, [float(side) for side in sides], top1, [f"{curve.name} at {side} px" for side in sides])


def _table(curves: Sequence[AccuracyBySide]) -> Table:
    rows: list[list[Cell]] = [
        [
            curve.net.name,
            curve.policy,
            side,
            YES if curve.up_again else NO,
            100 * report.top1,
            report.macs_mean / 1e6,
        ]
        for curve in curves
        for side, report in sorted(curve.reports.items(), reverse=True)
    ]
    columns = ["net", "policy", "side (px)", "up again", TOP1, "MMACs mean"]
    return Table("policies-by-side", "Each policy at each side", "", columns, rows)
