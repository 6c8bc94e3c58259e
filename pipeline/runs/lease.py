"""The lease on a run folder: one driver at a time, each with a higher fencing number than its predecessor.

A driver changes the lease at each heartbeat. A second driver is refused while the holder is alive, and takes over at
once if the holder was a process of this PID namespace that no longer exists. Of any other holder it only knows the
heartbeat: it watches the lease by its own monotonic clock, is refused when the lease changes, and takes over after
SILENT_S without a change. Clocks are never compared. Workers check the number before they write.
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
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias, TypedDict

from pipeline.errors import ResourceError, without_secrets
from pipeline.runs import journal
from pipeline.runs.files import write_text

SILENT_S = 60.0  # the lease may be taken over after this long without a heartbeat
BEAT_S = 10.0  # interval between heartbeats
POLL_S = 0.5  # interval between two looks at the lease of a holder that may be dead
FILE = "lease.json"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Verdict: TypeAlias = Literal["free", "held", "unknown"]


class LeaseEntry(TypedDict, total=False):
    """The content of lease.json: who holds the lease. Entries of older versions lack `boot` to `beat`."""

    fence: int
    host: str
    pid: int
    command: str
    heartbeat: float  # in seconds since 1970, for people
    released: bool
    boot: str | None  # id of the holder's kernel since it started; None if it is unknown
    pid_namespace: str | None  # that of `pid`
    ticks: int | None  # start of the process, in clock ticks since the kernel started
    beat: int  # heartbeats so far


class Lease:
    """A lease that is held from `acquire` to `release`; a thread writes the heartbeat. `fence` is its number."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._beats = 0
        self.fence = 0

    def acquire(self, *, watch: Watch | None = None, waiting: Callable[[str], None] | None = None) -> Lease:
        """Takes the lease; waits up to SILENT_S for the heartbeat of a holder that may be dead.

        watch: one that was begun earlier, so that its time counts. waiting: called with a sentence before a wait.
        Raises ResourceError naming the holder if another driver has the lease.
        """
        watch = watch or Watch(self._path)
        while not self._taken(watch):
            if waiting is not None:
                waiting(f"waiting until the lease of {_described(read(self._path))} expires or its heartbeat is seen")
                waiting = None
            time.sleep(POLL_S)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def _taken(self, watch: Watch) -> bool:
        """Whether this call has taken the lease. Raises ResourceError if another driver has it."""
        try:
            with _locked(self._path):
                verdict = watch.verdict()
                if verdict == "held":
                    raise self._refused(read(self._path))
                if verdict == "free":
                    self.fence = _newest_fence(self._path.parent) + 1
                    self._write(released=False)
                return verdict == "free"
        except OSError as error:
            raise ResourceError(
                f"{self._path}: the lease cannot be written ({error.strerror}); remove what is there, or free space",
                key=FILE,
                subject=self._path.parent,
            ) from None

    def _refused(self, held: LeaseEntry) -> ResourceError:
        return ResourceError(
            f"{self._path.parent}: another driver is training here: {_described(held)}. Wait for it, stop it, or use "
            f"another run folder; {SILENT_S:.0f} s after its last heartbeat the same command takes over",
            key=FILE,
            subject=self._path.parent,
        )

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
        self._beats += 1
        boot, namespace = _kernel(), _pid_namespace()
        entry: LeaseEntry = {
            "fence": self.fence,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "command": without_secrets(" ".join(sys.argv))[:300],
            "heartbeat": time.time(),
            "released": released,
            "boot": boot,
            "pid_namespace": namespace,
            "ticks": _start_ticks(os.getpid()) if namespace else None,
            "beat": self._beats,
        }
        write_text(self._path, json.dumps(entry))


class Watch:
    """Judges, look by look, whether a lease is held: by whether it changes, on this process' monotonic clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: bytes | None = None
        self._since = 0.0
        self._changed = False

    def verdict(self) -> Verdict:
        """ "free", "held", or "unknown" until the lease changes or SILENT_S have passed without a change."""
        _refresh(self.path.parent)
        content = _content(self.path)
        verdict = _at_a_glance(content)
        if verdict != "unknown":
            return verdict
        if content != self._last:
            self._changed = self._last is not None
            self._last, self._since = content, time.monotonic()
        if time.monotonic() - self._since >= SILENT_S:
            return "free"
        return "held" if self._changed else "unknown"

    def expire(self) -> bool:
        """Whether the lease is free; if it is by its silence, it is ended, so that its next driver need not watch it.

        Raises ResourceError if it cannot be written.
        """
        if self.verdict() != "free":
            return False
        if _at_a_glance(_content(self.path)) == "unknown":
            Lease(self.path.parent).acquire(watch=self).release()
        return True


def read(path: Path) -> LeaseEntry:
    """The entry of a lease file; empty if there is no file or it is damaged, until its holder's next heartbeat."""
    return _parsed(_content(path)) or {}


