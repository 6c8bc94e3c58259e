"""A row of a benchmark: a rate, and its ratio to a named peer measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    """`rate` in `unit`, the median over rounds; `ratio` to `peer`, the median of the rounds' own ratios."""

    name: str
    rate: float
    unit: str = "images/s"
    peer: str | None = None
    ratio: float | None = None


def interleave(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Rates of each run, measured A B A B …, so that a noisy machine treats all alike."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def compare(found: dict[str, list[float]], ours: str, unit: str = "images/s") -> list[Row]:
    """A row for `ours` against each other run, and one for each of those."""
    rows = []
    for name, rates in found.items():
        if name == ours:
            continue
        ratio = median(mine / theirs for mine, theirs in zip(found[ours], rates, strict=True))
        rows += [Row(name, median(rates), unit), Row(ours, median(found[ours]), unit, peer=name, ratio=ratio)]
    return rows
