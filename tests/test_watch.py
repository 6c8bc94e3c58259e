"""The driver's watch and the guardians, on small processes that stand for ranks and drivers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from jobs.schedulers.profile import SiteProfile
from jobs.schedulers.records import JobRecord
from jobs.schedulers.submission import Resources
from jobs.verbs import jobs
from pipeline.errors import ResourceError
from pipeline.execution import guardian, ray_processes
from pipeline.execution.guardians import report_failures
from pipeline.execution.ray_processes import RayState
from pipeline.execution.watch import RunWatch
from pipeline.execution.watched import WatchAddress
from pipeline.run_config import ComputeConfig
from pipeline.runs import journal, progress
from pipeline.runs.beats import Beats
from pipeline.runs.journal import Journal
from pipeline.runs.lease import Lease
from pipeline.tracking.summary import summaries

ROOT = Path(__file__).parents[1]
HANG_AFTER_S = 1.5
RANK = """
import ctypes, os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from pipeline.execution.watched import WatchAddress, watched

def wait_for_the_others():
    threading.Event().wait()

def read_the_batch():
    open({fifo!r}).read()

with watched(WatchAddress(*{address!r}), {rank!r}, {hang_after_s!r}) as beats:
    beats.enter("a step")
    beats.step = 7
    print("ready", flush=True)
    {body}
"""


@contextmanager
def process(tmp_path: Path, watch: RunWatch | None, rank: int | None, body: str) -> Iterator[psutil.Popen]:
    """A process with a guardian that runs `body`, which may use beats, wait_for_the_others() and read_the_batch()."""
    fifo = tmp_path / "fifo"
    if not fifo.exists():
        os.mkfifo(fifo)
    place = watch.address() if watch is not None else WatchAddress("127.0.0.1", 9, "nobody listens")
    code = RANK.format(
        root=str(ROOT),
        fifo=str(fifo),
        address=(place.host, place.port, place.token),
        rank=rank,
        hang_after_s=HANG_AFTER_S,
        body=textwrap.indent(textwrap.dedent(body), "    ").lstrip(),
    )
    started = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert started.stdout.readline() == b"ready\n"
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()
        started.stdout.close()


class Told(list[str]):
    """What a watch has told, and its journal."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir = run_dir

    def events(self, kind: str) -> list[journal.Record]:
        written = self.run_dir / "journal" / "driver.jsonl"
        return [record for record in journal.read_all(written) if record.get("event") == kind]


@contextmanager
def watching(run_dir: Path, **compute: object) -> Iterator[tuple[RunWatch, Told]]:
    told = Told(run_dir)
    written = Journal(run_dir / "journal", "driver")
    with RunWatch(run_dir, ComputeConfig(hang_after_s=HANG_AFTER_S, **compute), told.append) as watch:
        with watch.journal(written):
            yield watch, told


def wait_for(fact: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stall(run_dir: Path) -> str:
    found = progress.read(run_dir)
    return (found.stall() or "") if found is not None else ""


def test_a_rank_that_blocks_in_a_read_is_told_with_its_line_and_those_of_the_others(tmp_path: Path) -> None:
    with watching(tmp_path, on_hang="report") as (watch, told):
        with process(tmp_path, watch, 0, "beats.count += 1\nwait_for_the_others()") as first:
            Journal(tmp_path / "journal").event("checkpoint", step=5, where="there")
            with process(tmp_path, watch, 1, "read_the_batch()") as second:
                wait_for(lambda: bool(told.events("hang")))
                assert first.is_running() and second.is_running()
                wait_for(lambda: "stands still" in stall(tmp_path))
    (text,) = told
    here = socket.gethostname()
    assert all(word in text for word in (f"rank 0 on {here}", f"rank 1 on {here}", "in read_the_batch", "step 7"))
    assert "in wait_for_the_others" in text and "checkpoint at step 5" in text
    (event,) = told.events("hang")
    assert (tmp_path / event["report"]).read_text().startswith(text.partition("\n\nwritten to ")[0])


def test_a_stopped_rank_is_told_and_all_ranks_are_ended(tmp_path: Path) -> None:
    with watching(tmp_path) as (watch, told):
        with process(tmp_path, watch, 0, "wait_for_the_others()") as first:
            with process(tmp_path, watch, 1, "while True: beats.count += 1; time.sleep(0.01)") as second:
                second.send_signal(signal.SIGSTOP)
                assert first.wait(60) == second.wait(60) == -signal.SIGKILL
                assert report_failures(watch.address(), ["rank 0: lost", "rank 1: lost"]) is None
    (event,), (restart,) = told.events("hang"), told.events("restart")
    assert "rank 1" in event["reason"] and "state T" in event["reason"]
    assert event["reason"] in restart["reason"] and restart["reason"].startswith("hang")
    assert "in wait_for_the_others" in told[0]


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("ctypes.string_at(0)", "in string_at"),
        ("os._exit(3)", "exit code 3"),
    ],
)
def test_how_a_rank_died_is_what_the_restart_was_for(body: str, how: str, tmp_path: Path) -> None:
    with watching(tmp_path) as (watch, told):
        with process(tmp_path, watch, 1, body) as rank:
            rank.wait(60)
            wait_for(lambda: bool(watch._guardians.deaths()))
        report_failures(watch.address(), ["rank 1: its process was lost"])
    (restart,) = told.events("restart")
    assert "rank 1" in restart["reason"]
    assert how in restart["reason"] or (how == "exit code 3" and "without an error" in restart["reason"])


