"""Tests of the lease: one driver at a time, each with a higher number, and a dead driver does not block the next.

Times are shortened; no test depends on a clock that two processes share.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import full_disk
from raised import fails

from pipeline.errors import ResourceError
from pipeline.runs import lease
from pipeline.runs.journal import Journal
from pipeline.runs.lease import Lease, Watch

HOLD = """
import os, sys, time
from pathlib import Path
from pipeline.runs import lease
lease.BEAT_S = 0.1
shift = float(sys.argv[2])
clock = time.time
time.time = lambda: clock() + shift
lease.Lease(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""
OLD = {"fence": 4, "host": socket.gethostname(), "pid": 1, "started": 0.0, "command": "adaptnet train x"}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT_S", 1.5)
    monkeypatch.setattr(lease, "POLL_S", 0.05)


def write(folder: Path, **changes: object) -> None:
    (folder / "lease.json").write_text(json.dumps({**OLD, "heartbeat": time.time(), "released": False, **changes}))


def hold(folder: Path, shift_s: float = 0.0, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    command = [*before, sys.executable, "-c", HOLD, str(folder), str(shift_s)]
    process = subprocess.Popen(command, stdout=-1, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def acquired(folder: Path) -> int:
    mine = Lease(folder).acquire()
    mine.release()
    return mine.fence


def test_a_second_driver_is_refused_and_later_gets_a_higher_fence(tmp_path: Path) -> None:
    first = Lease(tmp_path).acquire()
    with fails(ResourceError, "lease.json", subject=tmp_path) as refused:
        Lease(tmp_path).acquire()
    assert socket.gethostname() in str(refused.value)  # names the holder
    first.release()
    second = Lease(tmp_path).acquire()
    assert second.fence == first.fence + 1
    assert not lease.is_current(tmp_path, first.fence)
    second.release()


def test_the_lease_of_a_killed_driver_in_this_namespace_is_free_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path)
    with fails(ResourceError, "lease.json", subject=tmp_path):
        Lease(tmp_path).acquire()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert acquired_within(tmp_path, 1.0) == 2  # although its parent has not reaped it
    process.wait()


def acquired_within(folder: Path, seconds: float) -> int:
    began = time.monotonic()
    fence = acquired(folder)
    assert time.monotonic() - began < seconds + 1
    return fence


def test_a_stopped_driver_keeps_its_lease(tmp_path: Path, started: list[subprocess.Popen[bytes]], soon: None) -> None:
    started.append(hold(tmp_path))
    started[0].send_signal(signal.SIGSTOP)
    time.sleep(2)
    with fails(ResourceError, "lease.json", subject=tmp_path):
        Lease(tmp_path).acquire()


def test_a_process_with_the_pid_of_a_dead_holder_does_not_hold_the_lease(tmp_path: Path) -> None:
    mine = Lease(tmp_path).acquire()
    entry = lease.read(tmp_path / "lease.json")
    mine.release()
    write(tmp_path, **{**entry, "ticks": (entry["ticks"] or 0) - 1, "released": False})
    assert acquired_within(tmp_path, 1.0) == entry["fence"] + 1


@pytest.mark.parametrize("shift_s", [-3600.0, 3600.0])
def test_a_living_holder_in_another_pid_namespace_is_not_robbed_whatever_its_clock(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], soon: None, shift_s: float
) -> None:
    """As in another container of this host: the same host name, and a pid that means another process here."""
    apart = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a PID namespace")
    started.append(hold(tmp_path, shift_s, apart))
    for _ in range(2):
        with fails(ResourceError, "lease.json", subject=tmp_path):
            Lease(tmp_path).acquire()
    started[0].kill()
    started[0].wait()
    said: list[str] = []
    mine = Lease(tmp_path).acquire(waiting=said.append)
    assert mine.fence == 2 and len(said) == 1
    mine.release()


def beats(folder: Path, shift_s: float, ended: threading.Event, **changes: object) -> None:
    for beat in range(10_000):
        if ended.wait(0.1):
            return
        write(folder, **{"heartbeat": time.time() + shift_s, "beat": beat, **changes})


@pytest.mark.parametrize("shift_s", [-3600.0, 60.0])
@pytest.mark.parametrize("entry", [{}, {"host": "elsewhere"}, {"boot": "another", "pid_namespace": "pid:[1]"}], ids=str)
def test_a_heartbeat_that_changes_is_alive_and_one_that_does_not_is_dead(
    tmp_path: Path, soon: None, shift_s: float, entry: dict[str, Any]
) -> None:
    """Entries of older versions, and of other hosts and kernels."""
    ended = threading.Event()
    holder = threading.Thread(target=lambda: beats(tmp_path, shift_s, ended, **entry))
    write(tmp_path, **{"heartbeat": time.time() + shift_s, **entry})
    holder.start()
    try:
        with fails(ResourceError, "lease.json", subject=tmp_path):
            Lease(tmp_path).acquire()
    finally:
        ended.set()
        holder.join()
    began = time.monotonic()
    assert acquired(tmp_path) == 5
    assert time.monotonic() - began >= 1.5


def test_of_two_that_watch_a_dead_holder_one_takes_over(tmp_path: Path, soon: None) -> None:
    write(tmp_path, host="elsewhere")
    fences: list[int] = []

    def contend() -> None:
        try:
            fences.append(Lease(tmp_path).acquire().fence)
        except ResourceError:
            fences.append(0)

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fences) == [0, 0, 0, 5]


