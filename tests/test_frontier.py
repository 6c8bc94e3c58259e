"""Dominated points against the definition by brute force; budgets as people write them; the best point within one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from raised import fails

from pipeline.errors import ConfigError
from pipeline.evaluation.frontier import best_within, dominated, macs_text, merit, parse_budget
from pipeline.family import Report


def by_definition(costs: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Another point is at least as accurate and at most as expensive; the first of equal points is not dominated."""
    points = list(zip(costs, accuracies, strict=True))
    return [
        any(
            other[0] <= point[0] and other[1] >= point[1] and (other != point or at < number)
            for at, other in enumerate(points)
            if at != number
        )
        for number, point in enumerate(points)
    ]


@pytest.mark.parametrize("levels", [2, 4, 10_000])  # few levels make many ties
def test_a_point_is_dominated_if_and_only_if_another_is_as_good_and_as_cheap(levels: int) -> None:
    draw = np.random.default_rng(levels)
    for size in [0, 1, 2, 3, 7, 40] * 20:
        costs, accuracies = draw.integers(0, levels, (2, size)).astype(float).tolist()
        assert dominated(costs, accuracies) == by_definition(costs, accuracies)


def test_of_equal_points_only_the_first_is_not_dominated() -> None:
    assert dominated([2.0, 2.0, 2.0], [0.5, 0.5, 0.5]) == [False, True, True]


def report(policy: str, top1: float, macs: float, share: float) -> Report:
    return Report(policy, 1, top1, None, 0.0, macs, macs, share)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("0.8G", 8e8, "macs"), ("300 MMACs", 3e8, "macs"), ("5ms", 5, "ms"), ("0.5s", 500, "ms"), ("50%", 0.5, "share")],
)
def test_budgets_are_read_as_people_write_them(text: str, amount: float, unit: str) -> None:
    budget = parse_budget(text)
    assert budget.amount == pytest.approx(amount) and budget.unit == unit


@pytest.mark.parametrize("text", ["", "fast", "-3G", "0%", "1.2.3G", "5 minutes"])
def test_other_texts_are_refused_as_budgets(text: str) -> None:
    with fails(ConfigError, "budget", text):
        parse_budget(text)


def test_the_best_within_a_budget_is_the_most_accurate_then_the_cheapest() -> None:
    reports = [
        report("a", 0.5, 1e6, 0.1),
        report("b", 0.7, 3e6, 0.3),
        report("c", 0.7, 2e6, 0.2),
        report("d", 0.9, 9e6, 0.9),
    ]
    for text, best in (("3M", 2), ("1M", 0), ("20%", 2), ("100%", 3)):
        budget = parse_budget(text)
        assert best_within(reports, [budget.cost_of(r) for r in reports], budget) == best
    budget = parse_budget("0.5M")
    with fails(ConfigError, "budget", "0.5M"):
        best_within(reports, [budget.cost_of(r) for r in reports], budget)


def test_no_budget_chooses_a_control_and_no_frontier_has_one() -> None:
    """Though it is the cheapest and the most accurate."""
    control = Report("mask", 10, 0.9, None, 0.1, 1e6, 1e6, 0.1, kind="gates-control")
    real = Report("hard", 10, 0.8, None, 0.1, 2e6, 2e6, 0.2, kind="gates")
    reports, costs = [control, real], [1e6, 2e6]
    assert best_within(reports, costs, parse_budget("3M")) == 1
    with fails(ConfigError, "budget"):
        best_within(reports, costs, parse_budget("1.5M"))
    assert dominated(costs, [merit(each.kind, each.top1) for each in reports]) == [True, False]


def test_macs_are_written_with_a_unit() -> None:
    assert [macs_text(macs) for macs in (4.1e9, 25_340_000, 900)] == ["4.1 GMACs", "25.34 MMACs", "900 MACs"]
