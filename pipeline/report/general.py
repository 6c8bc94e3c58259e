"""The figures of every report, whatever the family: frontiers, the policies of each net, accuracy by class.

A point is a policy of a trained net with its cost. Letters: K classes, P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from pipeline import family as families
from pipeline.evaluation.frontier import dominated, merit
from pipeline.evaluation.seed_means import over_seeds
from pipeline.family import Curves, Evaluated, Latency, Report
from pipeline.figures import Cell, Figure, HeatMap, Lines, Number, Series, Table, marks, over_training
from pipeline.report import published
from pipeline.report.cells import NO, YES
from pipeline.report.published import PublishedPoint

MOST_CLASSES = 60  # rows of the heat map; with more classes it shows the worst and the best
WIDE = 8  # ratio of the highest to the lowest cost above which the axis is logarithmic
WHOLE = 0.005  # distance of a policy's share of the whole net's MACs from 1 below which it leaves nothing out
NEAR_PP = 1.0  # points of top-1 below the best within which the cheapest policy is recommended
MAX_WAITED = 0.1  # share of time spent waiting for a core above which a latency is doubtful
TOP1 = "top-1 (%)"
WHAT = "what it does"
OTHERS = "in no group"


@dataclass(frozen=True)
class Point:
    """A policy of a net with its cost in the unit of a frontier; over seeds, both are means with deviations."""

    net: Evaluated
    report: Report
    cost: float
    cost_sd: Number = None

    @property
    def name(self) -> str:
        return f"{self.net.name} · {self.report.policy}"

    @property
    def top1_sd(self) -> Number:
        """The standard deviation over the seeds, in points; of a single training the standard error over the images."""
        if self.net.seeds:
            return _deviation(self.net, self.report, lambda report: 100 * report.top1)
        return 100 * math.sqrt(self.report.top1 * (1 - self.report.top1) / max(1, self.report.num_images))

    @property
    def label(self) -> str:
        """The policy's name; of one that leaves nothing out also the MACs of the whole net."""
        whole = abs(self.report.relative_macs - 1) < WHOLE
        return f"{self.report.policy} (whole, {self.report.macs_mean / 1e6:.3g} M)" if whole else self.report.policy


@dataclass(frozen=True)
class Frontier:
    """Points in one unit of cost, and whether each is dominated [P]."""

    points: Sequence[Point]
    beaten: Sequence[bool]

    def verdict(self, net: Evaluated, report: Report) -> str | None:
        """Whether a policy is dominated, as a word; None if it has no cost in this unit."""
        beaten = [beaten for p, beaten in zip(self.points, self.beaten, strict=True) if _same(p, net, report)]
        return (YES if beaten[0] else NO) if beaten else None


def _same(point: Point, net: Evaluated, report: Report) -> bool:
    return point.net is net and point.report is report


def frontier(points: Sequence[Point]) -> Frontier:
    """The frontier of these points."""
    return Frontier(points, dominated([p.cost for p in points], [merit(p.report.kind, p.report.top1) for p in points]))


def by_macs(nets: Sequence[Evaluated]) -> Frontier:
    """The frontier of all policies; the cost is in millions of MACs per image."""
    return _by_cost(nets, lambda report: report.macs_mean / 1e6)


def by_latency(nets: Sequence[Evaluated], batch: int) -> Frontier:
    """The frontier of the policies measured at this batch size; the cost is in ms per batch."""
    return _by_cost(nets, lambda report: next((entry.median_ms for entry in timed(report, batch)), None))


def _by_cost(nets: Sequence[Evaluated], cost: Callable[[Report], Number]) -> Frontier:
    """The frontier of the policies that have a cost."""
    costs = [(net, report, cost(report)) for net in nets for report in net.reports]
    known = [(net, report, value) for net, report, value in costs if value is not None]
    return frontier([Point(net, report, value, _deviation(net, report, cost)) for net, report, value in known])


def _deviation(net: Evaluated, report: Report, figure: Callable[[Report], Number]) -> Number:
    """The standard deviation over the net's seeds; None without seeds."""
    found = over_seeds(net, report.policy, figure)
    return found.sd if found else None


def timed(report: Report, batch: int) -> Sequence[Latency]:
    """The report's latency at this batch size; empty if it was not measured."""
    return [entry for entry in report.latency if entry.batch == batch][:1]


def batches(nets: Sequence[Evaluated]) -> list[int]:
    """The batch sizes at which latency was measured, in rising order."""
    return sorted({entry.batch for net in nets for report in net.reports for entry in report.latency})


# ---- accuracy against cost


