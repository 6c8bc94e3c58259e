"""`with watched(...)`: gives this process a guardian, and the signs of progress that the guardian reads."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

from pipeline.execution.guardian import SIGNAL, GuardianOrder
from pipeline.installation import CODE, module
from pipeline.runs import beats
from pipeline.runs.beats import Beats

PROGRAM = (
    f"import sys; sys.path.insert(0, sys.argv[1]); from {module('pipeline.execution.guardian')} import main; main()"
)


@dataclass(frozen=True)
class WatchAddress:
    """Where the driver's watch listens, and the token that it asks for."""

    host: str
    port: int
    token: str


@contextmanager
def watched(address: WatchAddress, rank: int | None, hang_after_s: float) -> Iterator[Beats]:
    """A guardian of this process until the end of the block; rank: None for the driver.

    Yields the beats to write to. Where there is no /proc, nothing is watched and nobody reads the beats.
    """
    if sys.platform != "linux":
        yield Beats()
        return
    memory = os.memfd_create("adaptnet-beats")
    os.truncate(memory, beats.BYTES)
    mine = beats.shared(memory)
    mine.enter("starting", beats.LONG)
    guardian = _start(address, memory, rank, hang_after_s)
    os.close(memory)
    try:
        yield mine
    finally:
        _release(guardian)


def _start(address: WatchAddress, memory: int, rank: int | None, hang_after_s: float) -> subprocess.Popen[bytes]:
    dump = _dump_file(of_rank=rank is not None)
    order: GuardianOrder = {
        "pid": os.getpid(),
        "beats": memory,
        "dump": dump,
        "dump_from": os.fstat(dump).st_size,
        "address": (address.host, address.port),
        "token": address.token,
        "hang_after_s": hang_after_s,
        "hello": {"rank": rank, "node": socket.gethostname(), "thread": threading.get_ident()},
    }
    guardian = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM, str(CODE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if rank is None else subprocess.DEVNULL,
        pass_fds=(memory, dump),
        start_new_session=True,
    )
    assert guardian.stdin is not None and guardian.stdout is not None
    guardian.stdin.write(json.dumps(order).encode() + b"\n")
    guardian.stdin.flush()
    with guardian.stdout as ready:
        ready.readline()  # from now on it sees how this process ends
    return guardian


@cache
def _dump_file(*, of_rank: bool) -> int:
    """The file in memory to which faulthandler writes this process's Python lines, one for all guardians."""
    file = os.memfd_create("adaptnet-stacks")
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)
    if of_rank:
        faulthandler.enable(file=file)
    return file


def _release(guardian: subprocess.Popen[bytes]) -> None:
    assert guardian.stdin is not None
    with suppress(OSError):  # it has ended
        guardian.stdin.write(b"bye\n")
        guardian.stdin.flush()
        guardian.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        guardian.wait(5)