def test_a_watch_is_told_of_a_death_after_signs_of_life(tmp_path: Path, soon: None) -> None:
    watch, seen = Watch(tmp_path / "lease.json"), []
    assert watch.verdict() == "free"
    for beat in range(3):
        write(tmp_path, beat=beat)
        seen.append(watch.verdict())
    assert seen == ["unknown", "held", "held"]
    assert not watch.expire()
    time.sleep(1.6)
    assert watch.expire()
    assert acquired_within(tmp_path, 0.5) == 6  # `expire` has taken the number 5


@pytest.mark.faults
@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"null", b'{"fence": "x"}', b"\x80\xff\x00", b"[" * 100_000]
)
def test_a_damaged_lease_is_healed_by_its_holder_and_else_expires(tmp_path: Path, soon: None, content: bytes) -> None:
    Journal(tmp_path / "journal", "driver", fence=7).event("driver-started")
    (tmp_path / "lease.json").write_bytes(content)
    assert lease.is_current(tmp_path, 7) and lease.is_live(tmp_path)
    assert acquired(tmp_path) == 8
    (tmp_path / "lease.json").unlink()
    assert acquired(tmp_path) == 8, "above the number of the newest driver in the journal"


def test_a_folder_in_place_of_a_lease_is_named(tmp_path: Path, soon: None) -> None:
    (tmp_path / "lease.json").mkdir()
    assert lease.is_current(tmp_path, 1)
    with fails(ResourceError, "lease.json", subject=tmp_path):
        Lease(tmp_path).acquire()


def test_a_holder_writes_a_damaged_lease_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    mine = Lease(tmp_path).acquire()
    (tmp_path / "lease.json").write_text("{")
    deadline = time.monotonic() + 10
    while not lease.read(tmp_path / "lease.json") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lease.read(tmp_path / "lease.json")["fence"] == mine.fence
    mine.release()


def test_a_lease_contains_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["adaptnet", "train", "x", "tracking.uri=postgresql://me:hidden@db/runs"])
    Lease(tmp_path).acquire().release()
    assert "hidden" not in (tmp_path / "lease.json").read_text()


def test_a_full_disk_does_not_keep_a_driver_from_ending(tmp_path: Path) -> None:
    mine = Lease(tmp_path).acquire()
    with full_disk(0):
        mine.release()
    assert not lease.read(tmp_path / "lease.json")["released"]


def test_only_the_lease_of_another_process_is_of_another(tmp_path: Path) -> None:
    assert not lease.is_of_another(tmp_path)
    mine = Lease(tmp_path).acquire()
    assert not lease.is_of_another(tmp_path) and lease.read(tmp_path / "lease.json")["pid"] == os.getpid()
    mine.release()
    write(tmp_path, pid=1)
    assert lease.is_of_another(tmp_path) and lease.is_live(tmp_path)
    os.utime(tmp_path / "lease.json", (0, 0))
    assert not lease.is_live(tmp_path)