def test_why_ray_lost_a_start_is_told_where_no_process_died(tmp_path: Path) -> None:
    with watching(tmp_path, max_failures=1) as (watch, told):
        for _ in range(2):
            report_failures(watch.address(), ["rank 3 raised ValueError: no such label"])
        assert report_failures(WatchAddress("127.0.0.1", watch.address().port, "wrong"), ["forged"]) is None
    assert [event["reason"] for event in told.events("restart")] == ["rank 3 raised ValueError: no such label"]
    assert len(told.events("failed")) == 1


@pytest.mark.parametrize(("hang_after_s", "on_hang"), [(500, "restart"), (1, "report")])
def test_a_request_to_stop_ends_a_hang(
    hang_after_s: float, on_hang: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.execution.watch.STOPS_WITHIN_S", 1.0)
    told: list[str] = []
    with RunWatch(tmp_path, ComputeConfig(hang_after_s=hang_after_s, on_hang=on_hang), told.append) as watch:
        with process(tmp_path, watch, 0, "beats.patience = 1; read_the_batch()") as rank:
            if on_hang == "report":
                wait_for(lambda: bool(told))
                assert rank.is_running()
            (tmp_path / "stop").touch()
            assert rank.wait(60) == -signal.SIGKILL
        assert report_failures(watch.address(), ["rank 0: lost"]) is not None
        assert isinstance(watch.end, ResourceError)


def test_a_long_phase_that_computes_and_a_slow_step_are_no_hang(tmp_path: Path) -> None:
    body = """
    beats.enter("compiling", 100.0)
    until = time.monotonic() + 6
    while time.monotonic() < until: pass
    beats.enter("a step")
    for beats.step in range(12):
        time.sleep(0.25)
    """
    with watching(tmp_path) as (watch, told):
        with process(tmp_path, watch, 0, body) as rank:
            wait_for(lambda: bool(told.events("slow")))
            assert rank.wait(60) == 0
    assert not told.events("hang")
    (event,) = told.events("slow")
    assert "compiling" in event["reason"] and event["report"] in told[0]
    assert 'File "<string>"' in (tmp_path / event["report"]).read_text()


@pytest.mark.parametrize("others", ["wait", "compute"])
def test_a_rank_that_waits_for_one_that_computes_is_no_hang(others: str, tmp_path: Path) -> None:
    with watching(tmp_path) as (watch, told):
        waits = process(tmp_path, watch, 0, 'beats.enter("compiling", 100.0)\nwait_for_the_others()')
        other = {"wait": "read_the_batch()", "compute": "while True: pass"}[others]
        with waits, process(tmp_path, watch, 1, f'beats.enter("saving", 50.0)\n{other}'):
            wait_for(lambda: len(told) > 0)
            kind = {"wait": "hang", "compute": "slow"}[others]
            wait_for(lambda: bool(told.events(kind)))
    assert len(told) == 1 and [len(told.events(each)) for each in ("hang", "slow")].count(0) == 1


def test_a_long_phase_that_only_waits_is_told_and_left_alone(tmp_path: Path) -> None:
    body = """
    beats.enter("opening the images", 100.0)
    read_the_batch()
    beats.enter("a step")
    while True: beats.count += 1; time.sleep(0.01)
    """
    with watching(tmp_path) as (watch, told):
        with process(tmp_path, watch, 0, body) as rank:
            wait_for(lambda: "only waits" in stall(tmp_path))
            (tmp_path / "fifo").write_bytes(b"at last")
            wait_for(lambda: bool(told.events("progress-again")) and not stall(tmp_path))
            assert rank.is_running()
    (event,) = told.events("hang")
    assert "opening the images" in event["reason"] and "in read_the_batch" in told[0]


def test_a_rank_that_dies_after_it_was_told_makes_no_progress_again(tmp_path: Path) -> None:
    with watching(tmp_path) as (watch, told):
        with process(tmp_path, watch, 0, 'beats.enter("saving", 100.0)\nread_the_batch()') as rank:
            wait_for(lambda: bool(told.events("hang")))
            rank.kill()
            wait_for(lambda: watch._hang is None)
    assert not told.events("progress-again")


def test_a_rank_that_waited_for_one_that_died_does_not_hang(tmp_path: Path) -> None:
    with watching(tmp_path) as (watch, told):
        with process(tmp_path, watch, 0, 'beats.enter("compiling", 100.0)\nwait_for_the_others()'):
            with process(tmp_path, watch, 1, 'beats.enter("compiling", 100.0)\nwhile True: pass') as other:
                wait_for(lambda: bool(told.events("slow")))
                other.kill()
                wait_for(lambda: bool(watch._guardians.deaths()))
                time.sleep(3)
    assert not told.events("hang")


def test_a_run_folder_that_does_not_answer_is_told_before_a_rank_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(tmp_path) as (watch, told):
        monkeypatch.setattr(watch._folder, "silent_s", lambda: 3600.0)
        with process(tmp_path, watch, None, 'beats.enter("waiting", float("inf"))\nread_the_batch()') as driver:
            wait_for(lambda: bool(told.events("hang")))
            assert driver.is_running()
    assert "has not answered since" in told[0]


def test_the_length_of_a_phase_is_not_that_of_a_step() -> None:
    beats = Beats()
    pace = guardian.Pace(beats, 0.2, guardian.Work(os.getpid(), 0.1))
    for name in ("starting", "opening", "restoring"):
        beats.enter(name, 10.0)
        pace.look()
        time.sleep(0.1)
    assert pace.look()["limit_s"] == pytest.approx(0.2 * 10)
    beats.enter("a step")
    pace.look()
    time.sleep(0.1)
    beats.step = 1
    assert float(str(pace.look()["limit_s"])) >= 20 * 0.1  # else a second step as slow as the first would be a hang
    for _ in range(300):
        beats.count += 1
        pace.look()
    beats.enter("a step")
    assert float(str(pace.look()["limit_s"])) >= 20 * 0.1  # short batches of an evaluation do not count


def test_a_report_that_takes_long_is_no_progress(tmp_path: Path) -> None:
    with watching(tmp_path, on_hang="report") as (watch, told):
        with process(tmp_path, watch, 0, "read_the_batch()") as rank:
            (its,) = (each for each in rank.children() if "guardian" in " ".join(each.cmdline()))
            wait_for(lambda: any(sight.limit_s < 1e9 for sight in watch._guardians.sights()))
            its.suspend()
            wait_for(lambda: len(told) > 0)
            time.sleep(6)
            its.resume()
    assert len(told.events("hang")) == 1 and not told.events("progress-again")


def test_a_driver_that_waits_in_a_long_phase_is_told(tmp_path: Path) -> None:
    with watching(tmp_path) as (watch, told):
        with process(tmp_path, watch, None, 'beats.enter("reading", 100.0)\nread_the_batch()') as driver:
            wait_for(lambda: bool(told.events("hang")))
            assert driver.is_running()
    assert "the driver" in told[0] and "in read_the_batch" in told[0]


def test_a_rank_ends_with_its_driver_even_if_it_is_stopped(tmp_path: Path) -> None:
    with RunWatch(tmp_path, ComputeConfig()) as watch:
        entered = process(tmp_path, watch, 0, "wait_for_the_others()")
        rank = entered.__enter__()
        rank.send_signal(signal.SIGSTOP)
        time.sleep(1)
    assert rank.wait(10) == -signal.SIGKILL
    entered.__exit__(None, None, None)


@pytest.mark.faults
def test_what_a_killed_driver_has_started_ends_within_ten_seconds(tmp_path: Path) -> None:
    body = (
        "import subprocess; below = subprocess.Popen(['sleep', '600']); print(below.pid, flush=True); time.sleep(600)"
    )
    with RunWatch(tmp_path, ComputeConfig()) as watch:
        with process(tmp_path, watch, None, body) as driver:
            below = psutil.Process(int(driver.stdout.readline()))
            time.sleep(2)
            below.suspend()
            driver.kill()
            driver.wait()
            below.wait(10)


def test_a_hanging_run_is_listed_as_such_and_its_job_says_since_when(tmp_path: Path) -> None:
    run_dir, now = tmp_path / "run", time.time()
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("recipe: {}")
    record = JobRecord(
        "7",
        "slurm",
        "run",
        "train",
        (),
        "",
        str(run_dir),
        "",
        Resources((1, 1), 0, 1, 9),
        SiteProfile(),
        now - 9,
        "here",
    )
    assert jobs._progress(record) == {} and jobs._stall(record) == ""
    lease = Lease(run_dir).acquire()
    for hang, silent_s, status in (
        (None, 0, "RUNNING"),
        ("rank 1 is stopped", 0, "HANGING"),
        (None, 3600, "HANGING"),
    ):
        written = progress.RunProgress(12, "a step", now - 500, now - silent_s, hang)
        progress.write(run_dir, written)
        (shown,) = summaries(tmp_path)
        assert shown.status == status and (shown.stall is None) == (status == "RUNNING")
        assert silent_s or jobs._progress(record) == {"progress": written.sentence()}
        assert (hang or "") in jobs._stall(record)
    lease.release()
    assert summaries(tmp_path)[0].status == "KILLED"


def test_a_stopped_and_a_killed_process_of_ray_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(tmp_path) as (watch, told), process(tmp_path, watch, 0, "while True: beats.count += 1") as rank:
        with psutil.Popen(["sleep", "600"]) as raylet, watch.over_ray(RayState(None, HANG_AFTER_S)):
            monkeypatch.setattr(ray_processes, "of_driver", lambda gcs: [psutil.Process(raylet.pid)])
            raylet.send_signal(signal.SIGSTOP)
            wait_for(lambda: bool(told.events("ray-frozen")))
            assert rank.is_running() and watch.error is None  # it still makes progress
            raylet.kill()
            assert rank.wait(60) == -signal.SIGKILL
            wait_for(lambda: watch.error is not None)
    assert "has died" in str(watch.error) and "has died" in told.events("hang")[0]["reason"]


def test_a_worker_that_a_raylet_has_just_forked_is_no_process_of_rays_own() -> None:
    """It has the raylet's name until it runs its own program, and its end is not that of the raylet."""
    code = "open('/proc/self/comm', 'w').write('raylet'); import os, time; os.fork(); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code]) as raylet:
        family = psutil.Process(raylet.pid)
        try:
            wait_for(lambda: len(family.children()) == 1)
            found = {each.pid for each in ray_processes.of_driver(None)}  # the session's head may be among them
            assert raylet.pid in found and family.children()[0].pid not in found
        finally:
            for each in [*family.children(), family]:
                each.kill()


def test_private_beats_can_be_written() -> None:
    beats = Beats()
    with beats.during("an evaluation", 3.0):
        assert list(beats.over("ab")) == ["a", "b"]
        assert beats.phase == b"an evaluation"
    assert beats.phase == b""


@pytest.mark.parametrize(
    ("rank", "end", "said"),
    [
        (None, "os._exit(1)", "ended with exit code 1"),
        (None, "os._exit(2)", ""),
        (None, "os.kill(os.getpid(), signal.SIGKILL)", ""),
        (None, "pass", ""),
        (0, "os._exit(1)", ""),
    ],
)
def test_a_driver_that_c_code_has_ended_is_told_by_its_guardian(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rank: int | None, end: str, said: str
) -> None:
    with watching(tmp_path) as (watch, _), process(tmp_path, watch, rank, f"time.sleep(2); {end}") as ended:
        (guardian_,) = ended.children()
        ended.wait(60)
        guardian_.wait(60)
    told = capfd.readouterr().err
    assert (said in told and told.count("adaptnet:") == 1) if said else "adaptnet:" not in told
