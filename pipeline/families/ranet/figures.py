"""RANet's own figures: which exit answers which images, the accuracy of each exit alone, and which images are hard.

Letters: N images, E exits, S sub-networks; both are numbered from 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.families.ranet.config import RanetConfig
from pipeline.family import Evaluated, Report
from pipeline.figures import (
    Arrays,
    Bars,
    Cell,
    Efforts,
    Figure,
    Gallery,
    HeatMap,
    Lines,
    Number,
    Series,
    Table,
    by_superclass,
    for_each,
    hits,
    numbered,
    over_training,
)


def figures(mine: Sequence[Evaluated], others: Sequence[Evaluated]) -> list[Figure]:
    alone = _exits_alone(mine)
    return ([alone] if alone else []) + for_each(mine, _own)


def _own(net: Evaluated) -> Iterable[Figure | None]:
    shown = _middle(net)
    arrays = net.details(shown.policy) if shown else None
    yield _answered(net, "exits", "exit")
    if shown:
        yield _answered_by_class(net, shown, "exits", "exit")
    if _several_exits(net):
        yield _answered(net, "subnetworks", "sub-network")
        if shown:
            yield _answered_by_class(net, shown, "subnetworks", "sub-network")
    yield _exits(net, shown, arrays)
    yield _subnetworks(net, shown, arrays)
    yield _loss_over_training(net)
    yield _accuracy_over_training(net)
    if shown and arrays:
        yield _gallery(net, shown, arrays)


def _config(net: Evaluated) -> RanetConfig:
    assert isinstance(net.config, RanetConfig)
    return net.config


def _owners(net: Evaluated) -> list[int]:
    """The sub-network, counted from 1, of each exit, [E]."""
    return [number + 1 for number in _config(net).subnetwork_of_exit]


def _several_exits(net: Evaluated) -> bool:
    """Whether some sub-network has several exits; otherwise exits and sub-networks give the same figure."""
    return len(set(_owners(net))) < len(_owners(net))


def _budgets(net: Evaluated) -> list[Report]:
    """The reports of the policies that meet a budget, the cheapest first."""
    found = [report for report in net.reports if report.kind == "budget"]
    return sorted(found, key=lambda report: report.macs_mean)


def _middle(net: Evaluated) -> Report | None:
    """The report of the median budget, used where only one can be shown."""
    budgets = _budgets(net)
    return budgets[len(budgets) // 2] if budgets else None


def _alone(net: Evaluated) -> dict[int, Report]:
    """{exit: report of the policy in which all images exit there}, rising."""
    found = {int(report.settings["exit"]): report for report in net.reports if report.kind == "exit"}
    return dict(sorted(found.items()))


# ---- which exit answers


def _answered(net: Evaluated, fact: str, what: str) -> Bars | None:
    budgets = _budgets(net)
    if not budgets:
        return None
    return Bars(
        name=f"ranet-answered-by-{what}",
        title=f"Images answered by each {what}",
        caption=f"Share of {budgets[0].num_images:,} images that get their answer at each {what}, for each budget of "
        "MACs; easy images leave early.",
        labels=[f"{what} {number}" for number in range(1, len(budgets[0].facts[fact]) + 1)],
        y_label="share of images",
        series={report.policy: list(report.facts[fact]) for report in budgets},
    )


def _answered_by_class(net: Evaluated, report: Report, fact: str, what: str) -> HeatMap:
    columns = [f"{what} {number}" for number in range(1, len(report.facts[fact]) + 1)]
    picture = HeatMap(
        name=f"ranet-answered-by-{what}-and-class",
        title=f"Images of each class answered by each {what}",
        caption=f"Share of a class' images that get their answer at each {what}, under {report.policy}, on "
        f"{report.num_images:,} images.",
        rows=net.classes,
        columns=columns,
        values=[row or [None] * len(columns) for row in report.facts_by_class[fact]],
        value_label="share of the class' images",
    )
    return by_superclass(picture, net.superclasses)


# ---- each exit alone


def _exits_alone(mine: Sequence[Evaluated]) -> Lines | None:
    series = []
    for net in mine:
        of = f"{net.name}: " if len(mine) > 1 else ""
        for name, reports in {"one exit for all": list(_alone(net).values()), "budgets": _budgets(net)}.items():
            if reports:
                series.append(
                    Series(
                        f"{of}{name}",
                        [report.macs_mean / 1e6 for report in reports],
                        [report.top1 for report in reports],
                        [report.policy for report in reports],
                    )
                )
    if not series:
        return None
    return Lines(
        name="ranet-accuracy-of-exits",
        title="Accuracy of each exit alone, and of budgets",
        caption=f"Top-1 on {mine[0].reports[0].num_images:,} images where all leave at one exit, whose earlier "
        "classifiers do not run, and where each leaves as soon as it is sure enough for the budget.",
        x_label="million MACs per image",
        y_label="top-1",
        series=series,
    )


def _exits(net: Evaluated, shown: Report | None, arrays: Arrays | None) -> Table | None:
    alone = _alone(net)
    if not alone:
        return None
    columns = ["exit", "sub-network", "million MACs alone", "top-1 alone"]
    columns += [f"share answered, {shown.policy}", "top-1 of the answered"] if shown else []
    rows: list[list[Cell]] = []
    for number, owner in enumerate(_owners(net), 1):
        report = alone.get(number)
        row: list[Cell] = [number, owner]
        row += [report.macs_mean / 1e6, report.top1] if report else [None, None]
        if shown:
            row += [shown.facts["exits"][number - 1], _top1(arrays, [number]) if arrays else None]
        rows.append(row)
    answered = f", and of the images that it answers under {shown.policy}" if shown else ""
    return Table(
        name="ranet-exits",
        title="Exits, alone and under a budget",
        caption=f"MACs and top-1 of each exit where all {next(iter(alone.values())).num_images:,} images leave "
        f"there{answered}.",
        columns=columns,
        rows=rows,
    )


def _subnetworks(net: Evaluated, shown: Report | None, arrays: Arrays | None) -> Bars | None:
    """A sub-network alone means its last exit for all images."""
    alone, exits = _alone(net), _exits_of(net)
    last = {owner: alone.get(numbers[-1]) for owner, numbers in exits.items()}
    series: dict[str, Sequence[Number]] = {}
    if any(last.values()):
        series["all images, at its last exit"] = [report.top1 if report else None for report in last.values()]
    if shown and arrays:
        series[f"the images that it answers under {shown.policy}"] = [
            _top1(arrays, numbers) for numbers in exits.values()
        ]
    if not series:
        return None
    return Bars(
        name="ranet-accuracy-of-sub-networks",
        title="Accuracy of each sub-network",
        caption="Top-1 of each sub-network, from the lowest resolution to the highest: alone on all "
        f"{net.reports[0].num_images:,} images, and on those that are left to it and that it answers.",
        labels=[f"sub-network {owner}" for owner in exits],
        y_label="top-1",
        series=series,
    )


def _exits_of(net: Evaluated) -> dict[int, list[int]]:
    """{sub-network: its exits}."""
    found: dict[int, list[int]] = {}
    for number, owner in enumerate(_owners(net), 1):
        found.setdefault(owner, []).append(number)
    return found


def _top1(arrays: Arrays, exits: Sequence[int]) -> float | None:
    """Top-1 of the images that exited at these exits; None if none did."""
    left = np.isin(np.rint(arrays["facts.exit"]), exits)
    return float(hits(arrays)[left].mean()) if left.any() else None


# ---- training


def _loss_over_training(net: Evaluated) -> Lines | None:
    curves = net.curves()
    keys = {key: f"exit {number}" for number, key in numbered(curves, "train/ce/").items()}
    picture = _training("loss", "Loss of each exit over training", "Cross-entropy of each exit", "cross-entropy")
    return over_training(picture, curves, keys)


def _accuracy_over_training(net: Evaluated) -> Lines | None:
    """Older runs logged only the last exit."""
    curves = net.curves()
    keys = {key: f"exit {number}" for number, key in numbered(curves, "train/top1/").items()}
    what = "each exit"
    if not keys:
        keys, what = {"train/top1": f"exit {_config(net).num_exits}"}, "the last exit, the only one logged,"
    picture = _training("accuracy", "Accuracy over training", f"Top-1 of {what}", "top-1")
    return over_training(picture, curves, keys)


def _training(name: str, title: str, what: str, y_label: str) -> Lines:
    return Lines(
        name=f"ranet-{name}-over-training",
        title=title,
        caption=f"{what} on training images as they are augmented; each point is a mean over the images since the "
        "log's point before.",
        x_label="",
        y_label=y_label,
        series=(),
    )


# ---- images


def _gallery(net: Evaluated, report: Report, arrays: Arrays) -> Gallery:
    total = _config(net).num_exits
    efforts = Efforts(arrays, arrays["facts.exit"], lambda number: f"exit {number:.0f} of {total}", net.classes)
    easy, hard = efforts.extremes()
    groups = {"easiest": easy, "hardest": hard}
    for number in efforts.widest():
        easy, hard = efforts.extremes(number)
        groups |= {f"{net.classes[number]}: easiest": easy, f"{net.classes[number]}: hardest": hard}
    return Gallery(
        name="ranet-easiest-and-hardest",
        title="Easiest and hardest images",
        caption=f"Of {report.num_images:,} images under {report.policy}, and of the classes whose images differ most: "
        "those that leave at the earliest exits, the surest first, and at the latest, the least sure first.",
        groups=groups,
    )
