"""Tests of the lease: one driver at a time, each with a higher number, and a dead driver does not block the next."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disks import full_disk
from raised import fails

from pipeline.errors import ResourceError
from pipeline.runs import lease
from pipeline.runs.lease import Lease


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


def test_the_lease_of_a_killed_driver_on_this_host_is_free_at_once(tmp_path: Path) -> None:
    code = "import time, pathlib; from pipeline.runs.lease import Lease; "
    code += f"Lease(pathlib.Path({str(tmp_path)!r})).acquire(); "
    process = subprocess.Popen([sys.executable, "-c", code + "print('held', flush=True); time.sleep(60)"], stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with fails(ResourceError, "lease.json", subject=tmp_path):
        Lease(tmp_path).acquire()
    process.kill()
    process.wait()
    mine = Lease(tmp_path).acquire()
    assert mine.fence == 2
    mine.release()


def test_the_lease_of_a_silent_driver_on_another_host_is_free_after_a_minute(tmp_path: Path) -> None:
    entry = {"fence": 4, "host": "elsewhere", "pid": 1, "started": 0, "command": "adaptnet train x", "released": False}
    for silent, refused in ((30.0, True), (61.0, False)):
        (tmp_path / "lease.json").write_text(json.dumps({**entry, "heartbeat": time.time() - silent}))
        if refused:
            with fails(ResourceError, "lease.json", subject=tmp_path):
                Lease(tmp_path).acquire()
        else:
            mine = Lease(tmp_path).acquire()
            assert mine.fence == 5
            mine.release()


def test_a_lease_contains_no_secret_and_a_damaged_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["adaptnet", "train", "x", "tracking.uri=postgresql://me:hidden@db/runs"])
    mine = Lease(tmp_path).acquire()
    assert "hidden" not in (tmp_path / "lease.json").read_text()
    mine.release()
    (tmp_path / "lease.json").write_text("")
    with fails(ResourceError, "lease.json", subject=tmp_path / "lease.json"):
        Lease(tmp_path).acquire()


def test_a_full_disk_does_not_keep_a_driver_from_ending(tmp_path: Path) -> None:
    mine = Lease(tmp_path).acquire()
    with full_disk(0):
        mine.release()
    assert not lease.read(tmp_path / "lease.json")["released"]
