"""The text of numbers and names. The page, its hover texts and the CSV files all use it, so they agree.

A number's text depends on the number alone: whole numbers in full, others with four digits.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from math import floor, log10
from numbers import Integral

from pipeline.figures import Bars, Cell, Gallery, HeatMap, Lines, Number, Table

DIGITS = 4
SMALLEST = 1e-4  # below, numbers are written with a power of ten
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # characters that XML cannot hold
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Sheet:
    """The numbers of a figure as text; the first `num_heads` columns name each row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_heads: int = 1

    def csv(self) -> str:
        """The content of a CSV file."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.columns, *self.rows])
        return file.getvalue()


def number(value: Number) -> str:
    """ "" for None, 1172 for 1172, 64.32 for 64.3196, 0.01309, 7849, 1.234e-05."""
    if value is None:
        return ""
    if isinstance(value, Integral) or value == 0:
        return str(int(value))
    if abs(value) < SMALLEST:
        return f"{value:.{DIGITS - 1}e}"
    return f"{value:.{max(0, DIGITS - 1 - floor(log10(abs(value))))}f}"


def text(raw: str) -> str:
    """`raw` without characters that a page cannot hold, e.g. of file names in another encoding."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", raw)


def cell(value: Cell) -> str:
    """A name or a number as text."""
    return text(value) if isinstance(value, str) else number(value)


def point(figure: Lines, number_of_series: int, place: int) -> str:
    """The hover text of a point: its name, then both coordinates with the labels of their axes."""
    series = figure.series[number_of_series]
    name = series.texts[place] if series.texts else series.name
    x, y = number(series.x[place]), number(series.y[place])
    x_sd, y_sd = (f" ± {sd[place]:.2g}" if sd and sd[place] is not None else "" for sd in (series.x_sd, series.y_sd))
    return text(f"{name}\n{figure.y_label}: {y}{y_sd}\n{figure.x_label}: {x}{x_sd}")


@singledispatch
def sheet(figure: object, files: Mapping[int, str]) -> Sheet:
    """The figure as a sheet; files {row: name} are those of a gallery's images."""
    raise AssertionError(figure)


@sheet.register
def _(figure: Lines, files: Mapping[int, str]) -> Sheet:
    fades = any(any(series.faded) for series in figure.series)
    spreads = any(series.x_sd or series.y_sd for series in figure.series)
    columns = ["series", "point", figure.x_label, figure.y_label] + (["faded"] if fades else [])
    columns += [f"sd of {label}" for label in (figure.x_label, figure.y_label)] if spreads else []
    rows = []
    for series in figure.series:
        none = [None] * len(series.x)
        names = series.texts or [""] * len(series.x)
        parts = (series.faded or none, series.x_sd or none, series.y_sd or none)
        for x, y, name, pale, x_sd, y_sd in zip(series.x, series.y, names, *parts, strict=True):
            row = [text(series.name), text(name), number(x), number(y)] + ([YES if pale else NO] if fades else [])
            rows.append(row + ([number(x_sd), number(y_sd)] if spreads else []))
    return Sheet([text(column) for column in columns], rows, 2)


@sheet.register
def _(figure: Bars, files: Mapping[int, str]) -> Sheet:
    columns = ["", *figure.series]
    values = zip(figure.labels, *figure.series.values(), strict=True)
    return Sheet([text(column) for column in columns], [[cell(value) for value in row] for row in values])


@sheet.register
def _(figure: HeatMap, files: Mapping[int, str]) -> Sheet:
    groups = [name for name, count in figure.groups.items() for _ in range(count)]
    heads = (
        [[group, row] for group, row in zip(groups, figure.rows, strict=True)] if groups else [[r] for r in figure.rows]
    )
    columns = [*(["group", ""] if groups else [""]), *figure.columns]
    rows = [[*map(text, head), *map(number, values)] for head, values in zip(heads, figure.values, strict=True)]
    return Sheet([text(column) for column in columns], rows, 2 if groups else 1)


@sheet.register
def _(figure: Gallery, files: Mapping[int, str]) -> Sheet:
    rows = [
        [text(heading), number(row), text(files.get(row, "")), text(label)]
        for heading, images in figure.groups.items()
        for row, label in images
    ]
    return Sheet(["group", "row", "file", "text"], rows, 3)


@sheet.register
def _(figure: Table, files: Mapping[int, str]) -> Sheet:
    return Sheet([text(column) for column in figure.columns], [[cell(value) for value in row] for row in figure.rows])
