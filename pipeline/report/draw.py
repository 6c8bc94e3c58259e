"""Draws figures with Matplotlib, each one once: as SVG for the page and as PNG of the same drawing for the folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import pairwise
from math import ceil

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from pipeline.figures import Bars, HeatMap, Lines, Number, Series
from pipeline.report import cells
from pipeline.report.style import (
    COLOURS_OF_VALUES,
    DASHES,
    FAINT,
    GREY,
    HEIGHT,
    INK,
    KEY,
    LETTER,
    LINE,
    MARKER,
    MARKERS,
    MOST_MARKED,
    MOST_SPOTS,
    NARROW,
    NEUTRAL_MARKER,
    PALETTE,
    SMALL,
    WIDTH,
    Look,
    new_canvas,
    png,
    short,
    style,
)
from pipeline.report.svg import Box, Drawing, Spot, svg


@dataclass(frozen=True)
class Picture:
    """A drawn figure: `svg` as an element of a page, `narrow` the same for a phone ("": none), `png` as a file."""

    svg: str
    narrow: str
    png: bytes


def picture(figure: Lines | Bars | HeatMap) -> Picture:
    """Draws the figure as SVG and PNG; heat maps and many bars, which do not fit a phone, in one width only."""
    with style():
        drawing = draw(figure, WIDTH)
        small = None if isinstance(figure, HeatMap) else draw(figure, NARROW)
        fits = small is not None and small.canvas.bbox.width <= NARROW
        narrow = svg(f"{figure.name}-narrow", small) if small is not None and fits else ""
        return Picture(svg(figure.name, drawing), narrow, png(drawing.canvas))


# ---- one drawing for each kind of figure


@singledispatch
def draw(figure: object, width: float = WIDTH) -> Drawing:
    """Draws a figure: Lines, Bars or HeatMap. Its width in px is this one, or more if its bars or cells need it."""
    raise AssertionError(figure)


@draw.register
def _(figure: Lines, width: float = WIDTH) -> Drawing:
    entries = [legend_entry(figure, number) for number in range(len(figure.series))]
    names = _legend_names([series.name for series in figure.series], width)
    across = _across(names, width)
    shown = len(names) > 1
    canvas = new_canvas(width, _height_of(width), LINE * ceil(len(names) / across) if shown else 0)
    axes = canvas.add_subplot(xlabel=cells.text(figure.x_label), ylabel=cells.text(figure.y_label))
    for number, series in enumerate(figure.series):
        _plot(axes, number, series, entries[number])
    _scale(axes, figure, width)
    if shown:
        _legend(canvas, entries, names, across)
    _freeze(canvas)
    drawing = Drawing(canvas, [series.group for series in figure.series])
    drawing.spots += _point_spots(axes, figure)
    _name_points(axes, figure, [spot.box for spot in drawing.spots])
    drawing.spots += _key_spots(canvas, drawing.groups, across) if shown else []
    return drawing


def legend_entry(figure: Lines, number: int) -> Line2D:
    """The look of a series: its group's colour, and a marker or dashes of its own; a neutral one is drawn in ink."""
    series = figure.series[number]
    if series.reference:
        return Line2D([], [], color=INK, linestyle=(0, (4, 3)), linewidth=1.3, gid=f"key-{number}")
    if series.background:
        return Line2D(
            [], [], color=INK, marker="o", markersize=SMALL, alpha=GREY, linestyle="none", gid=f"key-{number}"
        )
    own = [other for other in figure.series if not other.reference and not other.background]
    groups = list(dict.fromkeys(other.group or other.name for other in own if not other.neutral))
    at = next(place for place, other in enumerate(own) if other is series)
    colour = INK if series.neutral else PALETTE[groups.index(series.group or series.name) % len(PALETTE)]
    marker = NEUTRAL_MARKER if series.neutral else MARKERS[at % len(MARKERS)]
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
    """Draws a series' line and its markers; faded points are hollow."""
    x = np.asarray(series.x, dtype=float)
    y = np.asarray([np.nan if value is None else value for value in series.y], dtype=float)
    pale = np.asarray(series.faded or [False] * len(x), dtype=bool)
    look: Look = {"color": key.get_color(), "clip_on": False}
    if series.background:
        small: Look = {"marker": "o", "markersize": SMALL, "markeredgewidth": 0, "alpha": GREY, "linestyle": "none"}
        axes.plot(x, y, gid=f"series-{number}-marks", zorder=1.5, **look, **small)
        return
    _error_bars(axes, number, series, look)
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


