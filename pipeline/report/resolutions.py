"""What `adaptnet evaluate --sides` found: accuracy against resolution, of nets of any family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.family import Evaluated, Report
from pipeline.figures import Cell, Figure, Lines, Series, Table
from pipeline.report.cells import NO, YES
from pipeline.report.general import TOP1

NAME = re.compile(r"(.+)@(\d+)px(-and-up)?")  # of a policy at a side: `robustness.ResizedPolicy.name`
MOST_LINES = 8  # of more ways to run nets, the first policy of each net is drawn


@dataclass(frozen=True)
class ResolutionCurve:
    """A net under one policy, its images reduced and, if `up_again`, brought back: reports by side in pixels."""

    net: Evaluated
    policy: str
    up_again: bool
    reports: dict[int, Report] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.net.name} · {self.policy}{' · up again' if self.up_again else ''}"


def resolutions(nets: Sequence[Evaluated]) -> list[Figure]:
    """Accuracy by side, drawn and as a table; nothing where no such evaluation is stored."""
    ways = [way for net in nets for way in _ways(net)]
    if not ways:
        return []
    first = {(way.net.name, way.up_again): way for way in reversed(ways)}
    drawn = ways if len(ways) <= MOST_LINES else [way for way in ways if way in first.values()]
    told = "" if drawn == ways else f" Of {len(ways)} ways to run these nets the first of each net is drawn."
    return [
        Lines(
            "accuracy-by-side",
            "Accuracy against resolution",
            "Images reduced to a side (bilinear, antialiased) before the net sees them, or reduced and brought back to "
            f"their own size (up again); the policies' thresholds stay as they are.{told}",
            "side of the images (px)",
            TOP1,
            [_series(way) for way in drawn],
        ),
        _table(ways),
    ]


def _ways(net: Evaluated) -> Iterator[ResolutionCurve]:
    """In the order of the net's policies, each with the images' own side beside the lower ones."""
    own = {report.policy: report for report in net.reports}
    found: dict[tuple[str, bool], ResolutionCurve] = {}
    for reports in net.swept.values():
        for report in reports:
            match = NAME.fullmatch(report.policy)
            if match is None or match[1] not in own:
                continue
            key = (match[1], match[3] is not None)
            way = found.setdefault(key, ResolutionCurve(net, *key, {net.side_px: own[match[1]]}))
            way.reports[int(match[2])] = report
    order = list(own)
    yield from sorted(found.values(), key=lambda way: (order.index(way.policy), way.up_again))


def _series(way: ResolutionCurve) -> Series:
    sides = sorted(way.reports)
    top1 = [100 * way.reports[side].top1 for side in sides]
    return Series(way.name, [float(side) for side in sides], top1, [f"{way.name} at {side} px" for side in sides])


def _table(ways: Sequence[ResolutionCurve]) -> Table:
    rows: list[list[Cell]] = [
        [way.net.name, way.policy, side, YES if way.up_again else NO, 100 * report.top1, report.macs_mean / 1e6]
        for way in ways
        for side, report in sorted(way.reports.items(), reverse=True)
    ]
    columns = ["net", "policy", "side (px)", "up again", TOP1, "MMACs mean"]
    return Table("policies-by-side", "Each policy at each side", "", columns, rows)
