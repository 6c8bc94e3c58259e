"""A report over seeds shows means of its runs' reports with their spread; others' points never decide what is best."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import drawn_nets
import numpy as np
import pytest
import torch
import torchvision
from raised import fails
from test_over_seeds import group
from test_report import read_csv, read_page

from pipeline import family as families
from pipeline import run_config
from pipeline.data.toy import make
from pipeline.deploy import importing
from pipeline.errors import ConfigError
from pipeline.evaluation import over_seeds
from pipeline.evaluation.over_seeds import SeedGroup
from pipeline.evaluation.seed_means import mean_of, means
from pipeline.families.baseline import FAMILY as BASELINE
from pipeline.family import Evaluated
from pipeline.figures import Lines
from pipeline.report import build, cells, draw, general, published, report, seeds
from pipeline.run_config import RunConfig


@pytest.fixture
def drawn_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "find", lambda name: drawn_nets.FAMILIES["tiny"])


def drawn_group(name: str, *numbers: int) -> SeedGroup:
    """Nets with every kind of figure, but without answers by image."""
    nets = [drawn_nets.net(f"{name}-s{number}", number) for number in numbers]
    return SeedGroup(name, [replace(net, recipe={"seed": n}) for net, n in zip(nets, numbers, strict=True)])


# ---- means


@pytest.mark.usefixtures("drawn_families")
def test_a_groups_figures_are_the_means_of_its_seeds_and_have_their_deviation() -> None:
    net = mean_of(drawn_group("g", 1, 2, 4))
    for place, mean in enumerate(net.reports):
        own = [seed.reports[place] for seed in net.seeds]
        for name in ("top1", "top5", "ece", "macs_mean", "macs_p95", "relative_macs"):
            assert getattr(mean, name) == pytest.approx(np.mean([getattr(report, name) for report in own]))
        assert mean.latency[1].median_ms == pytest.approx(np.mean([report.latency[1].median_ms for report in own]))
        assert mean.top1_by_class[0] == pytest.approx(np.mean([report.top1_by_class[0] for report in own]))
        assert mean.top1_by_class[1] is None, "no seed has images of this class"
    (_, frontier, *_) = general.frontiers([net])
    assert isinstance(frontier, Lines)
    points = frontier.series[1]
    costs = [[report.macs_mean / 1e6 for report in seed.reports] for seed in net.seeds]
    assert points.x == pytest.approx(np.mean(costs, axis=0)) and points.x_sd == pytest.approx(np.std(costs, 0, ddof=1))
    top1 = [[100 * report.top1 for report in seed.reports] for seed in net.seeds]
    assert points.y == pytest.approx(np.mean(top1, axis=0)) and points.y_sd == pytest.approx(np.std(top1, 0, ddof=1))


def test_what_not_every_seed_has_or_was_measured_alike_has_no_mean() -> None:
    one, two = (drawn_nets.net("n", seed).reports for seed in (1, 2))
    elsewhere = [replace(entry, device="GPU") for entry in two[0].latency]
    two = [replace(two[0], latency=elsewhere, top5=None), *two[1:2]]
    found = means([one, two])
    assert [mean.policy for mean in found] == ["low", "mid"]
    assert found[0].latency == [] and found[0].top5 is None and len(found[1].latency) == 2


@pytest.mark.usefixtures("drawn_families")
def test_one_seed_and_single_nets_have_no_error_bars_of_seeds() -> None:
    single, one = drawn_nets.net("single", 7), mean_of(drawn_group("g", 1))
    (_, frontier, *_) = general.frontiers([single, one])
    assert isinstance(frontier, Lines)
    svg = draw.picture(frontier).svg
    assert "xbar" not in svg and "series-2-ybar" not in svg and "series-1-ybar" in svg  # of the images, of one training
    assert seeds.comparisons([single, one]) == []
    (table,) = seeds.tables([single, one], [])
    assert all(row[3:] == [None, None, None, 1] for row in table.rows)


@pytest.mark.usefixtures("drawn_families")
def test_error_bars_are_one_deviation_long_in_the_colour_and_group_of_their_points() -> None:
    (_, frontier, *_) = general.frontiers([mean_of(drawn_group("g", 1, 2, 3)), drawn_nets.net("single", 7)])
    assert isinstance(frontier, Lines)
    (axes,) = draw.draw(frontier).canvas.axes
    (upright,) = [part for part in axes.collections if part.get_gid() == "series-1-ybar2"]
    ends = [segment[:, 1] for segment in upright.get_segments()]  # type: ignore[attr-defined]
    points = frontier.series[1]
    assert [end.mean() for end in ends] == pytest.approx(points.y)
    assert [np.ptp(end) / 2 for end in ends] == pytest.approx(points.y_sd)
    svg = draw.picture(frontier).svg
    assert 'id="frontier-macs-series-1-xbar2" data-group="tiny"' in svg and "series-2-xbar" not in svg


# ---- the verdict


def test_a_verdict_names_the_better_group_or_what_the_seeds_resolve() -> None:
    a, b = group("a", 1, 2, 3), group("b", 1, 2, 3, shift=5)
    fast_slow = over_seeds.policies(a, b, "fast", "slow").over_both  # 60 % and 80 %
    assert fast_slow.resolved and fast_slow.difference < 0
    points = f"{-100 * fast_slow.difference:.2f} ± {100 * fast_slow.resolution:.2f} points"
    assert over_seeds.in_words(a, b, fast_slow, 400) == f"b is better than a by {points} (3 seeds, 400 images)"
    slow_fast = over_seeds.policies(b, a, "slow", "fast").over_both
    assert over_seeds.in_words(b, a, slow_fast, 400) == over_seeds.in_words(a, b, fast_slow, 400)
    same = over_seeds.policies(a, b).over_both
    assert not same.resolved and f"({100 * same.resolution:.2f} points)" in over_seeds.in_words(a, b, same, 400)


@pytest.mark.usefixtures("drawn_families")
def test_the_page_and_its_json_hold_the_spreads_and_the_test_of_every_two_groups(tmp_path: Path) -> None:
    groups = [group(name, 1, 2, 3, shift=shift) for name, shift in (("a", 0), ("b", 5), ("c", 9))]
    nets = [replace(mean_of(each), config=drawn_nets.net("n").config) for each in groups]
    written = build(nets, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "data.json").read_text())["over_seeds"]
    assert [(c["a"]["name"], c["b"]["name"]) for c in data["comparisons"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [each["verdict"] for each in data["comparisons"]] == list(written.verdicts)
    own = [net.reports[0].top1 for net in groups[0].nets]
    spread = data["spreads"]["a"]["slow"]["top-1 (%)"]
    assert (spread["mean"], spread["sd"]) == pytest.approx((100 * np.mean(own), 100 * np.std(own, ddof=1)))
    page = read_page(tmp_path / "out" / "index.html")
    (row,) = [row for row in page.tables["seeds-a"] if row[:2] == ["slow", "top-1 (%)"]]
    assert row[2:] == [cells.number(spread[key]) for key in ("mean", "sd", "low", "high", "n")]
    assert {row[-1] for row in page.tables["seed-tests"][1:]} >= {text.partition(": ")[2] for text in written.verdicts}
    assert all(f"{text}." in (tmp_path / "out" / "index.html").read_text() for text in written.verdicts)


def test_equal_groups_have_a_verdict_that_json_can_hold() -> None:
    a, b = (mean_of(SeedGroup(name, group("same", 1, 2).nets)) for name in "ab")
    compared = seeds.comparisons([a, b])
    assert json.dumps(seeds.to_json([a, b], compared), allow_nan=False)
    assert compared[0].test.over_both.difference == 0 and not compared[0].test.over_both.resolved


# ---- from runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes of two seeds each, untrained: runs/wide-s1, -s2, runs/thin-s1, -s2."""
    home = tmp_path_factory.mktemp("seeds")
    make(home / "toy", train=20, val=20, side_px=16)
    for name, depth in (("wide", 14), ("thin", 8)):
        for seed in (1, 2):
            config = recipe(home, f"family.depth={depth}", f"seed={seed}")
            torch.manual_seed(10 * seed + depth)
            weights = home / f"{name}-{seed}.pt"
            torch.save(BASELINE.build(config.family, 10).state_dict(), weights)
            importing.import_weights(config, weights, home / "runs" / f"{name}-s{seed}")
    return home / "runs"


