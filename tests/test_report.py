"""The report: its page shows the numbers of its files, dominated points are faded, wrong sources are refused."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import drawn_nets
import images as pictures
import numpy as np
import pytest
import torch
from PIL import Image
from raised import fails
from torchmetrics.functional.classification import multiclass_confusion_matrix

from jobs import cli
from pipeline import family as families
from pipeline import run_config, tracking
from pipeline.data.index import open_index
from pipeline.data.toy import make
from pipeline.deploy import evaluations, importing
from pipeline.errors import ConfigError, ContractError, ResourceError
from pipeline.families.baseline import FAMILY as BASELINE
from pipeline.family import Evaluated
from pipeline.figures import Bars, HeatMap, Lines, Series, Table
from pipeline.report import (
    NO_IMAGES,
    build,
    cells,
    confusion,
    draw,
    fault_of,
    folder,
    general,
    grouped,
    report,
    style,
    training,
)
from pipeline.report.resolutions import resolutions
from pipeline.report.thumbnails import SIDE_PX, thumbnails


@dataclass
class Page(HTMLParser):
    """The page as a reader sees it: by figure its table, its points' texts and its images; and all tags."""

    figure: str = ""
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    spots: dict[str, list[str]] = field(default_factory=dict)
    images: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    ids: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    cell: list[str] | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.ids += [about["id"]] if "id" in about else []
        self.targets += [about["href"][1:]] if tag == "a" else []
        if tag == "figure":
            self.figure = about["id"]
        elif tag == "table":
            self.tables[self.figure] = []
        elif tag == "tr":
            self.tables[self.figure].append([])
        elif tag in ("th", "td"):
            self.cell = []
        elif tag == "rect" and about.get("class") == "spot":
            self.spots.setdefault(self.figure, []).append(about["data-text"])
        elif tag == "img":
            self.images.setdefault(self.figure, []).append(about)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td") and self.cell is not None:
            self.tables[self.figure][-1].append("".join(self.cell))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def read_csv(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))


@pytest.fixture(autouse=True)
def known_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "find", lambda name: drawn_nets.FAMILIES[name])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three nets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "find", lambda name: drawn_nets.FAMILIES[name])
        out = tmp_path_factory.mktemp("reports") / "out"
        build(drawn_nets.three(), out)
    return out


# ---- the numbers


def test_every_figures_table_on_the_page_is_its_csv(made: Path) -> None:
    page = read_page(made / "index.html")
    files = {path.stem: read_csv(path) for path in (made / "figures").glob("*.csv")}
    assert {"frontier-macs", "frontier-latency-1", "frontier-latency-32", "policies-first-net", "tiny-rates"} <= set(
        files
    )
    assert page.tables == files


def test_every_policy_of_policies_csv_is_on_the_page_in_the_same_digits(made: Path) -> None:
    page = read_page(made / "index.html")
    head, *rows = read_csv(made / "policies.csv")
    assert len(rows) == sum(len(net.reports) for net in drawn_nets.three())
    shown = [row for name, table in page.tables.items() if name.startswith("policies-") for row in table[1:]]
    assert shown == [row[2:] for row in rows]
    assert page.tables["policies-plain"][0] == head[2:]


def test_a_points_text_has_the_numbers_of_its_row(made: Path) -> None:
    page = read_page(made / "index.html")
    for name in ("frontier-macs", "frontier-latency-1", "tiny-training"):
        (_, _, x_label, y_label, *_), *rows = page.tables[name]
        mine = [row for row in rows if row[0] != "not dominated" and row[3]]  # y is there
        sd = {place: column for place, column in enumerate(page.tables[name][0]) if column == f"sd of {y_label}"}
        bars = [[f" ± {float(row[place]):.2g}" for place in sd if row[place]] for row in mine]
        expected = [
            f"{row[1] or row[0]}\n{y_label}: {row[3]}{''.join(bar)}\n{x_label}: {row[2]}"
            for row, bar in zip(mine, bars, strict=True)
        ]
        assert page.spots[name] == 2 * expected and expected  # of the drawing, and of the one for phones


