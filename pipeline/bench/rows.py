"""A row of a benchmark: a rate, and its ratio to a named peer measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from pipeline.errors import ConfigError
from pipeline.training.memory import keep_freed_memory


@dataclass(frozen=True)
class BenchRow:
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


def compare(found: dict[str, list[float]], ours: str, unit: str = "images/s") -> list[BenchRow]:
    """A row for `ours` against each other run, and one for each of those."""
    rows = []
    for name, rates in found.items():
        if name == ours:
            continue
        ratio = median(mine / theirs for mine, theirs in zip(found[ours], rates, strict=True))
        rows += [BenchRow(name, median(rates), unit), BenchRow(ours, median(found[ours]), unit, peer=name, ratio=ratio)]
    return rows


def chosen(bench: str, asked: Sequence[str] | None, known: Collection[str]) -> Sequence[str]:
    """What is asked for; all there is where nothing is. Raises ConfigError for what is not known."""
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise ConfigError(f"bench {bench}: {', '.join(unknown)} is not known; known: {', '.join(known)}")
    return asked or list(known)


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Torch on `count` CPU threads, None for as many as it takes; memory is kept as in training and evaluation."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