def recipe(home: Path, *overrides: str) -> RunConfig:
    sides = [f"data.{key}=16" for key in ("side_px", "eval_side_px", "eval_resize_px")]
    fixed = [f"data.root={home / 'toy'}", *sides, "tracking.register=null", "compute.workers=0"]
    return run_config.load(
        "baseline/toy", [*fixed, "family.resolutions_px=[8]", "evaluation.latency_repeats=0", *overrides]
    )


def stored(run_dir: Path) -> list[float]:
    return [report["top1"] for report in json.loads((run_dir / "evaluations" / "final" / "reports.json").read_text())]


def test_the_reports_means_are_those_of_the_runs_reports(runs: Path, tmp_path: Path) -> None:
    sources = [str(runs / "wide-s*"), str(runs / "thin-s*")]
    written = report(sources, tmp_path / "out", track=False)
    assert written.num_nets == 2 and len(written.verdicts) == 1
    head, *rows = read_csv(tmp_path / "out" / "policies.csv")
    shown = {name: [row[head.index("top-1 (%)")] for row in rows if row[0] == name] for name in ("wide", "thin")}
    for name, values in shown.items():
        own = np.mean([stored(runs / f"{name}-s{seed}") for seed in (1, 2)], axis=0)
        assert values == [cells.number(100 * value) for value in own]