def test_the_frontiers_numbers_are_those_of_policies_csv(made: Path) -> None:
    head, *rows = read_csv(made / "policies.csv")
    for figure, column, verdict in (
        ("frontier-macs", "MMACs mean", "dominated"),
        ("frontier-latency-32", "ms @32 median", "dominated @32"),
    ):
        at = [head.index(name) for name in ("net", "policy", column, "top-1 (%)", verdict)]
        of_policies = [[f"{row[at[0]]} · {row[at[1]]}", *(row[place] for place in at[2:])] for row in rows]
        drawn = [row[1:5] for row in read_csv(made / "figures" / f"{figure}.csv")[1:] if row[0] != "not dominated"]
        assert sorted(drawn) == sorted(of_policies)


def test_json_has_all_reports_and_every_figure(made: Path) -> None:
    data = json.loads((made / "data.json").read_text(encoding="utf-8"))
    for entry, net in zip(data["nets"], drawn_nets.three(), strict=True):
        assert [stored["top1"] for stored in entry["reports"]] == [each.top1 for each in net.reports]
        assert entry["reports"][0]["latency"] == [each.to_json() for each in net.reports[0].latency]
    assert {figure["name"] for figure in data["figures"]} == {path.stem for path in (made / "figures").glob("*.csv")}
    assert sorted(data["files"]) == sorted(str(p.relative_to(made)) for p in made.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, ""), (1172, "1172"), (np.int64(3), "3"), (64.3196, "64.32"), (100.0, "100.0"), (0.0, "0"),
     (7849280.4, "7849280"), (0.0130912, "0.01309"), (-2.5, "-2.500"), (1.2344e-5, "1.234e-05")],
)  # fmt: skip
def test_numbers_are_written_with_four_digits_and_whole_ones_in_full(value: float | None, written: str) -> None:
    assert cells.number(value) == written


# ---- what is faded


def test_faded_points_are_those_dominated_by_brute_force() -> None:
    for seed in range(20):
        nets = [drawn_nets.net(f"n{k}", 7 * seed + k, policies=[f"p{n}" for n in range(9)]) for k in range(3)]
        doubled = replace(nets[2], reports=[*nets[2].reports, replace(nets[2].reports[0], policy="twin")])
        figure = general.frontiers([*nets[:2], doubled])[1]
        assert isinstance(figure, Lines)
        points = [
            (x, y, pale)
            for series in figure.series
            if not series.reference
            for x, y, pale in zip(series.x, series.y, series.faded, strict=True)
        ]
        for number, (x, y, pale) in enumerate(points):
            better = [
                other
                for at, other in enumerate(points)
                if at != number and other[0] <= x and other[1] >= y and (other[:2] != (x, y) or at < number)
            ]
            assert pale == bool(better)
        (line,) = [series for series in figure.series if series.reference]
        assert sorted(zip(line.x, line.y, strict=True)) == sorted({(x, y) for x, y, pale in points if not pale})


def test_only_nets_timed_at_a_batch_size_are_in_its_frontier() -> None:
    untimed = drawn_nets.net("untimed", 5)
    untimed = replace(untimed, reports=[replace(each, latency=[]) for each in untimed.reports])
    timed = drawn_nets.net("timed", 6)
    figures = {figure.name: figure for figure in general.frontiers([timed, untimed])}
    assert [series.name for series in figures["frontier-latency-1"].series] == ["not dominated", "timed (tiny)"]
    (row,) = [row for row in general.all_policies([timed, untimed]).rows if row[0] == "untimed" and row[2] == "low"]
    assert row.count(None) == 6  # four latencies, two verdicts
    assert not any(figure.name.startswith("frontier-latency") for figure in general.frontiers([untimed]))


