"""Which trials of a sweep are best: the one to register, and those that no other one beats in accuracy and cost."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.frontier import dominated
from tuning.config import SweepConfig
from tuning.record import Trial


def best(config: SweepConfig, trials: Sequence[Trial]) -> Trial | None:
    """The finished trial that is best by the first objective; of equals the one of less cost, then the earlier."""
    able = [trial for trial in trials if trial.state == "finished" and config.accuracy_metric in trial.metrics]

    def merit(trial: Trial) -> tuple[float, float, int]:
        spent = trial.metrics.get(config.cost_metric, 0.0)
        return (
            config.sign(config.accuracy_metric) * trial.metrics[config.accuracy_metric],
            config.sign(config.cost_metric) * spent,
            -trial.number,
        )

    return max(able, key=merit, default=None)


def frontier(config: SweepConfig, trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other beats in accuracy and cost, cheapest first."""
    able = [
        t for t in trials if t.state == "finished" and {config.accuracy_metric, config.cost_metric} <= set(t.metrics)
    ]
    costs = [-config.sign(config.cost_metric) * trial.metrics[config.cost_metric] for trial in able]
    merits = [config.sign(config.accuracy_metric) * trial.metrics[config.accuracy_metric] for trial in able]
    beaten = dominated(costs, merits)
    return [able[n] for n in sorted(range(len(able)), key=lambda n: costs[n]) if not beaten[n]]
