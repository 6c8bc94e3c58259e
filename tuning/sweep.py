"""`run(sweep, run_dir)`: trains every draw of a space, each as a run of its own. Starting is resuming from nothing.

RUN/trials/<name>/ is the folder of a trial, which `launch.train` starts or goes on with: so a trial has workers under
Ray Train, restarts, checkpoints and a journal like any run, and a finished one is found by its status.json. What the
sweep itself decides is in RUN/journal/sweep.jsonl (`record`), and this process may die at any line.

Ray Tune gives its domains (`space`), its ASHA and its Optuna searcher (`advice`). Its Tuner is not used: it would put
each trial's driver into an actor that takes a slot of its own beside the workers', hear of results through Ray Train's
reports alone, a barrier over all ranks that we call at checkpoints only, and restore after a kill neither a scheduler's
rungs nor what a searcher was told, in order; checkpoints, retries and results are the run's own here. Driven by the
loop below, all that Tune decides is replayed from the record in the order in which it happened.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipeline import config as configs
from pipeline.data.index import Splits, open_splits
from pipeline.errors import AdaptNetError, ConfigError, ResourceError
from pipeline.execution import cluster, launch
from pipeline.execution.launch import Result
from pipeline.run_config import RunConfig
from pipeline.runs import journal, lease, records
from pipeline.runs.files import write_text
from pipeline.runs.journal import FirstValues
from pipeline.runs.lease import Lease
from pipeline.tracking import Uploader
from pipeline.training import checkpoint
from tuning import cost, outcome, selection, slots
from tuning.config import Sweep
from tuning.outcome import Outcome
from tuning.record import ENDED, Record, Trial
from tuning.schedulers import ASHA, Study
from tuning.space import Sample

POLL_S = 0.5
TRIALS = "trials"
SAY_EVERY_S = 60.0  # what is waited for
GONE_S = 10.0  # without an answer a cluster is given up
STUCK_S = 45.0  # without an answer and without an end; Ray itself gives up after 60
GONE = (
    "the Ray cluster is gone: its head does not answer, or it has no node left. Give the same command once there is "
    "one again (without compute.address it starts its own): finished trials stay, the others go on from their "
    "checkpoints"
)


class Watcher(Protocol):
    """Who looks on: `say` is called for each event, `show` at each look at the trials, `close` before a hard end."""

    def say(self, text: str) -> None: ...

    def show(self, trials: Sequence[Trial], running: int) -> None: ...

    def close(self) -> None: ...


class Nobody:
    def say(self, text: str) -> None: ...

    def show(self, trials: Sequence[Trial], running: int) -> None: ...

    def close(self) -> None: ...


def run(sweep: Sweep, run_dir: Path, *, retry_failed: bool = False, watcher: Watcher | None = None) -> Outcome:
    """Trains what is left of `sweep` in `run_dir`, tracks it under a parent run, and writes tables and pictures.

    A file `stop` in the folder ends it at the next save of each running trial; the same call goes on. Raises
    ConfigError for what no trial could report or train and where the folder holds another sweep, ResourceError where
    another driver is at it or not one trial fits the cluster.
    """
    _check_place(run_dir)
    new = not run_dir.exists()
    run_dir = launch.make_folder(run_dir)
    held = Lease(run_dir).acquire()
    try:
        (run_dir / "stop").unlink(missing_ok=True)
        with ExitStack() as stack:
            controller = Controller(sweep, run_dir, held.fence, watcher or Nobody(), stack)
            return controller.go(retry_failed=retry_failed)
    finally:
        if new and not (run_dir / "config.yaml").exists():
            held.withdraw()
        else:
            held.release()


def _check_place(run_dir: Path) -> None:
    if (run_dir / "config.yaml").exists() and "sweep" not in configs.read_mapping(run_dir / "config.yaml"):
        raise ConfigError(f"{run_dir}: holds a run, not a sweep; give the sweep a folder of its own with --run-dir")


class Controller:
    """One driver's work on a sweep."""

    def __init__(self, sweep: Sweep, run_dir: Path, fence: int, watcher: Watcher, stack: ExitStack) -> None:
        self.sweep, self.config, self.run_dir, self.watcher = sweep, sweep.config, run_dir, watcher
        self._fence, self._stack = fence, stack
        self._running: dict[int, Runner] = {}
        self._waiting = Waiting(self._say)
        self._heard_of_cluster = time.monotonic()
        self._check_objectives()
        self._check_scheduler()
        self._halving = ASHA(self.config.scheduler, self._epochs())
        self._study = Study(self.config, sweep.cases) if self.config.search.kind == "optuna" else None
        self._write_config()  # once nothing of the file can be refused any more
        self.record = Record(run_dir, fence)
        stack.callback(self.record.close)
        self._replay()

    # --- the course of a sweep

    def go(self, *, retry_failed: bool) -> Outcome:
        self._plan(retry_failed)
        if self._left():
            (self.run_dir / "status.json").unlink(missing_ok=True)
        self.uploader = self._stack.enter_context(self._uploader())
        if self._left():
            with self._joined():
                self._say(f"{len(self.trials)} trials drawn, {self._tally()}; {self._concurrency()} at a time")
                self._say_if_none_is_judged()
                while self._step():
                    time.sleep(POLL_S)
        if self.record.ends:
            self._log_progress()  # a driver may have been killed before it did
        found = outcome.conclude(self.sweep, self.run_dir, self.trials, tracked=self._tracked())
        self._say(self._tally())
        return found

    @contextmanager
    def _joined(self) -> Iterator[None]:
        """The cluster that the trials train on; this process where they need none.

        Where a call into Ray waits for a head that is gone, this process is ended, saying why: after a minute Ray would
        end it without a word.
        """
        base = self.sweep.base.compute
        if base.workers == 0:
            yield
            return
        over = threading.Event()
        try:
            with cluster.cluster(base):
                threading.Thread(target=self._guard, args=(slots.head(), over), name="guard", daemon=True).start()
                yield
                over.set()  # what Ray's own end takes is no sign
        finally:
            over.set()

    def _guard(self, head: str, over: threading.Event) -> None:
        heard = time.monotonic()
        while not over.wait(1.0):
            if slots.listens(head):
                heard = time.monotonic()
            elif time.monotonic() - heard >= STUCK_S:
                try:
                    self._say(GONE)
                    self.watcher.close()
                finally:
                    os._exit(2)

    def _step(self) -> bool:
        """One look at what runs, and what may be started; False once there is nothing to do."""
        self._check_lease()
        self._check_cluster(patience_s=GONE_S)
        stopping = (self.run_dir / "stop").exists()
        for runner in list(self._running.values()):
            ended = runner.ended
            self._hear(runner)
            if ended:
                del self._running[runner.trial.number]
                self._conclude(runner)
            elif stopping or runner.is_to_stop:
                runner.stop()
        if not stopping:
            self._start_more()
        self.watcher.show(self.trials, len(self._running))
        return bool(self._running) or (not stopping and self._left())

    def _start_more(self) -> None:
        room = self._room() if self._left() else 0
        while room > 0 and (trial := self._next()) is not None:
            if self._start(trial):
                room -= 1

    def _room(self) -> int:
        """How many trials may be started now, of those that the file and the cluster allow."""
        compute, running = self.sweep.base.compute, len(self._running)
        room = (self.config.concurrency or sys.maxsize) - running
        if compute.workers == 0:  # torch's seeds and threads are the process' own
            return 1 - running
        free = slots.free(compute, running)
        if free == 0 and not running and self._waiting.said("others hold the cluster; waiting for room for a trial"):
            slots.slots(compute)  # raises where it is the cluster itself that has become too small
        return min(room, free)

    def _next(self) -> Trial | None:
        """What to start: the trials in their order; where a study draws them, a new one if there may be one."""
        due = [t for t in self.trials if t.state not in ENDED and t.number not in self._running]
        free = next((trial for trial in due if not self._is_elsewhere(trial)), None)
        if free is not None or self._study is None or len(self.trials) >= self.config.search.samples:
            return free
        number = len(self.trials)
        self._admit(self.record.add(Sample(number, *self._study.ask(number))))
        return self._next()

    def _is_elsewhere(self, trial: Trial) -> bool:
        """Whether another driver is at the trial: one that a person started, or one whose silence is still short."""
        command = lease.held_elsewhere(self.folder(trial))
        if command is not None:
            self._waiting.said(f"{trial.name}: another driver trains it ({command}); waiting for its end")
        return command is not None

    def _left(self) -> bool:
        drawn = [trial for trial in self.trials if trial.state not in ENDED and trial.number not in self._running]
        return bool(drawn) or (self._study is not None and len(self.trials) < self.config.search.samples)

    # --- one trial

    def _start(self, trial: Trial) -> bool:
        """Starts or goes on with a trial; ends it at once where all of it was done before a kill."""
        config, folder = self._recipe(trial), self.folder(trial)
        if trial.ends_at is not None and _saved_step(config, folder) >= trial.ends_at:
            _send_rest(config, folder)
            self._end(trial, "stopped", trial.ends_by, trial.ends_at)
            return False
        runner = Runner(trial, config, folder)
        self._running[trial.number] = runner
        self._say(f"{trial.name}: {'goes on' if runner.resumes else 'starts'}")
        trial.state = "running"
        runner.start()
        return True

    def _hear(self, runner: Runner) -> None:
        """Judges each new evaluation of a trial, in its order, until one ends it."""
        trial = runner.trial
        for found in runner.read():
            parts = found["key"].split("/")  # eval/POLICY/metric, of the first policy: no other is evaluated yet
            judged = parts[0] == "eval" and parts[-1] == self.config.scheduler.metric
            if judged and found["step"] not in trial.judged and trial.ends_at is None:
                self._judge(trial, found["step"], found["value"], runner.epochs_per_step)
        most = self.config.bounds.max_minutes
        if most is not None and trial.ends_at is None and runner.trained_s > 60 * most and not runner.ended:
            self.record.write("overtime", number=trial.number, step=runner.newest)
            self._say(f"{trial.name}: has trained for {most:g} minutes (bounds.max_minutes) and is stopped")

    def _judge(self, trial: Trial, step: int, value: float, epochs_per_step: float) -> None:
        epoch = round(step * epochs_per_step, 6)
        ends = self._halving.ends(trial.name, epoch, self._judged_sign * value) and step < trial.total_steps
        self.record.write("judged", number=trial.number, step=step, epoch=epoch, value=value, ends=ends)
        self._say(f"{trial.name}: {self.config.scheduler.metric} {value:.4f} at epoch {epoch:g}" + ends * ", ends here")

    def _conclude(self, runner: Runner) -> None:
        """What a trial whose driver has returned has come to."""
        trial, result, error = runner.trial, runner.result, runner.error
        if error is not None:
            self._check_cluster(patience_s=0)  # it failed by itself, not with the cluster
            self._end(trial, "failed", _words(error), trial.step)
        elif result is not None and result.finished and trial.ends_by != "ASHA":
            self._end(trial, "finished", "", result.step)
        elif result is not None and trial.ends_at is not None and result.step >= trial.ends_at:
            self._end(trial, "stopped", trial.ends_by, trial.ends_at)
        elif trial.ends_at is not None or (self.run_dir / "stop").exists():
            trial.state = "planned"  # as all that is not done
            self._say(f"{trial.name}: saved at step {trial.step}")
        else:
            self._end(trial, "stopped", "a stop file in its own folder", trial.step)

    def _end(self, trial: Trial, state: str, reason: str, step: int) -> None:
        folder, metrics = self.folder(trial), {}
        if state == "finished":
            metrics = outcome.final_metrics(self.sweep, folder, self._recipe(trial))
        elif state == "stopped":
            metrics = outcome.metrics_at(folder, step)
        self.record.write("ended", number=trial.number, state=state, reason=reason, step=step, metrics=metrics)
        self._tell(trial)
        shown = [f"{name} {metrics[name]:.4g}" for name in self._shown if name in metrics]
        self._say(
            f"{trial.name}: {state}{f' ({reason})' if reason else ''} at step {step}  {'  '.join(shown)}".rstrip()
        )
        self._log_progress()

    def _tell(self, trial: Trial) -> None:
        if self._study is not None:
            self._study.tell(trial.number, None if trial.state in ("failed", "refused") else trial.metrics)

    def _log_progress(self) -> None:
        """How the sweep stands, into its run in MLflow; a step is a trial that has ended."""
        ended = [trial for trial in self.trials if trial.state in ("finished", "stopped", "failed")]
        best = selection.best(self.config, self.trials)
        values = {"trials/ended": float(len(ended))}
        if best is not None:
            values |= {f"best/{name}": best.metrics[name] for name in self._shown if name in best.metrics}
        self.record.metrics(self.record.ends, values)

    # --- before and around it

    def _plan(self, retry_failed: bool) -> None:
        """Makes the draws that are not there yet, all of them before anything is trained; refuses the too costly."""
        for draw in self.sweep.samples()[len(self.trials) :]:
            self.record.add(draw)
        for trial in self.trials:
            if trial.state == "planned":
                self._admit(trial)
            if trial.state == "failed" and retry_failed:
                self.record.write("retried", number=trial.number)

    def _admit(self, trial: Trial) -> None:
        """Refuses a draw that costs too much, and of a study's, which were not checked before, one that is invalid."""
        try:
            if self._study is not None:
                self.sweep.recipe(trial.sample)
            self._price(trial)
        except ConfigError as error:  # of the recipe, which not every draw need suit; a study learns from it
            if self._study is None:
                raise
            self._refuse(trial, f"invalid: {error}")

    def _price(self, trial: Trial) -> None:
        """Measures a draw's net where there is a bound on it; refuses the draw where it breaks one."""
        bounds = self.config.bounds
        if bounds.max_gmacs is None and bounds.max_mparameters is None:
            return
        if not trial.cost:
            found = cost.of_recipe(self.sweep.recipe(trial.sample), self._num_classes)
            self.record.write("priced", number=trial.number, macs=found.macs, parameters=found.parameters)
        reason = cost.NetCost(**trial.cost).refusal(bounds)  # which a killed driver may not have written down
        if reason is not None:
            self._refuse(trial, reason)

    def _refuse(self, trial: Trial, reason: str) -> None:
        self.record.write("refused", number=trial.number, reason=reason)
        self._say(f"{trial.name}: refused, {reason}")
        self._tell(trial)

    def _replay(self) -> None:
        """Tells scheduler and study all that was decided before, in that order."""
        for event in self.record.before:
            trial = self.trials[event["number"]] if "number" in event else None
            if trial is None:
                continue
            if event["event"] == "judged":
                self._halving.ends(trial.name, event["epoch"], self._judged_sign * event["value"])
            if self._study is None:
                continue
            if event["event"] == "drawn":
                self._ask_again(trial)
            elif event["event"] == "refused" or event["event"] == "ended":
                bad = event["event"] == "refused" or event["state"] == "failed"
                self._study.tell(trial.number, None if bad else event["metrics"])

    def _ask_again(self, trial: Trial) -> None:
        assert self._study is not None
        found = self._study.ask(trial.number)
        if found != (trial.sample.case, dict(trial.sample.values)):
            raise ConfigError(
                f"{self.run_dir}: Optuna {self._study.version} does not draw {trial.sample.text} again, as it did when "
                "this sweep was begun; go on with the version in requirements.txt there, or begin a new sweep"
            )

    def _check_objectives(self) -> None:
        first = {draw.case: draw for draw in reversed(self.sweep.samples())}.values()  # of each case
        recipes = [self.sweep.base, *map(self.sweep.recipe, first)]
        found = [recipe.evaluation.policies or cost.policies(recipe, self._num_classes) for recipe in recipes]
        policies = dict.fromkeys(name for names in found for name in names)
        outcome.check_objectives(self.config, list(policies), self._num_classes)

    def _check_scheduler(self) -> None:
        metric, known = self.config.scheduler.metric, outcome.reported(self._num_classes)
        if metric not in known:
            raise ConfigError(f"scheduler.metric (={metric}): an evaluation reports {', '.join(known)}")
        self._judged_sign = -1 if metric in outcome.LOW_IS_GOOD else 1

    def _say_if_none_is_judged(self) -> None:
        base = self.sweep.base
        every, per_step = base.evaluation.every, base.training.batch_size / len(self._splits.train)
        first = {"epochs": every.value, "steps": every.value * per_step}.get(every.unit, 0.0)
        if self.config.scheduler.kind == "asha" and first >= self._epochs():
            self._say(
                f"no trial will end early: they are judged by evaluations while they train, and evaluation.every "
                f"(={every}) is not before their end at epoch {self._epochs():g}"
            )

    def _check_lease(self) -> None:
        if not lease.is_current(self.run_dir, self._fence):
            raise ResourceError(f"{self.run_dir}: another driver has taken this sweep over; this one ends")

    def _check_cluster(self, patience_s: float) -> None:
        """Raises ResourceError where Ray's cluster has not answered for that long."""
        if self.sweep.base.compute.workers == 0:
            return
        if slots.alive():
            self._heard_of_cluster = time.monotonic()
        elif time.monotonic() - self._heard_of_cluster >= patience_s:
            raise ResourceError(GONE)

    def _write_config(self) -> None:
        """config.yaml: the sweep, the recipe without draws, and what the folder must agree with."""
        path, identity = self.run_dir / "config.yaml", self.sweep.identity(self._splits.train.identity)
        if path.exists():
            saved = configs.read_mapping(path).get("fingerprint", {})
            changed = checkpoint.differences(saved, identity)
            if changed:
                lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
                raise ConfigError(
                    "\n".join(
                        [f"{self.run_dir} holds another sweep:", *lines, "Use the old values, or another --run-dir"]
                    )
                )
        mapping = {"sweep": configs.as_mapping(self.config), "recipe": configs.as_mapping(self.sweep.base)}
        write_text(path, configs.dump_yaml(mapping | {"fingerprint": identity}))

    def _uploader(self) -> Uploader:
        """Of the sweep's own run, the parent of its trials'."""
        tracking = self.sweep.base.tracking.model_copy(update={"register": None, "upload_checkpoints": False})
        recipe = configs.as_mapping(self.sweep.base) | {"sweep": configs.as_mapping(self.config)}
        write_text(self.run_dir / "note.md", f"{self.config.question}\n")
        return Uploader(self.run_dir, tracking, recipe, command=sys.argv, fence=self._fence)

    def _tracked(self) -> dict[str, str | None]:
        return {"run_id": self.uploader.run_id, "uri": self.uploader.uri}

    def _recipe(self, trial: Trial) -> RunConfig:
        """The recipe of a trial, as a run among the sweep's: tracked below its parent, registered by nobody."""
        config = self.sweep.recipe(trial.sample)
        tracking = config.tracking.model_copy(
            update={"uri": self.uploader.uri, "register": None, "parent": self.run_dir}
        )
        storage = config.checkpoint.storage
        if storage is not None:
            storage = f"{storage.rstrip('/')}/{self.run_dir.name}/{trial.name}"
        saving = config.checkpoint.model_copy(update={"storage": storage})
        return config.model_copy(update={"name": trial.name, "tracking": tracking, "checkpoint": saving})

    def _concurrency(self) -> int:
        """Trials at once, if nobody else needs the cluster. Raises ResourceError where not one fits."""
        compute, asked = self.sweep.base.compute, self.config.concurrency
        return 1 if compute.workers == 0 else min(slots.slots(compute), asked or sys.maxsize)

    def _epochs(self) -> float:
        """The longest that a trial may train; a study's is the recipe's."""
        if all(entry.key != "training.epochs" for case in self.sweep.cases for entry in case):
            return self.sweep.base.training.epochs
        return max([self.sweep.recipe(draw).training.epochs for draw in self.sweep.samples()], default=0.0)

    @cached_property
    def _splits(self) -> Splits:
        """The recipe's images. Raises what says early that there are none, or none to evaluate on."""
        base = launch.absolute(self.sweep.base)
        splits = open_splits(base.data, base.seed)
        if len(splits.val) == 0:
            raise ConfigError(f"data.root (={base.data.root}): no val split, so no trial would report anything")
        return splits

    @property
    def _num_classes(self) -> int:
        return len(self._splits.train.classes)

    @property
    def trials(self) -> list[Trial]:
        return self.record.trials

    @property
    def _shown(self) -> list[str]:
        return list(dict.fromkeys([*self.config.objectives, self.config.cost_metric]))

    def folder(self, trial: Trial) -> Path:
        return self.run_dir / TRIALS / trial.name

    def _tally(self) -> str:
        return outcome.tally(self.trials)

    def _say(self, text: str) -> None:
        self.watcher.say(text)


