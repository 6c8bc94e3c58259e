"""The guardian of a process: a small process beside a rank or the driver that answers when that one cannot.

It runs as a process of its own from the standard library alone, so it starts in milliseconds. About once a second it
reads the process's signs of progress (`runs.beats`) and its state from /proc, and sends both to the driver's watch. On
request it has faulthandler write the Python line of every thread, by a signal whose handler needs no Python to run,
and it kills the process. When the process has died it says how. It never uses ptrace.

A rank's guardian kills the rank if the driver is gone. The driver's guardian kills what the driver had started.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TypedDict

from pipeline.runs.beats import Beats, shared

SIGNAL = signal.SIGRTMIN + 7  # the handler of faulthandler; nothing else in a training uses it
EXITED, OUT_OF_MEMORY = "ended with exit code ", "killed because the machine or its job ran out of memory"
OWN_CODES = ("0", "2")  # with which a driver ends at once, having said why
GRACE_S = 3.0  # how long processes may take to end by themselves after the driver has died
STEPS_PER_LIMIT = 20  # a limit is at least as long as so many median steps
BUSY = 0.5  # a process computes if it is seen running at this share of the looks
DUMP_WITHIN_S = 3.0
ASK_EVERY_S = 0.6  # how long a thread may take before the next one is asked for the lines
PIDFD_GET_INFO, PIDFD_INFO_EXIT = 0xC040FF0B, 1 << 3  # Linux 6.15: how a process ended, for others than its parent
STOPPED = "Tt"  # states in which a process cannot run a signal handler
STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in an uninterruptible wait, as for a disk or a file server",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "dead",
}


class GuardianOrder(TypedDict):
    """What `execution.watched` asks of a guardian.

    beats, dump: numbers of open files; dump_from: the size of the latter. address: HOST and port of the watch.
    hello: the first message; its rank is None for the driver.
    """

    pid: int
    beats: int
    dump: int
    dump_from: int
    address: tuple[str, int]
    token: str
    hang_after_s: float
    hello: dict[str, str | int | None]


class Target:
    """The watched process, as /proc shows it."""

    def __init__(self, pid: int) -> None:
        self.pid, self._proc = pid, Path(f"/proc/{pid}")
        self._born = self._stat()[19]
        self._ooms = _oom_kills()
        self._last_rss = 0
        self._pidfd = -1
        with suppress(OSError, AttributeError):  # Linux before 5.3
            self._pidfd = os.pidfd_open(pid)

    def _stat(self) -> list[str]:
        """The fields of /proc/PID/stat from the state on."""
        return (self._proc / "stat").read_text().rpartition(")")[2].split()

    def state(self) -> str:
        """The letter of the process's state; "X" once it is gone."""
        try:
            fields = self._stat()
            self._last_rss = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") or self._last_rss
        except (OSError, ValueError, IndexError):
            return "X"
        return fields[0] if fields[19] == self._born else "X"

    def threads(self) -> list[dict[str, str]]:
        """Of each thread its name, its state, and the place in the kernel where it waits."""
        found = []
        for task in sorted((self._proc / "task").glob("*"), key=lambda path: int(path.name)):
            with suppress(OSError):
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                waits = _text(task / "wchan")
                found.append({"tid": task.name, "name": _text(task / "comm"), "state": state, "waits": waits})
        return found

    def kill(self) -> None:
        """SIGKILL, unless another process has the number by now."""
        if self.state() != "X":
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

    def for_signals(self) -> list[int]:
        """The threads that may run SIGNAL's handler, the main thread first."""
        awake = [int(each["tid"]) for each in self.threads() if each["state"] not in "DZX"]
        awake = [tid for tid in awake if not self._blocks_signal(tid)]
        return sorted(awake or [self.pid], key=lambda tid: tid != self.pid)

    def _blocks_signal(self, tid: int) -> bool:
        blocked = _text(self._proc / "task" / str(tid) / "status").partition("SigBlk:")[2].split()
        return bool(blocked) and bool(int(blocked[0], 16) >> (SIGNAL - 1) & 1)

    def signal_thread(self, tid: int) -> None:
        """Sends SIGNAL to one thread."""
        ctypes.CDLL(None).tgkill(self.pid, tid, int(SIGNAL))

    def ended_by(self) -> str:
        """How the process died, as far as the kernel says: "killed by signal 9 (SIGKILL)"."""
        status, rss = self._wait_status(), f"its memory was {self._last_rss / 2**30:.1f} GiB"
        if _oom_kills() > self._ooms and status in (None, signal.SIGKILL):
            return f"{OUT_OF_MEMORY}; {rss}"
        if status is None:
            return f"ended without an error of its own, as one that was killed (signal 9, SIGKILL); {rss}"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return f"killed by signal {number} ({signal.Signals(number).name})"
        return f"{EXITED}{os.WEXITSTATUS(status)}"

    def _wait_status(self) -> int | None:
        """The status as of wait(2); None where the kernel does not tell it to others than the parent."""
        deadline = time.monotonic() + 0.5
        while self._pidfd >= 0 and time.monotonic() < deadline:
            info = bytearray(struct.pack("=Q56x", PIDFD_INFO_EXIT))
            with suppress(OSError):
                fcntl.ioctl(self._pidfd, PIDFD_GET_INFO, info)
                if struct.unpack_from("=Q", info)[0] & PIDFD_INFO_EXIT:
                    return int(struct.unpack_from("=i", info, 60)[0])
            time.sleep(0.02)
        return self._zombie_status()

    def _zombie_status(self) -> int | None:
        """The same from /proc, until the parent has asked for it."""
        try:
            fields = self._stat()
        except OSError:
            return None
        return int(fields[49]) if fields[0] == "Z" and fields[19] == self._born else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return ""


