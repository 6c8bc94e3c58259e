"""The loop of a sweep: starts trials while there is room, judges their evaluations, records how they end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.execution.launch import RAY_LOG
from pipeline.run_config import RunConfig
from pipeline.runs import lease
from pipeline.tracking import Uploader
from tuning import metrics, outcome, slots, tables, trials
from tuning.config import Sweep
from tuning.decisions import Decisions
from tuning.events import State, TrialEnded, TrialJudged, TrialOvertime
from tuning.folder import SweepFolder
from tuning.guard import ClusterWatch, joined
from tuning.outcome import Outcome
from tuning.planning import Planner
from tuning.record import ENDED, SweepRecord, Trial
from tuning.selection import best
from tuning.trials import Runner
from tuning.watcher import Reminder, Watcher

POLL_S = 0.5
ASHA = "ASHA"  # the reason of a trial that the scheduler stopped


@contextmanager
def controller(sweep: Sweep, run_dir: Path, fence: int, watcher: Watcher) -> Iterator[Controller]:
    """The controller of a sweep in its folder, with the decisions of earlier drivers replayed.

    Raises ConfigError for what no trial could report or train, and if the folder holds another sweep.
    """
    folder = SweepFolder(sweep, run_dir, fence)
    folder.check_objectives()
    sign = metrics.sign_of(sweep.config, folder.num_classes)
    decisions = Decisions(sweep, sign=sign, epochs=folder.max_epochs())
    folder.write_config()  # only after everything that may reject the sweep
    record = SweepRecord(run_dir, fence)
    try:
        decisions.replay(record.before, record.trials, run_dir)
        yield Controller(folder, record, decisions, watcher)
    finally:
        record.close()


class Controller:
    """One driver's work on a sweep."""

    def __init__(self, folder: SweepFolder, record: SweepRecord, decisions: Decisions, watcher: Watcher) -> None:
        self.folder, self.record, self.decisions, self._watcher = folder, record, decisions, watcher
        self.planner = Planner(folder, record, decisions, watcher.say)
        self._config, self._compute = folder.sweep.config, folder.sweep.base.compute
        self._running: dict[int, Runner] = {}
        self._watches: dict[int, lease.Watch] = {}  # of trials whose lease another driver has
        self._reminder, self._cluster = Reminder(watcher.say), ClusterWatch(self._compute)
        self._uploader: Uploader | None = None

    def run(self, *, retry_failed: bool) -> Outcome:
        """Trains what is left of the sweep, until it ends or a file `stop` appears in its folder."""
        self.planner.plan(retry_failed=retry_failed)
        if self._left():
            (self.folder.run_dir / "status.json").unlink(missing_ok=True)
        with self.folder.uploader() as uploader:
            self._uploader = uploader
            if self._left():
                self._train()
            if self.record.num_ends:
                self._log_progress()  # in case a driver was killed before it did
            run_dir, run_id, uri = self.folder.run_dir, uploader.run_id, uploader.uri
            result = outcome.conclude(self.folder.sweep, run_dir, self.record.trials, run_id=run_id, uri=uri)
            self._watcher.say(tables.tally(self.record.trials))
            return result

    def _train(self) -> None:
        """Trains until nothing is left to do, or a file `stop` appears."""
        with joined(self._compute, self._watcher, self.folder.run_dir / RAY_LOG):
            self._announce()
            while self._poll():
                time.sleep(POLL_S)

    def _announce(self) -> None:
        drawn = self.record.trials
        self._watcher.say(f"{len(drawn)} trials drawn, {tables.tally(drawn)}; {self._concurrency()} at a time")
        epochs = self.folder.max_epochs()
        if self._config.scheduler.kind == "asha" and self.folder.first_evaluation() >= epochs:
            self._watcher.say(
                "no trial will stop early: the scheduler judges evaluations during training, and evaluation.every "
                f"(={self.folder.sweep.base.evaluation.every}) is not before the end at epoch {epochs:g}"
            )

    def _concurrency(self) -> int:
        """How many trials run at once if nothing else uses the cluster. Raises ResourceError if not one fits."""
        if self._compute.workers == 0:
            return 1
        return min(slots.slots(self._compute), self._config.concurrency or sys.maxsize)

    def _poll(self) -> bool:
        """Looks once at the running trials and starts more; False once there is nothing left to do."""
        self.folder.check_lease()
        self._cluster.check()
        stopping = self.folder.is_stopping
        for runner in list(self._running.values()):
            ended = runner.ended
            self._judge_new(runner)
            if ended:
                del self._running[runner.trial.number]
                self.conclude(runner)
            elif stopping or runner.is_to_stop:
                runner.stop()
        if not stopping:
            self._start_more()
        self._watcher.show(self.record.trials, len(self._running))
        return bool(self._running) or (not stopping and self._left())

    # --- starting trials

    def _left(self) -> bool:
        return bool(self._due()) or self.planner.may_draw

    def _due(self) -> list[Trial]:
        return [each for each in self.record.trials if each.state not in ENDED and each.number not in self._running]

    def _start_more(self) -> None:
        room = self._room() if self._left() else 0
        while room > 0 and (trial := self._next()) is not None:
            if self._start(trial):
                room -= 1

    def _room(self) -> int:
        """The trials that may start now, by the sweep's concurrency and the cluster."""
        running = len(self._running)
        if self._compute.workers == 0:  # one at a time: torch's seeds and threads belong to the process
            return 1 - running
        free = slots.free(self._compute, running)
        waiting = free == 0 and not running
        if waiting and self._reminder.said_again("others use the whole cluster; waiting for room for a trial"):
            slots.slots(self._compute)  # raises if the cluster itself has become too small
        return min((self._config.concurrency or sys.maxsize) - running, free)

    def _next(self) -> Trial | None:
        """The trial to start: the first that is due, else a new one of the study; None if there is none."""
        while True:
            trial = next((each for each in self._due() if not self._is_elsewhere(each)), None)
            if trial is not None or not self.planner.may_draw:
                return trial
            self.planner.draw()

    def _is_elsewhere(self, trial: Trial) -> bool:
        """Whether another driver holds the trial's lease, or may hold it: a user's, or one that was killed."""
        folder = self.folder.of(trial)
        watch = self._watches.setdefault(trial.number, lease.Watch(folder / lease.FILE))
        if not lease.is_of_another(folder) or watch.expire():
            return False
        command = lease.command_of(folder)
        self._reminder.said_again(f"{trial.name}: another driver trains it ({command}); waiting for its end")
        return True

    def _start(self, trial: Trial) -> bool:
        """Starts or resumes a trial; False if a killed driver had finished its training already."""
        config, folder = self._recipe(trial), self.folder.of(trial)
        if trial.ends_at is not None and trials.saved_step(config, folder) >= trial.ends_at:
            trials.send_rest(config, folder)
            self._end(trial, "stopped", trial.ends_by, trial.ends_at)
            return False
        runner = Runner(trial, config, folder)
        self._running[trial.number] = runner
        self._watcher.say(f"{trial.name}: {'resumes' if runner.resumes else 'starts'}")
        trial.state = "running"
        runner.start()
        return True

    def _recipe(self, trial: Trial) -> RunConfig:
        assert self._uploader is not None
        return self.folder.recipe(trial, self._uploader.uri)

    # --- judging and ending trials

    def _judge_new(self, runner: Runner) -> None:
        """Judges each new evaluation of a trial, in order, until one stops it; stops it after max_minutes."""
        trial = runner.trial
        for logged in runner.read():
            parts = logged.key.split("/")  # eval/POLICY/METRIC; during training only the first policy is evaluated
            judged = parts[0] == "eval" and parts[-1] == self._config.scheduler.metric
            if judged and logged.step not in trial.judged and trial.ends_at is None:
                self._judge(trial, logged.step, logged.value, runner.epochs_per_step)
        limit = self._config.bounds.max_minutes
        if limit is not None and trial.ends_at is None and runner.trained_s > 60 * limit and not runner.ended:
            self.record.write(TrialOvertime(trial.number, runner.newest))
            self._watcher.say(f"{trial.name}: has trained for {limit:g} minutes (bounds.max_minutes) and is stopped")

    def _judge(self, trial: Trial, step: int, value: float, epochs_per_step: float) -> None:
        epoch = round(step * epochs_per_step, 6)
        ends = self.decisions.should_stop(trial, epoch, value) and step < trial.total_steps
        self.record.write(TrialJudged(trial.number, step, epoch, value, ends))
        metric = self._config.scheduler.metric
        self._watcher.say(f"{trial.name}: {metric} {value:.4f} at epoch {epoch:g}" + ends * ", stops here")

    def conclude(self, runner: Runner) -> None:
        """Records the end of a trial whose driver has returned; one that was interrupted is planned again."""
        trial, result, error = runner.trial, runner.result, runner.error
        if error is not None:
            self._cluster.check(patience_s=0)  # a lost cluster ends the sweep, not the trial
            self._end(trial, "failed", trials.reason_of(error), trial.step)
        elif result is not None and result.finished and trial.ends_by != ASHA:
            self._end(trial, "finished", "", result.step)
        elif result is not None and trial.ends_at is not None and result.step >= trial.ends_at:
            self._end(trial, "stopped", trial.ends_by, trial.ends_at)
        elif trial.ends_at is not None or self.folder.is_stopping:
            trial.state = "planned"
            self._watcher.say(f"{trial.name}: saved at step {trial.step}")
        else:
            self._end(trial, "stopped", "a stop file in its own folder", trial.step)

    def _end(self, trial: Trial, state: State, reason: str, step: int) -> None:
        final: dict[str, float] = {}
        if state == "finished":
            final = metrics.final_metrics(self.folder.sweep, self.folder.of(trial), self._recipe(trial))
        elif state == "stopped":
            final = metrics.metrics_at(self.folder.of(trial), step)
        self.record.write(TrialEnded(trial.number, state, reason, step, final))
        self.decisions.report(trial)
        shown = "  ".join(f"{name} {final[name]:.4g}" for name in self._headline() if name in final)
        why = f" ({reason})" if reason else ""
        self._watcher.say(f"{trial.name}: {state}{why} at step {step}  {shown}".rstrip())
        self._log_progress()

    def _log_progress(self) -> None:
        """Logs the ended trials and the best metrics to the sweep's tracked run; its steps count ended trials."""
        ended = [trial for trial in self.record.trials if trial.state in ("finished", "stopped", "failed")]
        chosen = best(self._config, self.record.trials)
        values = {"trials/ended": float(len(ended))}
        if chosen is not None:
            values |= {f"best/{name}": chosen.metrics[name] for name in self._headline() if name in chosen.metrics}
        self.record.metrics(self.record.num_ends, values)

    def _headline(self) -> list[str]:
        """The objectives and the cost metric, each once."""
        return list(dict.fromkeys([*self._config.objectives, self._config.cost_metric]))