class Waiting:
    """Says what is waited for, each matter every SAY_EVERY_S."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._said = say, dict[str, float]()

    def said(self, text: str) -> bool:
        """Says it where that is due; whether it had to be said again."""
        before, now = self._said.get(text), time.monotonic()
        if before is None or now - before > SAY_EVERY_S:
            self._said[text] = now
            self._say(text)
        return before is not None and now - before > SAY_EVERY_S


class Runner:
    """A trial under way: its driver in a thread, and what its journal says."""

    def __init__(self, trial: Trial, config: RunConfig, folder: Path) -> None:
        self.trial, self._config, self._folder = trial, launch.absolute(config), folder
        self.resumes = (folder / "config.yaml").exists()
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.reached = -1  # the newest step of this start
        self.newest = 0  # and of all of them
        self.trained_s = 0.0  # over all starts
        self._path = folder / "journal" / f"rank0{journal.SUFFIX}"
        self._attempts = records.attempts(folder)  # before this start
        self._offset, self._first = 0, FirstValues()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go, name=f"trial-{trial.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _go(self) -> None:
        try:
            self.result = launch.train(self._config, self._folder)
        except BaseException as error:  # the sweep says what it means for the trial
            self.error = error
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def is_to_stop(self) -> bool:
        """Whether it is decided that the trial ends, and this start has got as far as that."""
        return self.trial.ends_at is not None and self.reached >= self.trial.ends_at

    def stop(self) -> None:
        """Asks it to save and end; asked again and again, since a driver that starts takes an old wish away."""
        if (self._folder / "lease.json").exists() and not self.ended:
            (self._folder / "stop").touch()

    @cached_property
    def epochs_per_step(self) -> float:
        config = self._config
        return config.training.batch_size / len(open_splits(config.data, config.seed).train)

    def read(self) -> Iterator[Mapping[str, Any]]:
        """Metrics that are new since the last call, each (key, step) once; those of earlier starts come first."""
        moved = True
        while moved and self._path.exists():
            before = self._offset
            records, self._offset = journal.read(self._path, before)
            moved = self._offset > before
            for record in records:
                self._note(record)
                if self._first.take(record):
                    if record["key"] == "time/interval_s":
                        self.trained_s += record["value"]
                    yield record

    def _note(self, record: Mapping[str, Any]) -> None:
        self.trial.total_steps = record.get("total_steps", self.trial.total_steps)
        if "key" in record:
            self.trial.step = record["step"]
            self.newest = max(self.newest, record["step"])
            if record["attempt"] > self._attempts:
                self.reached = max(self.reached, record["step"])


def _saved_step(config: RunConfig, folder: Path) -> int:
    """The newest step of which a trial has a whole checkpoint; -1 where it has none."""
    if not folder.exists():
        return -1
    names = checkpoint.open_storage(launch.absolute(config).checkpoint, folder).names()
    return int(names[-1].rpartition("-")[2]) if names else -1


def _send_rest(config: RunConfig, folder: Path) -> None:
    """Sends what a driver that was killed had not sent of a trial that is done."""
    held = Lease(folder).acquire()
    try:
        with Uploader(folder, config.tracking, configs.as_mapping(config), command=sys.argv, fence=held.fence):
            pass
    finally:
        held.release()


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (f"{'' if isinstance(error, AdaptNetError) else type(error).__name__ + ': '}" + " ".join(lines))[:500]
