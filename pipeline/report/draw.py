"""Draws figures with matplotlib, each once: as SVG for the page and, the very same drawing, as PNG for the folder.

One unit of a drawing is one CSS pixel at its natural size. Ink and palette are colours that stand for others: in the
SVG they become currentColor and CSS variables, so that the page's theme decides.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import singledispatch
from itertools import pairwise
from math import ceil
from textwrap import wrap
from typing import Any, TypeAlias
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from pipeline.figures import Bars, Gallery, HeatMap, Lines, Series
from pipeline.report import cells
from pipeline.report.thumbnails import Thumbnail

INK = "#1b1b1f"
# Okabe and Ito's colours for all kinds of sight (jfly.uni-koeln.de/color), without black, which is the ink, and yellow
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "D", "^", "v", "P", "X", "<", ">", "p", "*", "h", "8")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
BASELINE, BASELINE_MARKER = "baseline", "s"  # this group is drawn in ink
COLOURS_OF_VALUES = "viridis"  # from dark blue over green to yellow, lighter and lighter, for all kinds of sight
WIDTH, HEIGHT = 640, 400  # px of a figure; a heat map takes what its cells need
FONT = 13  # px; a page that is too narrow scrolls before it makes this smaller than 11
LETTER = 0.58 * FONT  # px, a letter's width on average
LINE = 22  # px, of a legend
MOST_MARKED = 40  # points of a joined series that still get markers
MOST_SPOTS = 2000  # points of a figure that can be asked for
LONGEST_LABEL = 30  # letters
MARKER = 8
PNG_DPI = 144
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "legend.frameon": False,
    "legend.fontsize": FONT,
    "font.size": FONT,
    "font.family": "DejaVu Sans",
    "axes.titlesize": FONT,
    "svg.fonttype": "none",
    "svg.hashsalt": "adaptnet",
    "lines.markersize": MARKER,
    "lines.linewidth": 1.8,
}
Look: TypeAlias = dict[str, Any]  # what matplotlib takes by name
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Spot:
    """A box (x, y, width, height in px from the top left) that says something, or a legend's entry."""

    box: tuple[float, float, float, float]
    text: str
    group: str = ""
    series: int = 0
    key: bool = False


@dataclass
class Drawing:
    """A canvas of 72 units an inch, and where on it what can be asked for."""

    canvas: Canvas
    groups: Sequence[str] = ()  # of series-0, series-1, ...
    spots: list[Spot] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    svg: str
    png: bytes


def picture(figure: Lines | Bars | HeatMap) -> Picture:
    """The figure as SVG, to stand inside a page, and as PNG."""
    with _style():
        drawing = draw(figure)
        return Picture(_svg(figure.name, drawing), _png(drawing.canvas))


