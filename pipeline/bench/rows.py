"""Rows of a benchmark: a rate, and its ratio to a named peer that was measured in the same run."""

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
    """`rate` in `unit` is the median over the rounds; `ratio` to `peer` is the median of the ratios of each round."""

    name: str
    rate: float
    unit: str = "images/s"
    peer: str | None = None
    ratio: float | None = None


def interleave(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The rates of each run, measured in turns A B A B …, so that load on the machine affects all runs alike."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(run())
    return rates


def compare(rates: dict[str, list[float]], ours: str, unit: str = "images/s") -> list[BenchRow]:
    """Two rows for each run other than `ours`: its own, and that of `ours` against it."""
    rows = []
    for name, theirs in rates.items():
        if name == ours:
            continue
        ratio = median(mine / other for mine, other in zip(rates[ours], theirs, strict=True))
        rows += [
            BenchRow(name, median(theirs), unit),
            BenchRow(ours, median(rates[ours]), unit, peer=name, ratio=ratio),
        ]
    return rows


def chosen(bench: str, requested: Sequence[str] | None, known: Collection[str]) -> Sequence[str]:
    """The requested names, or all known ones if none are requested. Raises ConfigError for an unknown name."""
    unknown = [name for name in requested or () if name not in known]
    if unknown:
        raise ConfigError(
            f"bench {bench}: unknown {', '.join(unknown)}; known: {', '.join(known)}",
            key=f"bench {bench}",
            subject=", ".join(unknown),
        )
    return requested or list(known)


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Runs torch on `count` CPU threads (None: its default) and retains freed memory, as training does."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
