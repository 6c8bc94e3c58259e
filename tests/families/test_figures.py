"""Tests of the families' own pictures: they hold what the reports hold, the extremes are extremes, nothing is empty."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import validate
from pipeline.data.config import DataConfig
from pipeline.evaluation.evaluate import Evaluator, calibrate, evaluate
from pipeline.families.convnet_aig.model import Aig
from pipeline.families.shape_adaptor.body_costs import BodyCosts
from pipeline.families.shape_adaptor.model import ShapeConfig, layout_of
from pipeline.family import Evaluated, find
from pipeline.figures import (
    GALLERY_CLASSES,
    GALLERY_IMAGES,
    MOST_POINTS,
    OTHERS,
    Bars,
    Figure,
    Gallery,
    HeatMap,
    Lines,
    Table,
    by_superclass,
    for_each,
    grouped,
    numbered,
    over_training,
)
from pipeline.report import fault_of

SIDE, IMAGES = 16, 120
CLASSES = ("ant", "bee", "car", "dog", "empty")  # the last has no image
SUPERCLASSES = {"insects": ["bee", "ant"], "not here": ["whale"], "vehicles": ["car"]}
ARRN = {"ladder_px": [16, 8, 4], "widths": [6, 8, 10], "inner": ["F1x1", "M2x1"], "final": "M2x1", "head_width": 12}
RANET = {"scales": [1, 2], "width_factors": [2, 1], "channels": 4, "growth": 4, "budgets": [0.6, 0.7, 0.9]}
SHAPE = {"net": "vgg16_bn", "side_px": SIDE, "width": 0.125}
KEYS: dict[str, dict[str, Any]] = {
    "convnet_aig": {"depth": 14, "target_rate": [1.0, 0.5, 0.5, 0.6, 0.6, 0.6]},
    "ranet": RANET,
    "arrn": {**ARRN, "resolutions_px": [12, 8]},
    "shape_adaptor": SHAPE,
    "baseline": {"net": "cifar_resnet", "depth": 8, "resolutions_px": [10, 8]},
}
F = TypeVar("F", Lines, Bars, HeatMap, Gallery, Table)


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    rows: Any


class Split:
    """Random images of many colours, in two batches."""

    unreadable = ()

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(IMAGES) % (len(CLASSES) - 1)
        colours = torch.randint(192, (IMAGES, 1, 1, 3), generator=generator)
        noise = torch.randint(64, (IMAGES, SIDE, SIDE, 3), generator=generator)
        self.images = (colours + noise).to(torch.uint8)

    def __iter__(self) -> Iterator[Batch]:
        for rows in np.array_split(np.random.default_rng(1).permutation(IMAGES), 2):
            yield Batch(self.images[rows], self.labels[rows], rows)


def trained(
    family: str,
    folder: Path,
    name: str = "net",
    arrange: Callable[[nn.Module], None] = lambda net: None,
    latency: bool = True,
    **keys: Any,
) -> Evaluated:
    """A small net, evaluated on Split as the pipeline does it, with the curves that its loss gives."""
    kind = find(family)
    config = validate(kind.config, {"name": family, **KEYS[family], **keys}, "family")
    torch.manual_seed(4)
    net = kind.build(config, len(CLASSES))
    data = DataConfig(root=Path("nowhere"), side_px=SIDE)
    batches, repeats = ((1, 2), 1) if latency else ((), 0)
    how = Evaluator(data, torch.device("cpu"), len(CLASSES), latency_batches=batches, latency_repeats=repeats)
    arrange(net)
    with torch.no_grad():
        for _ in range(10):  # statistics for its norms
            for batch in Split(seed=1):
                net.train()(how.images(batch))
    policies = calibrate(kind.policies(config, net), net, Split(seed=1), how)
    reports = evaluate(net, policies, Split(), how, folder / name)
    curves = curves_of(family, config, net)
    return Evaluated(
        name=name,
        family=family,
        config=config,
        recipe={},
        classes=CLASSES,
        data="split",
        side_px=SIDE,
        step=40,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        reports=reports,
        details=lambda policy: dict(np.load(folder / name / f"{policy}.npz")),
        curves=lambda: curves,
    )


def curves_of(family: str, config: Any, net: nn.Module) -> dict[str, list[tuple[int, float]]]:
    output = net.train()(torch.randn(8, 3, SIDE, SIDE))
    parts = find(family).loss(config, output, torch.arange(8) % len(CLASSES)).parts
    found = {f"train/{key}": [(20, float(value)), (40, float(value) / 2)] for key, value in parts.items()}
    return {**found, "train/top1": [(20, 0.1), (40, 0.5)], "train/epoch": [(20, 0.5), (40, 1.0)]}


def scattered(net: nn.Module) -> None:
    """Gates that decide by the image."""
    assert isinstance(net, Aig)
    torch.manual_seed(5)
    for gate in net.gates():
        nn.init.normal_(gate.fc2.weight, 0, 4)
        nn.init.normal_(gate.fc2.bias, 0, 0.5)


def all_gates(odds: float) -> Callable[[nn.Module], None]:
    def arrange(net: nn.Module) -> None:
        assert isinstance(net, Aig)
        for gate in net.gates():
            nn.init.zeros_(gate.fc2.weight)
            with torch.no_grad():
                gate.fc2.bias.copy_(torch.tensor([0.0, odds]))

    return arrange


def with_distinct_top1(net: Evaluated) -> Evaluated:
    """Each policy gets a distinct top-1, which untrained nets do not have."""
    return replace(net, reports=[replace(report, top1=0.1 + n**2 / 100) for n, report in enumerate(net.reports)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("evaluations")
    return found


@pytest.fixture(scope="module")
def aig(folder: Path) -> Evaluated:
    return trained("convnet_aig", folder, "aig", scattered)


@pytest.fixture(scope="module")
def ranet(folder: Path) -> Evaluated:
    return trained("ranet", folder, "ranet")


@pytest.fixture(scope="module")
def arrn(folder: Path) -> Evaluated:
    return with_distinct_top1(trained("arrn", folder, "arrn"))


@pytest.fixture(scope="module")
def shaped(folder: Path) -> Evaluated:
    return trained("shape_adaptor", folder, "shaped")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Evaluated:
    return with_distinct_top1(trained("baseline", folder, "plain"))


@pytest.fixture(params=["aig", "ranet", "arrn", "shaped"])
def net(request: pytest.FixtureRequest) -> Evaluated:
    found: Evaluated = request.getfixturevalue(request.param)
    return found


def drawn(*mine: Evaluated, others: Sequence[Evaluated] = ()) -> dict[str, Figure]:
    figures = find(mine[0].family).figures(mine, others)
    assert len({figure.name for figure in figures}) == len(figures)
    return {figure.name: figure for figure in figures}


def one(figures: Mapping[str, Figure], name: str, kind: type[F]) -> F:
    found = figures[name]
    assert isinstance(found, kind)
    return found


# ---- every family


@pytest.mark.long
def test_every_adaptive_family_makes_figures_and_none_without_nets(net: Evaluated) -> None:
    assert len(drawn(net)) >= 3
    assert list(find(net.family).figures([], [net])) == []


def test_figure_names_are_valid_and_name_the_net_if_there_are_several(net: Evaluated) -> None:
    single = drawn(net)
    several = drawn(*(replace(net, name=name) for name in ("A_b", "a-B", "a-b-2", "/")))
    titles = {"": "", "a-b": ": A_b", "a-b-2": ": a-B", "a-b-2-2": ": a-b-2", "net": ": /"}
    for name, figure in (single | several).items():
        assert fault_of(figure) is None, "a report of several nets of a family draws it"
        assert figure.title.endswith(titles[name.partition("--")[2]])
    whole = {name for name in several if "--" not in name}
    for name in set(single) - whole:
        assert {mark for mark in titles if mark} == {m for n, _, m in (f.partition("--") for f in several) if n == name}
    assert len(set(single) - whole) == {"convnet_aig": 4, "ranet": 9, "arrn": 0, "shape_adaptor": 3}[net.family]


def test_every_value_is_finite_or_none_and_the_lengths_agree(net: Evaluated, plain: Evaluated) -> None:
    broken = dict(net.curves())
    for key, points in broken.items():
        broken[key] = [*points[:-1], (points[-1][0], points[-1][1] if key == "train/epoch" else math.nan)]
    bad = replace(net, curves=lambda: broken, superclasses=SUPERCLASSES)
    for figure in (drawn(net) | drawn(bad, replace(net, name="second"), others=[plain])).values():
        assert figure.title and figure.caption.endswith(".")
        assert all(value is None or isinstance(value, str) or math.isfinite(value) for value in values_of(figure))
        assert any(value is not None for value in values_of(figure)), figure.name


def values_of(figure: Figure) -> Iterator[float | str | None]:
    """All values of a figure; asserts that what belongs together has one length."""
    if isinstance(figure, Lines):
        for series in figure.series:
            assert len(series.x) == len(series.y) == len(series.texts or series.x) > 0
            yield from (*series.x, *series.y)
    elif isinstance(figure, Bars):
        for values in figure.series.values():
            assert len(values) == len(figure.labels)
            yield from values
    elif isinstance(figure, HeatMap):
        assert len(figure.values) == len(figure.rows)
        for row in figure.values:
            assert len(row) == len(figure.columns)
            assert all(value is None or figure.low <= value <= figure.high for value in row)
            yield from row
    elif isinstance(figure, Gallery):
        yield from (row for entries in figure.groups.values() for row, _ in entries)
    else:
        for cells in figure.rows:
            assert len(cells) == len(figure.columns)
            yield from cells


def test_captions_name_the_number_of_images(net: Evaluated) -> None:
    for figure in drawn(net).values():
        assert f"{IMAGES} images" in figure.caption or figure.name.endswith(("over-training", "time-by-resolution"))


def test_a_figure_whose_inputs_are_missing_is_omitted(net: Evaluated) -> None:
    whole = set(drawn(net))
    no_arrays, no_curves = replace(net, details=lambda policy: None), replace(net, curves=dict)
    galleries = {name for name, figure in drawn(net).items() if isinstance(figure, Gallery)}
    training = {name for name in whole if name.endswith("over-training")}
    bars = {"convnet-aig-executed-layers"} & whole
    assert set(drawn(no_arrays)) == whole - galleries - bars
    assert set(drawn(no_curves)) == whole - training
    bare = [replace(report, facts={}, facts_by_class={}, latency=[], policy="other", kind="") for report in net.reports]
    assert not set(drawn(replace(no_arrays, curves=dict, reports=bare))) - {"shape-adaptor-against-human"}


# ---- what they share


def test_rows_are_grouped_by_superclass_and_complete() -> None:
    assert grouped(CLASSES, SUPERCLASSES) == {"insects": [1, 0], "vehicles": [2], OTHERS: [3, 4]}
    assert grouped(CLASSES, {}) == grouped(CLASSES, {"not here": ["whale"]}) == {}
    assert grouped(CLASSES, {"a": ["ant", "car"], "b": ["ant", "bee"]}) == {"a": [0, 2], "b": [1], OTHERS: [3, 4]}
    named = {OTHERS: ["dog"], "a": ["ant"]}
    assert grouped(CLASSES, named) == {"a": [0], OTHERS: [3, 1, 2, 4]}
    picture = HeatMap("h", "H", "H.", CLASSES, ["0"], [[float(n)] for n in range(5)], "share", high=5.0)
    found = by_superclass(picture, SUPERCLASSES)
    assert (found.rows, dict(found.groups)) == (
        ["bee", "ant", "car", "dog", "empty"],
        {"insects": 2, "vehicles": 1, OTHERS: 2},
    )
    assert found.values == [[1.0], [0.0], [2.0], [3.0], [4.0]]


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = [(step, step / 2) for step in range(10, 100_000, 10)]
    curves = {"train/x/2": points, "train/x/10": points[:3], "train/x/y": points, "train/x2": points}
    keys = {key: str(number) for number, key in numbered(curves, "train/x/").items()}
    assert list(keys) == ["train/x/2", "train/x/10"]
    picture = Lines("l", "L", "L.", "", "y", ())
    found = over_training(picture, curves, keys)
    assert found is not None
    long, short = found.series
    assert (found.x_label, len(short.x)) == ("step", 3)
    assert MOST_POINTS / 2 < len(long.x) <= MOST_POINTS + 1
    assert (long.x[0], long.x[-1]) == (10, points[-1][0])
    assert all(y == x / 2 for x, y in zip(long.x, long.y, strict=True))
    epochs = over_training(picture, {**curves, "train/epoch": [(step, step / 50) for step, _ in points]}, keys)
    assert epochs is not None
    assert (epochs.x_label, epochs.series[1].x) == ("epoch", [0.2, 0.4, 0.6])
    assert over_training(picture, curves, {**keys, "train/none": "none"}) is None
    assert over_training(picture, curves, {}) is None


def test_for_each_omits_none(aig: Evaluated) -> None:
    table = Table("t", "T", "T.", [], [])
    assert for_each([aig], lambda net: [None, table]) == [table]
    assert [figure.name for figure in for_each([aig, aig], lambda net: [table])] == ["t--aig", "t--aig-2"]


@pytest.mark.parametrize(("family", "fact"), [("aig", "facts.layers"), ("ranet", "facts.exit")])
def test_the_images_of_a_gallery_are_the_extremes(family: str, fact: str, request: pytest.FixtureRequest) -> None:
    net: Evaluated = request.getfixturevalue(family)
    (gallery,) = (figure for figure in drawn(net).values() if isinstance(figure, Gallery))
    policy = next(report.policy for report in net.reports if f"under {report.policy}" in gallery.caption)
    arrays = net.details(policy)
    assert arrays is not None
    keys = dict(zip(arrays["rows"].tolist(), zip(arrays[fact], -arrays["confidence"], strict=True), strict=True))
    label = dict(zip(arrays["rows"].tolist(), arrays["labels"].tolist(), strict=True))
    answer = dict(zip(arrays["rows"].tolist(), arrays["predicted"].tolist(), strict=True))
    headings = list(gallery.groups)
    for easy, hard in zip(headings[::2], headings[1::2], strict=True):
        of = CLASSES.index(easy.partition(":")[0]) if ":" in easy else None
        among = {row for row in keys if of is None or label[row] == of}
        few, many = ([row for row, _ in gallery.groups[heading]] for heading in (easy, hard))
        assert len(set(few) | set(many)) == 2 * GALLERY_IMAGES and set(few) | set(many) <= among
        assert [keys[row] for row in few] == sorted(keys[row] for row in among)[:GALLERY_IMAGES]
        assert [keys[row] for row in many] == sorted((keys[row] for row in among), reverse=True)[:GALLERY_IMAGES]
        for row, text in (*gallery.groups[easy], *gallery.groups[hard]):
            said = re.search(r"(\d+) (of \d+ layers)?", text)
            assert said and int(said[1]) == keys[row][0]
            assert (f"taken for {CLASSES[answer[row]]}" in text) == (answer[row] != label[row])
            assert CLASSES[label[row]] in text and text.endswith(f"{-keys[row][1]:.2f}")


def test_galleries_show_the_classes_whose_images_differ_most(aig: Evaluated) -> None:
    gallery = one(drawn(aig), "convnet-aig-fewest-and-most-layers", Gallery)
    arrays = aig.details("gates-hard")
    assert arrays is not None
    spread = {
        name: np.var(arrays["facts.layers"][arrays["labels"] == number]) for number, name in enumerate(CLASSES[:-1])
    }
    shown = [heading.partition(":")[0] for heading in list(gallery.groups)[::2]]
    assert len(shown) == GALLERY_CLASSES
    assert shown == sorted(spread, key=lambda name: -spread[name])[:GALLERY_CLASSES]


# ---- ConvNet-AIG


def test_the_heat_map_shows_the_reports_facts_by_class(aig: Evaluated) -> None:
    for net in (aig, replace(aig, superclasses=SUPERCLASSES)):
        found = one(drawn(net), "convnet-aig-rates-by-class", HeatMap)
        expected = dict(zip(CLASSES, aig.reports[0].facts_by_class["gates"], strict=True))
        assert expected["empty"] is None
        assert set(found.rows) == set(CLASSES)
        for name, values in zip(found.rows, found.values, strict=True):
            assert list(values) == (expected[name] or [None] * 6)
        assert sum(found.groups.values()) in (0, len(CLASSES))
    assert found.groups and list(found.rows[:2]) == ["bee", "ant"]
    assert list(found.columns) == ["0=", "1", "2↓", "3", "4↓", "5"]


def test_the_histogram_counts_every_image_once(aig: Evaluated) -> None:
    found = one(drawn(aig), "convnet-aig-executed-layers", Bars)
    counts = [count or 0 for count in found.series["images"]]
    assert sum(counts) == aig.reports[0].num_images == IMAGES
    mean = sum(int(label) * count for label, count in zip(found.labels, counts, strict=True)) / IMAGES
    assert mean == pytest.approx(aig.reports[0].facts["layers"][0], rel=1e-5)
    assert len(counts) > 2 and counts[0] and counts[-1]


def test_the_histogram_by_superclass_shows_shares_of_each_superclass(aig: Evaluated) -> None:
    name = "convnet-aig-executed-layers-by-superclass"
    assert name not in drawn(aig)
    found = one(drawn(replace(aig, superclasses=SUPERCLASSES)), name, Bars)
    assert list(found.series) == ["insects", "vehicles", OTHERS]
    sizes = {"insects": 60, "vehicles": 30, OTHERS: 30}
    assert all(sum(shares) == pytest.approx(1) for shares in found.series.values())  # type: ignore[arg-type]
    whole = one(drawn(aig), "convnet-aig-executed-layers", Bars).series["images"]
    for place, count in enumerate(whole):
        assert sum((found.series[group][place] or 0) * size for group, size in sizes.items()) == pytest.approx(count)


def test_rates_under_attack_are_drawn_beside_the_clean_ones(aig: Evaluated, folder: Path) -> None:
    attack = trained("convnet_aig", folder, "attacked", all_gates(1.0), latency=False).reports
    assert "convnet-aig-rates-under-attack" not in drawn(replace(aig, attacked={"fgsm 0.1": attack[1:]}))
    found = one(drawn(replace(aig, attacked={"fgsm 0.1": attack})), "convnet-aig-rates-under-attack", Lines)
    assert {series.name: list(series.y) for series in found.series} == {
        "clean": aig.reports[0].facts["gates"],
        "fgsm 0.1": [1.0] * 6,
    }


@pytest.mark.long
def test_error_against_cost_is_drawn_in_both_conventions(folder: Path, plain: Evaluated) -> None:
    shut = trained("convnet_aig", folder, "shut", all_gates(-1.0), latency=False, target_rate=0.2)
    opened = trained("convnet_aig", folder, "open", all_gates(1.0), latency=False, target_rate=0.9)
    name = "convnet-aig-error-against-cost"
    assert name not in drawn(shut)
    found = one(drawn(opened, shut, others=[plain]), name, Lines)
    spent, layers, baseline = found.series
    whole = opened.reports[0].macs_mean / 1e6
    assert spent.x == pytest.approx([shut.reports[0].macs_mean / 1e6, whole])
    assert layers.x == pytest.approx([0, whole])  # with all layers, both are the whole net; with none, the papers' is 0
    assert list(spent.texts) == ["shut, target 0.2", "open, target 0.9"]
    assert list(spent.y) == list(layers.y) == [1 - shut.reports[0].top1, 1 - opened.reports[0].top1]
    assert (baseline.name, baseline.x) == ("plain", [plain.reports[0].macs_mean / 1e6])
    other = trained("convnet_aig", folder, "deeper", scattered, latency=False, depth=20, target_rate=0.5)
    assert len(one(drawn(opened, shut, other), name, Lines).series) == 4


# ---- RANet


def test_shares_by_exit_sum_to_one_and_sub_networks_sum_their_exits(ranet: Evaluated) -> None:
    figures = drawn(ranet)
    exits = one(figures, "ranet-answered-by-exit", Bars)
    subnetworks = one(figures, "ranet-answered-by-sub-network", Bars)
    assert list(exits.series) == ["budget-0.6", "budget-0.7", "budget-0.9"]
    assert len(exits.labels) == 4 and len(subnetworks.labels) == 2
    for policy, shares in exits.series.items():
        assert sum(shares) == pytest.approx(1)  # type: ignore[arg-type]
        halves = [sum(shares[:2]), sum(shares[2:])]  # type: ignore[arg-type]
        assert subnetworks.series[policy] == pytest.approx(halves)
    assert any(0 < share < 1 for shares in exits.series.values() for share in shares if share is not None)
    for name in ("ranet-answered-by-exit-and-class", "ranet-answered-by-sub-network-and-class"):
        by_class = one(figures, name, HeatMap)
        assert "budget-0.7" in by_class.caption
        fact = "subnetworks" if "sub-network" in name else "exits"
        report = next(report for report in ranet.reports if report.policy == "budget-0.7")
        assert by_class.values[:-1] == list(report.facts_by_class[fact])[:-1]
        for row in by_class.values[:-1]:
            assert sum(row) == pytest.approx(1)  # type: ignore[arg-type]
        assert set(by_class.values[-1]) == {None}


def test_sub_networks_are_not_drawn_separately_if_each_has_one_exit(folder: Path) -> None:
    single = trained("ranet", folder, "single", latency=False, first_blocks=1, more_blocks=1, budgets=[0.7])
    assert "ranet-answered-by-exit" in drawn(single)
    assert "ranet-answered-by-sub-network" not in drawn(single)


def test_accuracies_of_exits_add_up_to_that_of_the_policy(ranet: Evaluated) -> None:
    table = one(drawn(ranet), "ranet-exits", Table)
    reports = {report.policy: report for report in ranet.reports}
    assert [row[:2] for row in table.rows] == [[1, 1], [2, 1], [3, 2], [4, 2]]
    for number, row in enumerate(table.rows, 1):
        assert row[2:4] == [reports[f"exit-{number}"].macs_mean / 1e6, reports[f"exit-{number}"].top1]
    hits = sum(row[4] * (row[5] or 0) for row in table.rows)  # type: ignore[operator,misc]
    assert hits == pytest.approx(reports["budget-0.7"].top1)
    bars = one(drawn(ranet), "ranet-accuracy-of-sub-networks", Bars)
    alone, answered = bars.series.values()
    assert list(alone) == [reports["exit-2"].top1, reports["exit-4"].top1]
    shares = reports["budget-0.7"].facts["subnetworks"]
    hits = sum(share * (top1 or 0) for share, top1 in zip(shares, answered, strict=True))
    assert hits == pytest.approx(reports["budget-0.7"].top1)


def test_an_exit_that_answers_nothing_has_no_accuracy(ranet: Evaluated) -> None:
    def nobody(policy: str) -> Mapping[str, Any]:
        return {**(ranet.details(policy) or {}), "facts.exit": np.full(IMAGES, 1.0)}

    table = one(drawn(replace(ranet, details=nobody)), "ranet-exits", Table)
    assert [row[5] is None for row in table.rows] == [False, True, True, True]


def test_exits_alone_and_budgets_are_drawn_at_their_macs(ranet: Evaluated) -> None:
    found = one(drawn(ranet), "ranet-accuracy-of-exits", Lines)
    reports = {report.policy: report for report in ranet.reports}
    for series in found.series:
        assert list(series.x) == [reports[policy].macs_mean / 1e6 for policy in series.texts] == sorted(series.x)
        assert list(series.y) == [reports[policy].top1 for policy in series.texts]
    assert list(found.series[0].texts) == [f"exit-{number}" for number in range(1, 5)]
    both = one(drawn(ranet, replace(ranet, name="b")), "ranet-accuracy-of-exits", Lines)
    assert [series.name for series in both.series][::2] == ["ranet: one exit for all", "b: one exit for all"]


def test_the_accuracy_of_each_exit_is_drawn_and_of_older_runs_that_of_the_last_exit(ranet: Evaluated) -> None:
    name = "ranet-accuracy-over-training"
    found = one(drawn(ranet), name, Lines)
    assert [series.name for series in found.series] == [f"exit {number}" for number in range(1, 5)]
    old = {key: points for key, points in ranet.curves().items() if not key.startswith("train/top1/")}
    last = one(drawn(replace(ranet, curves=lambda: old)), name, Lines)
    assert [series.name for series in last.series] == ["exit 4"]
    assert list(last.series[0].y) == [0.1, 0.5] and "only one" in last.caption
    loss = one(drawn(ranet), "ranet-loss-over-training", Lines)
    assert [series.y[0] for series in loss.series] == [ranet.curves()[f"train/ce/0{n}"][0][1] for n in range(1, 5)]


def test_the_accuracy_of_exits_is_that_of_their_answers() -> None:
    family = find("ranet")
    config = validate(family.config, {"name": "ranet", **RANET}, "family")
    output = family.build(config, 5).train()(torch.randn(16, 3, SIDE, SIDE))
    labels = torch.arange(16) % 5
    mixed: Tensor = 0.7 * nn.functional.one_hot(labels, 5) + 0.3 / 5
    for targets in (labels, mixed):
        parts = family.loss(config, output, targets).parts
        for number in range(4):
            expected = sum(output.exits[n, number].argmax() == labels[n] for n in range(16)) / 16
            assert float(parts[f"top1/0{number + 1}"]) == float(expected)


# ---- ARRN


def test_skipping_takes_fewer_macs_and_every_point_equals_its_report(arrn: Evaluated) -> None:
    figures = drawn(arrn)
    skipping, full = one(figures, "arrn-macs-by-resolution", Lines).series
    assert list(skipping.x) == list(full.x) == [16, 12, 8]
    assert skipping.y[0] == full.y[0]
    assert skipping.y[2] is not None and full.y[2] is not None and skipping.y[2] < full.y[2]
    accuracy = one(figures, "arrn-accuracy-by-resolution", Lines).series
    reports = {report.policy: report for report in arrn.reports}
    assert list(accuracy[0].y) == [reports[name].top1 for name in ("16px", "12px", "8px")]
    assert list(accuracy[1].texts) == ["16px", "full-12px", "full-8px"]
    time = one(figures, "arrn-time-by-resolution", Lines)
    assert "passes of 2 images" in time.caption
    entry = next(entry for entry in reports["full-8px"].latency if entry.batch == 2)
    assert time.series[1].y[-1] == entry.median_ms / 2


def test_totals_are_over_the_resolutions_that_all_curves_share(arrn: Evaluated, plain: Evaluated, folder: Path) -> None:
    alone = one(drawn(arrn), "arrn-over-all-resolutions", Table)
    reports = {report.policy: report for report in arrn.reports}
    ways = {"skipping": ["16px", "12px", "8px"], "all residuals": ["16px", "full-12px", "full-8px"]}
    for (_, way, top1, macs, ms), (name, policies) in zip(alone.rows, ways.items(), strict=True):
        assert way == name
        assert top1 == pytest.approx(sum(reports[policy].top1 for policy in policies) / 3)
        assert macs == pytest.approx(sum(reports[policy].macs_mean for policy in policies) / 1e6)
        assert ms == pytest.approx(
            sum(entry.median_ms / 2 for p in policies for entry in reports[p].latency if entry.batch == 2)
        )
    beside = one(drawn(arrn, others=[plain]), "arrn-over-all-resolutions", Table)
    assert "16, 8 px" in beside.caption
    assert [row[:2] for row in beside.rows[2:]] == [["plain", "natively"], ["plain", "down and up"]]
    whole, small, up = (
        next(r for r in plain.reports if r.policy == p) for p in ("native", "native-8px", "down-and-up-8px")
    )
    assert beside.rows[2][3] == pytest.approx((whole.macs_mean + small.macs_mean) / 1e6)
    assert beside.rows[3][2] == pytest.approx((whole.top1 + up.top1) / 2)
    far = trained("baseline", folder, "far", latency=False, resolutions_px=[9])
    assert one(drawn(arrn, others=[far]), "arrn-over-all-resolutions", Table) == alone


def test_baselines_are_shown_natively_and_down_and_up(arrn: Evaluated, plain: Evaluated) -> None:
    found = one(drawn(arrn, others=[plain]), "arrn-accuracy-by-resolution", Lines)
    assert [series.name for series in found.series] == [
        "arrn: skipping",
        "arrn: all residuals",
        "plain: natively",
        "plain: down and up",
    ]
    assert list(found.series[3].texts) == ["native", "down-and-up-10px", "down-and-up-8px"]


def test_times_of_different_machines_are_not_compared(arrn: Evaluated, plain: Evaluated) -> None:
    moved = [
        replace(report, latency=[replace(entry, device="another") for entry in report.latency])
        for report in plain.reports
    ]
    figures = drawn(arrn, others=[replace(plain, reports=moved)])
    assert len(one(figures, "arrn-time-by-resolution", Lines).series) == 2
    assert [row[4] is None for row in one(figures, "arrn-over-all-resolutions", Table).rows] == [
        *(False, False),
        *(True, True),
    ]
    unmeasured = replace(arrn, reports=[replace(report, latency=[]) for report in arrn.reports])
    assert "arrn-time-by-resolution" not in drawn(unmeasured)


def test_dropout_and_skipping_are_tabulated_for_nets_with_and_without_dropout(arrn: Evaluated, folder: Path) -> None:
    without = with_distinct_top1(trained("arrn", folder, "without", latency=False, drop=0.0))
    name = "arrn-dropout-and-skipping"
    assert name not in drawn(arrn) and name not in drawn(without, replace(without, name="again"))
    found = one(drawn(without, arrn), name, Table)
    assert [row[:2] for row in found.rows] == [["with", "arrn"], ["without", "without"]]
    for row, net in zip(found.rows, (arrn, without), strict=True):
        reports = {report.policy: report.top1 for report in net.reports}
        assert row[2] == pytest.approx((reports["12px"] + reports["8px"]) / 2)
        assert row[3] == pytest.approx((reports["full-12px"] + reports["full-8px"]) / 2)


def test_resolutions_above_the_images_side_count_as_that_side(folder: Path) -> None:
    large = trained("arrn", folder, "large", latency=False, ladder_px=[32, 16, 8], resolutions_px=[24, 12])
    found = one(drawn(large), "arrn-accuracy-by-resolution", Lines)
    assert [list(series.x) for series in found.series] == [[16, 12], [16, 12]]


# ---- Shape Adaptor

PUBLISHED = {  # the released code's list of sides that each layer reads, at the start
    ("vgg16", 32, "human"): [32] * 2 + [16] * 2 + [8] * 3 + [4] * 3 + [2] * 3,
    ("vgg16", 32, "sa"): [32] + [22] * 3 + [15] * 3 + [10] * 3 + [7] * 3,
    ("vgg16", 32, "autosc"): [32, 30, 15, 15, 8, 8, 8, 4, 4, 4, 2, 2, 2],
    ("vgg16", 224, "sa"): [224, 128, 128, 73, 73, 41, 41, 23, 23, 13, 13, 7, 7],
    ("resnet50", 32, "human"): [32] * 5 + [16] * 4 + [8] * 6 + [4] * 2,
    ("resnet50", 32, "sa"): [32] + [22] * 4 + [15] * 4 + [10] * 4 + [7] * 4,
    ("mobilenet_v2", 32, "human"): [32] * 5 + [16] * 3 + [8] * 7 + [4] * 4,
    ("mobilenet_v2", 32, "sa"): [32] + [22] * 4 + [15] * 5 + [10] * 4 + [7] * 5,
    ("mobilenet_v2", 224, "autosc"): [224, 112, 112, 56, 53] + [27] * 3 + [14] + [13] * 3 + [12] * 3 + [6] * 4,
}


@pytest.mark.long
@pytest.mark.parametrize(("net", "side_px", "mode"), PUBLISHED)
def test_input_sides_of_layers_are_the_published_ones(net: str, side_px: int, mode: str) -> None:
    config = ShapeConfig(net=net, side_px=side_px, mode=mode, width=0.125)  # type: ignore[arg-type]
    torch.manual_seed(0)
    found = find("shape_adaptor").build(config, 10)
    sizes = found.plan((side_px, side_px)).sizes  # type: ignore[operator]
    costs, image = BodyCosts(layout_of(config), 10), (side_px, side_px)
    assert costs.values(image, sizes) == BodyCosts(layout_of(config), 10).values(image, sizes) > 0
    for _ in range(2):
        assert list(costs.sides(image, sizes)) == PUBLISHED[net, side_px, mode]  # type: ignore[index]


def test_learned_sides_are_drawn_beside_the_human_design(shaped: Evaluated) -> None:
    found = one(drawn(shaped), "shape-adaptor-sides", Lines)
    learned, human = found.series
    assert [series.name for series in found.series] == ["learned", "human design"]
    places, facts = layout_of(shaped.config).places, shaped.reports[0].facts["side_px"]  # type: ignore[arg-type]
    assert [learned.y[place + 1] for place in places] == facts
    assert list(human.y) == [16] * 2 + [8] * 2 + [4] * 3 + [2] * 3 + [1] * 3
    assert all(a >= b for a, b in pairwise(learned.y))  # type: ignore[operator]


@pytest.mark.long
def test_costs_of_shapes_are_those_of_the_nets(shaped: Evaluated, folder: Path) -> None:
    name = "shape-adaptor-against-human"
    (mine, design) = one(drawn(shaped), name, Table).rows
    assert mine[:4] == ["shaped", "sa", shaped.parameters, shaped.reports[0].macs_mean / 1e6]
    assert mine[5:] == [shaped.reports[0].facts["side_px"][-1], shaped.reports[0].top1]
    human = trained("shape_adaptor", folder, "human", latency=False, mode="human")
    assert design[2:4] == [human.parameters, human.reports[0].macs_mean / 1e6] and design[6] is None
    assert name not in drawn(human)
    autosc = trained("shape_adaptor", folder, "autosc", latency=False, mode="autosc")
    rows = one(drawn(shaped, human, autosc), name, Table).rows
    assert [row[:2] for row in rows] == [["shaped", "sa"], ["human", "human"], ["autosc", "autosc"]]
    assert rows[1][2:6] == design[2:6] and rows[1][6] == human.reports[0].top1
    assert rows[2][2:4] == [autosc.parameters, autosc.reports[0].macs_mean / 1e6]
    assert all(row[4] > 0 for row in rows)  # type: ignore[operator]


def test_alphas_and_sides_over_training_are_the_logged_ones(shaped: Evaluated) -> None:
    figures, curves = drawn(shaped), shaped.curves()
    for name, key in (
        ("shape-adaptor-alpha-over-training", "alpha"),
        ("shape-adaptor-side-px-over-training", "side_px"),
    ):
        found = one(figures, name, Lines)
        assert found.x_label == "epoch" and len(found.series) == 3
        for number, series in enumerate(found.series):
            assert list(series.y) == [value for _, value in curves[f"train/{key}/{number:02d}"]]