def contact_sheet(figure: Gallery, images: Mapping[int, Thumbnail]) -> bytes:
    """A gallery as PNG: lines of images under each heading; an image that is not at hand by its name."""
    across = max(1, min(8, max((len(group) for group in figure.groups.values()), default=1)))
    heights = [h for group in figure.groups.values() for h in (0.25, *[1.0] * ceil(len(group) / across))] or [1.0]
    with _style():
        canvas = _canvas(max(320, across * 112), sum(heights) * 152)
        grid = canvas.add_gridspec(len(heights), across, height_ratios=heights)
        line = 0
        for heading, group in figure.groups.items():
            axes = canvas.add_subplot(grid[line, :])
            axes.axis("off")
            axes.text(0, 0, cells.text(heading), fontweight="bold")
            for number, (row, words) in enumerate(group):
                place = grid[line + 1 + number // across, number % across]
                _image(canvas.add_subplot(place), images.get(row), row, words)
            line += 1 + ceil(len(group) / across)
        return _png(canvas)


def _image(axes: Axes, found: Thumbnail | None, row: int, words: str) -> None:
    axes.axis("off")
    axes.set_title("\n".join(wrap(_short(words, 64), 18)[:4]), fontsize=10)
    if found is not None and found.jpeg:
        axes.imshow(found.pixels())
    else:
        axes.text(0.5, 0.5, _short(found.file if found else f"row {row}", 14), ha="center", fontsize=9)


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page has the browser's letters
        yield


def _canvas(width: float, height: float, legend: float = 0.0) -> Canvas:
    """A canvas of width x (height + legend) px; the legend's part is at the bottom."""
    canvas = Canvas(figsize=(width / 72, (height + legend) / 72), dpi=72)
    share = legend / (height + legend)
    canvas.set_layout_engine(ConstrainedLayoutEngine(rect=(0, share, 1, 1 - share)))
    return canvas


def _short(words: str, most: int = LONGEST_LABEL) -> str:
    words = cells.text(words)
    return words if len(words) <= most else words[: most - 1] + "…"


# ---- one drawing for each kind of figure


@singledispatch
def draw(figure: object) -> Drawing:
    raise AssertionError(figure)


@draw.register
def _(figure: Lines) -> Drawing:
    entries = [_key(figure, number) for number in range(len(figure.series))]
    names = [_short(series.name, 60) for series in figure.series]
    across = _across(names)
    shown = len(names) > 1
    canvas = _canvas(WIDTH, HEIGHT, LINE * ceil(len(names) / across) if shown else 0)
    axes = canvas.add_subplot(xlabel=cells.text(figure.x_label), ylabel=cells.text(figure.y_label))
    for number, series in enumerate(figure.series):
        _plot(axes, number, series, entries[number])
    _scale(axes, figure)
    if shown:
        _legend(canvas, entries, names, across)
    _freeze(canvas)
    drawing = Drawing(canvas, [series.group for series in figure.series])
    drawing.spots += _point_spots(axes, figure)
    for series in figure.series:
        if series.reference and series.texts:
            _name_points(axes, series, [spot.box for spot in drawing.spots])
    drawing.spots += _key_spots(canvas, drawing.groups) if shown else []
    return drawing


def _key(figure: Lines, number: int) -> Line2D:
    """How a series looks: a group has one colour, a series its own marker or dashes."""
    series = figure.series[number]
    if series.reference:
        return Line2D([], [], color=INK, linestyle=(0, (4, 3)), linewidth=1.3, gid=f"key-{number}")
    own = [other for other in figure.series if not other.reference]
    groups = list(dict.fromkeys(other.group or other.name for other in own if other.group != BASELINE))
    at = next(place for place, other in enumerate(own) if other is series)
    colour = INK if series.group == BASELINE else PALETTE[groups.index(series.group or series.name) % len(PALETTE)]
    marker = BASELINE_MARKER if series.group == BASELINE else MARKERS[at % len(MARKERS)]
    few = not series.joined or len(series.x) <= MOST_MARKED
    return Line2D(
        [],
        [],
        color=colour,
        marker=marker if few else None,
        markeredgecolor=INK,
        markeredgewidth=0.6,
        linestyle=DASHES[at // len(PALETTE) % len(DASHES)] if series.joined else "none",
        gid=f"key-{number}",
    )


def _plot(axes: Axes, number: int, series: Series, key: Line2D) -> None:
    x = np.asarray(series.x, dtype=float)
    y = np.asarray([np.nan if value is None else value for value in series.y], dtype=float)
    pale = np.asarray(series.faded or [False] * len(x), dtype=bool)
    look: Look = {"color": key.get_color(), "clip_on": False}
    if series.joined or series.reference:
        line: Look = {"linestyle": key.get_linestyle(), "linewidth": key.get_linewidth()}
        axes.plot(x, y, gid=f"series-{number}-line", zorder=2, **look, **line)
    if series.reference or key.get_marker() in (None, "None"):
        return
    mark: Look = {**look, "marker": key.get_marker(), "linestyle": "none"}
    edge: Look = {"markeredgecolor": INK, "markeredgewidth": 0.6}
    hollow: Look = {"markerfacecolor": "none", "markeredgewidth": 1.3, "alpha": 0.65}
    if not pale.all():
        axes.plot(x[~pale], y[~pale], gid=f"series-{number}-marks", zorder=4, **mark, **edge)
    if pale.any():
        axes.plot(x[pale], y[pale], gid=f"series-{number}-faded", zorder=3, **mark, **hollow)


def _scale(axes: Axes, figure: Lines) -> None:
    axes.margins(0.05, 0.1)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if figure.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"{cells.text(figure.x_label)}, logarithmic")
    elif all(float(x).is_integer() for series in figure.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _across(names: Sequence[str]) -> int:
    """Entries of a legend side by side."""
    widest = max((len(name) for name in names), default=1) * LETTER + 60
    return max(1, min(len(names), int(WIDTH // widest)))


def _legend(canvas: Canvas, entries: Sequence[Any], names: Sequence[str], across: int) -> None:
    shown = [name if not name.startswith("_") else f"\N{ZERO WIDTH SPACE}{name}" for name in names]
    look: Look = {"handlelength": 2.2, "borderpad": 0.2, "labelspacing": 0.45, "borderaxespad": 0}
    canvas.legend(entries, shown, loc="lower left", bbox_to_anchor=(0, 0), ncols=across, **look).set_in_layout(False)


def _freeze(canvas: Canvas) -> None:
    """Lays the drawing out, once for all."""
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")


def _point_spots(axes: Axes, figure: Lines) -> list[Spot]:
    """A box around each point that has a value; of very many points, evenly some."""
    places = [
        (number, place, y)
        for number, series in enumerate(figure.series)
        for place, y in enumerate(series.y)
        if y is not None and not series.reference
    ]
    spots = []
    for number, place, value in places[:: max(1, ceil(len(places) / MOST_SPOTS))]:
        series = figure.series[number]
        x, y = axes.transData.transform((series.x[place], value))
        box = (x - MARKER, _height(axes) - y - MARKER, 2 * MARKER, 2 * MARKER)
        spots.append(Spot(box, cells.point(figure, number, place), series.group, number))
    return spots


def _height(axes: Axes) -> float:
    canvas = axes.get_figure(root=True)
    assert canvas is not None
    return float(canvas.bbox.height)


def _key_spots(canvas: Canvas, groups: Sequence[str]) -> list[Spot]:
    """A box around each entry of the legend."""
    legend, height = canvas.legends[0], float(canvas.bbox.height)
    spots = []
    for number, (handle, words) in enumerate(zip(legend.legend_handles, legend.get_texts(), strict=True)):
        assert handle is not None
        left, right = handle.get_window_extent().x0, words.get_window_extent().x1
        low, high = words.get_window_extent().y0, words.get_window_extent().y1
        box = (left - 4, height - high - 4, right - left + 8, high - low + 8)
        group = groups[number] if number < len(groups) else ""
        spots.append(Spot(box, words.get_text(), group, number, key=True))
    return spots


PLACES = ((-8, 6, "right", "bottom"), (8, -6, "left", "top"), (8, 6, "left", "bottom"), (-8, -6, "right", "top"))


def _name_points(axes: Axes, series: Series, marks: Sequence[tuple[float, float, float, float]]) -> None:
    """Writes the texts beside their points, each where it covers nothing; a text without such a place is left out."""
    height = _height(axes)
    taken = [(x + 3, height - y - h + 3, x + w - 3, height - y - 3) for x, y, w, h in marks]
    taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in _along(axes, series)]
    for x, y, words in zip(series.x, series.y, series.texts, strict=True):
        for right, up, ha, va in PLACES:
            offset: Look = {"xytext": (right, up), "textcoords": "offset points", "ha": ha, "va": va}
            note = axes.annotate(_short(words, 24), (x, y), annotation_clip=False, **offset)
            box = note.get_window_extent().extents
            if _inside(box, axes.bbox.extents) and not any(_overlap(box, other) for other in taken):
                taken.append((box[0], box[1], box[2], box[3]))
                break
            note.remove()


def _along(axes: Axes, series: Series) -> list[tuple[float, float]]:
    """Places on the series' line, at most 4 px apart."""
    places = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    corners = axes.transData.transform(np.array(places, dtype=float).reshape(-1, 2))
    found: list[tuple[float, float]] = []
    for start, end in pairwise(corners):
        steps = np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 4))
        found += [(float(x), float(y)) for x, y in start + steps[:, None] * (end - start)]
    return found


def _inside(box: Sequence[float], frame: Sequence[float]) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@draw.register
def _(figure: Bars) -> Drawing:
    labels = [_short(label) for label in figure.labels]
    names = list(figure.series)
    across = _across(names)
    upright = max((len(label) for label in labels), default=0) * LETTER * len(labels) > WIDTH - 100
    room = 7 * max((len(label) for label in labels), default=0) if upright else 0
    width = max(WIDTH, 90 + 9 * len(labels) * max(1, len(names)), 90 + 18 * len(labels))
    canvas = _canvas(width, HEIGHT - 60 + room, LINE * ceil(len(names) / across) if len(names) > 1 else 0)
    axes = canvas.add_subplot(ylabel=cells.text(figure.y_label))
    axes.grid(visible=False, axis="x")
    bars = _bars(axes, figure)
    axes.set_xticks(range(len(labels)), labels, rotation=90 if upright else 0)
    axes.margins(x=0.02)
    if len(names) > 1:
        entries = [
            Patch(facecolor=PALETTE[n % len(PALETTE)], edgecolor=INK, hatch=_hatch(n)) for n in range(len(names))
        ]
        _legend(canvas, entries, [_short(name, 60) for name in names], across)
    _freeze(canvas)
    return Drawing(canvas, [], [Spot(_box(patch, axes), words) for patch, words in bars])


def _hatch(number: int) -> str | None:
    """Tells colours apart that come again, and all in black and white."""
    return (None, "///", "...", "xxx", "\\\\\\", "ooo")[number % 6]


def _bars(axes: Axes, figure: Bars) -> list[tuple[Any, str]]:
    """Each bar that was drawn, with what it says."""
    thick = 0.8 / max(1, len(figure.series))
    found = []
    for number, (name, values) in enumerate(figure.series.items()):
        left = (number - (len(figure.series) - 1) / 2) * thick
        for place, value in enumerate(values):
            if value is not None:
                look: Look = {"color": PALETTE[number % len(PALETTE)], "edgecolor": INK, "linewidth": 0.6}
                (bar,) = axes.bar(place + left, value, thick, hatch=_hatch(number), **look)
                words = f"{figure.labels[place]}\n{name}: {cells.number(value)}"
                found.append((bar, cells.text(words)))
    return found


def _box(patch: Any, axes: Axes) -> tuple[float, float, float, float]:
    box = patch.get_window_extent()
    return (box.x0, _height(axes) - box.y1, max(box.width, 4), max(box.height, 4))


@draw.register
def _(figure: HeatMap) -> Drawing:
    rows, columns = [_short(row) for row in figure.rows], [_short(column, 44) for column in figure.columns]
    step = max(1, ceil(len(rows) / 110))  # of very many rows some are named
    cell_height = 20 if len(rows) <= 110 else 1800 / len(rows)
    cell_width = max(20, min(60, 480 / max(1, len(columns))))
    flat = max(map(len, columns), default=0) * LETTER < cell_width
    head = 24 if flat else max(map(len, columns), default=0) * LETTER * 0.95
    side = max((len(row) for row in rows), default=0) * LETTER
    groups = max((len(name) for name in figure.groups), default=0) * LETTER
    width = max(340, 40 + side + groups + cell_width * len(columns))
    canvas = _canvas(width, 90 + head + cell_height * len(rows))
    axes = canvas.add_subplot()
    values = np.array([[np.nan if v is None else v for v in row] for row in figure.values], dtype=float)
    values = np.ma.masked_invalid(values.reshape(len(rows), len(columns)))
    look: Look = {"cmap": COLOURS_OF_VALUES, "vmin": figure.low, "vmax": figure.high, "aspect": "auto"}
    image = axes.imshow(values, interpolation="none", gid="cells", **look)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns, rotation=0 if flat else 90)
    axes.set_yticks(range(0, len(rows), step), rows[::step])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _divide(axes, figure)
    bar = canvas.colorbar(image, ax=axes, location="top", aspect=30, pad=0.02, label=cells.text(figure.value_label))
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    bar.outline.set_visible(False)
    _freeze(canvas)
    return Drawing(canvas)


def _divide(axes: Axes, figure: HeatMap) -> None:
    """Lines between the groups of rows, and their names at the right."""
    start = 0
    for name, count in figure.groups.items():
        axes.axhline(start - 0.5, color=INK, linewidth=1.5)
        where: Look = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "left"}
        axes.text(1.01, start + (count - 1) / 2, _short(name), fontweight="bold", **where)
        start += count


