"""Figures as plain data: a family provides them, the report draws them and lists the same numbers in tables.

Every figure has a `name` (of its files: lower case, digits, hyphens), a `title`, and a `caption` of one or two
sentences that describes the content and how it was measured. Values are finite; None means that there is no value.
After the kinds of figures come functions that families share to make them. Letters: N images, K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Number: TypeAlias = "float | None"
Array: TypeAlias = "NDArray[Any]"  # an array of any dtype
Arrays: TypeAlias = "Mapping[str, Array]"  # the per-image arrays stored with an evaluation
Cell: TypeAlias = "str | float | int | None"

OTHERS = "other classes"
MOST_POINTS = 400  # most points of a training curve; a screen cannot resolve more
GALLERY_CLASSES = 3  # classes whose images a gallery shows
GALLERY_IMAGES = 8  # images under one heading


def hits(arrays: Arrays, k: int = 1) -> NDArray[np.float64]:
    """By how much each image counts as right among its k most probable classes, [N] in 0..1.

    A label that shares its logit with others counts by the chance of drawing it among them; arrays of older evaluations
    do not say, and there the first of these classes is the answer.
    """
    if "tied" not in arrays:
        right = arrays["predicted"] == arrays["labels"] if k == 1 else arrays["rank_of_truth"] < k
        return right.astype(np.float64)
    room = k - arrays["rank_of_truth"].astype(np.float64)
    return np.where(arrays["tied"] > 0, np.clip(room / np.maximum(arrays["tied"], 1), 0.0, 1.0), 0.0)


@dataclass(frozen=True)
class Series:
    """Points that belong together: x and y of equal length, and the name of each point in `texts`.

    faded: points that are shown but not candidates. group: series of one group (a family) share a colour and are shown
    or hidden together. reference: the series is a line without markers with which others are compared; its `texts` are
    labels if there is room. neutral: the series, e.g. of a baseline, is drawn in ink instead of a colour. background:
    small grey marks behind the others, e.g. published points. x_sd, y_sd: standard deviations of x and y, drawn as
    error bars of this length to each side; None for a point without. labels: written beside the points, faintly beside
    faded ones, as far as there is room.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    texts: Sequence[str] = ()
    faded: Sequence[bool] = ()
    joined: bool = True
    group: str = ""
    reference: bool = False
    neutral: bool = False
    background: bool = False
    x_sd: Sequence[Number] = ()
    y_sd: Sequence[Number] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Lines:
    """Series over a common pair of axes; a series that is not `joined` is drawn as points only."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False


@dataclass(frozen=True)
class Bars:
    """Bars: for each label one bar of each series, side by side. series {name: [len(labels)]}."""

    name: str
    title: str
    caption: str
    labels: Sequence[str]
    y_label: str
    series: Mapping[str, Sequence[Number]]


@dataclass(frozen=True)
class HeatMap:
    """values [len(rows)][len(columns)] from `low` to `high`; groups {name: number of rows}, in the rows' order."""

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
    """Images of the evaluated split: groups {heading: [(row in the split, text)]}."""

    name: str
    title: str
    caption: str
    groups: Mapping[str, Sequence[tuple[int, str]]]


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`; numbers are given as numbers."""

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


Figure: TypeAlias = "Lines | Bars | HeatMap | Gallery | Table"


# ---- what several families need


class Named(Protocol):
    """A net with a name."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def for_each(nets: Sequence[N], own: Callable[[N], Iterable[Figure | None]]) -> list[Figure]:
    """The figures that `own` gives for each net, without None; with several nets, name and title contain the net's."""
    found: list[Figure] = []
    for net, mark in zip(nets, marks([net.name for net in nets]), strict=True):
        for figure in own(net):
            if figure is not None and len(nets) > 1:
                figure = replace(figure, name=f"{figure.name}--{mark}", title=f"{figure.title}: {net.name}")
            found += [] if figure is None else [figure]
    return found


def marks(names: Sequence[str]) -> list[str]:
    """A unique mark for each name, of lower case letters, digits and single hyphens."""
    found: list[str] = []
    for name in names:
        mark = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "net"
        number, free = 1, mark
        while free in found:
            number += 1
            free = f"{mark}-{number}"
        found.append(free)
    return found


def by_superclass(picture: HeatMap, superclasses: Mapping[str, Sequence[str]]) -> HeatMap:
    """A heat map of classes with its rows ordered by superclass, if there are any."""
    groups = grouped(picture.rows, superclasses)
    if not groups:
        return picture
    order = [number for numbers in groups.values() for number in numbers]
    return replace(
        picture,
        rows=[picture.rows[number] for number in order],
        values=[picture.values[number] for number in order],
        groups={name: len(numbers) for name, numbers in groups.items()},
    )


def grouped(classes: Sequence[str], superclasses: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """{superclass: numbers of its classes}, each class once; those without a superclass come last, as OTHERS."""
    left = {name: number for number, name in enumerate(classes)}
    groups: dict[str, list[int]] = {}
    for superclass, members in superclasses.items():
        numbers = [left.pop(name) for name in members if name in left]
        if numbers:
            groups[superclass] = numbers
    if groups and left:
        groups[OTHERS] = [*groups.pop(OTHERS, []), *left.values()]
    return groups


def over_training(
    picture: Lines, curves: Mapping[str, Sequence[tuple[int, float]]], keys: Mapping[str, str]
) -> Lines | None:
    """`picture` with a series for each curve in keys {key: name}, over epochs if they were logged, else over steps.

    A long curve is thinned to MOST_POINTS points and the last one. None if a curve is missing.
    """
    if not keys or not all(curves.get(key) for key in keys):
        return None
    epochs = dict(curves.get("train/epoch", ()))
    known = all(step in epochs for key in keys for step, _ in curves[key])
    series = []
    for key, name in keys.items():
        points = _thinned(curves[key])
        x = [epochs[step] if known else float(step) for step, _ in points]
        series.append(Series(name, x, [finite(value) for _, value in points]))
    return replace(picture, x_label="epoch" if known else "step", series=series)


def numbered(curves: Mapping[str, object], prefix: str) -> dict[int, str]:
    """{number: key} of the curves whose key is the prefix and a number, in rising order."""
    found = {key.removeprefix(prefix): key for key in curves if key.startswith(prefix)}
    return {int(number): found[number] for number in sorted(filter(str.isdecimal, found), key=int)}


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    every = math.ceil(len(points) / MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def finite(value: float) -> float | None:
    """The value; None if it is not finite."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Efforts:
    """The effort that each image of a split took.

    arrays: those stored with the evaluation. effort: [N]. text_of: an effort as text.
    """

    arrays: Arrays
    effort: Array
    text_of: Callable[[float], str]
    classes: Sequence[str]

    def extremes(self, number: int | None = None) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """The GALLERY_IMAGES images of least and those of most effort, as (row, text); no image is in both.

        Among equal efforts, the most confident images come first in the former and last in the latter. Of class
        `number`, or of all images.
        """
        labels = self.arrays["labels"]
        among = np.arange(len(labels)) if number is None else np.flatnonzero(labels == number)
        rising = among[np.lexsort((-self.arrays["confidence"][among], self.effort[among]))]
        count = min(GALLERY_IMAGES, len(rising) // 2)
        return self._entries(rising[:count]), self._entries(rising[::-1][:count])

    def widest(self) -> list[int]:
        """The GALLERY_CLASSES classes with the largest standard deviation of the effort, the largest first."""
        labels = self.arrays["labels"]
        spreads = {
            number: float(self.effort[labels == number].std())
            for number in range(len(self.classes))
            if (labels == number).any()
        }
        wide = [number for number, spread in spreads.items() if spread > 0]
        return sorted(wide, key=lambda number: -spreads[number])[:GALLERY_CLASSES]

    def _entries(self, places: Array) -> list[tuple[int, str]]:
        return [(int(self.arrays["rows"][place]), self._text(int(place))) for place in places]

    def _text(self, place: int) -> str:
        truth, answer = (self.classes[int(self.arrays[name][place])] for name in ("labels", "predicted"))
        answer = truth if answer == truth else f"{truth} taken for {answer}"
        return f"{self.text_of(float(self.effort[place]))}; {answer}, confidence {self.arrays['confidence'][place]:.2f}"
