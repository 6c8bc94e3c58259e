"""Real MLflow for tests: run folders as training writes them, and one server for the session, which can be frozen."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import config as configs
from pipeline.runs.journal import Journal
from pipeline.tracking import connect

CONTEXT = multiprocessing.get_context("forkserver")  # its children start with the slow imports already made
CONTEXT.set_forkserver_preload(
    [
        *("mlflow.entities", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.db.utils", "alembic.script"),
        *("matplotlib.backends.backend_agg", "matplotlib.figure", "pipeline.tracking", "pytest"),
    ]
)


def run_folder(path: Path, **tracking: Any) -> tuple[Path, dict[str, Any]]:
    """A run folder with a recipe and an empty journal, and the recipe."""
    recipe = {"name": path.name, "seed": 1, "family": {"name": "tiny"}, "tracking": tracking, "checkpoint": {}}
    (path / "journal").mkdir(parents=True)
    (path / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe, "fingerprint": {}}))
    return path, recipe


def finish(run_dir: Path, **status: Any) -> None:
    (run_dir / "status.json").write_text(json.dumps({"finished": True, **status}))


def write_steps(run_dir: Path, first: int, last: int, attempt: int = 1) -> None:
    """Writes two metrics for each step; the values show the attempt."""
    writer = Journal(run_dir / "journal", attempt=attempt)
    for step in range(first, last):
        writer.metrics(step, {"train/loss": 1000 * attempt + step, "eval/a/top1": step / 1000})
    writer.close()


def history(client: Any, run_id: str, key: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))


def sole_run(client: Any, experiment: str = "adaptnet") -> Any:
    """The only run of the experiment."""
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len(found) == 1
    return found[0]


def events(run_dir: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run_dir / "journal" / "driver.jsonl").read_text().splitlines()]


def tracking_events(run_dir: Path) -> list[str]:
    return [e["event"] for e in events(run_dir) if e["event"].startswith("tracking")]


@dataclass(frozen=True)
class Database:
    """A database file, and the runs that three concurrent processes made in it, each of which created it if missing."""

    path: Path
    run_ids: list[str]


@cache
def database() -> Database:
    """The session's database; copy it."""
    folder = _folder("database")
    start, answers = CONTEXT.Barrier(3), CONTEXT.Queue()
    uri = f"sqlite:///{folder}/deep/mlflow.db"
    racing = [CONTEXT.Process(target=_first_use, args=(uri, f"e{n}", start, answers)) for n in range(3)]
    for process in racing:
        process.start()
    made = [answers.get(timeout=400) for _ in racing]
    for process in racing:
        process.join(300)
    return Database(folder / "deep" / "mlflow.db", made)


def _first_use(uri: str, experiment: str, start: Any, answers: Any) -> None:
    start.wait()
    client = connect(uri)
    answers.put(client.create_run(client.create_experiment(experiment)).info.run_id)


def _folder(name: str) -> Path:
    """A folder for the whole session."""
    folder = Path(tempfile.mkdtemp(prefix=f"adaptnet-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Server:
    """`mlflow server` on a free port, with a database and artifacts of its own."""

    def __init__(self) -> None:
        self._folder = _folder("mlflow-server")
        shutil.copyfile(database().path, self._folder / "server.db")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        words += ["--artifacts-destination", f"{self._folder}/artifacts"]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self._folder / "log", "w") as log:
            self._process = subprocess.Popen(
                words, env=environment, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        atexit.register(self._end)
        deadline = time.monotonic() + 300
        while not self._answers():
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Makes the server accept connections without answering; requests of that time are handled afterwards."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def _end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@cache
def server() -> Server:
    """The session's server, started at the first call."""
    return Server()