def is_current(run_dir: Path, fence: int) -> bool:
    """Whether no driver with a higher fencing number has taken the lease."""
    return read(run_dir / FILE).get("fence", 0) <= fence


def is_of_another(run_dir: Path) -> bool:
    """Whether another process holds, or held when it died, the folder's lease."""
    held = read(run_dir / FILE)
    mine = held.get("pid") == os.getpid() and held.get("ticks") in (None, _start_ticks(os.getpid()))
    return bool(held) and not held.get("released") and not mine


def command_of(run_dir: Path) -> str:
    """The command of the driver that has or had the folder's lease."""
    return str(read(run_dir / FILE).get("command", "an unknown command"))


def is_live(run_dir: Path) -> bool:
    """Whether a driver seems to train in the folder, to be shown. It does not wait; nothing is taken over by it.

    The heartbeat of a process that cannot be seen from here counts for SILENT_S by the clock of the file system.
    """
    path = run_dir / FILE
    verdict = _at_a_glance(_content(path))
    return verdict == "held" or (verdict == "unknown" and _age_s(path) < SILENT_S)


def _at_a_glance(content: bytes | None) -> Verdict:
    """Whether a lease with this content is held; "unknown" if one read cannot decide it."""
    held = _parsed(content)
    if content is None or (held is not None and held.get("released")):
        return "free"
    boot, namespace = _kernel(), _pid_namespace()
    if held is None or boot is None or namespace is None:
        return "unknown"
    if (held.get("boot"), held.get("pid_namespace")) != (boot, namespace):
        return "unknown"
    return _process(held.get("pid"), held.get("ticks"))


def _process(pid: object, ticks: object) -> Verdict:
    """ "held" if the process that started at `ticks` exists in this PID namespace, "free" if it does not."""
    if not isinstance(pid, int) or not isinstance(ticks, int) or pid <= 0:
        return "unknown"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "free"
    except (OSError, OverflowError):  # another user's
        pass
    started = _start_ticks(pid)
    if started is None:  # /proc hides other users' processes
        return "unknown"
    return "held" if started == ticks else "free"


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the kernel started; -1 if only its entry is left, None if unseen."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
        return -1 if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


@cache
def _kernel() -> str | None:
    try:
        return BOOT_ID.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def _pid_namespace() -> str | None:
    """The PID namespace of this process; None if /proc is that of another one."""
    try:
        own = os.readlink("/proc/self") == str(os.getpid())
        return os.readlink("/proc/self/ns/pid") if own else None
    except OSError:
        return None


def _content(path: Path) -> bytes | None:
    """The bytes of a lease file; None if there is no file, empty if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _parsed(content: bytes | None) -> LeaseEntry | None:
    """The entry; None if there is none or it is damaged."""
    try:
        entry = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    fence = entry.get("fence") if isinstance(entry, dict) else None
    held: LeaseEntry | None = entry if isinstance(fence, int) and not isinstance(fence, bool) else None
    return held


def _newest_fence(run_dir: Path) -> int:
    """The highest fencing number so far; by the ends of the journals if the lease is missing or damaged."""
    held = read(run_dir / FILE)
    if held:
        return held["fence"]
    records = (record for path in journal.paths(run_dir / "journal") for record in journal.last_records(path))
    return max((record["fence"] for record in records if isinstance(record.get("fence"), int)), default=0)


def _described(held: LeaseEntry) -> str:
    who = f"process {held.get('pid', '?')} on {held.get('host', 'an unknown host')}"
    return f"{held.get('command', 'an unknown command')} ({who})"


def _refresh(folder: Path) -> None:
    """Changes the folder, so that a network file system does not answer the next look from its cache."""
    probe = folder / f".look-{uuid.uuid4().hex[:8]}"
    with suppress(OSError):
        probe.touch()
        probe.unlink()


def _age_s(path: Path) -> float:
    """Seconds since a file was written, by its file system's clock where the folder is writable, else by ours."""
    probe, now = path.with_name(f".look-{uuid.uuid4().hex[:8]}"), time.time()
    with suppress(OSError):
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    try:
        return now - path.stat().st_mtime
    except OSError:
        return SILENT_S


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path.with_suffix(".lock"), "a") as lock:
        with suppress(OSError):  # a file system without locks: the entry itself must suffice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
