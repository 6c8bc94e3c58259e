"""Laws of the lease: one driver at a time, the next one with a higher number, a dead one is no obstacle."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import ResourceError
from pipeline.runs import lease
from pipeline.runs.lease import Lease


def test_a_second_driver_is_refused_with_the_holder_named_and_later_gets_a_higher_fence(tmp_path: Path) -> None:
    first = Lease(tmp_path).acquire()
    with pytest.raises(ResourceError, match=rf"on {socket.gethostname()}"):
        Lease(tmp_path).acquire()
    first.release()
    second = Lease(tmp_path).acquire()
    assert second.fence == first.fence + 1
    assert not lease.is_current(tmp_path, first.fence)
    second.release()


def test_a_killed_driver_on_this_host_is_succeeded_at_once(tmp_path: Path) -> None:
    code = "import time, pathlib; from pipeline.runs.lease import Lease; "
    code += f"Lease(pathlib.Path({str(tmp_path)!r})).acquire(); "
    process = subprocess.Popen([sys.executable, "-c", code + "print('held', flush=True); time.sleep(60)"], stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ResourceError, match=f"process {process.pid}"):
        Lease(tmp_path).acquire()
    process.kill()
    process.wait()
    mine = Lease(tmp_path).acquire()
    assert mine.fence == 2
    mine.release()


def test_a_silent_holder_on_another_host_is_succeeded_after_a_minute(tmp_path: Path) -> None:
    entry = {"fence": 4, "host": "elsewhere", "pid": 1, "started": 0, "command": "adaptnet train x", "released": False}
    for silent, refused in ((30.0, True), (61.0, False)):
        (tmp_path / "lease.json").write_text(json.dumps({**entry, "heartbeat": time.time() - silent}))
        if refused:
            with pytest.raises(ResourceError, match="adaptnet train x"):
                Lease(tmp_path).acquire()
        else:
            mine = Lease(tmp_path).acquire()
            assert mine.fence == 5
            mine.release()


def test_a_lease_holds_no_secret_and_a_torn_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["adaptnet", "train", "x", "tracking.uri=postgresql://me:hidden@db/runs"])
    mine = Lease(tmp_path).acquire()
    assert "hidden" not in (tmp_path / "lease.json").read_text()
    mine.release()
    (tmp_path / "lease.json").write_text("")
    with pytest.raises(ResourceError, match="damaged; if no driver trains"):
        Lease(tmp_path).acquire()


def test_a_folder_that_takes_nothing_more_does_not_break_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    mine = Lease(tmp_path).acquire()
    monkeypatch.setattr(lease, "write_text", full)
    mine.release()
    assert not lease.read(tmp_path / "lease.json")["released"]
