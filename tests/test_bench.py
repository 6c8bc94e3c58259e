"""Benchmarks: each compares like with like, in one run, in turns."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from raised import fails

from pipeline import run_config
from pipeline.bench import loader, record, training
from pipeline.bench.record import CpuTime
from pipeline.bench.rows import compare, interleave
from pipeline.data import toy
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


BURNS = "import time; begin = time.process_time()\nwhile time.process_time() - begin < {}: pass"


def test_cpu_time_is_that_of_this_process_and_of_all_below_it_in_the_block() -> None:
    """Also of one whose parent has ended, and of one that was there before; sleep is none."""
    twice = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURNS.format(1.0)!r}])"
    before = subprocess.Popen([sys.executable, "-c", "input();" + BURNS.format(0.5)], stdin=subprocess.PIPE, text=True)
    with before, CpuTime() as used:
        before.communicate("go\n")
        subprocess.run([sys.executable, "-c", twice], check=True)
        began = time.process_time()
        while time.process_time() - began < 0.5:
            pass
        time.sleep(1)
    assert 1.9 - 3 * record.LOOKED_EVERY_S < used.cpu_s < 3.5 and used.wall_s > 3


def test_each_training_of_the_record_has_its_own_seed_and_time(tmp_path: Path) -> None:
    images = toy.make(tmp_path / "images", num_classes=2, train=24, val=8, side_px=16, seed=5)
    small = ["family.depth=8", "data.side_px=16", "training.batch_size=8", "training.epochs=1", "compute.workers=0"]
    config = run_config.load("baseline/toy", [*record.OVERRIDES, *small, f"data.root={images}"])
    first, second = record.trained(config, 2)
    assert (first.seed, second.seed) == (config.seed, config.seed + 1)
    for each in (first, second):
        assert each.cpu_s > 0 and each.wall_s > 0 and all(0 <= top1 <= 1 for top1 in each.top1.values())


def test_the_record_is_the_speed_run_but_for_its_length_and_sees_the_test_images_once() -> None:
    config = run_config.load(record.RECIPE, [*record.OVERRIDES, "data.root=unused"])
    plain = run_config.load(record.RECIPE.partition(":")[0], ["data.root=unused"])
    assert (config.family, config.data) == (plain.family, plain.data)
    assert config.evaluation.every.unit == "epochs" and config.evaluation.every.value >= config.training.epochs
