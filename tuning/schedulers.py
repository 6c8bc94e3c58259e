"""What Ray Tune decides: which trials end early (ASHA), and what an Optuna study draws next.

Neither keeps its state over a kill: Tune does not save a scheduler's rungs, and restores searchers only with an
experiment of its own. Both are functions of what they were told, in order: so they are made anew and told it again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from pipeline.errors import ConfigError
from tuning import space
from tuning.config import SchedulerConfig, SweepConfig
from tuning.space import Case, Dimension, Values


class ASHA:
    """Tune's AsyncHyperBandScheduler, told one evaluation at a time. No trial ends where the scheduler is `none`."""

    def __init__(self, config: SchedulerConfig, epochs: float) -> None:
        self._scheduler: Any = None
        self._known: set[str] = set()
        if config.kind == "asha":
            from ray.tune.schedulers.async_hyperband import AsyncHyperBandScheduler

            if config.grace_epochs > epochs:
                raise ConfigError(
                    f"scheduler.grace_epochs (={config.grace_epochs:g}) is above training.epochs (={epochs:g}): no "
                    "trial would ever be judged"
                )
            self._scheduler = AsyncHyperBandScheduler(
                time_attr="epoch",
                metric="value",
                mode="max",
                max_t=epochs,
                grace_period=config.grace_epochs,
                reduction_factor=config.reduction,
                stop_last_trials=False,
            )

    def ends(self, trial: str, epoch: float, value: float) -> bool:
        """Takes note of an evaluation, of which more is better; whether the trial is to end by it."""
        if self._scheduler is None:
            return False
        handle = SimpleNamespace(trial_id=trial)
        if trial not in self._known:
            self._known.add(trial)
            self._scheduler.on_trial_add(None, handle)
        decision = self._scheduler.on_trial_result(None, handle, {"epoch": epoch, "value": value})
        return bool(decision == self._scheduler.STOP)


class Study:
    """An Optuna study, by Tune's OptunaSearch: asked for draws, told what became of them."""

    def __init__(self, config: SweepConfig, cases: Sequence[Case]) -> None:
        search, optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
        self._cases, self._objectives = cases, dict(config.objectives)
        self.version = str(optuna.__version__)
        names = list(self._objectives)
        self._search = search(
            space=self._suggest,
            metric=names if len(names) > 1 else names[0],
            mode=list(self._objectives.values()) if len(names) > 1 else self._objectives[names[0]],
            seed=config.search.seed,
        )

    def ask(self, number: int) -> tuple[int, Values]:
        """The case and the values of draw `number`; the same where it was asked before."""
        found = self._search.suggest(str(number))
        case = int(found.get("case", 0))

        def pick(entry: Dimension) -> Any:
            value = found[self._name(case, entry)]
            if entry.kind == "choice":
                return entry.of[value]
            return value if entry.kind == "integer" else space.shortened(value, entry)

        return case, space.assemble(self._cases[case], pick)

    def tell(self, number: int, metrics: Mapping[str, float] | None) -> None:
        """What draw `number` came to; None where it was refused or failed."""
        values = {name: metrics[name] for name in self._objectives if name in metrics} if metrics else {}
        whole = len(values) == len(self._objectives)
        self._search.on_trial_complete(str(number), values if whole else None, error=not whole)

    def _suggest(self, trial: Any) -> None:
        """Optuna's define-by-run: asks for what applies, case by case."""
        case = trial.suggest_categorical("case", range(len(self._cases))) if len(self._cases) > 1 else 0

        def pick(entry: Dimension) -> Any:
            name = self._name(case, entry)
            if entry.kind == "choice":  # by position, since Optuna takes plain values only
                return entry.of[trial.suggest_categorical(name, range(len(entry.of)))]
            low, high = entry.of
            if entry.kind == "integer":
                return trial.suggest_int(name, low, high)
            value = trial.suggest_float(name, low, high, log=entry.kind == "loguniform")
            return space.shortened(value, entry)

        space.assemble(self._cases[case], pick)

    def _name(self, case: int, entry: Dimension) -> str:
        """Of a key in one case: to Optuna a name is drawn alike in every trial, and another case may draw otherwise."""
        return f"{case}: {entry.key}" if len(self._cases) > 1 else entry.key


def _optuna() -> tuple[Any, Any]:
    try:
        import optuna  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            "search.kind (=optuna) needs the extra `optuna`: pip install --constraint constraints.txt '.[optuna]'; "
            "search.kind=random draws without it"
        ) from None
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch, optuna
