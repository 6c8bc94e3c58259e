"""ARRN's own pictures: accuracy, time and MACs against the resolution of the images, and what dropout does to them.

A curve shows one way in which a net processes images of lower resolution. ARRN skips residuals or runs all of them;
the baselines beside it take the images natively, or reduced and enlarged again, as in the paper.
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
    """A net's reports by the side of the images in pixels, largest first, under one way of processing small ones."""

    net: Evaluated
    kind: str
    reports: Mapping[int, Report]


def figures(mine: Sequence[Evaluated], others: Sequence[Evaluated]) -> list[Figure]:
    """Accuracy, time and MACs by resolution of `mine` beside `others`, and the dropout control; empty without any."""
    curves = [curve for net in (*mine, *others) for curve in _curves(net)]
    if not any(curve.net in mine for curve in curves):
        return []
    names = _names(curves)
    found = [_accuracy(curves, names), _time(curves, names), _macs(curves, names), _totals(curves), _dropout(mine)]
    return [figure for figure in found if figure is not None]


def _curves(net: Evaluated) -> Iterable[ResolutionCurve]:
    """The curves of the ways in which the net was evaluated at two or more resolutions."""
    for kind, (setting, value) in WAYS.get(net.family, {}).items():
        finest = _finest(net)
        found = {min(net.side_px, finest[0]): finest[1]} if finest else {}
        for report in net.reports:
            if report.kind == "resolution" and report.settings.get(setting) == value:
                found.setdefault(min(net.side_px, int(report.settings["side_px"])), report)
        if len(found) > 1:
            yield ResolutionCurve(net, kind, dict(sorted(found.items(), reverse=True)))


def _finest(net: Evaluated) -> tuple[int, Report] | None:
    """The side and report of the policy that does not reduce the images; both of the net's curves contain it."""
    side, settings = net.side_px, dict[str, object]()
    if isinstance(net.config, ArrnConfig):
        side = net.config.plan.ladder[0]
        settings = {"side_px": side, "full": False}
    wanted = (report for report in net.reports if report.kind == "resolution" and report.settings == settings)
    return next(((side, report) for report in wanted), None)


def _names(curves: Sequence[ResolutionCurve]) -> list[str]:
    several = len({curve.net.name for curve in curves}) > 1
    return [f"{curve.net.name}: {curve.kind}" if several else curve.kind for curve in curves]


def _images(curves: Sequence[ResolutionCurve]) -> str:
    return f"{curves[0].net.reports[0].num_images:,} images"


# ---- against resolution


def _accuracy(curves: Sequence[ResolutionCurve], names: Sequence[str]) -> Lines:
    return Lines(
        name="arrn-accuracy-by-resolution",
        title="Accuracy against input resolution",
        caption=f"Top-1 on {_images(curves)}, reduced to each resolution{_baselines_note(curves)}. Where skipping and "
        "all residuals lie on one another, skipping changes nothing.",
        x_label="side of the image in pixels",
        y_label="top-1",
        series=_series(curves, names, lambda report: report.top1),
    )


def _time(curves: Sequence[ResolutionCurve], names: Sequence[str]) -> Lines | None:
    setup = _measured(curves)
    if setup is None:
        return None
    device, threads, batch = setup
    timed = {name: curve for curve, name in zip(curves, names, strict=True) if setup in _latencies(curve)}
    return Lines(
        name="arrn-time-by-resolution",
        title="Time against input resolution",
        caption=f"Milliseconds per image, their reduction included: the median of passes of {batch} images on {device} "
        f"with {threads} threads.",
        x_label="side of the image in pixels",
        y_label="ms per image",
        series=_series([*timed.values()], [*timed], lambda report: _ms(report, setup)),
    )


def _macs(curves: Sequence[ResolutionCurve], names: Sequence[str]) -> Lines:
    return Lines(
        name="arrn-macs-by-resolution",
        title="MACs against input resolution",
        caption=f"MACs of an image at each resolution{_baselines_note(curves)}, the reduction by the net's own filters "
        f"included; the mean over {_images(curves)}.",
        x_label="side of the image in pixels",
        y_label="million MACs per image",
        series=_series(curves, names, lambda report: report.macs_mean / 1e6),
    )


def _baselines_note(curves: Sequence[ResolutionCurve]) -> str:
    beside = any(curve.net.family != "arrn" for curve in curves)
    return "; baselines take them natively, or made small and large again" if beside else ""


