"""Pictures as plain data: a family says what is to be seen, the report draws it, and the same numbers go into tables.

Every figure has a `name` (of its files: lower case, digits, hyphens), a `title`, and a `caption` of a sentence or two
that says what one sees and how it was measured. Values are finite; None stands where there is no value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Number: TypeAlias = "float | None"
Cell: TypeAlias = "str | float | int | None"


@dataclass(frozen=True)
class Series:
    """Points that belong together: x and y of equal length, `texts` what each point is called.

    `faded` marks points that are shown, but not to be chosen; `group` is what series of one kind have in common (a
    family): they share a colour and are shown or hidden together. A `reference` is what others are compared with: a
    neutral line without markers, on which `texts` stand as labels where there is room.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    texts: Sequence[str] = ()
    faded: Sequence[bool] = ()
    joined: bool = True
    group: str = ""
    reference: bool = False


@dataclass(frozen=True)
class Lines:
    """Series over a common pair of axes; points alone where a series is not joined."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False


@dataclass(frozen=True)
class Bars:
    """Side by side for each label one bar of each series {name: [len(labels)]}."""

    name: str
    title: str
    caption: str
    labels: Sequence[str]
    y_label: str
    series: Mapping[str, Sequence[Number]]


@dataclass(frozen=True)
class HeatMap:
    """values [len(rows)][len(columns)], from `low` to `high`; groups {name: number of rows}, in the rows' order."""

    name: str
    title: str
    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Number]]
    value_label: str
    low: float = 0.0
    high: float = 1.0
    groups: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """Images of the evaluated split by their rows there: groups {heading: [(row, text)]}."""

    name: str
    title: str
    caption: str
    groups: Mapping[str, Sequence[tuple[int, str]]]


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`; numbers as numbers."""

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


Figure: TypeAlias = "Lines | Bars | HeatMap | Gallery | Table"