def frontiers(nets: Sequence[Evaluated], others: Sequence[PublishedPoint] = ()) -> list[Figure]:
    """A table of the points on the frontier by MACs; then accuracy against MACs and against the time of a batch.

    others: points published for the same images, which are drawn behind those of the picture by MACs.
    """
    macs = by_macs(nets)
    caption = (
        f"Each point is one policy of one net on the same {_images(nets)}. Faded points are dominated: another point "
        "is at least as accurate and costs at most as much. The dashed line joins the points that are not. A baseline "
        "computes the same for every image."
    ) + "".join(f" {text}" for text in (*_bars(nets), *_conditions(nets)))
    if others:
        caption += " " + published.caption(others, [(p.report.macs_mean, p.report.top1) for p in _undominated(macs)])
    title = "Accuracy against MACs"
    figures: list[Figure] = [_choices(macs), _drawn(macs, "frontier-macs", title, "MMACs per image", caption, others)]
    for size in batches(nets):
        times, entries = by_latency(nets, size), _entries(nets, size)
        title = f"Accuracy against time, batch size {size}"
        label = f"ms per batch of {size}"
        figures.append(_drawn(times, f"frontier-latency-{size}", title, label, _measured(entries, size)))
    return figures


def _bars(nets: Sequence[Evaluated]) -> Iterator[str]:
    """What the error bars are."""
    if any(not net.seeds for net in nets):
        yield "The bars of a single training reach one standard error over the images to each side."
    names = [net.name for net in nets if net.seeds]
    if names:
        yield (
            f"A point of {', '.join(names)} is a mean over seeds; its bars reach one standard deviation over the seeds "
            "to each side, and whether it is dominated is decided by the means."
        )


def _conditions(nets: Sequence[Evaluated]) -> Iterator[str]:
    """How each net's checkpoint was chosen, and the precision of the figures."""
    choices = {net.name: net.reports[0].choice for net in nets if net.reports and net.reports[0].choice}
    for text in dict.fromkeys(choices.values()):
        names = ", ".join(name for name, each in choices.items() if each == text)
        yield f"The checkpoint of {names} is {text}."
    precisions = sorted(
        {report.precision or "a precision that was not noted" for net in nets for report in net.reports}
    )
    yield f"Computed in {' or '.join(precisions)}" + (": not all alike." if len(precisions) > 1 else ".")


def _images(nets: Sequence[Evaluated]) -> str:
    counts = sorted({report.num_images for net in nets for report in net.reports})
    return f"{counts[0]:,} images" if len(counts) == 1 else f"images ({counts[0]:,} to {counts[-1]:,} of them)"


def _drawn(
    points: Frontier, name: str, title: str, x_label: str, caption: str, others: Sequence[PublishedPoint] = ()
) -> Lines:
    names = list(dict.fromkeys(point.net.name for point in points.points))
    behind = [published.series(others)] if others else []
    costs = [*(point.cost for point in points.points), *(x for each in behind for x in each.x)]
    series = [_line(points), *(_series(points, net) for net in names), *behind]
    wide = bool(costs) and min(costs) > 0 and max(costs) > WIDE * min(costs)
    return Lines(name, title, caption, x_label, TOP1, series, log_x=wide)


def _line(frontier: Frontier) -> Series:
    """The line through the undominated points, cheapest first."""
    best = sorted(_undominated(frontier), key=lambda point: point.cost)
    return Series(
        name="not dominated",
        x=[point.cost for point in best],
        y=[100 * point.report.top1 for point in best],
        reference=True,
    )


def _undominated(frontier: Frontier) -> list[Point]:
    return [point for point, beaten in zip(frontier.points, frontier.beaten, strict=True) if not beaten]


def _series(frontier: Frontier, name: str) -> Series:
    """The points of the net of this name."""
    mine = [(p, beaten) for p, beaten in zip(frontier.points, frontier.beaten, strict=True) if p.net.name == name]
    family = mine[0][0].net.family
    adaptive = families.find(family).adaptive
    kind = family if adaptive else "iso-cost baseline"
    spreads = any(point.net.seeds for point, _ in mine)
    labels = [p.label for p, _ in mine] if adaptive or len(mine) > 1 else [name]
    return Series(
        name=name if kind in name else f"{name} ({kind})",
        x_sd=[point.cost_sd for point, _ in mine] if spreads else (),
        y_sd=[point.top1_sd for point, _ in mine],
        labels=labels,
        x=[point.cost for point, _ in mine],
        y=[100 * point.report.top1 for point, _ in mine],
        texts=[point.name for point, _ in mine],
        faded=[beaten for _, beaten in mine],
        joined=False,
        group=family,
        neutral=not adaptive,
    )