def _series(curves: Sequence[ResolutionCurve], names: Sequence[str], value: Callable[[Report], Number]) -> list[Series]:
    return [
        Series(
            name,
            [float(side) for side in curve.reports],
            [value(report) for report in curve.reports.values()],
            [report.policy for report in curve.reports.values()],
        )
        for curve, name in zip(curves, names, strict=True)
    ]


Setup = tuple[str, int, int]  # device, threads, batch


def _latencies(curve: ResolutionCurve) -> set[Setup]:
    """The setups in which all reports of the curve were timed."""
    each = [{_setup(entry) for entry in report.latency} for report in curve.reports.values()]
    return set.intersection(*each)


def _setup(entry: Latency) -> Setup:
    return entry.device, entry.threads, entry.batch


def _measured(curves: Sequence[ResolutionCurve]) -> Setup | None:
    """The setup with the largest batch in which all curves of this family were timed; None without one."""
    common = set.intersection(*(_latencies(curve) for curve in curves if curve.net.family == "arrn"))
    return max(common, key=lambda setup: (setup[2], setup), default=None)


def _ms(report: Report, setup: Setup) -> float | None:
    found = [entry.median_ms / entry.batch for entry in report.latency if _setup(entry) == setup]
    return found[0] if found else None


# ---- over all resolutions


def _totals(curves: Sequence[ResolutionCurve]) -> Table | None:
    """Means and sums over the resolutions that all curves share, so that they are of the same images.

    Curves that share fewer than two resolutions with the family's nets are omitted.
    """
    sides = _common(curves)
    if len(sides) < 2:
        return None
    shared = [curve for curve in curves if sides <= set(curve.reports)]
    setup = _measured(curves)
    rows: list[list[Cell]] = []
    for curve in shared:
        reports = [report for side, report in curve.reports.items() if side in sides]
        times = [_ms(report, setup) if setup else None for report in reports]
        rows.append(
            [
                curve.net.name,
                curve.kind,
                fmean(report.top1 for report in reports),
                sum(report.macs_mean for report in reports) / 1e6,
                None if None in times else sum(time for time in times if time is not None),
            ]
        )
    timed = f"; times are of passes of {setup[2]} images on {setup[0]} with {setup[1]} threads" if setup else ""
    return Table(
        name="arrn-over-all-resolutions",
        title="Over all resolutions",
        caption=f"Top-1 in the mean, MACs and time in the sum over {_listed(sides)} px, on {_images(curves)} at "
        f"each{timed}.",
        columns=["net", "way", "mean top-1", "million MACs per image, summed", "ms per image, summed"],
        rows=rows,
    )


def _common(curves: Sequence[ResolutionCurve]) -> set[int]:
    own = set.intersection(*(set(curve.reports) for curve in curves if curve.net.family == "arrn"))
    beside = [own & set(curve.reports) for curve in curves if curve.net.family != "arrn"]
    return set.intersection(own, *(sides for sides in beside if len(sides) > 1))


def _dropout(mine: Sequence[Evaluated]) -> Table | None:
    """Skipping or not, with and without Laplacian dropout: the mean over the resolutions below the finest."""
    curves = [curve for net in mine for curve in _curves(net)]
    kinds = {curve.kind for curve in curves}
    if {_dropped(curve.net) for curve in curves} != {True, False} or kinds != {SKIPPING, ALL}:
        return None
    sides = set.intersection(*(set(list(curve.reports)[1:]) for curve in curves))
    if not sides:
        return None
    means: dict[str, dict[str, float]] = {}
    for curve in curves:
        means.setdefault(curve.net.name, {})[curve.kind] = fmean(curve.reports[side].top1 for side in sides)
    rows: list[list[Cell]] = [
        ["with" if _dropped(net) else "without", net.name, means[net.name].get(SKIPPING), means[net.name].get(ALL)]
        for net in sorted(mine, key=_dropped, reverse=True)
        if net.name in means
    ]
    return Table(
        name="arrn-dropout-and-skipping",
        title="Laplacian dropout and skipping",
        caption=f"Mean top-1 over {_listed(sides)} px on {_images(curves)} at each. Nets that are to be compared "
        "should differ in their dropout alone.",
        columns=["Laplacian dropout", "net", f"top-1, {SKIPPING}", f"top-1, {ALL}"],
        rows=rows,
    )


def _dropped(net: Evaluated) -> bool:
    assert isinstance(net.config, ArrnConfig)
    return any(net.config.probabilities)


def _listed(sides: Iterable[int]) -> str:
    return ", ".join(str(side) for side in sorted(sides, reverse=True))
