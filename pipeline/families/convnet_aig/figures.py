"""ConvNet-AIG's own figures: which layers run, for which classes and images, over training and under attack.

Layers are numbered from 0, as the gates are in the paper. Letters: N images, K classes, L layers.
Source: Figs. 3-5 of Veit & Belongie, ECCV 2018 (arXiv 1711.11503).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pipeline.families.convnet_aig.model import AigConfig
from pipeline.family import Evaluated, Report
from pipeline.figures import (
    Arrays,
    Bars,
    Efforts,
    Figure,
    Gallery,
    HeatMap,
    Lines,
    Series,
    by_superclass,
    for_each,
    grouped,
    numbered,
    over_training,
)


def figures(mine: Sequence[Evaluated], others: Sequence[Evaluated]) -> list[Figure]:
    compared = _error_against_cost(mine, others)
    return ([compared] if compared else []) + for_each(mine, _own)


def _own(net: Evaluated) -> Iterable[Figure | None]:
    report = _gated(net.reports)
    arrays = net.details(report.policy) if report else None
    if report:
        yield _rates_by_class(net, report)
    if report and arrays:
        yield _executed(net, report, arrays)
        yield _executed_by_superclass(net, report, arrays)
    yield _rates_over_training(net)
    if report and arrays:
        yield _gallery(net, report, arrays)
    if report:
        yield _attacked(net, report)


def _gated(reports: Sequence[Report]) -> Report | None:
    """The first report with the rates of the layers; it is the default policy's if that was evaluated."""
    return next((report for report in reports if report.facts.get("gates")), None)


def _config(net: Evaluated) -> AigConfig:
    assert isinstance(net.config, AigConfig)
    return net.config


def _layers(net: Evaluated) -> list[str]:
    """The label of each layer, [L]; ↓ marks a layer that halves the maps, = one without a gate."""
    config = _config(net)
    halving = set(accumulate(config.stages[:-1]))
    return [
        f"{number}{'↓' if number in halving else ''}{'=' if target == 1 else ''}"
        for number, target in enumerate(config.targets)
    ]


def _marks(net: Evaluated) -> str:
    free = " and = one without a gate, which always runs" if 1 in _config(net).targets else ""
    return f"↓ marks a layer that halves the maps{free}"


# ---- one net


def _rates_by_class(net: Evaluated, report: Report) -> HeatMap:
    layers = _layers(net)
    picture = HeatMap(
        name="convnet-aig-rates-by-class",
        title="Layers that each class runs",
        caption=f"Share of a class' images that run each layer, under {report.policy}, on {report.num_images:,} "
        f"images. {_marks(net)}.",
        rows=net.classes,
        columns=layers,
        values=[row or [None] * len(layers) for row in report.facts_by_class["gates"]],
        value_label="share of images that run the layer",
    )
    return by_superclass(picture, net.superclasses)


def _executed(net: Evaluated, report: Report, arrays: Arrays) -> Bars:
    layers = _counted(arrays)
    span = range(layers.min(), layers.max() + 1)
    return Bars(
        name="convnet-aig-executed-layers",
        title="Layers that an image runs",
        caption=f"How many of {report.num_images:,} images run how many of the {_config(net).num_blocks} layers, under "
        f"{report.policy}; {report.facts['layers'][0]:.2f} in the mean.",
        labels=[str(count) for count in span],
        y_label="images",
        series={"images": [int((layers == count).sum()) for count in span]},
    )


def _executed_by_superclass(net: Evaluated, report: Report, arrays: Arrays) -> Bars | None:
    groups = grouped(net.classes, net.superclasses)
    layers, labels = _counted(arrays), arrays["labels"]
    span = range(layers.min(), layers.max() + 1)
    found = {name: layers[np.isin(labels, numbers)] for name, numbers in groups.items()}
    shares = {name: [float((some == n).mean()) for n in span] for name, some in found.items() if len(some)}
    if not shares:
        return None
    return Bars(
        name="convnet-aig-executed-layers-by-superclass",
        title="Layers that an image runs, by superclass",
        caption=f"Share of each superclass' images that run so many layers, under {report.policy}, on "
        f"{report.num_images:,} images in all.",
        labels=[str(count) for count in span],
        y_label="share of the superclass' images",
        series=shares,
    )


def _counted(arrays: Arrays) -> NDArray[np.int64]:
    """The number of layers that each image ran, [N]."""
    return np.rint(arrays["facts.layers"]).astype(np.int64)