# ---- files


def _png(canvas: Canvas) -> bytes:
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=PNG_DPI, facecolor="white")
    return file.getvalue()


def _svg(name: str, drawing: Drawing) -> str:
    """The drawing to be put into a page: ids of its own, the theme's colours, spots on top."""
    file = io.StringIO()
    drawing.canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(_themed(file.getvalue()))
    _rename(root, name)
    for unwanted in [child for child in root if child.tag == f"{{{SVG}}}metadata"]:
        root.remove(unwanted)
    _mark(root, name, drawing.groups)
    _add_spots(root, drawing.spots)
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    root.attrib |= {"class": "drawing", "width": f"{width:g}", "height": f"{height:g}"}
    root.attrib["style"] = f"--width: {width:g}px"
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(text: str) -> str:
    text = text.replace(INK, "currentColor")
    for number, colour in enumerate(PALETTE):
        text = text.replace(colour, f"var(--c{number}, {colour})")
    return text


def _rename(root: ElementTree.Element, name: str) -> None:
    """Ids and what refers to them get the figure's name, so that several drawings can stand in one page."""
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.attrib[key] = f"{name}-{value}"
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.attrib[key] = f"#{name}-{value[1:]}"
            else:
                element.attrib[key] = re.sub(r"url\(#", f"url(#{name}-", value)