def test_a_latency_caption_describes_the_measurement_and_warns_of_doubtful_ones() -> None:
    def caption(**changes: Any) -> str:
        net = drawn_nets.net("n")
        reports = [replace(r, latency=[replace(entry, **changes) for entry in r.latency]) for r in net.reports]
        return general.frontiers([replace(net, reports=reports)])[2].caption

    quiet = caption(waited_share=0.01)
    assert "Some <CPU> & more with 2 threads" in quiet and "up to 1.3 times the median" in quiet
    assert "busy" not in quiet and "same device" not in quiet
    assert "40 %" in caption(waited_share=0.4) and "busy" in caption(waited_share=0.4)
    one, other = drawn_nets.net("one"), drawn_nets.net("other")
    slow = [replace(r, latency=[replace(entry, device="GPU") for entry in r.latency]) for r in other.reports]
    assert "same device" in general.frontiers([one, replace(other, reports=slow)])[2].caption


# ---- classes


def swept(net: Evaluated, sides: Sequence[int], up: str = "") -> Evaluated:
    reports = [
        replace(
            report,
            policy=f"{report.policy}@{side}px{up}",
            kind="resized",
            settings={"policy": report.policy, "side_px": side, "up_again": bool(up)},
        )
        for report in net.reports
        for side in sides
    ]
    return replace(net, swept={**net.swept, f"sides{sides}{up}": reports})


def test_lower_sides_are_drawn_with_the_images_own_and_listed_in_a_table() -> None:
    assert resolutions(drawn_nets.three()) == []
    one = swept(swept(drawn_nets.net("one"), (16, 8)), (16,), "-and-up")
    lines, table = resolutions([one, drawn_nets.net("two")])
    assert isinstance(lines, Lines) and isinstance(table, Table)
    names = [f"one · {policy}{up}" for policy in ("low", "mid", "full") for up in ("", " · up again")]
    assert [series.name for series in lines.series] == names
    assert [series.x for series in lines.series] == [[8.0, 16.0, 32.0], [16.0, 32.0]] * 3
    assert lines.series[0].y == [100 * one.reports[0].top1] * 3
    assert len(table.rows) == 3 * (3 + 2) and table.rows[0][:4] == ["one", "low", 32, "no"]


def test_the_speed_of_a_training_is_the_median_of_its_log_points() -> None:
    first, second, *_ = drawn_nets.three()
    assert not training.speeds([first, second])
    points = {"time/images_per_s": [(2, 100.0), (4, 300.0), (6, 200.0)], "time/macs_share_of_peak": [(2, 0.25)]}
    (table,) = training.speeds([first, replace(second, curves=lambda: points), replace(first, curves=dict)])
    assert list(table.columns) == ["net", *training.COLUMNS]
    assert [list(row) for row in table.rows] == [[second.name, 200.0, None, 25.0, None, None]]


def test_of_many_resolution_curves_each_nets_first_is_drawn() -> None:
    nets = [swept(drawn_nets.net(name), (16, 8)) for name in ("one", "two", "three")]
    lines, table = resolutions(nets)
    assert isinstance(lines, Lines) and isinstance(table, Table)
    assert [series.name for series in lines.series] == ["one · low", "two · low", "three · low"]
    assert "Of 9 curves" in lines.caption and len(table.rows) == 27


def test_of_many_classes_the_worst_and_best_are_drawn_and_the_csv_has_all(tmp_path: Path) -> None:
    classes = [f"class-{k:03d}" for k in range(200)]
    net = drawn_nets.net("many", 4, classes=classes)
    means = {classes[k]: np.mean([r.top1_by_class[k] for r in net.reports]) for k in range(200) if k != 1}
    build([net], tmp_path / "out")
    drawn = read_csv(tmp_path / "out" / "figures" / "accuracy-by-class.csv")
    ranked = sorted(means, key=lambda name: means[name])
    assert [row[0] for row in drawn[1:]] == ranked[:30] + ranked[-30:]
    assert [row[0] for row in read_csv(tmp_path / "out" / "classes.csv")[1:]] == classes
    assert "Of 200 classes, the 30 with the lowest" in (tmp_path / "out" / "index.html").read_text()


