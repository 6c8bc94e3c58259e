"""Keeps what Ray's C++ code writes to standard error in a file; Python's standard error still reaches the user."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STDERR = 2
_second: list[int] = []


@contextmanager
def into_file(path: Path | None) -> Iterator[None]:
    """Within the block the file descriptor 2 is `path`, to which lines are added; an empty file is removed afterwards.

    `sys.stderr` writes to where that descriptor led before, unless it leads elsewhere already. Without a path, or if
    the file cannot be opened, nothing changes. Not for two threads at once.
    """
    try:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if path is not None else None
    except OSError:
        target = None
    if path is None or target is None:
        yield
        return
    before, stream = _kept(), sys.stderr
    try:
        if _leads_to_stderr(stream):
            stream.flush()
            sys.stderr = io.TextIOWrapper(
                os.fdopen(before, "wb", closefd=False),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=True,
                write_through=True,
            )
        os.dup2(target, STDERR)
        yield
    finally:
        os.dup2(before, STDERR)
        if sys.stderr is not stream:
            with suppress(ValueError, OSError):
                sys.stderr.flush()
            sys.stderr = stream
        os.close(target)
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()


def _kept() -> int:
    """A second descriptor of standard error, always the same: a handler may have kept a stream that writes to it."""
    if not _second:
        _second.append(os.dup(STDERR))
    else:
        os.dup2(STDERR, _second[0])
    return _second[0]


def _leads_to_stderr(stream: object) -> bool:
    with suppress(OSError, ValueError):  # a proxy, such as that of a live table, writes elsewhere
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == STDERR
    return False
