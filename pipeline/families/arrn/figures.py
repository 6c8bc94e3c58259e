"""ARRN's own pictures: accuracy, time and MACs against the resolution of the images, and what dropout does to them.

A way is how a net takes images of fewer pixels: skipping residuals or running all of them; of the baselines that are
shown beside it, natively or made small and large again, as the paper feeds them.
Source: Demeule et al., arXiv 2412.06195.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.families.arrn.config import ArrnConfig
from pipeline.family import Evaluated, Latency, Report
from pipeline.figures import Cell, Figure, Lines, Number, Series, Table

SKIPPING, ALL = "skipping", "all residuals"
NATIVE, UP_AGAIN = "natively", "down and up"
WAYS: Mapping[str, Mapping[str, tuple[str, bool]]] = {  # by family: the setting of its "resolution" policies
    "arrn": {SKIPPING: ("full", False), ALL: ("full", True)},
    "baseline": {NATIVE: ("up_again", False), UP_AGAIN: ("up_again", True)},
}


@dataclass(frozen=True)
class ResolutionCurve:
    """A net's reports by the side of the images in pixels, the finest first, under one way to take smaller ones."""

    net: Evaluated
    kind: str
    reports: Mapping[int, Report]


def figures(mine: Sequence[Evaluated], others: Sequence[Evaluated]) -> list[Figure]:
    ways = [way for net in (*mine, *others) for way in _ways(net)]
    if not any(way.net in mine for way in ways):
        return []
    named = _names(ways)
    found = [_accuracy(ways, named), _time(ways, named), _macs(ways, named), _totals(ways), _dropout(mine)]
    return [figure for figure in found if figure is not None]


def _ways(net: Evaluated) -> Iterable[ResolutionCurve]:
    """Those under which the net was evaluated at two resolutions at least."""
    for kind, (setting, value) in WAYS.get(net.family, {}).items():
        finest = _finest(net)
        found = {min(net.side_px, finest[0]): finest[1]} if finest else {}
        for report in net.reports:
            if report.kind == "resolution" and report.settings.get(setting) == value:
                found.setdefault(min(net.side_px, int(report.settings["side_px"])), report)
        if len(found) > 1:
            yield ResolutionCurve(net, kind, dict(sorted(found.items(), reverse=True)))


def _finest(net: Evaluated) -> tuple[int, Report] | None:
    """The policy that takes images as they come, which belongs to both ways, and its side."""
    side, settings = net.side_px, dict[str, object]()
    if isinstance(net.config, ArrnConfig):
        side = net.config.plan.ladder[0]
        settings = {"side_px": side, "full": False}
    wanted = (report for report in net.reports if report.kind == "resolution" and report.settings == settings)
    return next(((side, report) for report in wanted), None)


def _names(ways: Sequence[ResolutionCurve]) -> list[str]:
    several = len({way.net.name for way in ways}) > 1
    return [f"{way.net.name}: {way.kind}" if several else way.kind for way in ways]


def _images(ways: Sequence[ResolutionCurve]) -> str:
    return f"{ways[0].net.reports[0].num_images:,} images"


# ---- against resolution


def _accuracy(ways: Sequence[ResolutionCurve], named: Sequence[str]) -> Lines:
    return Lines(
        name="arrn-accuracy-by-resolution",
        title="Accuracy against input resolution",
        caption=f"Top-1 on {_images(ways)}, reduced to each resolution{_fed(ways)}. Where skipping and all residuals "
        "lie on one another, skipping changes nothing.",
        x_label="side of the image in pixels",
        y_label="top-1",
        series=_series(ways, named, lambda report: report.top1),
    )


def _time(ways: Sequence[ResolutionCurve], named: Sequence[str]) -> Lines | None:
    how = _measured(ways)
    if how is None:
        return None
    device, threads, batch = how
    timed = {name: way for way, name in zip(ways, named, strict=True) if how in _latencies(way)}
    return Lines(
        name="arrn-time-by-resolution",
        title="Time against input resolution",
        caption=f"Milliseconds per image, their reduction included: the median of passes of {batch} images on {device} "
        f"with {threads} threads.",
        x_label="side of the image in pixels",
        y_label="ms per image",
        series=_series([*timed.values()], [*timed], lambda report: _ms(report, how)),
    )


def _macs(ways: Sequence[ResolutionCurve], named: Sequence[str]) -> Lines:
    return Lines(
        name="arrn-macs-by-resolution",
        title="MACs against input resolution",
        caption=f"What an image costs at each resolution{_fed(ways)}, the reduction by the net's own filters included; "
        f"the mean over {_images(ways)}.",
        x_label="side of the image in pixels",
        y_label="million MACs per image",
        series=_series(ways, named, lambda report: report.macs_mean / 1e6),
    )