def recommendation(nets: Sequence[Evaluated]) -> list[str]:
    """Which policy is the most accurate, and which is the cheapest within NEAR_PP points of it, in sentences."""
    points = [p for p in by_macs(nets).points if merit(p.report.kind, p.report.top1) >= 0]
    if not points:
        return []
    best = max(points, key=lambda p: (p.report.top1, -p.cost))
    near = min((p for p in points if 100 * (best.report.top1 - p.report.top1) <= NEAR_PP), key=lambda p: p.cost)
    several = len(nets) > 1
    text = f"The most accurate policy is {_named(best, several)}: {_spoken(best)}."
    if near is best:
        return [f"{text} No cheaper one is within {NEAR_PP:g} point of it."]
    less = 100 * (1 - near.cost / best.cost)
    return [
        f"The cheapest policy within {NEAR_PP:g} point of the best is {_named(near, several)}: {_spoken(near)}, "
        f"{less:.0f} % fewer MACs than the best.",
        text,
    ]


def _named(point: Point, several: bool) -> str:
    return f"{point.report.policy} of {point.net.name}" if several else point.report.policy


def _spoken(point: Point) -> str:
    sd = point.top1_sd
    spread = "" if sd is None else f" ± {sd:.1f}"
    return f"top-1 {100 * point.report.top1:.1f}{spread} %, {point.cost:.3g} million MACs per image"


def training(nets: Sequence[Evaluated]) -> list[Lines]:
    """Loss and top-1 of the training images over the training, of the nets whose run's folder is at hand."""
    curves = [(net.name, (net.seeds[0] if net.seeds else net).curves()) for net in nets]
    return [*_curve(curves, "train/loss", "loss"), *_curve(curves, "train/top1", TOP1, 100.0)]


def _curve(curves: Sequence[tuple[str, Curves]], key: str, y_label: str, factor: float = 1.0) -> list[Lines]:
    """One picture of this key of every net that logged it; none if no net did."""
    what = key.removeprefix("train/")
    title = f"{'Loss' if what == 'loss' else 'Top-1'} of the training images"
    caption = "Means over the interval since the last log point, of augmented images; of several seeds the first one."
    frame = Lines(f"training-{what}", title, caption, "step", y_label, ())
    own = [over_training(frame, logged, {key: name}) for name, logged in curves]
    drawn = [one for one in own if one is not None]
    if not drawn:
        return []
    label = "epoch" if all(one.x_label == "epoch" for one in drawn) else "step"
    kept = [_scaled(series, factor) for one in drawn if one.x_label == label for series in one.series]
    return [replace(frame, x_label=label, series=kept)]


def _scaled(series: Series, factor: float) -> Series:
    return replace(series, y=[None if value is None else factor * value for value in series.y])


def _choices(frontier: Frontier) -> Table:
    best = sorted(_undominated(frontier), key=lambda point: point.cost)
    rows = [_row(point) for point in best]
    caption = "The points of the next picture that are not dominated, cheapest first: one of these is the best choice."
    columns = ["net", "policy", TOP1, "MMACs mean", "% of full", WHAT]
    return Table("frontier-points", "Points on the frontier", caption, columns, rows)


def _row(point: Point) -> list[Cell]:
    report = point.report
    figures = [100 * report.top1, report.macs_mean / 1e6, 100 * report.relative_macs]
    return [point.net.name, report.policy, *figures, what(point.net, report)]


def what(net: Evaluated, report: Report) -> str:
    """What a policy of the net does, in a few words; of one that the family does not know, its kind."""
    return families.described(net.family, report)


def _entries(nets: Sequence[Evaluated], size: int) -> list[Latency]:
    return [entry for net in nets for report in net.reports for entry in timed(report, size)]


def _measured(entries: Sequence[Latency], size: int) -> str:
    """How a latency was measured, and whether it is reliable."""
    places = _listed(
        f"{e.device} with {e.threads} thread{'s' if e.threads > 1 else ''}{e.precision and f' in {e.precision}'}"
        for e in entries
    )
    text = (
        f"Median time of a batch of {size} image{'s' if size > 1 else ''} on {places}, after one batch of warm-up. "
        "The policies of a net take turns, and the device is synchronised. "
    )
    text += f"The slowest of twenty batches took up to {_spread(entries):.1f} times the median; "
    waited = max(entry.waited_share for entry in entries)
    text += f"threads waited up to {100 * waited:.0f} % of the time for a core"
    text += ": the machine was busy, measure again." if waited > MAX_WAITED else "."
    if len({(entry.device, entry.threads, entry.precision) for entry in entries}) > 1:
        text += (
            " Not all nets were measured on the same device, with the same threads and precision: do not compare them."
        )
    return text


