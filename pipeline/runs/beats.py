"""Signs of progress of a process, in memory that another process can read.

A write to any field of `Beats` is a sign of progress. The guardian (`execution.guardian`) reads the fields about once a
second, so a sign costs one attribute write and no system call. Before training, without a guardian, the memory is
private and nobody reads it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
# After what multiple of `compute.hang_after_s` a phase without regular signs is ended; it is reported after one.
LONG = 10.0
COMPILING = 30.0
UNWATCHED = float("inf")  # a phase that something else bounds


class Beats(ctypes.Structure):
    """What a process does now. `Beats()` is private; `shared` gives one that other processes can read.

    step: the optimizer step. count: anything else that is counted, such as evaluated batches. phase: in words, at most
    47 bytes. patience: the limit of this phase without a sign, as a multiple of `compute.hang_after_s`.
    """

    step: int
    count: int
    patience: float
    phase: bytes
    _fields_ = (
        ("step", ctypes.c_int64),
        ("count", ctypes.c_uint64),
        ("patience", ctypes.c_double),
        ("phase", ctypes.c_char * 48),
    )

    def enter(self, phase: str, patience: float = 1.0) -> None:
        """Begins a phase."""
        self.patience = patience
        self.phase = phase.encode()[:47]
        self.count += 1

    @contextmanager
    def during(self, phase: str, patience: float = 1.0) -> Iterator[None]:
        """A phase within another, which continues afterwards."""
        before = self.phase, self.patience
        self.enter(phase, patience)
        yield
        self.phase, self.patience = before
        self.count += 1

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items; each is a sign of progress when it is requested and when it is there."""
        for item in items:
            self.count += 1
            yield item
            self.count += 1


BYTES = ctypes.sizeof(Beats)


def shared(file: int) -> Beats:
    """The beats in an open file of at least BYTES, such as one of `os.memfd_create`."""
    return Beats.from_buffer(mmap.mmap(file, BYTES))
