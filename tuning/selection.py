"""The best trials of a sweep: the one to register, and those that no other one beats in accuracy and cost."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.frontier import dominated
from tuning.config import SweepConfig
from tuning.record import Trial


def best(config: SweepConfig, trials: Sequence[Trial]) -> Trial | None:
    """The finished trial that is best in the first objective; of equal ones the cheapest, then the earliest."""
    candidates = [trial for trial in trials if trial.state == "finished" and config.accuracy_metric in trial.metrics]

    def merit(trial: Trial) -> tuple[float, float, int]:
        cost = trial.metrics.get(config.cost_metric, 0.0)
        return (
            config.sign(config.accuracy_metric) * trial.metrics[config.accuracy_metric],
            config.sign(config.cost_metric) * cost,
            -trial.number,
        )

    return max(candidates, key=merit, default=None)


def frontier(config: SweepConfig, trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other one beats in accuracy and cost, cheapest first."""
    both = {config.accuracy_metric, config.cost_metric}
    candidates = [trial for trial in trials if trial.state == "finished" and both <= set(trial.metrics)]
    costs = [-config.sign(config.cost_metric) * trial.metrics[config.cost_metric] for trial in candidates]
    merits = [config.sign(config.accuracy_metric) * trial.metrics[config.accuracy_metric] for trial in candidates]
    beaten = dominated(costs, merits)
    return [candidates[n] for n in sorted(range(len(candidates)), key=lambda n: costs[n]) if not beaten[n]]