def _oom_kills() -> int:
    """How many processes of this machine were killed for want of memory since it started."""
    words = _text(Path("/proc/vmstat")).split()
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


class Work:
    """Whether a process or one below it computes: whether a thread of theirs runs, or would if it had a core."""

    def __init__(self, pid: int, within_s: float) -> None:
        self._pid, self._within_s = pid, within_s
        self._seen: deque[tuple[float, bool]] = deque()  # (time, whether a thread ran), of the last `within_s` seconds

    def forget(self) -> None:
        self._seen.clear()

    def busy(self) -> bool:
        """Whether a thread ran at BUSY of the looks of the last `within_s` seconds; True of a first look."""
        now = time.monotonic()
        first = not self._seen
        self._seen.append((now, first or any(map(_runs, (self._pid, *descendants(self._pid))))))
        while now - self._seen[0][0] > self._within_s:
            self._seen.popleft()
        return sum(ran for _, ran in self._seen) >= BUSY * len(self._seen)


class Pace:
    """When the signs of progress last changed, and how long a step takes."""

    def __init__(self, beats: Beats, hang_after_s: float, work: Work) -> None:
        self._beats, self._hang_after_s, self._work = beats, hang_after_s, work
        self._seen = Beats.from_buffer_copy(beats)
        self._moved = time.monotonic()
        self._stepped: float | None = None  # when the step last changed, once it has
        self._steps: deque[float] = deque(maxlen=101)  # how long the last ones took
        self._signs: deque[float] = deque(maxlen=101)  # the same for the other signs of this phase

    def look(self) -> dict[str, object]:
        """Reads the beats: step, phase, age_s since the last change, limit_s of the phase, step_s of a median step.

        busy: whether the process computes; looked at in a long phase that may soon be one too long.
        """
        beats, now = Beats.from_buffer_copy(self._beats), time.monotonic()
        self._time(beats, now)
        if bytes(beats) != bytes(self._seen):
            self._seen, self._moved = beats, now
        step_s = max(median(self._steps or [0.0]), median(self._signs or [0.0]))
        short_limit_s = max(self._hang_after_s, STEPS_PER_LIMIT * step_s)
        busy = False
        if 1 < beats.patience < float("inf") and now - self._moved >= short_limit_s / 2:
            busy = self._work.busy()
        else:
            self._work.forget()
        return {
            "step": beats.step,
            "phase": beats.phase.decode(errors="replace"),
            "limit_s": short_limit_s * beats.patience,
            "patience": beats.patience,
            "step_s": step_s,
            "busy": busy,
            "age_s": time.monotonic() - self._moved,
        }

    def _time(self, beats: Beats, now: float) -> None:
        """Notes how long a step took, or another sign within one phase; the length of a phase says nothing of it."""
        before, steps = self._seen, beats.step - self._seen.step
        if beats.phase != before.phase:
            self._signs.clear()
        if steps > 0:
            if self._stepped is not None or steps == 1:  # else the run was resumed at this step
                self._steps.append((now - (self._stepped or self._moved)) / steps)
            self._stepped = now
        elif beats.phase == before.phase and beats.count > before.count:
            self._signs.append((now - self._moved) / (beats.count - before.count))


