"""Sends a run to its trackers: from a thread in the driver while it trains, by `sync` afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import config as configs
from pipeline.errors import ConfigError, JsonValue, ResourceError, without_secrets
from pipeline.runs import journal, lease, provenance, records, seed_runs
from pipeline.runs.journal import Journal
from pipeline.tracking.address import TrackingConfig, locked, resolve_uri, unusable
from pipeline.tracking.client import failures, reason_of
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.mlflow import MlflowTracker
from pipeline.tracking.replay import STATUS_EVENTS, Composite, Replay
from pipeline.tracking.tensorboard import TensorBoardTracker, require_tensorboard
from pipeline.tracking.tracker import RunStatus, Tracker

MLFLOW = "mlflow"  # the tracker that gives a run its id
LOCK = "tracking.lock"  # one process at a time sends a run
PAUSE_S = 2.0  # pause between two passes over the journals
LONGEST_PAUSE_S = 60.0  # while a tracker is unreachable
LAST_TRY_S = 10.0  # how long the end of a run waits for a server that is already unreachable


class Uploader:
    """A thread in the driver that sends the run's record to its trackers while it trains, between `with` and its end.

    Training never waits for it, and its end not for a server that accepts requests and does not answer. Its messages
    (a tracker is unreachable, is reachable again) are events of the journal `driver`. Raises ConfigError before
    anything is started if a tracker cannot be used as configured.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        recipe: Mapping[str, JsonValue],
        *,
        command: Sequence[str] = (),
        fence: int = 0,
    ) -> None:
        self._run_dir, self._config, self._command = run_dir, config, command
        self.uri = resolve_uri(config.uri, run_dir)
        self._trackers = _composite(run_dir, self.uri, config, recipe)
        self.journal = Journal(run_dir / "journal", "driver", fence=fence)
        self._pauses: dict[str, float] = {}  # seconds, of the trackers that are unreachable
        self._due: dict[str, float] = {}  # when these are tried again, on the monotonic clock
        self._closing, self._wake = threading.Event(), threading.Event()  # signals to the thread
        self._sent, self._done, self._ended = (threading.Event() for _ in range(3))  # signals from the thread
        self._telling, self._left = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None until the server has answered once."""
        return Ledger.peek(self._run_dir).run_id

    @property
    def sends(self) -> bool:
        """Whether the run is sent to MLflow now; if not, it can be sent later from its journal."""
        return self._thread.ident is not None and MLFLOW in self._trackers.replays

    @property
    def silent(self) -> bool:
        """Whether MLflow's server has accepted a request and does not answer it."""
        replay = self._trackers.replays.get(MLFLOW)
        tracker = replay.tracker if replay is not None else None
        return isinstance(tracker, MlflowTracker) and tracker.answers.owed_s() > LAST_TRY_S

    def __enter__(self) -> Uploader:
        with suppress(OSError):
            provenance.record(self._run_dir, self._command)
        self.journal.event("driver-started", command=[without_secrets(word) for word in self._command])
        if MLFLOW not in self._trackers.replays:
            reason = f"{unusable(self.uri)}; MLflow receives nothing of this run now"
            hint = f"adaptnet runs sync {self._run_dir} --uri sqlite:////a/local/path/mlflow.db"
            self.journal.event("tracking-off", reason=reason, hint=hint)
        if self._trackers.replays:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        status: RunStatus = "FAILED" if isinstance(error, Exception) else "KILLED"
        if error is None:
            status = "FINISHED" if records.read_status(self._run_dir).finished else "STOPPED"
        self.close(status, error=reason_of(error) if error else None)

    def close(self, status: RunStatus, error: str | None = None) -> bool:
        """Sends the rest, for at most `tracking.patience_s`, or LAST_TRY_S if the server does not answer.

        Returns whether every tracker has everything.
        """
        self.journal.event("driver-ended", status=status, error=error)
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            patience = self._config.patience_s
            self._wait(self._ended, min(patience, LAST_TRY_S) if self._pauses else patience)
            if not self._done.is_set():
                reason, hint = "not everything was sent; nothing is lost", f"adaptnet runs sync {self._run_dir}"
                self._event("tracking-left", reason=reason, hint=hint)
        if self._thread.ident is None or self._ended.is_set():  # nothing else writes to it
            self.journal.close()
        return self._done.is_set()

    def ready(self, timeout_s: float) -> str | None:
        """Waits until the MLflow run exists and holds everything up to now; its id, or None after `timeout_s`."""
        self._sent.clear()
        self._due.clear()
        self._wake.set()
        return self.run_id if self.sends and self._wait(self._sent, timeout_s) else None

    def _wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Waits for an event of the thread; gives up early if the server is silent."""
        deadline = time.monotonic() + timeout_s
        while not event.wait(min(0.2, max(0.0, deadline - time.monotonic()))):
            if self.silent or time.monotonic() >= deadline:
                return event.is_set()
        return True

    def _run(self) -> None:
        while not self._closing.is_set():
            self._attempt(final=False)
            self._wake.wait(PAUSE_S)
            self._wake.clear()
        if self._attempt(final=True) or self._attempt(final=True):
            self._done.set()
        self._ended.set()

    def _attempt(self, *, final: bool) -> bool:
        """One pass for every tracker that is due, at the end for all. Returns whether none of them failed."""
        now = time.monotonic()
        names = [name for name in self._trackers.replays if final or self._due.get(name, now) <= now]
        if not names:
            return True
        try:
            with locked(self._run_dir / LOCK, wait=False) as mine:
                if not mine:
                    raise ResourceError("another process is sending this run", key=LOCK, subject=self._run_dir)
                errors = self._trackers.send(names, final=final)
        except Exception as error:  # the lock is taken, or the disk is full
            errors = dict.fromkeys(names, error)
        for name in names:
            if name in errors:
                self._away(name, errors[name])
            else:
                self._reached(name)
        return not errors

    def _event(self, kind: str, **facts: object) -> None:
        """Writes an event of the sending; `tracking-left` is the last, though the thread may still run."""
        with self._telling:
            if not self._left:
                self.journal.event(kind, None, **facts)
            self._left = kind == "tracking-left"

    def _reached(self, name: str) -> None:
        if name == MLFLOW:
            self._sent.set()
        if self._pauses.pop(name, None) is not None:
            self._due.pop(name, None)
            self._event("tracking-back", uri=self._trackers.replays[name].tracker.place)

    def _away(self, name: str, error: Exception) -> None:
        first = name not in self._pauses
        self._pauses[name] = min(2 * self._pauses.get(name, PAUSE_S), LONGEST_PAUSE_S)
        self._due[name] = time.monotonic() + self._pauses[name]
        if first:
            hint = f"training continues; if this persists, send the journal later: adaptnet runs sync {self._run_dir}"
            place = self._trackers.replays[name].tracker.place
            self._event("tracking-away", uri=place, reason=reason_of(error), hint=hint)


def _composite(run_dir: Path, uri: str, config: TrackingConfig, recipe: Mapping[str, JsonValue]) -> Composite:
    """The trackers of the config, without MLflow if `uri` may not be used from this machine.

    MLflow comes last, so that waiting for its server delays none of the others.
    """
    trackers: dict[str, Tracker] = {}
    if "tensorboard" in config.also:
        require_tensorboard()
        trackers["tensorboard"] = TensorBoardTracker(run_dir)
    if unusable(uri) is None:
        trackers[MLFLOW] = MlflowTracker(uri, config.experiment)
    return Composite({name: Replay(run_dir, tracker, config, recipe) for name, tracker in trackers.items()})


def send_once(run_dir: Path, config: TrackingConfig, recipe: Mapping[str, JsonValue], *, final: bool) -> list[str]:
    """Makes one pass for each tracker over a folder that has no driver; returns why some did not take everything.

    final: the record has ended. Nothing is sent while another process sends this folder.
    """
    with locked(run_dir / LOCK, wait=False) as mine:
        if not mine:
            return [f"another process is sending {run_dir}"]
        trackers = _composite(run_dir, resolve_uri(config.uri, run_dir), config, recipe)
        return [reason_of(error) for error in trackers.send(final=final).values()]


@dataclass(frozen=True)
class Sync:
    """The result of `sync`: the MLflow run, and the number of metrics sent."""

    run_id: str
    uri: str  # without secrets
    num_metrics: int
    status: str


def sync(run_dir: Path, uri: str | None = None) -> Sync:
    """Sends what the trackers do not have yet of a run that is not training, or that only writes its journal.

    Idempotent. `uri` replaces the recipe's. Raises ConfigError if `run_dir` is not a run folder, ResourceError if the
    server does not answer or another process is sending this run.
    """
    recipe = recipe_of(run_dir)
    config = tracking_config(run_dir, recipe)
    address = resolve_uri(uri or config.uri, run_dir)
    reason = unusable(address)
    if reason is not None:
        raise ResourceError(f"{reason}. Name a server or a local file with --uri", key="--uri", subject=address)
    with locked(run_dir / LOCK, wait=False) as mine:
        if not mine:
            raise ResourceError(
                f"{run_dir}: another process is sending this run; let it finish, or try again later",
                key=LOCK,
                subject=run_dir,
            )
        _end_if_dead(run_dir)
        trackers = _composite(run_dir, address, config, recipe)
        errors = trackers.send(final=not is_live(run_dir))
    for error in errors.values():
        raise _unsent(run_dir, address, error) from None  # a traceback would show the address with its password
    replay = trackers.replays[MLFLOW]
    tracker = replay.tracker
    assert isinstance(tracker, MlflowTracker) and tracker.run_id is not None
    return Sync(tracker.run_id, tracker.place, replay.num_metrics, tracker.status or "")


def _unsent(run_dir: Path, address: str, error: Exception) -> Exception:
    if not isinstance(error, failures()):
        return error
    return ResourceError(
        f"{without_secrets(address)}: not everything of {run_dir} could be sent ({reason_of(error)}). Nothing is lost: "
        "check that the server is running, then run the same command again",
        key="tracking.uri",
        subject=without_secrets(address),
    )


def recipe_of(run_dir: Path) -> dict[str, JsonValue]:
    """The recipe that a run folder was trained by. Raises ConfigError if it is not a run folder."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: not a run folder, for it has no config.yaml", key="run folder", subject=run_dir)
    recipe = configs.read_mapping(run_dir / "config.yaml").get("recipe")
    if not isinstance(recipe, dict):
        raise ConfigError(f"{run_dir / 'config.yaml'}: holds no recipe", key="config.yaml", subject=run_dir)
    return recipe


