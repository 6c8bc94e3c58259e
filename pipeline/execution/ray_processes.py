"""Ray's own processes on this machine: which of those that serve this driver is stopped."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

from pipeline.execution.hang_report import clock

NAMES = ("raylet", "gcs_server")


def of_driver(address: str | None) -> Iterator[psutil.Process]:
    """The raylet and the GCS of a cluster: children of this process, or those of the head at `address`."""
    if address is None:
        with suppress(psutil.Error):
            yield from (each for each in psutil.Process().children(recursive=True) if _name(each) in NAMES)
        return
    port = address.rpartition(":")[2]
    for process in psutil.process_iter(["name", "uids"]):
        if process.info["name"] in NAMES and process.info["uids"] and process.info["uids"].real == os.getuid():
            with suppress(psutil.Error):
                if port in " ".join(process.cmdline()):
                    yield process


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


class RayState:
    """Looks at Ray's processes every now and then, and remembers since when one is stopped."""

    def __init__(self, address: str | None, hang_after_s: float) -> None:
        self._address, self._hang_after_s = address, hang_after_s
        self._since: dict[int, float] = {}
        self._looked = 0.0
        self._found: str | None = None

    def stopped(self) -> str | None:
        """Which process has been stopped for too long; None if none has."""
        now = time.monotonic()
        if now - self._looked >= max(1.0, min(10.0, self._hang_after_s / 5)):
            self._looked = now
            self._found = self._look(now)
        return self._found

    def _look(self, now: float) -> str | None:
        for process in of_driver(self._address):
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_STOPPED:
                    self._since.pop(process.pid, None)
                    continue
                since = self._since.setdefault(process.pid, now)
                if now - since >= self._hang_after_s:
                    place = f"process {process.pid} on {socket.gethostname()}"
                    return f"Ray's {process.name()} ({place}) is stopped (state T) since {clock(now - since)}"
        return None

    def kill(self) -> None:
        """Kills Ray's processes on this machine: they belong to nobody else if the cluster was started here."""
        for process in of_driver(self._address):
            with suppress(psutil.Error):
                process.kill()
