"""Benchmarks: each compares like with like, in one run, in turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from raised import fails

from pipeline.bench import loader, training
from pipeline.bench.rows import compare, interleave
from pipeline.errors import ConfigError


def test_turns_are_interleaved_and_ratios_taken_within_a_round() -> None:
    turns: list[str] = []
    rates = {"ours": iter([1.0, 20.0, 3.0]), "theirs": iter([2.0, 10.0, 6.0])}

    def turn(name: str) -> Callable[[], float]:
        return lambda: (turns.append(name), next(rates[name]))[1]

    measured = interleave({name: turn(name) for name in rates}, 3)
    assert turns == ["ours", "theirs"] * 3
    theirs, ours = compare(measured, "ours")
    assert (theirs.name, theirs.rate, theirs.ratio) == ("theirs", 6.0, None)
    assert (ours.peer, ours.rate, ours.ratio) == ("theirs", 3.0, 0.5)


@pytest.mark.long
def test_loaders_are_compared_on_the_same_images(data_home: Path, packed: Callable[[str], Path]) -> None:
    rows = loader.loader(packed("flower-photos-subset"), seconds=0.1, rounds=1)
    assert [row.peer for row in rows] == [None, loader.NATIVE, None, loader.TORCHVISION]
    assert all(row.rate > 0 for row in rows)


def test_reads_with_added_latency_are_compared_with_reads_without(packed: Callable[[str], Path]) -> None:
    rows = loader.loader(packed("flower-photos-subset"), read_latency_s=0.005, seconds=0.1, rounds=1)
    assert [row.peer for row in rows] == [None, loader.WITHOUT_LATENCY]


def test_the_costs_of_an_index_are_measured_in_a_process_of_its_own() -> None:
    rows = {row.name.rpartition(": ")[2]: row for row in loader.index_only(20_000, 10)}
    assert set(rows) == {"load", "memory added", "epoch order, full", "epoch order, block"}
    assert [rows[name].unit for name in ("load", "memory added")] == ["s", "MB"]
    assert 0 < rows["load"].rate < 60


@pytest.mark.long
def test_a_familys_step_is_compared_with_a_plain_net_of_nearly_the_same_macs() -> None:
    (pair,) = training.training(["convnet_aig/cifar10_small"], batch_size=2, rounds=1)
    assert pair.plain.mmacs == pytest.approx(pair.family.mmacs, rel=0.3)
    assert pair.plain.depth == 14  # the same blocks without gates
    for step in (pair.family, pair.plain):
        assert sum(step.shares.values()) == pytest.approx(1) and min(step.shares.values()) > 0
    assert pair.family.ms > 0 and pair.plain.ms > 0
    assert pair.quotient == pytest.approx(pair.family.ms / pair.plain.ms * pair.plain.mmacs / pair.family.mmacs)
    with fails(ConfigError, "bench training", "arrn/toy"):
        next(training.training(["arrn/toy"]))