def _fed(ways: Sequence[ResolutionCurve]) -> str:
    beside = any(way.net.family != "arrn" for way in ways)
    return "; baselines take them natively, or made small and large again" if beside else ""


def _series(ways: Sequence[ResolutionCurve], named: Sequence[str], value: Callable[[Report], Number]) -> list[Series]:
    return [
        Series(
            name,
            [float(side) for side in way.reports],
            [value(report) for report in way.reports.values()],
            [report.policy for report in way.reports.values()],
        )
        for way, name in zip(ways, named, strict=True)
    ]


How = tuple[str, int, int]  # device, threads, batch


def _latencies(way: ResolutionCurve) -> set[How]:
    """How the latency of all of its reports was measured."""
    each = [{_how(entry) for entry in report.latency} for report in way.reports.values()]
    return set.intersection(*each)


def _how(entry: Latency) -> How:
    return entry.device, entry.threads, entry.batch


def _measured(ways: Sequence[ResolutionCurve]) -> How | None:
    """The largest batch that all ways of this family were timed with on one device; None where there is none."""
    common = set.intersection(*(_latencies(way) for way in ways if way.net.family == "arrn"))
    return max(common, key=lambda how: (how[2], how), default=None)


def _ms(report: Report, how: How) -> float | None:
    found = [entry.median_ms / entry.batch for entry in report.latency if _how(entry) == how]
    return found[0] if found else None


# ---- over all resolutions


def _totals(ways: Sequence[ResolutionCurve]) -> Table | None:
    """Over the resolutions that all ways share, so that the sums are of the same images; those that share less than
    two with the family's nets are left out.
    """
    sides = _common(ways)
    if len(sides) < 2:
        return None
    shared = [way for way in ways if sides <= set(way.reports)]
    how = _measured(ways)
    rows: list[list[Cell]] = []
    for way in shared:
        reports = [report for side, report in way.reports.items() if side in sides]
        times = [_ms(report, how) if how else None for report in reports]
        rows.append(
            [
                way.net.name,
                way.kind,
                fmean(report.top1 for report in reports),
                sum(report.macs_mean for report in reports) / 1e6,
                None if None in times else sum(time for time in times if time is not None),
            ]
        )
    timed = f"; times are of passes of {how[2]} images on {how[0]} with {how[1]} threads" if how else ""
    return Table(
        name="arrn-over-all-resolutions",
        title="Over all resolutions",
        caption=f"Top-1 in the mean, MACs and time in the sum over {_listed(sides)} px, on {_images(ways)} at "
        f"each{timed}.",
        columns=["net", "way", "mean top-1", "million MACs per image, summed", "ms per image, summed"],
        rows=rows,
    )


def _common(ways: Sequence[ResolutionCurve]) -> set[int]:
    own = set.intersection(*(set(way.reports) for way in ways if way.net.family == "arrn"))
    beside = [own & set(way.reports) for way in ways if way.net.family != "arrn"]
    return set.intersection(own, *(sides for sides in beside if len(sides) > 1))


def _dropout(mine: Sequence[Evaluated]) -> Table | None:
    """Skipping or not, with and without Laplacian dropout: in the mean over the resolutions below the finest."""
    ways = [way for net in mine for way in _ways(net)]
    if {_dropped(way.net) for way in ways} != {True, False} or {way.kind for way in ways} != {SKIPPING, ALL}:
        return None
    sides = set.intersection(*(set(list(way.reports)[1:]) for way in ways))
    if not sides:
        return None
    means: dict[str, dict[str, float]] = {}
    for way in ways:
        means.setdefault(way.net.name, {})[way.kind] = fmean(way.reports[side].top1 for side in sides)
    rows: list[list[Cell]] = [
        ["with" if _dropped(net) else "without", net.name, means[net.name].get(SKIPPING), means[net.name].get(ALL)]
        for net in sorted(mine, key=_dropped, reverse=True)
        if net.name in means
    ]
    return Table(
        name="arrn-dropout-and-skipping",
        title="Laplacian dropout and skipping",
        caption=f"Mean top-1 over {_listed(sides)} px on {_images(ways)} at each. Nets that are to be compared "
        "should differ in their dropout alone.",
        columns=["Laplacian dropout", "net", f"top-1, {SKIPPING}", f"top-1, {ALL}"],
        rows=rows,
    )


def _dropped(net: Evaluated) -> bool:
    assert isinstance(net.config, ArrnConfig)
    return any(net.config.probabilities)


def _listed(sides: Iterable[int]) -> str:
    return ", ".join(str(side) for side in sorted(sides, reverse=True))
