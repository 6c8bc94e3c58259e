"""What every report shows, whatever the family: the frontiers, the policies of each net, accuracy by class.

A point is a policy of a trained net with what it costs. Letters: K classes, P points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.evaluation.frontier import dominated
from pipeline.family import Evaluated, Latency, Report
from pipeline.figures import Cell, Figure, HeatMap, Lines, Series, Table, marks
from pipeline.report.cells import NO, YES

BASELINE = "baseline"  # the family of nets that always do the same
MOST_CLASSES = 60  # that are shown; of more, the worst and the best
WIDE = 8  # the dearest point costs so many times the cheapest: the axis is logarithmic
WAITED = 0.1  # share of time that threads may wait for a core before a latency is called doubtful
TOP1 = "top-1 (%)"


@dataclass(frozen=True)
class Point:
    """A policy of a net, and its cost in a frontier's unit."""

    net: Evaluated
    report: Report
    cost: float

    @property
    def name(self) -> str:
        return f"{self.net.name} · {self.report.policy}"


@dataclass(frozen=True)
class Frontier:
    """Points in one unit of cost, and which of them are dominated [P]."""

    points: Sequence[Point]
    beaten: Sequence[bool]

    def says(self, net: Evaluated, report: Report) -> str | None:
        """Whether a policy is dominated, in a word; None where it has no cost in this unit."""
        found = [beaten for p, beaten in zip(self.points, self.beaten, strict=True) if _same(p, net, report)]
        return (YES if found[0] else NO) if found else None


def _same(point: Point, net: Evaluated, report: Report) -> bool:
    return point.net is net and point.report is report


def frontier(points: Sequence[Point]) -> Frontier:
    return Frontier(points, dominated([p.cost for p in points], [p.report.top1 for p in points]))


def by_macs(nets: Sequence[Evaluated]) -> Frontier:
    return frontier([Point(net, report, report.macs_mean / 1e6) for net in nets for report in net.reports])


def by_latency(nets: Sequence[Evaluated], batch: int) -> Frontier:
    """Over those that were measured at this batch size."""
    return frontier(
        [Point(net, report, e.median_ms) for net in nets for report in net.reports for e in timed(report, batch)]
    )


def timed(report: Report, batch: int) -> Sequence[Latency]:
    """The report's latency at this batch size, if it was measured."""
    return [entry for entry in report.latency if entry.batch == batch][:1]


def batches(nets: Sequence[Evaluated]) -> list[int]:
    """The batch sizes at which latency was measured, rising."""
    return sorted({entry.batch for net in nets for report in net.reports for entry in report.latency})


# ---- accuracy against cost


def frontiers(nets: Sequence[Evaluated]) -> list[Figure]:
    """Accuracy against MACs and against the time of a pass, and the points between which one has to choose."""
    macs = by_macs(nets)
    told = (
        f"Each point is one policy of one net on the same {_images(nets)}. Faded points are dominated: another point "
        "is at least as accurate and costs at most as much. The dashed line joins the others. A baseline always does "
        "the same for every image."
    )
    found: list[Figure] = [_drawn(macs, "frontier-macs", "Accuracy against MACs", "MMACs per image", told)]
    for size in batches(nets):
        times, entries = by_latency(nets, size), _entries(nets, size)
        title = f"Accuracy against time, {size} image{'s' if size > 1 else ''} at once"
        label = f"ms per pass of {size}"
        found.append(_drawn(times, f"frontier-latency-{size}", title, label, _measured(entries, size)))
    return [*found, _to_choose(macs)]


def _images(nets: Sequence[Evaluated]) -> str:
    counts = sorted({report.num_images for net in nets for report in net.reports})
    return f"{counts[0]:,} images" if len(counts) == 1 else f"images ({counts[0]:,} to {counts[-1]:,} of them)"