def test_confusions_count_the_answers_of_the_most_accurate_policy() -> None:
    classes, draw = ("ant", "bee", "oak"), np.random.default_rng(0)
    labels, predicted = draw.integers(0, 2, 200), draw.integers(0, 3, 200)
    stored = {"labels": labels, "predicted": predicted}
    asked: list[str] = []

    def details(policy: str) -> dict[str, Any]:
        asked.append(policy)
        return stored

    net = drawn_nets.net("n", classes=classes, details=details)
    matrix, table = confusion.confusions([net])
    assert isinstance(matrix, HeatMap) and isinstance(table, Table)
    assert set(asked) == {max(net.reports, key=lambda report: report.top1).policy}
    wanted = multiclass_confusion_matrix(*map(torch.from_numpy, (predicted, labels)), 3, normalize="true")
    for row, values in zip(wanted[:2].tolist(), matrix.values[:2], strict=True):
        assert values == pytest.approx([100 * share for share in row])
    assert list(matrix.values[2]) == [None] * 3, "no image is of this class"
    assert sum(row[2] for row in table.rows) == (labels != predicted).sum()
    assert [row[2] for row in table.rows] == sorted((row[2] for row in table.rows), reverse=True)
    first = table.rows[0]
    a, b = classes.index(first[0]), classes.index(first[1])
    assert a != b and first[2] == ((labels == a) & (predicted == b)).sum()


def test_confusions_of_several_seeds_are_counted_together() -> None:
    def seed(predicted: int) -> Evaluated:
        stored = {"labels": np.zeros(4, int), "predicted": np.full(4, predicted)}
        return drawn_nets.net("n", classes=("ant", "bee", "oak"), details=lambda policy: stored)

    both = replace(seed(0), details=lambda policy: None, seeds=(seed(1), seed(2)))
    _, table = confusion.confusions([both])
    assert isinstance(table, Table) and list(table.rows) == [["ant", "bee", 4, 50.0], ["ant", "oak", 4, 50.0]]


def test_of_many_classes_only_the_most_frequent_confusions_are_listed() -> None:
    draw, classes = np.random.default_rng(0), [f"c{n}" for n in range(5_000)]
    stored = {"labels": draw.integers(0, 5_000, 900), "predicted": draw.integers(0, 5_000, 900)}
    (table,) = confusion.confusions([drawn_nets.net("n", classes=classes, details=lambda policy: stored)])
    assert isinstance(table, Table) and len(table.rows) == confusion.MOST_PAIRS
    assert not confusion.confusions([drawn_nets.net("n", classes=classes)])


def test_classes_are_ordered_by_group_with_others_last(tmp_path: Path) -> None:
    net = drawn_nets.net("n", classes=["ant", "oak", "bee", "rock"])
    (tmp_path / "groups.yaml").write_text("plants: [oak]\nanimals: [bee, ant]\n")
    (one,) = grouped([net], tmp_path / "groups.yaml")
    (figure,) = general.by_class([one])
    assert list(figure.rows) == ["oak", "ant", "bee", "rock"]
    assert figure.groups == {"plants": 1, "animals": 2, "in no group": 1}
    assert [row[:2] for row in cells.sheet(figure, {}).rows][1] == ["animals", "ant"]


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("animals: [ant, unicorn]", "unicorn"),
        ('{"animals": "ant"}', "animals"),
        ("animals: [ant]\nplants: [ant]", "ant"),
        ("- ant", "groups.yaml"),
    ],
)
def test_wrong_groups_are_refused(text: str, subject: str, tmp_path: Path) -> None:
    (tmp_path / "groups.yaml").write_text(text)
    with fails(ConfigError, "--groups", subject):
        grouped([drawn_nets.net("n", classes=["ant", "oak"])], tmp_path / "groups.yaml")


# ---- the page and the pictures


def test_hostile_names_stay_text_and_the_page_loads_nothing(made: Path) -> None:
    text = (made / "index.html").read_text(encoding="utf-8")
    page = read_page(made / "index.html")
    assert not page.tags & {"b", "i", "net", "cpu", "x", "things", "over", "iframe", "object", "base"}
    assert "&lt;b&gt;ant &amp; &quot;bee&quot;&lt;/b&gt;" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", text)
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text
    assert text.count("<script") == 1 and 'http-equiv="Content-Security-Policy"' in text
    assert [row[0] for row in page.tables["accuracy-by-class"][1:]] == [cells.text(name) for name in drawn_nets.HOSTILE]


