"""Commands in processes of their own that are killed, or find a full disk, at an exact operation on files.

Each process is forked from a server that has made the slow imports, so that hundreds of them take minutes.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

CHANGES = {"os.rename": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.truncate": 1}  # paths
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("mlflow.entities", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.db.utils"),
        *("alembic.script", "matplotlib.figure", "pandas", "torchvision.models"),
        *("jobs.verbs.train", "jobs.verbs.data", "jobs.verbs.runs", "pipeline.execution.launch", "pipeline.data.dali"),
        *("pipeline.registry.publishing", "pipeline.tracking", "pipeline.data.pack", "pytest"),
    ]
)


@dataclass(frozen=True)
class Fault:
    """What befalls a command at the `at`-th operation that changes a file or a folder below `folder`.

    A disk that is full stays full, so each later operation fails too. "count" only counts them: a byte each in `log`.
    """

    folder: Path
    at: int = 0
    kind: Literal["kill", "full", "count"] = "count"
    log: Path | None = None

    def install(self) -> None:
        """From now on, in this process and in those that it forks."""
        numbers, main, folder = itertools.count(), os.getpid(), f"{self.folder}/"
        counted = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if self.log else None

        def hook(event: str, args: tuple[object, ...]) -> None:
            if not _changes(event, args, folder):
                return
            number = next(numbers)
            if counted is not None:
                os.write(counted, b".")
            elif self.kind == "kill" and number == self.at:
                os.kill(main, signal.SIGKILL)
            elif self.kind == "full" and number >= self.at and event not in ("os.remove", "os.rmdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

        sys.addaudithook(hook)


def _changes(event: str, args: tuple[object, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = args
        return isinstance(flags, int) and bool(flags & WRITING) and _below(path, folder)
    return any(_below(path, folder) for path in args[: CHANGES.get(event, 0)])


def _below(path: object, folder: str) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(folder)


def begin(words: Sequence[str], log: Path, fault: Fault | None = None) -> BaseProcess:
    """`adaptnet WORDS` as a process in a session of its own, whose output is added to `log`."""
    process = CONTEXT.Process(target=_command, args=(list(words), log, fault))
    process.start()
    return process


def end(process: BaseProcess, log: Path, timeout_s: float = 600) -> int:
    """The exit code of the command; negative for a signal."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"no end within {timeout_s:g} s\n{tail(log)}")
    return process.exitcode


def run(words: Sequence[str], log: Path, fault: Fault | None = None) -> int:
    """The exit code of `adaptnet WORDS`."""
    return end(begin(words, log, fault), log)


def operations(words: Sequence[str], log: Path, folder: Path) -> int:
    """How many operations of the command change files or folders below `folder`; it must succeed."""
    counted = log.with_suffix(".count")
    assert run(words, log, Fault(folder, log=counted)) == 0, tail(log)
    return counted.stat().st_size


def tail(log: Path) -> str:
    """The last lines of a log."""
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]


def _command(words: list[str], log: Path, fault: Fault | None) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    from jobs import cli

    if fault is not None:
        fault.install()
    cli.main(words)
