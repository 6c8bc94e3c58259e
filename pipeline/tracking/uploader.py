"""Who carries a run to MLflow, and when: a thread in the driver while it trains, `sync` afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config as configs
from pipeline.errors import ConfigError, ResourceError
from pipeline.runs import journal, lease, provenance, records
from pipeline.runs.journal import Journal
from pipeline.runs.provenance import without_secrets
from pipeline.tracking.address import TrackingConfig, failures, locked, reason_of, resolve_uri, unusable
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.replay import STATUS_EVENTS, Replay

PAUSE_S = 2.0  # between two looks at the journals
LONGEST_PAUSE_S = 60.0  # while the server is away
LAST_TRY_S = 10.0  # at the end of a run, for a server that is away already


class Uploader:
    """A thread in the driver that carries the run's record to MLflow while it trains, between `with` and its end.

    Training never waits for it. What it has to say (the server is away, is back) goes as events into the journal
    `driver`. Raises ConfigError for an address that MLflow does not know, before anything is started.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        recipe: Mapping[str, Any],
        *,
        command: Sequence[str] = (),
        fence: int = 0,
    ) -> None:
        self._run_dir, self._config, self._recipe, self._command = run_dir, config, recipe, command
        self.uri = resolve_uri(config.uri, run_dir)
        self.journal = Journal(run_dir / "journal", "driver", fence=fence)
        self._replay: Replay | None = None
        self._away = False
        self._closing, self._wake = threading.Event(), threading.Event()  # asked of the thread
        self._sent, self._done = threading.Event(), threading.Event()  # said by it
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None until a server has answered once."""
        ledger = self._replay.ledger if self._replay else Ledger.peek(self._run_dir)
        return ledger.run_id

    @property
    def sends(self) -> bool:
        """False where only the journal is written."""
        return self._thread.ident is not None

    def __enter__(self) -> Uploader:
        with suppress(OSError):
            provenance.record(self._run_dir, self._command)
        self.journal.event("driver-started", command=[without_secrets(word) for word in self._command])
        why = unusable(self.uri)
        if why is None:
            self._thread.start()
        else:
            hint = f"adaptnet runs sync {self._run_dir} --uri sqlite:////a/local/path/mlflow.db"
            self.journal.event("tracking-off", reason=f"{why}; only the journal is written", hint=hint)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        if error is None and records.read_status(self._run_dir).finished:
            status = "FINISHED"
        self.close(status, error=reason_of(error) if error else None)

    def close(self, status: str, error: str | None = None) -> bool:
        """Sends the rest, for `tracking.patience_s` at most; whether MLflow has all of it."""
        self.journal.event("driver-ended", status=status, error=error)
        self._closing.set()
        self._wake.set()
        if self.sends:
            patience = self._config.patience_s
            self._thread.join(min(patience, LAST_TRY_S) if self._away else patience)
            if not self._done.is_set():
                reason, hint = "not all was sent to MLflow; nothing is lost", f"adaptnet runs sync {self._run_dir}"
                self.journal.event("tracking-left", reason=reason, hint=hint)
        if not self._thread.is_alive():
            self.journal.close()
        return self._done.is_set()

    def ready(self, timeout_s: float) -> str | None:
        """Waits until the MLflow run is there and holds all up to now; its id, None where that takes too long."""
        self._sent.clear()
        self._wake.set()
        return self.run_id if self.sends and self._sent.wait(timeout_s) else None

    def _run(self) -> None:
        pause = PAUSE_S
        while not self._closing.is_set():
            sent = self._attempt(final=False)
            pause = PAUSE_S if sent else min(2 * pause, LONGEST_PAUSE_S)
            self._wake.wait(pause)
            self._wake.clear()
        if self._attempt(final=True) or self._attempt(final=True):
            self._done.set()

    def _attempt(self, *, final: bool) -> bool:
        try:
            with locked(self._run_dir / "tracking.lock", wait=False) as mine:
                if not mine:
                    raise ResourceError("another process is sending this run to MLflow")
                if self._replay is None:
                    self._replay = Replay(self._run_dir, self.uri, self._config, self._recipe)
                self._replay.send(final=final)
        except Exception as error:  # of MLflow, requests or sqlalchemy; training must not end by it
            self._say_away(error)
            return False
        self._sent.set()
        if self._away:
            self._away = False
            self.journal.event("tracking-back", uri=without_secrets(self.uri))
        return True

    def _say_away(self, error: Exception) -> None:
        if self._away:
            return
        self._away = True
        hint = f"training goes on; if it stays so, send the journal later: adaptnet runs sync {self._run_dir}"
        self.journal.event("tracking-away", uri=without_secrets(self.uri), reason=reason_of(error), hint=hint)


@dataclass(frozen=True)
class Sync:
    """What `sync` did: the MLflow run, and how many metrics were sent now."""

    run_id: str
    uri: str  # without secrets
    num_metrics: int
    status: str


def sync(run_dir: Path, uri: str | None = None) -> Sync:
    """Sends what MLflow does not have yet of a run that is not training, or that only writes its journal.

    Idempotent. `uri` replaces the recipe's. Raises ConfigError where `run_dir` is no run folder, ResourceError where
    the server does not answer or another process is sending this run.
    """
    recipe = recipe_of(run_dir)
    config = configs.validate(TrackingConfig, recipe.get("tracking", {}), f"{run_dir}: recipe.tracking")
    address = resolve_uri(uri or config.uri, run_dir)
    why = unusable(address)
    if why is not None:
        raise ResourceError(f"{why}. Name a server or a local file with --uri")
    with locked(run_dir / "tracking.lock", wait=False) as mine:
        if not mine:
            raise ResourceError(f"{run_dir}: another process is sending this run to MLflow now; let it, or try later")
        _end_if_dead(run_dir)
        replay = Replay(run_dir, address, config, recipe)
        try:
            replay.send(final=not is_live(run_dir))
        except failures() as error:
            raise ResourceError(
                f"{without_secrets(address)}: not everything of {run_dir} could be sent ({reason_of(error)}). "
                "Nothing is lost: see that the server runs and give the same command again"
            ) from None  # a traceback would show the address, with a password that stands in it
    assert replay.ledger.run_id is not None
    return Sync(replay.ledger.run_id, without_secrets(address), replay.num_metrics, replay.status or "")


def recipe_of(run_dir: Path) -> dict[str, Any]:
    """The recipe that a run folder was trained by. Raises ConfigError where it is no run folder."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: there is no config.yaml, so this is no run folder")
    recipe = configs.read_mapping(run_dir / "config.yaml").get("recipe")
    if not isinstance(recipe, dict):
        raise ConfigError(f"{run_dir / 'config.yaml'}: it holds no recipe")
    return recipe


def is_live(run_dir: Path) -> bool:
    held = lease.read(run_dir / "lease.json")
    return bool(held) and not held.get("released") and time.time() - float(held["heartbeat"]) < lease.SILENT_S


def last_status(run_dir: Path) -> journal.Record | None:
    """The newest start or end of a driver in the journal."""
    path = run_dir / "journal" / f"driver{journal.SUFFIX}"
    found = [r for r in journal.read_all(path) if r.get("event") in STATUS_EVENTS] if path.exists() else []
    return found[-1] if found else None


def _end_if_dead(run_dir: Path) -> None:
    """Writes the end of a driver that could not write it itself."""
    last = last_status(run_dir)
    if last is not None and last["event"] == "driver-started" and not is_live(run_dir):
        writer = Journal(run_dir / "journal", "driver", fence=last.get("fence", 0))
        writer.event("driver-ended", status="KILLED", error="the driver ended without a word")
        writer.close()
