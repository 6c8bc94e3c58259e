"""The trials of a sweep before they are trained: samples are drawn, measured, and refused above a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import ConfigError
from tuning import cost
from tuning.decisions import Decisions
from tuning.events import CostMeasured, TrialRefused, TrialRetried
from tuning.folder import SweepFolder
from tuning.record import SweepRecord, Trial


@dataclass(frozen=True)
class Planner:
    """Adds trials to the record. `say` gets a line for each refused sample."""

    folder: SweepFolder
    record: SweepRecord
    decisions: Decisions
    say: Callable[[str], None]

    def plan(self, *, retry_failed: bool) -> None:
        """Draws all samples that can be drawn before training, and refuses those that cost too much."""
        for sample in self.folder.sweep.samples()[len(self.record.trials) :]:
            self.record.add(sample)
        for trial in self.record.trials:
            if trial.state == "planned":
                self._admit(trial)
            if trial.state == "failed" and retry_failed:
                self.record.write(TrialRetried(trial.number))

    @property
    def may_draw(self) -> bool:
        """Whether the study may draw another sample."""
        return self.decisions.has_study and len(self.record.trials) < self.folder.sweep.config.search.samples

    def draw(self) -> None:
        """Draws the study's next sample and admits or refuses it."""
        self._admit(self.record.add(self.decisions.draw(len(self.record.trials))))

    def _admit(self, trial: Trial) -> None:
        """Refuses a sample that costs too much; of a study, also one that the recipe does not accept."""
        try:
            if self.decisions.has_study:
                self.folder.sweep.recipe(trial.sample)
            self._check_cost(trial)
        except ConfigError as error:
            if not self.decisions.has_study:  # `config.load` has checked all samples
                raise
            self._refuse(trial, f"invalid: {error}")

    def _check_cost(self, trial: Trial) -> None:
        bounds = self.folder.sweep.config.bounds
        if bounds.max_gmacs is None and bounds.max_mparameters is None:
            return
        if trial.cost is None:
            measured = cost.of_recipe(self.folder.sweep.recipe(trial.sample), self.folder.num_classes)
            self.record.write(CostMeasured(trial.number, measured.macs, measured.parameters))
        assert trial.cost is not None
        reason = trial.cost.refusal(bounds)  # a killed driver may have recorded the cost alone
        if reason is not None:
            self._refuse(trial, reason)

    def _refuse(self, trial: Trial, reason: str) -> None:
        self.record.write(TrialRefused(trial.number, reason))
        self.say(f"{trial.name}: refused, {reason}")
        self.decisions.report(trial)