def test_ids_are_unique_and_every_link_has_a_target(made: Path) -> None:
    page = read_page(made / "index.html")
    assert len(page.ids) == len(set(page.ids))
    assert page.targets and set(page.targets) <= set(page.ids)


def test_ink_follows_the_theme_in_the_page_and_is_dark_in_the_png(made: Path) -> None:
    text = (made / "index.html").read_text(encoding="utf-8")
    assert "currentColor" in text and style.INK not in text.partition("</style>")[2]
    for path in (made / "figures").glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert tuple(pixels[0, 0]) == (255, 255, 255) and pixels.min() < 60, path.name


def test_every_drawn_figure_has_a_png(made: Path) -> None:
    kinds = {figure["name"]: figure["kind"] for figure in json.loads((made / "data.json").read_text())["figures"]}
    drawn = {name for name, kind in kinds.items() if kind != "Table"}
    assert drawn == {path.stem for path in (made / "figures").glob("*.png")} and "tiny-easy" in drawn


def test_marks_and_legend_entries_carry_their_group_and_no_two_series_look_alike() -> None:
    nets = [drawn_nets.net(f"n{k}", k, family="tiny" if k % 2 else "other") for k in range(11)]
    figure = general.frontiers(nets)[1]
    assert isinstance(figure, Lines)
    svg = draw.picture(figure).svg
    assert svg.count('data-group="tiny" class="key"') == 5 and svg.count('data-group="other" class="key"') == 6
    looks = [draw.legend_entry(figure, number) for number in range(1, 12)]
    assert len({(key.get_color(), key.get_marker()) for key in looks}) == 11
    assert len({key.get_color() for key in looks}) == 2


def test_a_legend_reads_row_by_row_and_each_spot_is_on_its_entry() -> None:
    series = [Series(f"series {n}", [0, 1], [n, 1.0], group=f"g{n}") for n in range(7)]
    drawing = draw.draw(Lines("a", "A", "", "x", "y", series))
    keys = {spot.series: spot for spot in drawing.spots if spot.key}
    assert all(spot.text == f"series {number}" and spot.group == f"g{number}" for number, spot in keys.items())
    reading = sorted(keys, key=lambda number: (round(keys[number].box[1]), keys[number].box[0]))
    assert reading == list(range(7)) and len({round(spot.box[1]) for spot in keys.values()}) == 2
    assert all(spot.box[0] >= 0 for spot in keys.values())


def test_spots_are_on_their_marks() -> None:
    figure = Lines(
        "a", "A", "", "x", "y", [Series("s", [0, 10, 20], [0.0, None, 5.0], texts=["p", "q", "r"], joined=False)]
    )
    drawing = draw.draw(figure)
    axes = drawing.canvas.axes[0]
    assert [spot.text.split("\n")[0] for spot in drawing.spots] == ["p", "r"]
    for spot, place in zip(drawing.spots, ((0, 0.0), (20, 5.0)), strict=True):
        x, y = axes.transData.transform(place)
        left, top, width, height = spot.box
        assert (left + width / 2, top + height / 2) == pytest.approx((x, drawing.canvas.bbox.height - y))


def test_the_same_figure_gives_the_same_drawing() -> None:
    figure = general.frontiers(drawn_nets.three())[1]
    assert isinstance(figure, Lines)
    assert draw.picture(figure) == draw.picture(figure)


@pytest.mark.parametrize(
    "figure",
    [
        Lines("a", "A", "", "x", "y", []),
        Lines("a", "A", "", "x", "y", [Series("s", [], [])], log_x=True),
        Lines("a", "A", "", "x", "y", [Series("s", list(range(3000)), [0.5] * 3000)]),
        Bars("a", "A", "", [], "y", {}),
        Bars("a", "A", "", [f"a long label {n}" for n in range(60)], "y", {"s": [1.0] * 60, "t": [None] * 60}),
        HeatMap("a", "A", "", [f"row {n}" for n in range(1000)], ["c"], [[0.5]] * 1000, "v"),
        HeatMap("a", "A", "", ["r"], [f"a column of a long name {n}" for n in range(60)], [[None] * 60], "v"),
    ],
    ids=["no series", "no points", "many points", "no bars", "many bars", "many rows", "many columns"],
)
def test_extreme_figures_are_drawn(figure: Lines | Bars | HeatMap) -> None:
    picture = draw.picture(figure)
    assert picture.svg.startswith("<svg") and picture.png[:4] == b"\x89PNG"
    assert picture.svg.count('class="spot"') <= style.MOST_SPOTS


