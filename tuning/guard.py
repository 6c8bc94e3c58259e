"""The Ray cluster of a sweep: joined while it trains, watched so that a lost head ends the sweep with a message."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ResourceError
from pipeline.execution import cluster, sockets
from pipeline.run_config import ComputeConfig
from tuning import slots
from tuning.watcher import Watcher

GONE_S = 10.0  # silence after which a sweep abandons its cluster
STUCK_S = 45.0  # silence after which the process exits; Ray itself kills it after 60 s
GONE = (
    "the Ray cluster is gone: its head does not answer, or it has no node left. Give the same command once there is "
    "one again (without compute.address it starts its own): finished trials stay, the others resume from their "
    "checkpoints"
)


@contextmanager
def joined(compute: ComputeConfig, watcher: Watcher, messages: Path) -> Iterator[None]:
    """Joins the cluster on which the trials train; does nothing for trials that train in this process.

    messages: the file for what Ray's C++ code would print.

    If the head is lost while a call into Ray waits for it, the process exits with a message and status 2: otherwise Ray
    kills it silently after 60 s.
    """
    if compute.workers == 0:
        yield
        return
    over = threading.Event()
    try:
        with cluster.cluster(compute, messages):
            arguments = (slots.head(), over, watcher)
            threading.Thread(target=_exit_without_head, args=arguments, name="guard", daemon=True).start()
            yield
            over.set()  # Ray does not answer while it shuts down
    finally:
        over.set()


def _exit_without_head(head: str, over: threading.Event, watcher: Watcher) -> None:
    heard = time.monotonic()
    while not over.wait(1.0):
        if sockets.listens(head):
            heard = time.monotonic()
        elif time.monotonic() - heard >= STUCK_S:
            try:
                watcher.say(GONE)
                watcher.close()
            finally:
                os._exit(2)


class ClusterWatch:
    """Checks at each poll that the cluster still answers. Trials that train in this process need none."""

    def __init__(self, compute: ComputeConfig) -> None:
        self._needed = compute.workers != 0
        self._heard = time.monotonic()

    def check(self, patience_s: float = GONE_S) -> None:
        """Raises ResourceError if the cluster has not answered for that long."""
        if not self._needed:
            return
        if slots.alive():
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard >= patience_s:
            raise ResourceError(GONE, key="compute.address")