class Guardian:
    """The loop of the process."""

    def __init__(self, order: GuardianOrder) -> None:
        self._order = order
        self._target = Target(order["pid"])
        work = Work(order["pid"], order["hang_after_s"] / 2)
        self._pace = Pace(shared(order["beats"]), order["hang_after_s"], work)
        self._poll_s = min(1.0, order["hang_after_s"] / 10)
        self._socket: socket.socket | None = None
        self._buffer = b""
        self._stopped_at: float | None = None
        self._told = False
        self._children: dict[int, str] = {}

    def run(self) -> None:
        """Returns when the process has ended or needs no guardian any more."""
        self._connect()
        while True:
            if self._released():
                return
            state = self._target.state()
            if state in "XZ":
                self._after_death()
                return
            self._note_stop(state)
            self._send({**self._pace.look(), "state": state, "stopped_s": self._stopped_s()})
            if self._is_driver:
                self._children.update(descendants(self._target.pid))
            elif self._socket is None:
                self._after_driver()
                return
            self._obey()

    @property
    def _is_driver(self) -> bool:
        return bool(self._order["hello"]["rank"] is None)

    # --- the process

    def _released(self) -> bool:
        """Waits for one poll; whether the process has said that it needs no guardian any more."""
        heard = [0] if self._socket is None else [0, self._socket.fileno()]
        ready, _, _ = select.select(heard, [], [], self._poll_s)
        if 0 not in ready:
            return False
        said = os.read(0, 16)
        if not said:  # its end of the pipe is closed: it is dying
            deadline = time.monotonic() + GRACE_S
            while self._target.state() not in "XZ" and time.monotonic() < deadline:
                time.sleep(0.01)
            self._after_death()
        return True

    def _note_stop(self, state: str) -> None:
        if state not in STOPPED:
            self._stopped_at, self._told = None, False
        elif self._stopped_at is None:
            self._stopped_at = time.monotonic()
        if self._is_driver and not self._told and self._stopped_s() > self._order["hang_after_s"]:
            self._told = True
            since = time.strftime("%H:%M:%S", time.localtime(time.time() - self._stopped_s()))
            self._print(
                f"the driver (process {self._target.pid} on {self._order['hello']['node']}) is stopped (state {state}) "
                f"since {since}; `kill -CONT {self._target.pid}` resumes it"
            )

    def _stopped_s(self) -> float:
        return 0.0 if self._stopped_at is None else time.monotonic() - self._stopped_at

    @staticmethod
    def _print(text: str) -> None:
        with suppress(OSError):
            os.write(2, f"adaptnet: {text}\n".encode())

    def _after_death(self) -> None:
        """Reports how the process died, with the lines that faulthandler wrote; ends what the driver has started."""
        ended = self._target.ended_by()
        self._send({"ended": ended, "stacks": self._dump_since(self._order["dump_from"])})
        if self._is_driver:
            self._say_that_it_ended(ended)
            time.sleep(GRACE_S)
            living = [pid for pid, born in self._children.items() if born_at(pid) == born]
            for pid in living:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _say_that_it_ended(self, ended: str) -> None:
        """What the driver could not say itself: Ray's C++ code ends one that it cannot connect, without a word."""
        if ended.startswith(EXITED) and ended.removeprefix(EXITED) not in OWN_CODES:
            ended += ", not by our code: see ray.log in the run's folder"
        elif not ended.startswith(OUT_OF_MEMORY):
            return
        self._print(
            f"the driver (process {self._target.pid} on {self._order['hello']['node']}) was {ended}; "
            "the same command starts again"
        )

    def _after_driver(self) -> None:
        """The driver is gone: its rank may end by itself, and is killed otherwise."""
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and self._target.state() not in "XZ":
            time.sleep(0.1)
        self._target.kill()

    # --- the driver

    def _connect(self) -> None:
        host, port = self._order["address"]
        try:
            self._socket = socket.create_connection((host, port), timeout=30)
        except OSError:  # the driver says which ranks it does not hear
            sys.exit(0)
        self._send({"token": self._order["token"], **self._order["hello"], "pid": self._target.pid})

    def _send(self, message: Mapping[str, object]) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:  # the driver does not read; it may later
            pass
        except OSError:
            self._socket = None

    def _obey(self) -> None:
        for word in self._commands():
            if word == "stacks":
                self._send({"stacks": self._stacks(), "threads": self._target.threads()})
            elif word == "kill":
                self._target.kill()

    def _commands(self) -> Iterator[str]:
        if self._socket is None or not select.select([self._socket], [], [], 0)[0]:
            return
        try:
            data = self._socket.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._socket = None
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        yield from (line.decode() for line in lines)

    # --- Python lines

    def _stacks(self) -> str:
        """The Python lines of all threads; empty if the process is stopped, or does not write them in time.

        Any thread can write those of all. One that waits for a file server may run no handler although it sleeps, so
        that the next one is asked.
        """
        if self._target.state() in STOPPED:
            return ""
        before = os.fstat(self._order["dump"]).st_size
        start, threads = time.monotonic(), self._target.for_signals()
        asked, size = 0, -1
        while (waited_s := time.monotonic() - start) < DUMP_WITHIN_S:
            now = os.fstat(self._order["dump"]).st_size
            if before < size == now:
                break
            if now == before and asked < len(threads) and waited_s >= asked * ASK_EVERY_S:
                self._target.signal_thread(threads[asked])
                asked += 1
            size = now
            time.sleep(0.1)
        return self._dump_since(before)

    def _dump_since(self, offset: int) -> str:
        file = self._order["dump"]
        return os.pread(file, 1 << 20, offset).decode(errors="replace").strip()


def descendants(pid: int) -> dict[int, str]:
    """The processes below `pid`, each with the time of its start, by which it is known again."""
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for children in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            below = [int(word) for word in _text(children).split()]
            waiting += below
            found |= {child: born_at(child) for child in below if child != os.getpid()}
    return found


def born_at(pid: int) -> str:
    """When the process was started, in ticks since the machine was; empty if there is none."""
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _runs(pid: int) -> bool:
    """Whether a thread of the process runs or waits for a core."""
    stats = (_text(path) for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return any(stat.rpartition(")")[2].split()[:1] == ["R"] for stat in stats)


def main() -> None:
    """Reads the order, one line of JSON, from standard input, and guards until the process ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a batch system signals all processes of a job: the guardian ends last
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    guardian = Guardian(json.loads(line))
    os.write(1, b"ready\n")
    guardian.run()
