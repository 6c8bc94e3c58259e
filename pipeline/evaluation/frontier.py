"""The frontier between accuracy and cost: the points that no other one beats, and the best point within a budget.

A point is a policy of a trained net. Its cost is in MACs per image, or in milliseconds per batch of some size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.errors import ConfigError

if TYPE_CHECKING:  # pipeline.family imports torch, which takes seconds
    from pipeline.family import Report

Unit = Literal["macs", "ms", "share"]
FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
BUDGET = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>ms|s|%|[kmgt]?(macs)?)", re.IGNORECASE)


CONTROL = "-control"  # ends the kind of a policy that only serves to be compared with


def merit(kind: str, top1: float) -> float:
    """A policy's top-1 in 0..1; that of a control is below all others, so that no frontier and no budget has it."""
    return float("-inf") if kind.endswith(CONTROL) else top1


def dominated(costs: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Whether each point is beaten by one that is at least as accurate and at most as expensive.

    costs, accuracies [n] -> [n]. The first of equal points is not beaten by the others.
    """
    order = sorted(range(len(costs)), key=lambda n: (costs[n], -accuracies[n], n))
    beaten, best = [True] * len(costs), float("-inf")
    for number in order:  # cheapest first: a point is not beaten if it is more accurate than all before it
        if accuracies[number] > best:
            beaten[number], best = False, accuracies[number]
    return beaten


@dataclass(frozen=True)
class Budget:
    """A limit on the cost: mean MACs per image, milliseconds per batch, or a share of the full network's MACs."""

    amount: float
    unit: Unit
    text: str  # as the user wrote it

    def cost_of(self, report: Report, milliseconds: float | None = None) -> float:
        """The cost of a policy in this budget's unit; `milliseconds` is its measured time."""
        if self.unit == "ms":
            assert milliseconds is not None
            return milliseconds
        return report.macs_mean if self.unit == "macs" else report.relative_macs

    def written(self, cost: float) -> str:
        """A cost in this budget's unit as text for people."""
        if self.unit == "ms":
            return f"{cost:.3g} ms"
        return f"{100 * cost:.3g} %" if self.unit == "share" else macs_text(cost)


def parse_budget(text: str) -> Budget:
    """ "0.8G" and "300M" are MACs, "5ms" a time, "50%" a share of the full network. Raises ConfigError for others."""
    match = BUDGET.fullmatch(text.strip())
    if match is None or float(match["number"]) <= 0:
        raise ConfigError(
            f"budget (={text}): write MACs as 0.8G or 300M, a time as 5ms, a share of the full net as 50%",
            key="budget",
            subject=text,
        )
    number, unit = float(match["number"]), match["unit"].lower().removesuffix("macs")
    if unit in ("ms", "s"):
        return Budget(number * (1e3 if unit == "s" else 1), "ms", text)
    if unit == "%":
        return Budget(number / 100, "share", text)
    return Budget(number * FACTORS[unit], "macs", text)


def best_within(reports: Sequence[Report], costs: Sequence[float], budget: Budget) -> int:
    """The position of the most accurate policy within the budget; of equally accurate ones the cheapest.

    costs [n] in the budget's unit. Raises ConfigError naming the cheapest policy if every one is above the budget.
    """
    merits = [merit(report.kind, report.top1) for report in reports]
    possible = [number for number, each in enumerate(merits) if each > float("-inf")]
    within = [number for number in possible if costs[number] <= budget.amount]
    if not within:
        cheapest = min(possible, key=lambda number: costs[number])
        raise ConfigError(
            f"budget (={budget.text}): every policy costs more; the cheapest is {reports[cheapest].policy} at "
            f"{budget.written(costs[cheapest])}",
            key="budget",
            subject=budget.text,
        )
    return max(within, key=lambda number: (merits[number], -costs[number]))


def macs_text(macs: float) -> str:
    """MACs with a unit, e.g. "1.23 GMACs"."""
    for factor, unit in ((1e9, "G"), (1e6, "M")):
        if macs >= factor:
            return f"{macs / factor:.4g} {unit}MACs"
    return f"{macs:.4g} MACs"