def test_groups_that_are_none_and_nets_given_twice_are_refused(runs: Path, tmp_path: Path) -> None:
    with fails(ConfigError, "source", "-s*"):
        report([str(runs / "none-s*")], tmp_path / "out", track=False)
    with fails(ConfigError, "source", "wide-s1"):  # two recipes
        report([str(runs / "*-s*")], tmp_path / "out", track=False)
    with fails(ConfigError, "sources", "wide-s1"):
        report([str(runs / "wide-s*"), str(runs / "wide-s1")], tmp_path / "out", track=False)
    with fails(ConfigError, "--published", "cifar10"):
        report([str(runs / "wide-s1")], tmp_path / "out", track=False, data_set="cifar10")


# ---- what others have published


def test_every_published_point_is_possible_and_has_a_source() -> None:
    file = published.published()
    for source in file.sources:
        assert source.data_set in file.data_sets and source.link.startswith("https://") and source.note
        for name, side, gmacs, top1 in source.points:
            assert 16 <= side <= 640 and 0 < gmacs <= 12 and 50 < top1 < 100, f"{source.title}: {name}"
    named = [(source.data_set, source.title, name) for source in file.sources for name, *_ in source.points]
    assert len(set(named)) == len(named)


def test_torchvisions_points_are_those_of_the_installed_weights() -> None:
    (source,) = [source for source in published.published().sources if source.title.startswith("torchvision")]
    for name, side, gmacs, top1 in source.points:
        model, _, weights = name.partition(" ")
        entry = torchvision.models.get_model_weights(model)[weights]
        stated = (entry.meta["_ops"], entry.meta["_metrics"]["ImageNet-1K"]["acc@1"])
        assert (gmacs, top1) == stated and entry.transforms.keywords["crop_size"] == side, name


def counted(classes: int, images: int, unreadable: int = 0) -> Evaluated:
    net = drawn_nets.net("n", classes=[f"class-{k}" for k in range(classes)], policies=["only"])
    missing = [f"{k}.jpg" for k in range(unreadable)]
    return replace(net, reports=[replace(net.reports[0], num_images=images - unreadable, unreadable=missing)])


@pytest.mark.parametrize(
    ("root", "stated", "classes", "images", "expected"),
    [
        ("/data/cifar10", None, 10, 10_000, "cifar10"),
        ("/data/imagenet", None, 1000, 50_000, "imagenet-1k"),
        ("/data/imagenet", None, 1000, 10_000, None),
        ("/data/imagenet", None, 100, 50_000, None),
        ("/data/imagenet-c", None, 1000, 50_000, None),
        (None, None, 1000, 50_000, None),
        ("/data/photos", "imagenet-1k", 1000, 50_000, "imagenet-1k"),
        ("/data/imagenet", "none", 1000, 50_000, None),
    ],
)
def test_a_data_set_is_known_if_it_is_named_and_its_numbers_agree(
    root: str | None, stated: str | None, classes: int, images: int, expected: str | None
) -> None:
    assert published.data_set_of(counted(classes, images, 3), root, stated) == expected


@pytest.mark.parametrize("stated", ["imagenet-1k", "cifar10", "imagenet"])
def test_a_stated_data_set_that_the_images_cannot_be_is_refused(stated: str) -> None:
    with fails(ConfigError, "--published", stated):
        published.data_set_of(counted(10, 9_000), "/data/imagenet", stated)


def test_the_caption_counts_our_points_that_a_published_one_beats_by_brute_force() -> None:
    draws = np.random.default_rng(3)
    (first, *_) = published.points("cifar10")
    for _ in range(20):
        others = [replace(first, macs=macs, top1=top1) for macs, top1 in draws.random((3, 2))]
        own = [(macs, top1) for macs, top1 in draws.random((4, 2))]
        own = [p for p in own if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in own)]
        lost = sum(any(other.macs <= macs and other.top1 >= top1 for other in others) for macs, top1 in own)
        assert f"beat {lost} of the {len(own)} points" in published.caption(others, own)


@pytest.mark.usefixtures("drawn_families")
def test_published_points_are_grey_behind_ours_and_decide_nothing(tmp_path: Path) -> None:
    others = published.points("cifar10")
    nets = [drawn_nets.net(f"n{seed}", seed) for seed in range(4)]
    alone, beside = general.frontiers(nets)[1], general.frontiers(nets, others)[1]
    assert isinstance(alone, Lines) and isinstance(beside, Lines)
    assert list(beside.series[:-1]) == list(alone.series) and beside.series[-1].background
    assert published.caption(others, [])[:30] in beside.caption and "Grey" not in alone.caption
    assert draw.legend_entry(beside, len(beside.series) - 1).get_color() == draw.INK
    build(nets, tmp_path / "out", None, others)
    page = read_page(tmp_path / "out" / "index.html")
    assert len(page.tables["published-points"]) == 1 + len(others)
    assert {row[-1] for row in page.tables["published-points"][1:]} == {
        row[0] for row in page.tables["published-sources"][1:]
    }