def _error_bars(axes: Axes, number: int, series: Series, look: Look) -> None:
    """One standard deviation to each side; none of length 0, and none to 0, which a logarithmic axis does not have."""
    x, y = (np.asarray([np.nan if v is None else v for v in values], dtype=float) for values in (series.x, series.y))
    for axis, at, sd in (("x", x, series.x_sd), ("y", y, series.y_sd)):
        if not any(sd):
            continue
        length = np.asarray([value or np.nan for value in sd], dtype=float)
        bar: Look = {f"{axis}err": np.stack([np.minimum(length, 0.99 * at), length]), "capsize": 3, "elinewidth": 1.2}
        _, caps, lines = axes.errorbar(x, y, fmt="none", zorder=2.5, **look, **bar)
        for place, part in enumerate((*caps, *lines)):
            part.set_gid(f"series-{number}-{axis}bar{place}")


def _height_of(width: float) -> float:
    """A narrow drawing is less flat, so that its points have room."""
    return HEIGHT if width >= WIDTH else 0.9 * width


def _scale(axes: Axes, figure: Lines, width: float) -> None:
    axes.margins(0.05, 0.1)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if figure.log_x:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        room = width >= WIDTH or high < 50 * low
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if room else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"{cells.text(figure.x_label)}, logarithmic")
    elif all(float(x).is_integer() for series in figure.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator(8 if width >= WIDTH else 4, integer=True))


def _legend_names(names: Sequence[str], width: float) -> list[str]:
    """The names as a legend of this width holds them."""
    most = min(60, int((width - KEY) / LETTER))
    return [short(name, most) for name in names]