def _rates_over_training(net: Evaluated) -> Lines | None:
    curves = net.curves()
    layers = _layers(net)
    keys = {key: f"layer {layers[n]}" for n, key in numbered(curves, "train/rate/").items() if n < len(layers)}
    picture = Lines(
        name="convnet-aig-rates-over-training",
        title="Layers run over training",
        caption="Share of training images that run each layer, with the gates' sampling; each point is a mean over the "
        f"images since the log's point before. {_marks(net)}.",
        x_label="",
        y_label="share of images that run the layer",
        series=(),
    )
    return over_training(picture, curves, keys)


def _gallery(net: Evaluated, report: Report, arrays: Arrays) -> Gallery | None:
    total = _config(net).num_blocks
    efforts = Efforts(arrays, arrays["facts.layers"], lambda layers: f"{layers:.0f} of {total} layers", net.classes)
    groups: dict[str, list[tuple[int, str]]] = {}
    for number in efforts.widest():
        few, many = efforts.extremes(number)
        groups |= {f"{net.classes[number]}: fewest layers": few, f"{net.classes[number]}: most layers": many}
    if not groups:
        return None
    return Gallery(
        name="convnet-aig-fewest-and-most-layers",
        title="Images that run fewest and most layers",
        caption=f"Of the classes whose images differ most, out of {report.num_images:,} images under {report.policy}. "
        "Among equals, the surest come first on the side of few layers, the least sure on the other.",
        groups=groups,
    )


def _attacked(net: Evaluated, report: Report) -> Lines | None:
    found = {
        name: attack.facts["gates"]
        for name, reports in net.attacked.items()
        for attack in reports
        if attack.policy == report.policy and attack.facts.get("gates")
    }
    if not found:
        return None
    layers = _layers(net)
    numbers = [float(number) for number in range(len(layers))]
    texts = [f"layer {layer}" for layer in layers]
    return Lines(
        name="convnet-aig-rates-under-attack",
        title="Layers run, clean and attacked",
        caption=f"Share of {report.num_images:,} images that run each layer under {report.policy}, as they are and "
        "under attack: lines that lie close say that an attack changes the answer more than the path.",
        x_label="layer",
        y_label="share of images that run the layer",
        series=[
            Series(name, numbers, list(rates), texts)
            for name, rates in {"clean": report.facts["gates"], **found}.items()
        ],
    )


# ---- several nets


def _error_against_cost(mine: Sequence[Evaluated], others: Sequence[Evaluated]) -> Lines | None:
    """Error against cost in two conventions: the measured MACs, and the papers' cost.

    The papers' cost is the whole net's MACs times the share of layers that ran. It ignores that stem, shortcuts, gates
    and head always run and that layers differ in MACs.
    """
    found = [(net, report) for net in mine if (report := _gated(net.reports))]
    if len(found) < 2:
        return None
    series = []
    for depth in sorted({_config(net).depth for net, _ in found}):
        same = [(net, report) for net, report in found if _config(net).depth == depth]
        series.append(_swept(f"depth {depth}, MACs spent", same, [report.macs_mean for _, report in same]))
        series.append(_swept(f"depth {depth}, share of layers", same, [_by_layers(report) for _, report in same]))
    for net in others:
        if net.family == "baseline":
            plain = net.reports[0]
            series.append(Series(net.name, [plain.macs_mean / 1e6], [1 - plain.top1], [net.name], joined=False))
    return Lines(
        name="convnet-aig-error-against-cost",
        title="Error against cost over target rates",
        caption=f"Top-1 error on {found[0][1].num_images:,} images. The cost is given in two ways: the MACs that "
        "images really take, and the papers' way, the whole net's MACs times the share of layers that ran.",
        x_label="million MACs per image",
        y_label="top-1 error",
        series=series,
    )


def _by_layers(report: Report) -> float:
    gates = report.facts["gates"]
    return report.macs_mean / report.relative_macs * sum(gates) / len(gates)


def _swept(name: str, found: Sequence[tuple[Evaluated, Report]], macs: Sequence[float]) -> Series:
    order = sorted(range(len(found)), key=lambda n: macs[n])
    return Series(
        name,
        [macs[n] / 1e6 for n in order],
        [1 - found[n][1].top1 for n in order],
        [f"{found[n][0].name}, target {_target(found[n][0])}" for n in order],
    )


def _target(net: Evaluated) -> str:
    targets = _config(net).targets
    mean = sum(targets) / len(targets)
    return f"{mean:.3g}{' in the mean' if len(set(targets)) > 1 else ''}"