@pytest.mark.parametrize(
    ("figure", "fault"),
    [
        (Table("No Name", "", "", [], []), "lower case"),
        (Table("a", "", "", ["x"], [["1", "2"]]), "cells as there are columns"),
        (Table("a", "", "", ["x"], [[float("nan")]]), "not finite"),
        (Lines("a", "", "", "", "", [Series("s", [1], [])]), "differ in length"),
        (Lines("a", "", "", "", "", [Series("s", [float("inf")], [1.0])]), "not finite"),
        (Bars("a", "", "", ["x"], "", {"s": []}), "as many values as there are labels"),
        (HeatMap("a", "", "", ["r"], ["c"], [[1.0, 2.0]], ""), "values are not 1 rows of 1"),
        (HeatMap("a", "", "", ["r"], ["c"], [[1.0]], "", groups={"g": 2}), "its groups hold 2 rows"),
        (Lines("a", "", "", "", "", [Series("s", [1], [None])]), None),
    ],
)
def test_a_figure_that_breaks_the_contract_is_named(
    figure: Any, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (fault_of(figure) or "") == "" if fault is None else fault in (fault_of(figure) or "")
    wrong = replace(drawn_nets.FAMILIES["tiny"], figures=lambda mine, others: [figure])
    monkeypatch.setattr(families, "find", lambda name: wrong)
    if fault is not None:
        with fails(ContractError, figure.name, "tiny"):
            build([drawn_nets.net("n")], tmp_path / "out")


# ---- galleries


def test_a_gallery_has_small_upright_copies_of_its_images(tmp_path: Path) -> None:
    for number, (width, height) in enumerate([(300, 200), (64, 40)]):
        place = tmp_path / "set" / "ant" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        turned = Image.Exif()
        turned[0x0112] = 6  # to be turned by a quarter
        place.write_bytes(pictures.jpeg(width, height, exif=turned.tobytes()))
    (tmp_path / "set" / "ant" / "2.jpg").write_bytes(b"no image")
    index = open_index(tmp_path / "set")
    found = thumbnails(index, [0, 1, 2, 99])
    sizes = [Image.open(io.BytesIO(found[row].jpeg)).size for row in (0, 1)]
    assert sizes == [(SIDE_PX * 2 // 3, SIDE_PX), (40, 64)] and set(found) == {0, 1, 2}
    assert found[2].jpeg == b""
    assert found[0].file.endswith("ant/0.jpg")
    build([drawn_nets.net("n")], tmp_path / "out", index)
    page = read_page(tmp_path / "out" / "index.html")
    shown = page.images["tiny-easy"]
    assert len(shown) == 2 and all(image["src"].startswith("data:image/jpeg;base64,") for image in shown)
    assert page.tables["tiny-easy"][1] == ["<i>easy</i>", "0", "ant/0.jpg", "1 layer"]


def test_a_gallery_without_images_shows_names(made: Path) -> None:
    text = (made / "index.html").read_text(encoding="utf-8")
    assert NO_IMAGES.strip() in text and ">row 2</span>" in text
    assert not read_page(made / "index.html").images


# ---- the folder


def test_a_report_replaces_an_earlier_one_and_leaves_other_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(drawn_nets.three(), out)
    (out / "notes.txt").write_text("mine")
    (out / "figures" / "own.png").write_bytes(b"mine")
    build(drawn_nets.three()[1:], out)
    assert (
        not (out / "figures" / "tiny-rates.png").exists() and not (out / "figures" / "policies-first-net.csv").exists()
    )
    assert (out / "notes.txt").read_text() == "mine" and (out / "figures" / "own.png").exists()
    assert (out / "figures" / "frontier-macs.png").exists()


def test_an_edited_file_list_removes_no_other_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build([drawn_nets.net("n")], out)
    (tmp_path / "precious.csv").write_text("mine")
    (out / "notes.txt").write_text("mine")
    data = json.loads((out / "data.json").read_text())
    data["files"] += ["../precious.csv", "notes.txt", "figures/../../precious.csv", str(tmp_path / "precious.csv")]
    (out / "data.json").write_text(json.dumps(data))
    build([drawn_nets.net("n")], out)
    assert (tmp_path / "precious.csv").exists() and (out / "notes.txt").exists()


@pytest.mark.long
def test_an_interrupted_report_can_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, full = tmp_path / "out", OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_bytes", lambda path, content: (_ for _ in ()).throw(full))
        with fails(ResourceError, "--out", "No space left"):
            build([drawn_nets.net("n")], out)
    build([drawn_nets.net("n")], out)
    assert (out / "index.html").exists()


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    (tmp_path / "home" / "data.json").write_text("{}")
    with fails(ConfigError, "--out", tmp_path / "home"):
        build([drawn_nets.net("n")], tmp_path / "home")
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["data.json", "thesis.tex"]
    with fails(ConfigError, "--out", "thesis.tex"):
        folder.check(tmp_path / "home" / "thesis.tex")
    with fails(ResourceError, "--out"):
        folder.check(Path("/proc/report"))


# ---- from runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of untrained nets, evaluated on the same images and sent to MLflow: runs/a and runs/b."""
    home = tmp_path_factory.mktemp("nets")
    make(home / "toy", train=40, val=30, side_px=24)
    for number, name in enumerate("ab"):
        overrides = [f"data.root={home / 'toy'}", "tracking.register=null", "compute.workers=0"]
        config = run_config.load("baseline/toy", [*overrides, "evaluation.latency_repeats=2"])
        torch.manual_seed(number)
        net = BASELINE.build(config.family, 10)
        torch.save(net.state_dict(), home / f"{name}.pt")
        importing.import_weights(config, home / f"{name}.pt", home / "runs" / name)
    return home / "runs"


@pytest.fixture
def real_families(monkeypatch: pytest.MonkeyPatch, known_families: None) -> None:
    monkeypatch.undo()


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process; returns its exit code and its output."""

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


@pytest.mark.usefixtures("real_families")
def test_the_command_writes_a_report_of_runs_and_logs_it_to_each(say, runs: Path, tmp_path: Path) -> None:
    code, text = say("report", str(runs / "a"), str(runs / "b"), "--out", str(tmp_path / "out"))
    assert code == 0 and "2 nets, 6 policies" in text and "warning" not in text, text
    client = tracking.connect(f"sqlite:///{runs}/mlflow.db")
    for name in "ab":
        run_id = json.loads((runs / name / "tracking.json").read_text())["run_id"]
        assert f"uploaded to MLflow run {run_id}" in text
        assert {"report/index.html", "report/data.json"} <= {f.path for f in client.list_artifacts(run_id, "report")}
    head, *rows = read_csv(tmp_path / "out" / "policies.csv")
    stored = json.loads((runs / "a" / "evaluations" / "final" / "reports.json").read_text())
    assert rows[0][head.index("MMACs mean")] == cells.number(stored[0]["macs_mean"] / 1e6)
    assert [row[0] for row in rows] == 3 * ["a"] + 3 * ["b"]


@pytest.mark.usefixtures("real_families")
def test_an_unreachable_server_gives_one_warning(say, runs: Path, tmp_path: Path) -> None:
    away = ("--uri", "http://127.0.0.1:9")
    code, text = say("report", str(runs / "a"), str(runs / "b"), "--out", str(tmp_path / "out"), *away)
    assert code == 0 and text.count("warning: http://127.0.0.1:9: ") == 1
    assert (tmp_path / "out" / "index.html").exists()
    code, text = say("report", str(runs / "a"), "--out", str(tmp_path / "out"), "--no-track", *away)
    assert code == 0 and "warning" not in text and "uploaded" not in text


@pytest.mark.usefixtures("real_families")
def test_wrong_sources_are_refused(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with fails(ConfigError, "sources", f"{runs}/a/"):
        report([str(runs / "a"), f"{runs}/a/"], out)
    shutil.copytree(runs / "a", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "evaluations")
    with fails(ConfigError, "source", tmp_path / "bare"):
        report([str(tmp_path / "bare")], out)
    shutil.copytree(runs / "b", tmp_path / "elsewhere")
    about = tmp_path / "elsewhere" / "evaluations" / "final" / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "data": "other"}))
    with fails(ConfigError, "data.root", tmp_path / "elsewhere"):
        report([str(runs / "a"), str(tmp_path / "elsewhere")], out)
    with fails(ConfigError, "source", tmp_path / "nowhere"):
        report([str(tmp_path / "nowhere")], out)


@pytest.mark.usefixtures("real_families")
def test_the_images_of_an_evaluation_are_found_in_their_folder(runs: Path) -> None:
    net = evaluations.find(str(runs / "a"))
    found = evaluations.images([net], net.sets[0])
    assert found is not None and len(found) == 30 and found.identity == net.sets[0]
    assert evaluations.images([net], "another") is None


def test_the_points_that_are_not_dominated_are_labelled_and_no_label_covers_another() -> None:
    figure = next(each for each in general.frontiers(drawn_nets.three()) if each.name == "frontier-macs")
    assert isinstance(figure, Lines)
    drawing = draw.draw(figure)
    notes = {note.get_gid(): note for note in drawing.canvas.axes[0].texts}
    free = [
        f"series-{number}-label{place}"
        for number, series in enumerate(figure.series)
        for place in range(len(series.labels))
        if not series.faded[place]
    ]
    assert free and set(free) <= set(notes)
    boxes = [note.get_tightbbox().extents for note in notes.values() if note.arrow_patch is None]
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            assert min(one[2], other[2]) <= max(one[0], other[0]) or min(one[3], other[3]) <= max(one[1], other[1])


def test_the_recommended_policy_is_the_cheapest_near_the_best() -> None:
    net = drawn_nets.net("mine", policies=["a", "b", "c", "d"])
    figures = {"a": (0.900, 4e8), "b": (0.895, 3e8), "c": (0.891, 2e8), "d": (0.889, 1e8)}
    reports = [replace(r, top1=figures[r.policy][0], macs_mean=figures[r.policy][1]) for r in net.reports]
    cheap, best = general.recommendation([replace(net, reports=reports)])
    assert " c: " in cheap and "50 %" in cheap and " a: " in best
    (alone,) = general.recommendation([replace(net, reports=[reports[0], reports[3]])])
    assert " a: " in alone


def test_a_single_training_has_bars_of_the_images_and_curves() -> None:
    net = drawn_nets.net("mine", policies=["a"])
    point = general.by_macs([net]).points[0]
    top1 = net.reports[0].top1
    assert point.top1_sd == pytest.approx(100 * (top1 * (1 - top1) / 10_000) ** 0.5)
    assert general.training([net]) == []
    logged = replace(net, curves=lambda: {"train/top1": [(1, 0.5), (2, 0.75)], "train/loss": [(1, 2.0), (2, 1.0)]})
    loss, top = general.training([net, logged])
    assert [series.y for series in loss.series] == [[2.0, 1.0]] and [series.y for series in top.series] == [[50, 75]]


def test_bars_that_do_not_fit_a_phone_have_one_drawing_which_scrolls() -> None:
    few, many = (
        Bars("bars", "Bars", "", [f"c{n}" for n in range(count)], "share", {"one": [0.5] * count}) for count in (3, 60)
    )
    assert draw.picture(few).narrow and not draw.picture(many).narrow


def test_a_stored_policy_that_its_family_does_not_know_is_shown_by_its_kind() -> None:
    net = drawn_nets.three()[0]
    for kind in ("", "of-another-time"):
        report = replace(net.reports[0], kind=kind, settings={})
        assert general.what(replace(net, family="convnet_aig"), report) == kind
