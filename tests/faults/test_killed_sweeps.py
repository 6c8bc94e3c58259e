"""Sweeps on a real Ray whose driver, worker or cluster is killed, and trials side by side (make test-faults)."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow_here import database, server
from raised import fails
from test_sweep import Log, ended, learned, records, table, wait_until

from jobs.cli import INTERRUPTED
from pipeline.data import toy
from pipeline.errors import ResourceError
from pipeline.execution import cluster
from pipeline.run_config import ComputeConfig
from pipeline.runs import journal
from pipeline.tracking import connect
from pipeline.tracking.description import is_charted
from tuning import config, slots, sweep
from tuning.guard import GONE

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "set"
    return toy.make(folder, num_classes=4, train=320, val=80, side_px=32, seed=5)


def settings(images: Path) -> list[str]:
    """Four trials of 40 steps of 32 images, some stopped by ASHA; one at a time, so that they report in one order.

    Checkpoints are saved where metrics are logged, so that means are over the same steps after a kill.
    """
    small = ["training.batch_size=32", "checkpoint.every=10 steps", "logging.every=10 steps"]
    small += ["concurrency=1", "compute.workers=1"]
    return [f"data.root={images}", *small]


STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Kills the processes that a failed test has started; Ray's processes end with their driver."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


def start(images: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    arguments = [*settings(images), *overrides]
    command = [sys.executable, "-m", "jobs.cli", "sweep", "toy", *arguments, "--run-dir", str(run_dir)]
    with open(run_dir.parent / "log", "ab") as log:
        root = Path(__file__).parents[2]
        STARTED.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=root, start_new_session=True))
    return STARTED[-1]


def wait_for(done: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.3)  # listing all processes takes time


def family_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for child in family_of(process):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def kill_a_worker(process: subprocess.Popen[bytes]) -> bool:
    for worker in reversed(workers_of(process)):
        with contextlib.suppress(psutil.Error):
            worker.send_signal(signal.SIGKILL)
            return True
    return False


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=600)
    assert not alive


def kill(kind: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Sends SIGKILL to the driver, to one worker, or to Ray's own processes; without these the driver exits."""
    family = family_of(process)
    if kind == "worker":
        wait_for(lambda: kill_a_worker(process), process, log)  # between two trials there is none
        return
    if kind == "cluster":
        for child in family:
            if child.name() in ("raylet", "gcs_server"):
                child.send_signal(signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    assert kind == "driver" or GONE in " ".join(log.read_text().split())
    wait_until_gone(family)


def test_smoke_a_sweep_killed_on_ray_ends_like_one_that_trained_in_one_process(images: Path, tmp_path: Path) -> None:
    """One trial with one worker; its driver is killed after its first checkpoint and seconds before its end."""
    short = ["space.family.target_rate=0.4", "search.samples=1", "scheduler.kind=none", "training.epochs=16"]
    for name in ("here", "ray"):
        (tmp_path / name).mkdir()
        shutil.copyfile(database().path, tmp_path / name / "mlflow.db")
    here, there = tmp_path / "here" / "sweep", tmp_path / "ray" / "sweep"
    assert sweep.run(config.load("toy", [*settings(images), *short, "compute.workers=0"]), here).finished
    process, log = start(images, there, *short), tmp_path / "ray" / "log"
    wait_for(lambda: any(there.glob("trials/*/checkpoints/*/COMPLETE.json")), process, log)
    kill("driver", process, log)
    assert ended(there) == 0, "killed before its end"
    assert start(images, there, *short).wait(timeout=600) == 0, log.read_text()
    assert table(there) == table(here)
    assert any(events_of(folder, "resumed") for folder in (there / "trials").iterdir())


def events_of(run_dir: Path, kind: str) -> list[journal.Record]:
    path = run_dir / "journal" / "rank0.jsonl"
    return [record for record in journal.read_all(path) if record.get("event") == kind] if path.exists() else []


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted sweep in one process."""
    run_dir = tmp_path_factory.mktemp("sweeps") / "whole"
    shutil.copyfile(database().path, run_dir.parent / "mlflow.db")
    assert sweep.run(config.load("toy", [*settings(images), "compute.workers=0"]), run_dir).finished
    return run_dir


@pytest.mark.parametrize("kinds", [("driver", "driver"), ("worker", "cluster")], ids=" ".join)
def test_the_same_command_ends_with_the_same_table_whatever_was_killed(
    images: Path, whole: Path, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    """Each kill hits the trial after one that has ended; a sweep that has lost a worker continues by itself."""
    run_dir, log, choose = tmp_path / "whole", tmp_path / "log", random.Random(len(kinds[0]))
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    process = start(images, run_dir)
    for kind in kinds:
        before = ended(run_dir)
        wait_for(lambda before=before: ended(run_dir) > before, process, log)
        wait_for(lambda process=process: bool(workers_of(process)), process, log)
        time.sleep(choose.uniform(0, 4))
        kill(kind, process, log)
        if process.poll() is not None:
            process = start(images, run_dir)
    assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    assert table(run_dir) == table(whole)
    for name in (row[0] for row in table(whole)[1:]):
        last = next(int(row[table(whole)[0].index("step")]) for row in table(whole)[1:] if row[0] == name)
        assert learned(run_dir / "trials" / name, last) == learned(whole / "trials" / name, last)


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_on_a_terminal_saves_the_trial_and_the_same_command_gives_the_same_table(
    images: Path, whole: Path, tmp_path: Path, workers: int
) -> None:
    """The live table is shown; a terminal sends its signal to all processes of the command, Ray's included."""
    run_dir, log = tmp_path / "whole", tmp_path / "log"
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    here = [*settings(images), f"compute.workers={workers}", "--run-dir", str(run_dir)]
    ours, theirs = pty.openpty()
    try:
        STARTED.append(
            subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "sweep", "toy", *here],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where these tests run behind `&`
            )
        )
        os.close(theirs)
        shown = threading.Thread(target=copy_terminal, args=(ours, log))
        shown.start()
        process = STARTED[-1]
        wait_for(lambda: any(run_dir.glob("trials/*/checkpoints/*/COMPLETE.json")), process, log)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=600) == INTERRUPTED, log.read_text()[-3000:]
        shown.join(timeout=300)
    finally:
        os.close(ours)
    text = log.read_text()
    for words in ("newest top1", "running", "stopping at the next save", "stopped; "):
        assert words in text, text[-3000:]
    assert "saved at step" in text or "finished at step" in text, "a trial may be at its end by then"
    (folder,) = (run_dir / "trials").iterdir()
    last = max(record["step"] for record in records(folder))
    saved = [int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoints/*/COMPLETE.json")]
    assert max(saved) >= last
    assert start(images, run_dir, f"compute.workers={workers}").wait(timeout=400) == 0, log.read_text()[-3000:]
    assert table(run_dir) == table(whole)


def copy_terminal(ours: int, log: Path) -> None:
    """Copies the output of a terminal to a file until its last writer has ended."""
    with open(log, "ab", buffering=0) as file:
        while True:
            try:
                written = os.read(ours, 4096)
            except OSError:  # EIO: the other end is closed
                return
            if not written:
                return
            file.write(written)


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of three nodes with one CPU each, and a head without CPUs."""
    from ray.cluster_utils import Cluster

    # the cluster has no token; a driver that requires one, because its user has one, would reject the head
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(3):
        nodes.add_node(num_cpus=1)
    try:
        yield nodes
    finally:
        nodes.shutdown()


@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_with_three_slots_three_trials_run_and_no_metric_is_lost(
    images: Path, tmp_path: Path, three_nodes: Any, where: str
) -> None:
    uri = server().uri if where == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    here = [f"compute.address={three_nodes.address}", "concurrency=null", f"tracking.uri={uri}"]
    log = Log()
    loaded = config.load("toy", [*settings(images), *here, f"tracking.experiment=three-{where}"])
    found = sweep.run(loaded, tmp_path / "sweep", watcher=log)
    assert found.finished and not found.failed, found.failed
    assert log.most == 3
    assert "3 at a time" in log.lines[0]
    client = connect(uri)
    for folder in (tmp_path / "sweep" / "trials").iterdir():
        from pipeline.tracking.ledger import Ledger

        run_id = Ledger.peek(folder).run_id
        wanted = {(record["key"], record["step"]) for record in records(folder) if is_charted(record["key"])}
        sent = [(key, m.step) for key in {key for key, _ in wanted} for m in client.get_metric_history(run_id, key)]
        assert sorted(sent) == sorted(wanted)


def test_new_nodes_count_at_once_and_lost_ones_no_more(three_nodes: Any) -> None:
    compute = ComputeConfig(address=three_nodes.address, workers=1, device="cpu")
    with cluster.cluster(compute):
        assert slots.slots(compute) == slots.free(compute, 0) == 3 and slots.free(compute, 2) == 1
        with fails(ResourceError, "compute.workers", 1):
            slots.slots(compute.model_copy(update={"cpus_per_worker": 2.0}))
        node = three_nodes.add_node(num_cpus=2)
        wait_until(lambda: slots.free(compute, 0) == 5)
        three_nodes.remove_node(node)
        wait_until(lambda: slots.free(compute, 0) == 3)
        assert slots.alive()


def test_a_trial_that_fits_no_cluster_is_refused_at_once(images: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    loaded = config.load("toy", [*settings(images), "compute.cpus_per_worker=500"])
    with pytest.raises(ResourceError):
        sweep.run(loaded, tmp_path / "sweep")
    assert time.monotonic() - started < 300
