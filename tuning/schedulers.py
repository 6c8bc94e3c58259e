"""Decisions that Ray Tune makes: which trials stop early (ASHA), and which sample an Optuna study draws next.

Neither survives a kill: Tune does not save a scheduler's rungs, and restores a searcher only with an experiment of its
own. Both depend on nothing but their inputs in order, so a restarted sweep creates them anew and replays the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, JsonValue
from tuning import space
from tuning.config import SchedulerConfig, SweepConfig
from tuning.space import Case, Dimension, Values

if TYPE_CHECKING:  # Ray Tune takes seconds to import
    from pipeline.compat.ray_tune import OptunaSearcher, OptunaTrial


class ASHA:
    """Ray Tune's ASHA, fed with one evaluation at a time; stops no trial if the scheduler is `none`.

    epochs is the length of the longest trial. Raises ConfigError if the grace period is longer.
    """

    def __init__(self, config: SchedulerConfig, epochs: float) -> None:
        self._asha = None
        if config.kind == "asha":
            from pipeline.compat.ray_tune import Asha

            if config.grace_epochs > epochs:
                raise ConfigError(
                    f"scheduler.grace_epochs (={config.grace_epochs:g}) is above training.epochs (={epochs:g}): no "
                    "trial would ever be judged",
                    key="scheduler.grace_epochs",
                    subject=f"{config.grace_epochs:g}",
                )
            self._asha = Asha(epochs=epochs, grace_epochs=config.grace_epochs, reduction=config.reduction)

    def should_stop(self, trial: str, epoch: float, value: float) -> bool:
        """Records an evaluation, of which more is better; returns whether the trial is to stop there."""
        return self._asha is not None and self._asha.should_stop(trial, epoch, value)


class Study:
    """An Optuna study: `ask` draws a sample, `tell` reports its result. Raises ConfigError if Optuna is missing."""

    def __init__(self, config: SweepConfig, cases: Sequence[Case]) -> None:
        self._cases, self._objectives = cases, dict(config.objectives)
        self._search = _searcher(self, self._objectives, config.search.seed)
        self.version = self._search.version

    def ask(self, number: int) -> tuple[int, Values]:
        """Returns the case and the values of sample `number`; repeated calls return the same."""
        drawn = self._search.suggest(str(number))
        case = int(drawn.get("case", 0))

        def pick(dimension: Dimension) -> JsonValue:
            value = drawn[self._name(case, dimension)]
            if dimension.kind == "choice":
                return dimension.allowed[int(value)]
            return value if dimension.kind == "integer" else space.shortened(value, dimension)

        return case, space.assemble(self._cases[case], pick)

    def tell(self, number: int, metrics: Mapping[str, float] | None) -> None:
        """Reports the metrics of sample `number`; None if it was refused or failed."""
        values = {name: metrics[name] for name in self._objectives if name in metrics} if metrics else {}
        self._search.complete(str(number), values if len(values) == len(self._objectives) else None)

    def define(self, trial: OptunaTrial) -> None:
        """Optuna's define-by-run: suggests a case, then each key of it that applies."""
        case = trial.suggest_categorical("case", range(len(self._cases))) if len(self._cases) > 1 else 0

        def pick(dimension: Dimension) -> JsonValue:
            name = self._name(case, dimension)
            if dimension.kind == "choice":  # by position, since Optuna takes plain values only
                return dimension.allowed[trial.suggest_categorical(name, range(len(dimension.allowed)))]
            low, high = dimension.bounds
            if dimension.kind == "integer":
                return trial.suggest_int(name, int(low), int(high))
            value = trial.suggest_float(name, low, high, log=dimension.kind == "loguniform")
            return space.shortened(value, dimension)

        space.assemble(self._cases[case], pick)

    def _name(self, case: int, dimension: Dimension) -> str:
        """The key's name in Optuna, which requires one distribution per name; cases may differ in theirs."""
        return f"{case}: {dimension.key}" if len(self._cases) > 1 else dimension.key


def _searcher(study: Study, objectives: Mapping[str, str], seed: int) -> OptunaSearcher:
    from pipeline.compat.ray_tune import OptunaSearcher

    try:
        return OptunaSearcher(study.define, objectives, seed)
    except ImportError:
        raise ConfigError(
            "search.kind (=optuna) needs the extra `optuna`: pip install --constraint constraints.txt '.[optuna]'; "
            "search.kind=random works without it",
            key="search.kind",
            subject="optuna",
        ) from None
