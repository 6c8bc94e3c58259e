"""The contract of trackers: whatever is repeated, killed or resumed, a tracker holds each (key, step) once."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from mlflow_here import CONTEXT, database, finish, run_folder, write_steps
from raised import fails

from pipeline import config as configs
from pipeline.errors import ConfigError, JsonValue
from pipeline.runs.files import whole_file
from pipeline.runs.journal import Journal
from pipeline.tracking import TrackingConfig, Uploader, connect, resolve_uri, sync, tensorboard
from pipeline.tracking.mlflow import MlflowTracker
from pipeline.tracking.replay import Composite, Replay
from pipeline.tracking.tensorboard import TensorBoardTracker
from pipeline.tracking.tracker import DatasetUse, Ending, MetricPoint, NoProgress, Tracker

CONFIG = TrackingConfig(upload_checkpoints=False)
Curve = list[tuple[int, float]]


class MemoryTracker:
    """The simplest tracker: it holds what it is sent in dictionaries that outlive it."""

    takes_files, place = True, "memory"

    def __init__(self, store: dict[str, Any]) -> None:
        self._store = store

    def open(self, run_dir: Path, recipe: Mapping[str, JsonValue]) -> NoProgress:
        return NoProgress()

    def log(self, points: Sequence[MetricPoint]) -> None:
        for point in points:
            self._store.setdefault((point.key, point.step), point.value)

    def log_artifact(self, path: Path, place: str) -> None:
        self._store["files"] = {*self._store.get("files", ()), f"{place}/{path.name}".strip("/")}

    def log_summary(self, facts: Mapping[str, str]) -> None:
        self._store["facts"] = {**self._store.get("facts", {}), **facts}

    def log_inputs(self, datasets: Sequence[DatasetUse]) -> None:
        self._store["inputs"] = list(datasets)

    def running(self) -> None:
        self._store["status"] = "RUNNING"

    def finish(self, ending: Ending) -> None:
        self._store["status"] = ending.status


class Case(Protocol):
    """A tracker on a run folder, and what can be read from it afterwards."""

    def tracker(self) -> Tracker:
        """A new object, as a restarted driver makes one."""

    def curve(self, key: str) -> Curve:
        """Every value that it holds under the key, duplicates included, by step."""

    def status(self) -> str: ...


class MemoryCase:
    def __init__(self, run_dir: Path) -> None:
        self.store: dict[Any, Any] = {}

    def tracker(self) -> Tracker:
        return MemoryTracker(self.store)

    def curve(self, key: str) -> Curve:
        return sorted((each[1], value) for each, value in self.store.items() if each[0] == key)

    def status(self) -> str:
        return self.store["status"]


class MlflowCase:
    def __init__(self, run_dir: Path) -> None:
        self._uri = resolve_uri(None, run_dir)
        if not (run_dir.parent / "mlflow.db").exists():
            shutil.copyfile(database().path, run_dir.parent / "mlflow.db")
        self._run_dir = run_dir

    def tracker(self) -> MlflowTracker:
        return MlflowTracker(self._uri, "adaptnet")

    def _run(self) -> Any:
        client = connect(self._uri)
        runs = client.search_runs([client.get_experiment_by_name("adaptnet").experiment_id])
        (run,) = [run for run in runs if run.data.tags["adaptnet.run_dir"] == str(self._run_dir)]
        return run

    def curve(self, key: str) -> Curve:
        history = connect(self._uri).get_metric_history(self._run().info.run_id, key)
        return sorted((metric.step, metric.value) for metric in history)

    def status(self) -> str:
        return self._run().info.status


class TensorBoardCase:
    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def tracker(self) -> TensorBoardTracker:
        return TensorBoardTracker(self._run_dir)

    def _events(self) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = str(self._run_dir / "tensorboard")
        return EventAccumulator(folder, {"scalars": 0, "tensors": 0}, purge_orphaned_data=False).Reload()

    def curve(self, key: str) -> Curve:
        return sorted((event.step, event.value) for event in self._events().Scalars(key))

    def status(self) -> str:
        texts = self._events().Tensors("summary/status/text_summary")
        return texts[-1].tensor_proto.string_val[0].decode()


CASES = [MemoryCase, TensorBoardCase, MlflowCase]


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Case]:
    if request.param is TensorBoardCase:
        pytest.importorskip("tensorboard")
    return request.param


def write_run(path: Path) -> tuple[Path, dict[str, Any], Journal]:
    run_dir, recipe = run_folder(path)
    driver = Journal(run_dir / "journal", "driver")
    driver.event("driver-started")
    return run_dir, recipe, driver


def wanted(steps: int) -> Curve:
    return [(step, 1000.0 + step) for step in range(steps)]


def test_replaying_again_changes_nothing(case: Any, tmp_path: Path) -> None:
    run_dir, recipe, driver = write_run(tmp_path / "a")
    write_steps(run_dir, 0, 30)
    driver.event("driver-ended", status="FINISHED")
    there = case(run_dir)
    for _ in range(3):  # as three drivers, each of which passes twice
        replay = Replay(run_dir, there.tracker(), CONFIG, recipe, points_per_call=7)
        replay.send(final=True)
        replay.send(final=True)
    assert there.curve("train/loss") == wanted(30) and there.status() == "FINISHED"


def test_a_resumed_run_equals_an_uninterrupted_one(case: Any, tmp_path: Path) -> None:
    run_dir, recipe, driver = write_run(tmp_path / "a")
    there = case(run_dir)
    write_steps(run_dir, 0, 20)
    Replay(run_dir, there.tracker(), CONFIG, recipe).send(final=False)
    assert there.status() == "RUNNING"
    driver.event("driver-ended", status="KILLED")
    Replay(run_dir, there.tracker(), CONFIG, recipe).send(final=True)
    assert there.status() == "KILLED"
    driver.event("driver-started")
    write_steps(run_dir, 10, 20)  # trained again after the checkpoint of step 10
    write_steps(run_dir, 20, 40)
    replay = Replay(run_dir, there.tracker(), CONFIG, recipe)
    replay.send(final=False)
    assert there.status() == "RUNNING"
    driver.event("driver-ended", status="FINISHED")
    replay.send(final=True)
    assert there.curve("train/loss") == wanted(40) and there.status() == "FINISHED"


def test_a_file_that_is_still_being_written_is_not_sent(tmp_path: Path) -> None:
    run_dir, recipe, _ = write_run(tmp_path / "a")
    there = MemoryCase(run_dir)
    (run_dir / "results.csv").write_text("a\n")
    with whole_file(run_dir / "results.csv") as aside:
        aside.write_text("a")
        Replay(run_dir, there.tracker(), CONFIG, recipe).send(final=False)
    assert "results.csv" in there.store["files"]
    assert not any(Path(name).name.startswith(".") for name in there.store["files"])


def die_while_logging(case: Any, run_dir: Path, recipe: dict[str, Any], after: int) -> None:
    """Sends the run; kills its own process after so many calls of `log`, the last of them complete or not."""
    tracker = case(run_dir).tracker()
    log, calls = tracker.log, iter(range(1, 10**6))

    def logged(points: Sequence[MetricPoint]) -> None:
        log(points)
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    tracker.log = logged
    Replay(run_dir, tracker, CONFIG, recipe, points_per_call=8).send(final=True)


@pytest.mark.faults
@pytest.mark.parametrize("case", [TensorBoardCase, MlflowCase], ids=lambda case: case.__name__)
def test_a_killed_driver_leaves_no_gap_and_no_duplicate(case: Any, tmp_path: Path) -> None:
    if case is TensorBoardCase:
        pytest.importorskip("tensorboard")
    run_dir, recipe, driver = write_run(tmp_path / "a")
    there = case(run_dir)
    write_steps(run_dir, 0, 20)
    driver.event("driver-ended", status="FINISHED")
    for after in (1, 3):
        process = CONTEXT.Process(target=die_while_logging, args=(case, run_dir, recipe, after))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    Replay(run_dir, there.tracker(), CONFIG, recipe).send(final=True)
    assert there.curve("train/loss") == wanted(20) and there.status() == "FINISHED"


class Broken(MemoryTracker):
    """Fails at its first `failures` calls of `log`."""

    def __init__(self, store: dict[str, Any], failures: int) -> None:
        super().__init__(store)
        self._left = failures

    def log(self, points: Sequence[MetricPoint]) -> None:
        self._left -= 1
        if self._left >= 0:
            raise OSError("unreachable")
        super().log(points)


def test_an_error_of_one_tracker_loses_nothing_of_any(case: Any, tmp_path: Path) -> None:
    run_dir, recipe, driver = write_run(tmp_path / "a")
    there, store = case(run_dir), dict[Any, Any]()
    trackers: dict[str, Tracker] = {"broken": Broken(store, 2), "good": there.tracker()}
    both = Composite({name: Replay(run_dir, each, CONFIG, recipe) for name, each in trackers.items()})
    write_steps(run_dir, 0, 10)
    assert set(both.send(final=False)) == {"broken"}
    assert there.curve("train/loss") == wanted(10)
    write_steps(run_dir, 10, 20)
    assert set(both.send(final=False)) == {"broken"}
    driver.event("driver-ended", status="FINISHED")
    assert both.send(final=True) == {}
    assert there.curve("train/loss") == wanted(20)
    assert sorted((key[1], value) for key, value in store.items() if key[0] == "train/loss") == wanted(20)


def test_a_write_that_fails_is_repeated_in_a_new_event_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_dir, recipe, driver = write_run(tmp_path / "a")
    there = TensorBoardCase(run_dir)
    replay = Replay(run_dir, there.tracker(), CONFIG, recipe)
    replay.send(final=False)
    (file,) = (run_dir / "tensorboard").iterdir()
    file.rename(run_dir / "elsewhere")  # so that the next writer cannot create a file: its folder is replaced by a file
    (run_dir / "tensorboard").rmdir()
    (run_dir / "tensorboard").write_text("")
    write_steps(run_dir, 0, 10)
    with pytest.raises(OSError):
        Replay(run_dir, there.tracker(), CONFIG, recipe).send(final=False)
    (run_dir / "tensorboard").unlink()
    driver.event("driver-ended", status="FINISHED")
    Replay(run_dir, there.tracker(), CONFIG, recipe).send(final=True)
    assert there.curve("train/loss") == wanted(10)


def test_an_event_cut_off_by_a_kill_is_written_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_dir, recipe, driver = write_run(tmp_path / "a")
    there = TensorBoardCase(run_dir)
    write_steps(run_dir, 0, 10)
    Replay(run_dir, there.tracker(), CONFIG, recipe).send(final=False)
    (file,) = (run_dir / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-150])  # some of the last values, and half of one
    assert len(there.curve("train/loss")) < 10
    driver.event("driver-ended", status="FINISHED")
    Replay(run_dir, there.tracker(), CONFIG, recipe).send(final=True)
    assert there.curve("train/loss") == wanted(10)
    assert [step for step, _ in there.curve("eval/a/top1")] == list(range(10))


def test_mlflow_is_named_behind_its_seams_only() -> None:
    """Elsewhere it is only a peer of a benchmark, a word of help, a package, or a variable of the environment."""
    root = Path(__file__).parents[1]
    allowed = ("pipeline/tracking", "pipeline/registry", "pipeline/compat", "pipeline/bench", "jobs/verbs")
    sources = [path for top in ("pipeline", "tuning", "jobs") for path in (root / top).rglob("*.py")]
    named = [str(path.relative_to(root)) for path in sources if "mlflow" in path.read_text(encoding="utf-8").lower()]
    assert [name for name in named if not name.startswith(allowed)] == [
        "pipeline/api/models.py",
        "pipeline/runs/provenance.py",
        "jobs/environment.py",
    ]


# --- as a user configures it


def test_tracking_also_writes_event_files_while_training_and_by_sync(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = TrackingConfig(also=("tensorboard",), upload_checkpoints=False)
    (tmp_path / "runs").mkdir()
    shutil.copyfile(database().path, tmp_path / "runs" / "mlflow.db")
    run_dir, recipe = run_folder(tmp_path / "runs" / "a", **configs.as_mapping(config))
    with Uploader(run_dir, config, recipe) as uploader:
        write_steps(run_dir, 0, 10)
        assert uploader.ready(120)
        finish(run_dir)
    there = TensorBoardCase(run_dir)
    assert there.curve("train/loss") == MlflowCase(run_dir).curve("train/loss") == wanted(10)
    assert there.status() == "FINISHED"
    shutil.rmtree(run_dir / "tensorboard")
    assert sync(run_dir).num_metrics == 0
    assert there.curve("train/loss") == wanted(10)


def test_without_mlflow_the_event_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    config = TrackingConfig(uri="http://127.0.0.1:9", also=("tensorboard",), patience_s=5)
    run_dir, recipe = run_folder(tmp_path / "a", **configs.as_mapping(config))
    with Uploader(run_dir, config, recipe) as uploader:
        write_steps(run_dir, 0, 10)
        finish(run_dir)
    assert uploader.run_id is None and TensorBoardCase(run_dir).curve("train/loss") == wanted(10)


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with fails(ConfigError, "tracking.also", subject="tensorboard"):
        Uploader(tmp_path, TrackingConfig(also=("tensorboard",)), {})
    assert not list(tmp_path.iterdir())


def test_a_profile_is_sent_as_artifacts(tmp_path: Path) -> None:
    run_dir, recipe = run_folder(tmp_path / "run")
    (run_dir / "profile").mkdir()
    for name in ("table.txt", "trace.json.gz"):
        (run_dir / "profile" / name).write_text("x")
    store: dict[str, Any] = {}
    Replay(run_dir, MemoryTracker(store), CONFIG, recipe).send(final=False)
    assert {"profile/table.txt", "profile/trace.json.gz"} <= store["files"]