def _spread(entries: Sequence[Latency]) -> float:
    """The largest ratio of the 95th percentile to the median."""
    return max(entry.p95_ms / entry.median_ms for entry in entries)


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


# ---- numbers of each policy


def all_policies(nets: Sequence[Evaluated]) -> Table:
    """One row for each policy of each net: policies.csv."""
    sizes = batches(nets)
    macs, times = by_macs(nets), {size: by_latency(nets, size) for size in sizes}
    columns = ["net", "family", "policy", TOP1, "top-5 (%)", "ECE", "MMACs mean", "MMACs p95", "% of full"]
    columns += [text for size in sizes for text in (f"ms @{size} median", f"ms @{size} p95")]
    columns += ["dominated", *(f"dominated @{size}" for size in sizes), "images", WHAT]
    rows = []
    for net in nets:
        for report in net.reports:
            verdicts = [each.verdict(net, report) for each in (macs, *times.values())]
            rows.append(
                [net.name, net.family, *_figures(report, sizes), *verdicts, report.num_images, what(net, report)]
            )
    return Table("policies", "All policies", "", columns, rows)


def _figures(report: Report, sizes: Sequence[int]) -> list[Cell]:
    top5 = None if report.top5 is None else 100 * report.top5
    row: list[Cell] = [report.policy, 100 * report.top1, top5, report.ece]
    row += [report.macs_mean / 1e6, report.macs_p95 / 1e6, 100 * report.relative_macs]
    for size in sizes:
        latency = timed(report, size)
        row += [latency[0].median_ms, latency[0].p95_ms] if latency else [None, None]
    return row


def policies(nets: Sequence[Evaluated], whole: Table) -> list[Table]:
    """The rows of each net in `whole`, the table of all policies, as a table of its own."""
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
    """The net's name, followed by its family's if the name does not contain that."""
    name = net.name if net.family in net.name else f"{net.name} ({net.family})"
    return f"{name} over {_of_seeds(net)}" if net.seeds else name


def _of_seeds(net: Evaluated) -> str:
    return "1 seed" if len(net.seeds) == 1 else f"{len(net.seeds)} seeds"


def _about(net: Evaluated) -> str:
    what = f"Means over {_of_seeds(net)}" if net.seeds else f"Step {net.step:,}"
    text = (
        f"{what}, {net.parameters:,} parameters, images of {net.side_px} px. ECE is the expected "
        "calibration error: the mean distance between confidence and accuracy, from 0 to 1. p95 is the 95th "
        "percentile, of MACs over the images and of ms over twenty batches. % of full is the mean MACs over those of "
        "the net's own forward; "
    )
    first = net.reports[0]
    text += f"the checkpoint is {first.choice}; " if first.choice else ""
    text += f"computed in {first.precision}; " if first.precision else ""
    entries = [entry for report in net.reports for entry in report.latency]
    if entries:
        text += f"times are in ms per batch at each batch size (@), on {_listed(e.device for e in entries)}; "
    return text + "dominated is among all points of this report, by MACs and by ms at each batch size (@)."


# ---- accuracy by class


def by_class(nets: Sequence[Evaluated], *, all_classes: bool = False) -> list[HeatMap]:
    """Top-1 of each class under each policy; empty if no report has it."""
    columns = [(net, report) for net in nets for report in net.reports if report.top1_by_class]
    if not columns:
        return []
    classes = nets[0].classes
    values = [[_percent(report.top1_by_class[label]) for _, report in columns] for label in range(len(classes))]
    chosen, groups = _ordered(nets[0], values, len(classes) if all_classes else MOST_CLASSES)
    caption = "Top-1 of the images of each class under each policy, in %."
    if len(chosen) < len(classes):
        caption += (
            f" Of {len(classes):,} classes, the {MOST_CLASSES // 2} with the lowest and the {MOST_CLASSES // 2} with "
            "the highest mean over the policies are shown, lowest first; classes.csv has all of them."
        )
    single = len(nets) == 1
    return [
        HeatMap(
            name="accuracy-by-class",
            title="Accuracy by class",
            caption=caption,
            rows=[classes[label] for label in chosen],
            columns=[report.policy if single else f"{net.name} · {report.policy}" for net, report in columns],
            values=[values[label] for label in chosen],
            value_label=TOP1,
            high=100.0,
            groups=groups,
        )
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _ordered(net: Evaluated, values: Sequence[Sequence[float | None]], most: int) -> tuple[list[int], dict[str, int]]:
    """The labels of the shown classes in order, and {superclass: number of them} if superclasses are given."""
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
    counts = {group: sum(each == group for each in groups.values()) for group in places}
    return labels, {group: count for group, count in counts.items() if count}