def _drawn(found: Frontier, name: str, title: str, x_label: str, caption: str) -> Lines:
    costs = [point.cost for point in found.points]
    names = list(dict.fromkeys(point.net.name for point in found.points))
    series = [_line(found), *(_series(found, net) for net in names)]
    wide = bool(costs) and min(costs) > 0 and max(costs) > WIDE * min(costs)
    return Lines(name, title, caption, x_label, TOP1, series, log_x=wide)


def _line(found: Frontier) -> Series:
    """Through the points that nothing beats, cheapest first."""
    best = sorted(_unbeaten(found), key=lambda point: point.cost)
    return Series(
        name="not dominated",
        x=[point.cost for point in best],
        y=[100 * point.report.top1 for point in best],
        texts=[point.report.policy for point in best],
        reference=True,
    )


def _unbeaten(found: Frontier) -> list[Point]:
    return [point for point, beaten in zip(found.points, found.beaten, strict=True) if not beaten]


def _series(found: Frontier, name: str) -> Series:
    mine = [(p, beaten) for p, beaten in zip(found.points, found.beaten, strict=True) if p.net.name == name]
    family = mine[0][0].net.family
    kind = "iso-cost baseline" if family == BASELINE else family
    return Series(
        name=name if kind in name else f"{name} ({kind})",
        x=[point.cost for point, _ in mine],
        y=[100 * point.report.top1 for point, _ in mine],
        texts=[point.name for point, _ in mine],
        faded=[beaten for _, beaten in mine],
        joined=False,
        group=family,
    )


def _to_choose(found: Frontier) -> Table:
    best = sorted(_unbeaten(found), key=lambda point: point.cost)
    rows = [_row(point) for point in best]
    caption = "The points of the first picture that nothing beats, the cheapest first: choose one of these."
    return Table("frontier-points", "The choice", caption, ["net", "policy", TOP1, "MMACs mean", "% of full"], rows)


def _row(point: Point) -> list[Cell]:
    report = point.report
    return [point.net.name, report.policy, 100 * report.top1, report.macs_mean / 1e6, 100 * report.relative_macs]


def _entries(nets: Sequence[Evaluated], size: int) -> list[Latency]:
    return [entry for net in nets for report in net.reports for entry in timed(report, size)]


def _measured(entries: Sequence[Latency], size: int) -> str:
    """How a latency was measured, and whether to trust it."""
    places = _listed(f"{e.device} with {e.threads} thread{'s' if e.threads > 1 else ''}" for e in entries)
    text = (
        f"Median time of one pass over {size} image{'s' if size > 1 else ''} on {places}, after one pass to warm up; "
        "the policies of a net take turns, and the device is waited for. "
    )
    text += f"The slowest of twenty passes took up to {_spread(entries):.1f} times the median; "
    waited = max(entry.waited_share for entry in entries)
    text += f"threads waited up to {100 * waited:.0f} % of the time for a core"
    text += ": a busy machine, measure again." if waited > WAITED else "."
    if len({(entry.device, entry.threads) for entry in entries}) > 1:
        text += " Not all nets were measured on the same device with as many threads: their times do not compare."
    return text


def _spread(entries: Sequence[Latency]) -> float:
    return max(entry.p95_ms / entry.median_ms for entry in entries)


def _listed(words: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(words))


# ---- numbers of each policy


def all_policies(nets: Sequence[Evaluated]) -> Table:
    """One row per policy of each net, of all nets together: policies.csv."""
    sizes = batches(nets)
    macs, times = by_macs(nets), {size: by_latency(nets, size) for size in sizes}
    columns = ["net", "family", "policy", TOP1, "top-5 (%)", "ECE", "MMACs mean", "MMACs p95", "% of full"]
    columns += [text for size in sizes for text in (f"ms @{size} median", f"ms @{size} p95")]
    columns += ["dominated", *(f"dominated @{size}" for size in sizes), "images"]
    rows = []
    for net in nets:
        for report in net.reports:
            verdicts = [found.says(net, report) for found in (macs, *times.values())]
            rows.append([net.name, net.family, *_figures(report, sizes), *verdicts, report.num_images])
    return Table("policies", "All policies", "", columns, rows)