def _across(names: Sequence[str], width: float) -> int:
    """The number of entries in a row of a legend."""
    widest = max((len(name) for name in names), default=1) * LETTER + KEY
    return max(1, min(len(names), int(width // widest)))


def _legend(canvas: Canvas, entries: Sequence[Artist], names: Sequence[str], across: int) -> None:
    order = _row_by_row(len(names), across)
    entries = [entries[number] for number in order]
    shown = [f"\N{ZERO WIDTH SPACE}{names[n]}" if names[n].startswith("_") else names[n] for n in order]
    look: Look = {"handlelength": 2.2, "borderpad": 0.2, "labelspacing": 0.45, "borderaxespad": 0}
    canvas.legend(entries, shown, loc="lower left", bbox_to_anchor=(0, 0), ncols=across, **look).set_in_layout(False)


def _row_by_row(count: int, across: int) -> list[int]:
    """The order of entries that reads row by row in Matplotlib, which fills a legend column by column."""
    return [number for column in range(across) for number in range(column, count, across)]


def _freeze(canvas: Canvas) -> None:
    """Computes the layout and fixes it."""
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")


def _point_spots(axes: Axes, figure: Lines) -> list[Spot]:
    """A spot on each point that has a value; an even selection of at most MOST_SPOTS."""
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


def _key_spots(canvas: Canvas, groups: Sequence[str], across: int) -> list[Spot]:
    """A spot on each entry of the legend."""
    legend, height = canvas.legends[0], float(canvas.bbox.height)
    spots = []
    order = _row_by_row(len(groups), across)
    for number, handle, text in zip(order, legend.legend_handles, legend.get_texts(), strict=True):
        assert handle is not None
        left, right = handle.get_window_extent().x0, text.get_window_extent().x1
        low, high = text.get_window_extent().y0, text.get_window_extent().y1
        left = max(1.0, left - 4)
        box = (left, height - high - 2, right - left + 4, high - low + 4)
        spots.append(Spot(box, text.get_text(), groups[number], number, key=True))
    return spots


NEAR = ((-8, 6), (8, -6), (8, 6), (-8, -6))
FAR = tuple((x * far, y * far) for far in (2.5, 4.5) for x, y in (*NEAR, (0, 10), (0, -10)))  # joined by a thin line


def _name_points(axes: Axes, figure: Lines, marks: Sequence[Box]) -> None:
    """Writes each label beside its point, or farther away with a line to it, where it covers nothing.

    Points that are not faded come first. A label for which there is no room is left out.
    """
    height = _height(axes)
    taken = [(x + 3, height - y - h + 3, x + w - 3, height - y - 3) for x, y, w, h in marks]
    taken += [
        (x - 1, y - 1, x + 1, y + 1) for series in figure.series if series.reference for x, y in _along(axes, series)
    ]
    labelled = [
        (bool(series.faded and series.faded[place]), number, place)
        for number, series in enumerate(figure.series)
        for place in range(len(series.labels))
        if series.y[place] is not None
    ]
    for faded, number, place in sorted(labelled):
        series = figure.series[number]
        look: Look = {"alpha": FAINT if faded else 1.0, "gid": f"series-{number}-label{place}"}
        at = (series.x[place], series.y[place])
        if found := _placed(axes, series.labels[place], at, taken, look):
            taken.append(found)


def _placed(
    axes: Axes, label: str, at: tuple[float, Number], taken: Sequence[Sequence[float]], look: Look
) -> tuple[float, float, float, float] | None:
    """Writes the label at the first place that is free; returns its box, None if no place is."""
    for right, up in (*NEAR, *FAR):
        sides: Look = {"ha": "center" if right == 0 else "left" if right > 0 else "right"}
        sides |= {"va": "bottom" if up > 0 else "top"}
        offset: Look = {"xytext": (right, up), "textcoords": "offset points", "annotation_clip": False}
        line: Look = {"arrowprops": {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": FAINT, "shrinkB": 5}}
        note = axes.annotate(short(label, 28), at, **offset, **sides, **look, **(line if abs(up) > 6 else {}))
        note.get_window_extent()  # moves the text to its offset; this extent includes the line
        left, low, end, high = Text.get_window_extent(note).extents
        box = (float(left), float(low), float(end), float(high))
        if _inside(box, axes.bbox.extents) and not any(_overlap(box, other) for other in taken):
            return box
        note.remove()
    return None


def _along(axes: Axes, series: Series) -> list[tuple[float, float]]:
    """Points on the series' line in px, at most 4 px apart."""
    places = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    corners = axes.transData.transform(np.array(places, dtype=float).reshape(-1, 2))
    points: list[tuple[float, float]] = []
    for start, end in pairwise(corners):
        steps = np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 4))
        points += [(float(x), float(y)) for x, y in start + steps[:, None] * (end - start)]
    return points


def _inside(box: Sequence[float], frame: Sequence[float]) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@draw.register
def _(figure: Bars, width: float = WIDTH) -> Drawing:
    labels = [short(label) for label in figure.labels]
    names = _legend_names(list(figure.series), width)
    across = _across(names, width)
    upright = max((len(label) for label in labels), default=0) * LETTER * len(labels) > width - 100
    room = 7 * max((len(label) for label in labels), default=0) if upright else 0
    tall = _height_of(width) - 60 + room
    width = max(width, 90 + 9 * len(labels) * max(1, len(names)), 90 + 18 * len(labels))
    canvas = new_canvas(width, tall, LINE * ceil(len(names) / across) if len(names) > 1 else 0)
    axes = canvas.add_subplot(ylabel=cells.text(figure.y_label))
    axes.grid(visible=False, axis="x")
    bars = _bars(axes, figure)
    axes.set_xticks(range(len(labels)), labels, rotation=90 if upright else 0)
    axes.margins(x=0.02)
    if len(names) > 1:
        entries = [
            Patch(facecolor=PALETTE[n % len(PALETTE)], edgecolor=INK, hatch=_hatch(n)) for n in range(len(names))
        ]
        _legend(canvas, entries, names, across)
    _freeze(canvas)
    return Drawing(canvas, [], [Spot(_box(patch, axes), text) for patch, text in bars])


def _hatch(number: int) -> str | None:
    """A pattern that distinguishes repeated colours, and all series in black and white."""
    return (None, "///", "...", "xxx", "\\\\\\", "ooo")[number % 6]


def _bars(axes: Axes, figure: Bars) -> list[tuple[Patch, str]]:
    """Draws the bars; returns each one with the text of its spot."""
    thick = 0.8 / max(1, len(figure.series))
    bars = []
    for number, (name, values) in enumerate(figure.series.items()):
        left = (number - (len(figure.series) - 1) / 2) * thick
        for place, value in enumerate(values):
            if value is not None:
                look: Look = {"color": PALETTE[number % len(PALETTE)], "edgecolor": INK, "linewidth": 0.6}
                (bar,) = axes.bar(place + left, value, thick, hatch=_hatch(number), **look)
                text = f"{figure.labels[place]}\n{name}: {cells.number(value)}"
                bars.append((bar, cells.text(text)))
    return bars


def _box(patch: Patch, axes: Axes) -> Box:
    box = patch.get_window_extent()
    return (box.x0, _height(axes) - box.y1, max(box.width, 4), max(box.height, 4))


@draw.register
def _(figure: HeatMap, width: float = WIDTH) -> Drawing:
    rows, columns = [short(row) for row in figure.rows], [short(column, 44) for column in figure.columns]
    step = max(1, ceil(len(rows) / 110))  # with very many rows, only some get a label
    cell_height = 20 if len(rows) <= 110 else 1800 / len(rows)
    cell_width = max(20, min(60, 480 / max(1, len(columns))))
    flat = max(map(len, columns), default=0) * LETTER < cell_width
    head = 24 if flat else max(map(len, columns), default=0) * LETTER * 0.95
    side = max((len(row) for row in rows), default=0) * LETTER
    groups = max((len(name) for name in figure.groups), default=0) * LETTER
    width = max(NARROW, 40 + side + groups + cell_width * len(columns))
    canvas = new_canvas(width, 90 + head + cell_height * len(rows))
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
    """Draws lines between the groups of rows, and their names at the right."""
    start = 0
    for name, count in figure.groups.items():
        axes.axhline(start - 0.5, color=INK, linewidth=1.5)
        where: Look = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "left"}
        axes.text(1.01, start + (count - 1) / 2, short(name), fontweight="bold", **where)
        start += count
