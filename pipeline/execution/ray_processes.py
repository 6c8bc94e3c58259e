"""Ray's own processes on this machine: which of those that serve this driver has died or is stopped."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Collection
from contextlib import suppress

import psutil

from pipeline.execution.hang_report import clock

NAMES = ("raylet", "gcs_server")
STARTS_STOPPED_S = 30.0  # how long one may be stopped before the ranks start: after 60 s Ray ends the driver
SESSION = re.compile(r"/session_[^/ ]+")


def of_driver(gcs: str | None) -> list[psutil.Process]:
    """The raylet and the GCS that serve this process: its own children, or this machine's of the cluster at `gcs`.

    A worker that a raylet has just forked is left out: until it runs its own program it looks like the raylet.
    """
    found = _by_name(gcs)
    pids = {each.pid for each in found}
    return [each for each in found if _parent(each) not in pids]


def _by_name(gcs: str | None) -> list[psutil.Process]:
    if gcs is None:
        with suppress(psutil.Error):
            return [each for each in psutil.Process().children() if _name(each) in NAMES]
        return []
    ours = [each for each in psutil.process_iter(["name", "cmdline"]) if each.info["name"] in NAMES]
    words = {each: " ".join(each.info["cmdline"] or ()) for each in ours}
    raylets = [line for line in words.values() if f"--gcs-address={gcs} " in f"{line} "]
    sessions = {session[0] for line in raylets if (session := SESSION.search(line))}
    return [each for each, line in words.items() if (found := SESSION.search(line)) and found[0] in sessions]


def _parent(process: psutil.Process) -> int:
    """The id of the parent; 0 of a process that has ended."""
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


class RayState:
    """Looks at Ray's processes every now and then, and remembers since when one is stopped.

    hang_after_s: how long one may be stopped. others: ids of processes that are of no concern.
    """

    def __init__(self, gcs: str | None, hang_after_s: float, others: Collection[int] = ()) -> None:
        self.hang_after_s = hang_after_s
        self._gcs, self._others = gcs, frozenset(others)
        self._since: dict[int, float] = {}  # when a process was first seen stopped
        self._names: dict[int, str] = {}  # of the processes that were seen
        self._looked = 0.0
        self.died = False  # whether the process was killed, not stopped: Ray soon ends this process as well
        self._found: str | None = None

    def frozen(self, *, at_once: bool = False) -> str | None:
        """Which process has died, or has been stopped for too long; None if all run.

        at_once: looks now, although it has just looked.
        """
        now = time.monotonic()
        if at_once or now - self._looked >= max(1.0, min(10.0, self.hang_after_s / 5)):
            self._looked = now
            self._found = self._look(now)
        return self._found

    def living(self) -> list[psutil.Process]:
        """The processes that are looked at."""
        return [each for each in of_driver(self._gcs) if each.pid not in self._others]

    def _look(self, now: float) -> str | None:
        states: dict[int, str] = {}
        for process in self.living():
            with suppress(psutil.Error):
                self._names[process.pid], states[process.pid] = process.name(), process.status()
        for pid, name in self._names.items():
            what = f"Ray's {name} (process {pid} on {socket.gethostname()})"
            if pid not in states and psutil.pid_exists(pid):  # the look was disturbed
                continue
            if states.get(pid, psutil.STATUS_ZOMBIE) == psutil.STATUS_ZOMBIE:
                self.died = True
                return f"{what} has died"
            since = self._since.setdefault(pid, now)
            if states[pid] != psutil.STATUS_STOPPED:
                del self._since[pid]
            elif now - since >= self.hang_after_s:
                return f"{what} is stopped (state T) since {clock(now - since)}"
        return None
