"""The lease on a run folder: one driver at a time, each with a higher fencing number than its predecessor.

A second driver is refused while the holder is alive. It may take over after SILENT_S without a heartbeat, or at once if
the holder was a process on this host that no longer exists. Workers check the number before they write.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

import psutil

from pipeline.errors import ResourceError
from pipeline.runs.files import write_text
from pipeline.runs.provenance import without_secrets

SILENT_S = 60.0  # the lease may be taken over after this long without a heartbeat
BEAT_S = 10.0  # interval between heartbeats


class LeaseEntry(TypedDict, total=False):
    """The content of lease.json: who holds the lease, and the time of the last heartbeat."""

    fence: int
    host: str
    pid: int
    started: float  # start of the process, in seconds since 1970
    command: str
    heartbeat: float  # in seconds since 1970
    released: bool


class Lease:
    """A lease that is held from `acquire` to `release`; a thread writes the heartbeat. `fence` is its number."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "lease.json"
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.fence = 0

    def acquire(self) -> Lease:
        """Takes the lease. Raises ResourceError naming the holder if another driver has it."""
        with _locked(self._path):
            held = read(self._path)
            if _refuses(held):
                raise ResourceError(
                    f"{self._path.parent}: another driver is training here: {held['command']} (process {held['pid']} "
                    f"on {held['host']}, last heartbeat {time.time() - held['heartbeat']:.0f} s ago). Wait for it, "
                    f"stop it, or use another run folder; {SILENT_S:.0f} s after its last heartbeat you may take over",
                    key="lease.json",
                    subject=self._path.parent,
                )
            self.fence = held.get("fence", 0) + 1
            self._write(released=False)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Releases the lease, so that another driver may take it at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError), _locked(self._path):  # on a full disk the lease ends by itself, after SILENT_S
            if is_current(self._path.parent, self.fence):
                self._write(released=True)

    def withdraw(self) -> None:
        """Ends the lease and removes the run folder, for a run that was refused before it wrote anything."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with _locked(self._path):
            if is_current(self._path.parent, self.fence):
                shutil.rmtree(self._path.parent, ignore_errors=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError), _locked(self._path):  # a full disk may have space again at the next heartbeat
                if not is_current(self._path.parent, self.fence):
                    return
                self._write(released=False)

    def _write(self, *, released: bool) -> None:
        process = psutil.Process()
        entry: LeaseEntry = {
            "fence": self.fence,
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "command": without_secrets(" ".join(sys.argv))[:300],
            "heartbeat": time.time(),
            "released": released,
        }
        write_text(self._path, json.dumps(entry))


def read(path: Path) -> LeaseEntry:
    """The entry of a lease file; empty if there is no file. Raises ResourceError for a damaged file."""
    try:
        entry: LeaseEntry = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ResourceError(
            f"{path}: damaged; if no driver is training in this folder, delete the file", key="lease.json", subject=path
        ) from None
    return entry


def is_current(run_dir: Path, fence: int) -> bool:
    """Whether no driver with a higher fencing number has taken the lease."""
    held: int = read(run_dir / "lease.json").get("fence", 0)
    return held <= fence


def refuses(path: Path) -> bool:
    """Whether the entry in a lease file would refuse another driver now."""
    return _refuses(read(path))


def held_elsewhere(run_dir: Path) -> str | None:
    """The command of another live process with the folder's lease; None if there is none."""
    held = read(run_dir / "lease.json")
    mine = held.get("host") == socket.gethostname() and held.get("pid") == os.getpid()
    return str(held["command"]) if _refuses(held) and not mine else None


def _refuses(held: LeaseEntry) -> bool:
    return bool(held) and not held.get("released") and _is_running(held)


def _is_running(held: LeaseEntry) -> bool:
    if held["host"] != socket.gethostname():
        return time.time() - float(held["heartbeat"]) < SILENT_S
    try:
        started = psutil.Process(held["pid"]).create_time()
    except psutil.Error:
        return False
    return abs(started - float(held["started"])) < 2


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path.with_suffix(".lock"), "a") as lock:
        with suppress(OSError):  # a file system without locks: the entry itself must suffice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