def _figures(report: Report, sizes: Sequence[int]) -> list[Cell]:
    top5 = None if report.top5 is None else 100 * report.top5
    row: list[Cell] = [report.policy, 100 * report.top1, top5, report.ece]
    row += [report.macs_mean / 1e6, report.macs_p95 / 1e6, 100 * report.relative_macs]
    for size in sizes:
        found = timed(report, size)
        row += [found[0].median_ms, found[0].p95_ms] if found else [None, None]
    return row


def policies(nets: Sequence[Evaluated], whole: Table) -> list[Table]:
    """Each net's part of the table of all."""
    return [
        Table(
            f"policies-{name}",
            titled(net),
            _about(net),
            whole.columns[2:],
            [row[2:] for row in whole.rows if row[0] == net.name],
        )
        for net, name in zip(nets, marks([net.name for net in nets]), strict=True)
    ]


def titled(net: Evaluated) -> str:
    """The net's name, and its family's where that is not in it."""
    return net.name if net.family in net.name else f"{net.name} ({net.family})"


def _about(net: Evaluated) -> str:
    text = (
        f"Step {net.step:,}, {net.parameters:,} parameters, images of {net.side_px} px. ECE is the expected "
        "calibration error, % of full the mean share of the dearest policy's network; "
    )
    entries = [entry for report in net.reports for entry in report.latency]
    if entries:
        text += f"times are in ms per pass at each batch size (@), on {_listed(e.device for e in entries)}; "
    return text + "dominated among all points of this report, in MACs, and in ms at each batch size (@)."


# ---- accuracy by class


def by_class(nets: Sequence[Evaluated], *, all_classes: bool = False) -> list[HeatMap]:
    """Top-1 of each class under each policy; without a picture where no report says it."""
    told = [(net, report) for net in nets for report in net.reports if report.top1_by_class]
    if not told:
        return []
    classes = nets[0].classes
    values = [[_percent(report.top1_by_class[label]) for _, report in told] for label in range(len(classes))]
    chosen, groups = _ordered(nets[0], values, len(classes) if all_classes else MOST_CLASSES)
    caption = "Top-1 of the images of each class under each policy, in %."
    if len(chosen) < len(classes):
        caption += (
            f" Of {len(classes):,} classes those {MOST_CLASSES // 2} with the lowest and those {MOST_CLASSES // 2} "
            "with the highest mean over the policies are shown, the lowest first; all are in classes.csv."
        )
    alone = len(nets) == 1
    return [
        HeatMap(
            name="accuracy-by-class",
            title="Accuracy by class",
            caption=caption,
            rows=[classes[label] for label in chosen],
            columns=[report.policy if alone else f"{net.name} · {report.policy}" for net, report in told],
            values=[values[label] for label in chosen],
            value_label=TOP1,
            high=100.0,
            groups=groups,
        )
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _ordered(net: Evaluated, values: Sequence[Sequence[float | None]], most: int) -> tuple[list[int], dict[str, int]]:
    """Which classes are shown, in order, and how many of each superclass where these are given."""
    labels = list(range(len(values)))
    if len(labels) > most:
        measured = [label for label in labels if None not in values[label]]
        measured.sort(key=lambda label: fmean(value for value in values[label] if value is not None))
        half = most // 2
        labels = measured[:half] + measured[max(half, len(measured) - half) :]
    if not net.superclasses:
        return labels, {}
    group_of = {name: group for group, names in net.superclasses.items() for name in names}
    places = {group: place for place, group in enumerate([*net.superclasses, OTHERS])}
    groups = {label: group_of.get(net.classes[label], OTHERS) for label in labels}
    labels.sort(key=lambda label: places[groups[label]])
    counts = {group: sum(found == group for found in groups.values()) for group in places}
    return labels, {group: count for group, count in counts.items() if count}


OTHERS = "in no group"
