"""Comparing nets: McNemar's test is the binomial one, equal cost is really equal, and nothing differs from itself."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raised import fails

from jobs.cli import main
from pipeline.deploy import evaluations
from pipeline.errors import ConfigError
from pipeline.evaluation import comparing
from pipeline.family import Evaluated, FamilyConfig, Report

IMAGES = 400


def net(name: str, accuracies: Mapping[str, tuple[float, float]], seed: int = 0, first_row: int = 0) -> Evaluated:
    """A net of policies {name: (MACs, accuracy)}, its answers drawn from the seed."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, Mapping[str, Any]] = {}
    reports = []
    for policy, (macs, accuracy) in accuracies.items():
        right = generator.random(IMAGES) < accuracy
        labels = np.zeros(IMAGES, np.int64)
        rows = np.arange(first_row, first_row + IMAGES)
        arrays[policy] = {"rows": rows, "labels": labels, "predicted": np.where(right, 0, 1)}
        reports.append(Report(policy, IMAGES, float(right.mean()), None, 0.0, macs, macs, 1.0))
    config = FamilyConfig(name="any")
    return Evaluated(name, "any", config, {}, ("a", "b"), "x", 32, 1, 1, reports, details=arrays.get)


ANY = {"slow": (4e6, 0.8), "fast": (1e6, 0.6), "bad": (3e6, 0.5)}


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 0), (7, 12), (30, 30)])
def test_mcnemars_p_is_the_probability_of_a_coin_tossing_split_as_uneven(only_a: int, only_b: int) -> None:
    count = only_a + only_b
    as_uneven = [n for n in range(count + 1) if abs(n - count / 2) >= abs(only_a - count / 2)]
    assert comparing.mcnemar(only_a, only_b) == pytest.approx(sum(comb(count, n) for n in as_uneven) / 2**count)


def test_a_net_does_not_differ_from_itself() -> None:
    pair = comparing.policies(net("a", ANY), net("b", ANY))
    assert (pair.difference, pair.low, pair.high, pair.p_value, pair.only_a, pair.only_b) == (0, 0, 0, 1, 0, 0)
    assert all(
        each.difference == each.low == each.high == 0 for each in comparing.at_equal_cost(net("a", ANY), net("b", ANY))
    )


def test_swapping_the_nets_flips_the_signs() -> None:
    a, b = net("a", ANY), net("b", {"other": (2e6, 0.7)}, seed=1)
    there, back = comparing.policies(a, b, "fast"), comparing.policies(b, a, None, "fast")
    assert there.difference == pytest.approx(-back.difference) and there.p_value == pytest.approx(back.p_value)
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a)
    assert there.low == pytest.approx(-back.high, abs=0.01) and there.low < there.difference < there.high


def test_an_interval_covers_the_truth_at_its_level() -> None:
    generator = np.random.default_rng(3)
    samples = [generator.choice([-1.0, 0.0, 1.0], 200, p=[0.2, 0.5, 0.3]) for _ in range(200)]  # a mean of 0.1
    covered = [low <= 0.1 <= high for low, high in map(comparing.interval, samples)]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_at_the_cost_of_a_policy_a_net_has_its_accuracy_and_between_two_the_line() -> None:
    a, b = net("a", ANY), net("b", {"small": (1e6, 0.4), "middle": (2e6, 0.55), "large": (9e6, 0.9)}, seed=2)
    accuracy = {report.policy: report.top1 for report in (*a.reports, *b.reports)}
    found = {each.macs: each for each in comparing.at_equal_cost(a, b)}
    assert sorted(found) == [1e6, 2e6, 4e6, 9e6]  # "bad" is on no frontier
    assert found[1e6].top1_a == pytest.approx(accuracy["fast"]) and found[1e6].top1_b == pytest.approx(
        accuracy["small"]
    )
    between = accuracy["fast"] + (accuracy["slow"] - accuracy["fast"]) / 3
    assert found[2e6].top1_a == pytest.approx(between) and found[2e6].top1_b == pytest.approx(accuracy["middle"])
    assert found[9e6].top1_a == pytest.approx(accuracy["slow"]) and found[9e6].top1_b == pytest.approx(
        accuracy["large"]
    )
    for each in found.values():
        assert each.difference == pytest.approx(each.top1_a - each.top1_b) and each.low <= each.difference <= each.high


def test_only_common_images_count() -> None:
    pair = comparing.policies(net("a", ANY), net("b", ANY, first_row=100))
    assert pair.num_images == IMAGES - 100
    with fails(ConfigError, "evaluations"):
        comparing.policies(net("a", ANY), net("b", ANY, first_row=IMAGES))


def test_nets_that_cannot_be_compared_are_refused() -> None:
    with fails(ConfigError, "--policy-a", "quick"):
        comparing.policies(net("a", ANY), net("b", ANY), "quick")
    bare = net("b", ANY)
    with fails(ConfigError, "evaluations", "slow"):
        comparing.policies(net("a", ANY), Evaluated(**{**vars(bare), "details": lambda policy: None}))


# --- on trained nets


def test_the_command_prints_the_librarys_results(
    finished: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gated, exits = finished["convnet_aig"], finished["ranet"]
    main_ends(0, "compare", gated, exits)
    printed = capsys.readouterr().out
    pair = comparing.policies(*evaluations.together([evaluations.find(str(run)) for run in (gated, exits)]))
    assert f"A - B = {100 * pair.difference:+.2f} points" in printed and "at equal cost" in printed
    monkeypatch.chdir(gated.parents[1])  # the registry beside the runs is found by itself
    main_ends(0, "compare", "models:/gated@candidate", gated)
    assert "+0.00 points" in capsys.readouterr().out


def test_nets_without_an_evaluation_or_with_other_images_are_refused(
    finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main_ends(2, "compare", finished["convnet_aig"], finished["elsewhere"])
    main_ends(2, "compare", finished["convnet_aig"], finished["convnet_aig"] / "checkpoints" / "step-00000005")
    assert len(capsys.readouterr().err.splitlines()) == 2


def main_ends(code: int, *arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    assert (ended.value.code or 0) == code
