"""Ray Tune's ASHA and its Optuna searcher without Tune's controller, which would run the trials itself.

Tune calls a scheduler with its controller and its trials. ASHA ignores the controller and reads only `trial_id` of a
trial, so it gets None and a stand-in. The import checks the signatures on which this rests.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import ray
from ray.tune.schedulers import ASHAScheduler

from pipeline.compat import require
from pipeline.errors import ResourceError

TRIED = "2.60"
SIGNATURES = {
    "on_trial_add": ("self", "tune_controller", "trial"),
    "on_trial_result": ("self", "tune_controller", "trial", "result"),
}


def check_signatures(scheduler: type) -> None:
    """Raises ResourceError if the scheduler's methods do not take what this module gives them."""
    for name, expected in SIGNATURES.items():
        actual = tuple(inspect.signature(getattr(scheduler, name)).parameters)
        if actual != expected:
            raise ResourceError(
                f"ray {ray.__version__}: {scheduler.__name__}.{name} takes ({', '.join(actual)}), AdaptNet gives it "
                f"({', '.join(expected)}). It was tried with ray {TRIED}; install one of these versions",
                key="ray",
                subject=ray.__version__,
            )


require("ray", ASHAScheduler, (*SIGNATURES, "STOP"), tried=TRIED)
check_signatures(ASHAScheduler)


class Asha:
    """Tune's ASHAScheduler, fed with one result at a time. More of the value is better."""

    def __init__(self, *, epochs: float, grace_epochs: float, reduction: float) -> None:
        # Tune annotates whole numbers; it computes with floats
        limits: dict[str, Any] = {"max_t": epochs, "grace_period": grace_epochs, "reduction_factor": reduction}
        self._scheduler = ASHAScheduler(time_attr="epoch", metric="value", mode="max", stop_last_trials=False, **limits)
        self._known: set[str] = set()

    def should_stop(self, trial: str, epoch: float, value: float) -> bool:
        """Records the result of a trial at an epoch; returns whether the trial is to stop there."""
        stand_in: Any = SimpleNamespace(trial_id=trial)
        no_controller: Any = None
        if trial not in self._known:
            self._known.add(trial)
            self._scheduler.on_trial_add(no_controller, stand_in)
        result = {"epoch": epoch, "value": value}
        return bool(self._scheduler.on_trial_result(no_controller, stand_in, result) == ASHAScheduler.STOP)


class OptunaTrial(Protocol):
    """What a space may ask of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: range) -> int: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


class OptunaSearcher:
    """Tune's OptunaSearch over a space that `define` walks for each trial.

    objectives {metric: "max" or "min"}. Raises ImportError if Optuna is not installed.
    """

    def __init__(self, define: Callable[[OptunaTrial], None], objectives: Mapping[str, str], seed: int) -> None:
        import optuna  # type: ignore[import-not-found, unused-ignore]
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
        self.version = str(optuna.__version__)
        metrics, modes = list(objectives), list(objectives.values())
        several = len(metrics) > 1
        arguments: dict[str, Any] = {
            "space": define,
            "metric": metrics if several else metrics[0],
            "mode": modes if several else modes[0],
            "seed": seed,
        }
        self._search = OptunaSearch(**arguments)

    def suggest(self, trial: str) -> Mapping[str, float]:
        """The values of `trial` by the names that `define` gave them."""
        values: Mapping[str, float] | None = self._search.suggest(trial)
        assert values is not None
        return values

    def complete(self, trial: str, metrics: Mapping[str, float] | None) -> None:
        """Reports the objectives of `trial`; None if it failed."""
        result = None if metrics is None else dict(metrics)
        self._search.on_trial_complete(trial, result, error=metrics is None)
