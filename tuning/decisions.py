"""The decisions of a sweep: which trials stop early and which sample comes next.

ASHA and an Optuna study depend on nothing but their inputs in order. A restarted sweep replays these from its record,
so it decides as if it had never been interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from tuning.config import Sweep
from tuning.events import Event, SampleDrawn, TrialEnded, TrialJudged, TrialRefused
from tuning.record import Trial
from tuning.schedulers import ASHA, Study
from tuning.space import Sample


class Decisions:
    """ASHA and, if the search is Optuna's, the study.

    sign: 1 if more of the scheduler's metric is better, else -1. epochs: the length of the longest trial.
    Raises ConfigError if the scheduler would judge nothing or Optuna is missing.
    """

    def __init__(self, sweep: Sweep, *, sign: int, epochs: float) -> None:
        self._sign = sign
        self._asha = ASHA(sweep.config.scheduler, epochs)
        self._study = Study(sweep.config, sweep.cases) if sweep.config.search.kind == "optuna" else None

    @property
    def has_study(self) -> bool:
        """Whether samples are drawn one by one, each from the results of the others."""
        return self._study is not None

    def should_stop(self, trial: Trial, epoch: float, value: float) -> bool:
        """Records an evaluation of the scheduler's metric; returns whether the trial is to stop there."""
        return self._asha.should_stop(trial.name, epoch, self._sign * value)

    def draw(self, number: int) -> Sample:
        """Sample `number` of the study."""
        assert self._study is not None
        return Sample(number, *self._study.ask(number))

    def report(self, trial: Trial) -> None:
        """Reports the result of a trial that has ended or was refused to the study."""
        if self._study is not None:
            self._study.tell(trial.number, None if trial.state in ("failed", "refused") else trial.metrics)

    def replay(self, events: Iterable[Event], trials: Sequence[Trial], run_dir: Path) -> None:
        """Repeats the inputs of earlier drivers. Raises ConfigError if the study now draws another sample."""
        for event in events:
            trial = trials[event.number]
            match event:
                case TrialJudged():
                    self.should_stop(trial, event.epoch, event.value)
                case SampleDrawn():
                    self._redraw(trial, run_dir)
                case TrialRefused() if self._study is not None:
                    self._study.tell(event.number, None)
                case TrialEnded() if self._study is not None:
                    self._study.tell(event.number, None if event.state == "failed" else event.metrics)

    def _redraw(self, trial: Trial, run_dir: Path) -> None:
        if self._study is None:
            return
        if self._study.ask(trial.number) != (trial.sample.case, dict(trial.sample.values)):
            raise ConfigError(
                f"{run_dir}: Optuna {self._study.version} does not draw {trial.sample.text} again, as it did when this "
                "sweep was started; install the version in requirements.txt there, or start a new sweep",
                key="search.kind",
                subject=self._study.version,
            )