def tracking_config(run_dir: Path, recipe: Mapping[str, JsonValue] | None = None) -> TrackingConfig:
    """The section `tracking` of a run folder's recipe."""
    section = configs.section(recipe_of(run_dir) if recipe is None else recipe, "tracking")
    return configs.validate_stored(TrackingConfig, section, f"{run_dir}: recipe.tracking")


def last_status(run_dir: Path) -> journal.Record | None:
    """The newest event of a driver's start or end in the journal; None if there is none."""
    path = run_dir / "journal" / f"driver{journal.SUFFIX}"
    events = [r for r in journal.read_all(path) if r.get("event") in STATUS_EVENTS] if path.exists() else []
    return events[-1] if events else None


def is_live(run_dir: Path) -> bool:
    """Whether a driver works on the run, or on a run of the group that this folder is."""
    runs = [seed_runs.folder_of(run_dir, seed) for seed in seed_runs.seeds_in(run_dir)]
    return any(map(lease.is_live, (run_dir, *runs)))


def _end_if_dead(run_dir: Path) -> None:
    """Writes the end of a driver that could not write it itself."""
    last = last_status(run_dir)
    if last is not None and last["event"] == "driver-started" and not is_live(run_dir):
        writer = Journal(run_dir / "journal", "driver", fence=last.get("fence", 0))
        writer.event("driver-ended", status="KILLED", error="the driver ended without a message")
        writer.close()
