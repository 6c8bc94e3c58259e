"""Tracking: after any kill or outage MLflow holds one run, every (key, step) once, and no secret anywhere."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_here import (
    CONTEXT,
    database,
    events,
    finish,
    history,
    run_folder,
    server,
    sole_run,
    tracking_events,
    write_steps,
)
from raised import fails

from pipeline import config as configs
from pipeline.errors import ConfigError, ResourceError
from pipeline.registry.publishing import register_best
from pipeline.runs.journal import Journal
from pipeline.tracking import TrackingConfig, Uploader, address, connect, replay, resolve_uri, summaries, sync, uploader
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.mlflow import MlflowTracker
from pipeline.tracking.replay import Replay

NO_UPLOADS = {"upload_checkpoints": False}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder for runs with an mlflow.db."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copyfile(database().path, folder / "mlflow.db")
    return folder


def _connect(uri: str) -> None:
    connect(uri)


def test_a_database_whose_creator_was_killed_is_created_again(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    process = CONTEXT.Process(target=_connect, args=(f"sqlite:///{path}",))
    process.start()
    deadline = time.monotonic() + 300
    while not (tmp_path / ".mlflow.db.new").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # in the midst of its tables
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not path.exists()
    assert [found.name for found in connect(f"sqlite:///{path}").search_experiments()] == ["Default"]


def test_concurrent_processes_create_one_database() -> None:
    client = connect(f"sqlite:///{database().path}")
    assert {"e0", "e1", "e2"} <= {found.name for found in client.search_experiments()}
    assert [client.get_run(run_id).info.status for run_id in database().run_ids] == ["RUNNING"] * 3


# --- the driver is killed


def send_until(run_dir: Path, recipe: dict[str, Any], deadly: int) -> None:
    """Sends the run; SIGKILLs its own process before or after a call to MLflow, at the `deadly`-th such moment."""
    os.chdir("/")
    moments = iter(range(1, 10**6))

    class Deadly:
        def __init__(self, client: Any) -> None:
            self._client = client

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any, **named: Any) -> Any:
                die()
                answer = getattr(self._client, name)(*args, **named)
                die()
                return answer

            return call

    def die() -> None:
        if next(moments) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    config = TrackingConfig(**recipe["tracking"])
    tracker = MlflowTracker(
        resolve_uri(config.uri, run_dir), config.experiment, connect=lambda uri: Deadly(connect(uri))
    )
    Replay(run_dir, tracker, config, recipe, points_per_call=40).send(final=True)


def die_at_every_moment(run_dir: Path, recipe: dict[str, Any], deaths: Any) -> None:
    """Children send the run one after another; each is killed one moment later than the one before, until one ends."""
    while True:
        child = os.fork()
        if child == 0:
            send_until(run_dir, recipe, deaths.value + 1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(status)
        deaths.value += 1


@pytest.mark.faults
def test_a_kill_between_any_two_calls_loses_and_doubles_nothing(runs: Path) -> None:
    run_dir, recipe = run_folder(runs / "a", **NO_UPLOADS)
    driver = Journal(run_dir / "journal", "driver")
    driver.event("driver-started")
    write_steps(run_dir, 0, 100)
    write_steps(run_dir, 50, 150, attempt=2)  # from a checkpoint at step 50
    driver.event("driver-ended", status="FINISHED")
    finish(run_dir, step=149)
    parent = CONTEXT.Process(target=die_at_every_moment, args=(run_dir, recipe, deaths := CONTEXT.Value("i")))
    parent.start()
    parent.join(400)
    assert parent.exitcode == 0 and deaths.value > 20
    client = connect(resolve_uri(None, run_dir))
    run = sole_run(client)
    wanted = [(step, 1000.0 + step) for step in range(100)] + [(step, 2000.0 + step) for step in range(100, 150)]
    assert history(client, run.info.run_id) == wanted
    assert history(client, run.info.run_id, "eval/a/top1") == [(step, step / 1000) for step in range(150)]
    assert run.info.status == "FINISHED" and run.data.params["seed"] == "1"
    assert {"config.yaml", "plots", "status.json"} <= {found.path for found in client.list_artifacts(run.info.run_id)}


def drive(run_dir: Path, recipe: dict[str, Any], attempt: int, last: int, ready: Any) -> None:
    """A driver: sends while it writes steps, from a checkpoint some steps back, up to `last`."""
    uploader.PAUSE_S = 0.05
    replay.POINTS_PER_CALL = 20
    first = max(0, max((r["step"] for r in _metrics(run_dir)), default=0) - 30)
    with Uploader(run_dir, TrackingConfig(**NO_UPLOADS), recipe) as uploading:
        assert uploading.ready(300)
        ready.set()
        for step in range(first, last):
            write_steps(run_dir, step, step + 1, attempt)
            time.sleep(0.002)
        finish(run_dir, step=last)


def _metrics(run_dir: Path) -> Iterator[Any]:
    from pipeline.runs.journal import read_all

    path = run_dir / "journal" / "rank0.jsonl"
    return (r for r in read_all(path) if "event" not in r) if path.exists() else iter(())


@pytest.mark.faults
def test_a_driver_killed_at_random_continues_the_same_run(runs: Path) -> None:
    run_dir, recipe = run_folder(runs / "a")
    draw = random.Random(5)
    for attempt in range(1, 6):
        ready = CONTEXT.Event()
        driver = CONTEXT.Process(target=drive, args=(run_dir, recipe, attempt, 900, ready))
        driver.start()
        assert ready.wait(300)
        if attempt < 5:
            time.sleep(draw.uniform(0.02, 0.4))
            driver.kill()
        driver.join(300)
    client = connect(resolve_uri(None, run_dir))
    run = sole_run(client)
    first: dict[int, float] = {}
    for record in _metrics(run_dir):
        if record["key"] == "train/loss":
            first.setdefault(record["step"], record["value"])
    assert history(client, run.info.run_id) == sorted(first.items()) and len(first) == 900
    assert len({value // 1000 for value in first.values()}) > 1  # several drivers took part
    assert run.info.status == "FINISHED"
    at = {m.step: m.timestamp for m in client.get_metric_history(run.info.run_id, "train/loss")}
    written = {r["step"]: r["time"] for r in reversed(list(_metrics(run_dir))) if r["key"] == "train/loss"}
    assert at == {step: round(1000 * seconds) for step, seconds in written.items()}


# --- the server is unreachable


@pytest.mark.faults
def test_a_server_that_hangs_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploader, "PAUSE_S", 0.2)
    monkeypatch.setattr(uploader, "LONGEST_PAUSE_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    there = server()
    config = TrackingConfig(uri=there.uri, experiment=tmp_path.name, patience_s=3)
    run_dir, recipe = run_folder(tmp_path / "a", **configs.as_mapping(config))
    with there.frozen():
        uploading = Uploader(run_dir, config, recipe).__enter__()
        start = time.monotonic()
        write_steps(run_dir, 0, 50)
        assert time.monotonic() - start < 60  # training does not wait for the server
        assert uploading.ready(0.1) is None
        wait_for(lambda: tracking_events(run_dir) == ["tracking-away"])
    run_id = uploading.ready(300)
    assert run_id is not None
    with there.frozen():
        write_steps(run_dir, 50, 100)
        finish(run_dir, step=99)
        wait_for(lambda: tracking_events(run_dir).count("tracking-away") == 2)  # batches were sent and not answered
        closing = time.monotonic()
        uploading.__exit__(None, None, None)
        assert time.monotonic() - closing < 120
        with pytest.raises(ResourceError) as refused:
            sync(run_dir)
        assert refused.value.key in ("tracking.lock", "tracking.uri")  # while the driver's last attempt runs, or after
    kinds = tracking_events(run_dir)
    assert kinds[:2] == ["tracking-away", "tracking-back"] and kinds[-1] == "tracking-left"
    assert kinds.count("tracking-away") == 2  # one for each outage, however many attempts there were
    uploading._thread.join(300)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a busy machine answers late
    done = sync(run_dir)
    assert (done.run_id, done.status) == (run_id, "FINISHED")
    assert sync(run_dir).num_metrics == 0
    client = connect(there.uri)
    assert sole_run(client, tmp_path.name).info.run_id == run_id
    assert history(client, run_id) == [(step, 1000.0 + step) for step in range(100)]
    assert "plots" in {found.path for found in client.list_artifacts(run_id)}


@pytest.mark.parametrize("name", [None, "aig"])
def test_the_end_of_a_run_does_not_wait_for_a_server_that_never_answers(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "LAST_TRY_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # connections succeed, by the kernel's queue
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        config = TrackingConfig(uri=uri, patience_s=900, register=name)
        run_dir, recipe = run_folder(tmp_path / "a", **configs.as_mapping(config))
        write_steps(run_dir, 0, 5)
        with Uploader(run_dir, config, recipe) as uploading:
            finish(run_dir, step=4)
            start = time.monotonic()
            assert register_best(run_dir, config, uploading) is None
        assert time.monotonic() - start < 200  # MLflow's import and a busy machine included
    uploading._thread.join(300)  # now the server refuses, which the thread finds out after the end of the run
    assert not uploading._thread.is_alive() and tracking_events(run_dir)[-1] == "tracking-left"
    assert [each["event"] for each in events(run_dir)].count("not-registered") == (0 if name is None else 1)


def wait_for(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what MLflow shows of a run


def test_a_resumed_run_is_running_again_with_its_changes_as_tags(runs: Path) -> None:
    run_dir, recipe = run_folder(runs / "a")
    with Uploader(run_dir, TrackingConfig(), recipe) as uploading:
        write_steps(run_dir, 0, 3)
        finish(run_dir)
        client = connect(uploading.uri)
    run = sole_run(client)
    assert run.info.status == "FINISHED"
    (run_dir / "status.json").unlink()
    changed = configs.merge(recipe, {"seed": 2, "training": {"epochs": 9}})
    with pytest.raises(RuntimeError), Uploader(run_dir, TrackingConfig(), changed) as uploading:
        assert uploading.ready(300) == run.info.run_id
        assert sole_run(client).info.status == "RUNNING"
        raise RuntimeError("no more: http://me:hush@host/ said so")
    run = sole_run(client)
    assert run.info.status == "FAILED"
    assert run.data.tags["adaptnet.error"] == "RuntimeError: no more: http://host/ said so"
    assert (run.data.params["seed"], run.data.tags["changed.seed"]) == ("1", "2")
    assert run.data.params["training.epochs"] == "9"
    with pytest.raises(KeyboardInterrupt), Uploader(run_dir, TrackingConfig(), changed):
        raise KeyboardInterrupt
    assert sole_run(client).info.status == "KILLED"
    with Uploader(run_dir, TrackingConfig(), changed):
        pass  # it was asked to stop, and has saved
    assert sole_run(client).info.status == "SCHEDULED"  # neither failed nor killed, and not finished
    assert sole_run(client).data.tags["adaptnet.status"] == "STOPPED"
    assert summaries(run_dir)[0].status == "STOPPED"


def test_a_ledger_without_a_run_id_finds_its_run(runs: Path) -> None:
    run_dir, _ = run_folder(runs / "a")
    write_steps(run_dir, 0, 3)
    first = sync(run_dir)
    ledger = Ledger.open(run_dir)
    ledger.run_id, ledger.offsets = None, {}  # as if the driver had died while the run was being made
    ledger.save()
    assert sync(run_dir).run_id == first.run_id
    client = connect(resolve_uri(None, run_dir))
    assert history(client, first.run_id) == [(step, 1000.0 + step) for step in range(3)]
    client.delete_run(first.run_id)
    with fails(ResourceError, "tracking.json", subject=first.run_id):
        sync(run_dir)
    client.restore_run(first.run_id)
    client.delete_experiment(client.get_run(first.run_id).info.experiment_id)
    assert sync(run_dir).run_id == first.run_id, "the experiment was not restored with its run"
    assert client.get_run(first.run_id).info.lifecycle_stage == "active"
    client.delete_experiment(client.get_run(first.run_id).info.experiment_id)
    other, _ = run_folder(runs / "b")  # a new run does not bring back what a person has deleted
    with fails(ResourceError, "tracking.experiment", subject="adaptnet"):
        sync(other)
    assert sync(run_dir).run_id == first.run_id
    (run_dir / "tracking.json").write_text("{")
    with fails(ResourceError, "tracking.json", subject=run_dir):
        sync(run_dir)


def test_a_different_server_is_sent_everything(runs: Path) -> None:
    run_dir, _ = run_folder(runs / "a")
    write_steps(run_dir, 0, 3)
    shutil.copyfile(runs / "mlflow.db", runs / "other.db")
    there = f"sqlite:///{runs / 'other.db'}"
    assert sync(run_dir).num_metrics == sync(run_dir, there).num_metrics == 6
    assert sync(run_dir, there).num_metrics == 0
    assert len(history(connect(there), sole_run(connect(there)).info.run_id)) == 3


def test_sync_ends_a_run_whose_driver_was_killed(runs: Path) -> None:
    run_dir, _ = run_folder(runs / "a")
    Journal(run_dir / "journal", "driver").event("driver-started")
    assert sync(run_dir).status == "KILLED"


def test_best_and_last_checkpoint_are_uploaded_and_named(runs: Path) -> None:
    import tiny

    from pipeline.training import state

    run_dir, _ = run_folder(runs / "a")
    current = tiny.fresh(tiny.training())
    recorder = tiny.Recorder(run_dir / "checkpoints")
    writer = Journal(run_dir / "journal")
    for step in (5, 10, 15):
        current.step = step
        recorder.save(current, wait=True)
        writer.event("checkpoint", step=step, where=str(run_dir / "checkpoints" / f"step-{step:08d}"))
    finish(run_dir, step=15, best="step-00000005")
    done = sync(run_dir)
    client = connect(done.uri)
    tags = client.get_run(done.run_id).data.tags
    assert tags["adaptnet.checkpoint.last"] == "checkpoints/step-00000015"
    assert tags["adaptnet.checkpoint.best"] == "checkpoints/step-00000005"
    assert tags["adaptnet.checkpoint"] == str(run_dir / "checkpoints" / "step-00000015")
    assert [found.path for found in client.list_artifacts(done.run_id, "checkpoints")] == [
        "checkpoints/step-00000005",
        "checkpoints/step-00000015",
    ]
    fetched = client.download_artifacts(done.run_id, "checkpoints/step-00000015")
    from pipeline.training import checkpoint

    checkpoint.verify(Path(fetched))
    assert state.to_mapping(current)["step"] == checkpoint.read(Path(fetched))["step"]


def test_odd_keys_and_values_do_not_block_the_others(runs: Path) -> None:
    run_dir, recipe = run_folder(runs / "a")
    writer = Journal(run_dir / "journal")
    writer.metrics(0, {"eval/budget=0.85 G%/top1": 1.0, "x" * 400: 2.0, "//a//../b": 3.0, "nan": float("nan")})
    writer.metrics(0, {"inf": float("inf"), "plain": 4.0})
    recipe["long"] = "y" * 10_000
    recipe["odd#key"] = {"": 1}
    (run_dir / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    for _ in range(2):
        done = sync(run_dir)
        (run_dir / "tracking.json").write_text((run_dir / "tracking.json").read_text().replace("rank0", "none"))
    assert done.num_metrics == 6  # the second time they were sent again, and refused as known
    client = connect(done.uri)
    metrics = client.get_run(done.run_id).data.metrics
    assert metrics["eval/budget_0.85 G_/top1"] == 1.0 and metrics["x" * 250] == 2.0 and metrics["plain"] == 4.0
    assert len(history(client, done.run_id, "nan")) == len(history(client, done.run_id, "inf")) == 1
    assert client.get_run(done.run_id).data.params["long"] == "y" * 6000


# --- addresses and secrets


@pytest.mark.parametrize(
    ("uri", "full"),
    [
        (None, "sqlite:////home/r/mlflow.db"),
        ("sqlite:////data/x.db", "sqlite:////data/x.db"),
        ("sqlite:///x.db", f"sqlite:///{Path.cwd()}/x.db"),
        ("http://u:p@host:5000/base", "http://u:p@host:5000/base"),
        ("postgresql+psycopg2://u@host/db", "postgresql+psycopg2://u@host/db"),
    ],
)
def test_a_uri_is_completed(uri: str | None, full: str) -> None:
    assert resolve_uri(uri, Path("/home/r/run1")) == full


@pytest.mark.parametrize("uri", ["runs/mlflow", "file:///tmp/x", "ftp://host/x", "sqlite://", "http://", "http://h:x"])
def test_a_uri_that_mlflow_does_not_support_is_refused(uri: str, tmp_path: Path) -> None:
    with fails(ConfigError, "tracking.uri"):
        Uploader(tmp_path, TrackingConfig(uri=uri), {})


def test_no_secret_leaves_the_address(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploader, "PAUSE_S", 0.05)
    uri = "http://me:hush@127.0.0.1:9/?token=hush2"  # nothing listens there
    config = TrackingConfig(uri=uri, patience_s=10)
    run_dir, recipe = run_folder(runs / "a", **configs.as_mapping(config))
    with Uploader(run_dir, config, recipe, command=["adaptnet", "train", f"tracking.uri={uri}"]):
        write_steps(run_dir, 0, 1)
    with fails(ResourceError, "tracking.uri") as refused:
        sync(run_dir, uri)
    with fails(ConfigError, "tracking.uri") as wrong:
        resolve_uri("ftp://me:hush@host/", run_dir)
    written = [path.read_text() for path in run_dir.rglob("*") if path.is_file()]
    assert "tracking-away" in tracking_events(run_dir)
    assert not [text for text in (*written, str(refused.value), str(wrong.value)) if "hush" in text]


def test_sqlite_on_a_network_file_system_is_not_used(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = runs.parent / "mounts"
    shared = runs.parent / "net work"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nhost:/x {str(shared).replace(' ', chr(92) + '040')} nfs4 rw 0 0\n")
    monkeypatch.setattr(address, "MOUNTS", mounts)
    run_dir, recipe = run_folder(shared / "a")
    with Uploader(run_dir, TrackingConfig(), recipe) as uploading:
        write_steps(run_dir, 0, 3)
        assert uploading.ready(0.1) is None
        finish(run_dir)
    assert not list(shared.glob("mlflow.db*"))
    off = events(run_dir)[1]
    assert off["event"] == "tracking-off" and off["reason"] and off["hint"]
    with fails(ResourceError, "--uri", subject=shared):
        sync(run_dir)
    done = sync(run_dir, f"sqlite:///{runs / 'mlflow.db'}")
    assert (done.num_metrics, done.status) == (6, "FINISHED")


@pytest.mark.parametrize("name", ["a/b", "a:b", "x@champion", "", " a", "a ", ".", "..", "a'b", "n" * 300])
def test_a_registry_name_with_bad_characters_is_refused_by_name(name: str) -> None:
    with fails(ConfigError, "register"):
        configs.validate(TrackingConfig, {"register": name}, "recipe")
    assert configs.validate(TrackingConfig, {"register": "aig-toy_1.0 x"}, "recipe").register == "aig-toy_1.0 x"