def _mark(root: ElementTree.Element, name: str, groups: Sequence[str]) -> None:
    """Says of each series' marks and lines, and of its entry in the legend, which group they are of."""
    for element in root.iter():
        found = re.fullmatch(rf"{re.escape(name)}-(series|key)-(\d+)(-\w+)?", element.attrib.get("id", ""))
        if found and int(found[2]) < len(groups) and groups[int(found[2])]:
            element.attrib["data-group"] = groups[int(found[2])]
        if element.attrib.get("id") == f"{name}-cells":
            element.attrib["class"] = "cells"


def _add_spots(root: ElementTree.Element, spots: Sequence[Spot]) -> None:
    layer = ElementTree.SubElement(root, f"{{{SVG}}}g", {"class": "spots"})
    for spot in spots:
        x, y, width, height = (f"{side:.1f}" for side in spot.box)
        look = {"x": x, "y": y, "width": width, "height": height, "rx": "3"}
        if spot.key and not spot.group:
            continue
        about = {"data-group": spot.group} if spot.group else {}
        if spot.key:
            title = f"{spot.text}: show only {spot.group}"
            about |= {"class": "key", "role": "button", "tabindex": "0", "aria-pressed": "false", "aria-label": title}
        else:
            about |= {"class": "spot", "data-text": spot.text}
        ElementTree.SubElement(layer, f"{{{SVG}}}rect", look | about)
