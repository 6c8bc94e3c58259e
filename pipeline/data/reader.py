"""Reads encoded images in threads, ahead of their use, from file descriptors that stay open."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import numpy as np

from pipeline.data.index import ImageIndex
from pipeline.data.philox import Ints
from pipeline.data.store import open_file
from pipeline.data.verdict import NO_FILE, DecodeError, decodable

READS_PER_TASK = 4
RUN_GAP, RUN_BYTES = 1 << 13, 1 << 20  # images with smaller gaps are read together, up to this many bytes
RETRIED_AFTER_S = (0.1, 1.0, 5.0)
DESCRIPTORS_SHARE = 4  # at most a quarter of the process's descriptors stay open
GAP = 1 << 16  # bytes; two images with a smaller gap are fetched together


@dataclass(frozen=True)
class Read:
    """The bytes of an image for the decoder, and the reason if they cannot be decoded."""

    encoded: bytes
    reason: str | None = None


class Pending:
    """Images that are being read: parts, each with the places of its images among all, that threads read."""

    def __init__(self, parts: Sequence[tuple[Ints, Future[list[Read]]]]) -> None:
        self._parts = parts

    def result(self) -> list[Read]:
        """All images in the order in which they were asked for; waits for them."""
        found = [pair for places, part in self._parts for pair in zip(places, part.result(), strict=True)]
        return [read for _, read in sorted(found, key=itemgetter(0))]


class Reader:
    """Reads rows of an index in `threads` threads; `latency_s` is added to every read, for benchmarks."""

    def __init__(
        self, index: ImageIndex, threads: int, latency_s: float = 0.0, *, most_open: int | None = None
    ) -> None:
        """most_open: files that stay open; by default a share of what the process may have."""
        self.index, self.latency_s = index, latency_s
        self._threads = ThreadPoolExecutor(threads, "adaptnet-read")
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_open = max(16, limit // DESCRIPTORS_SHARE) if most_open is None else most_open
        self._lock = threading.Lock()

    def start(self, rows: Sequence[int] | Ints) -> Pending:
        """Starts to read `rows`. Those that are neighbours in a shard are read at once, as in an evaluation."""
        rows = np.asarray(rows, dtype=np.int64)
        if self.index.shards is None:
            return Pending([(each, self._threads.submit(self._read_each, rows[each])) for each in _few(len(rows))])
        order = self._stored_order(rows)
        runs = self._runs(rows[order], RUN_GAP, RUN_BYTES)
        single = order[[run.start for run in runs if len(run) == 1]]
        parts = [(part, self._read_each) for part in (single[each] for each in _few(len(single)))]
        parts += [(order[run.start : run.stop], self._read_run) for run in runs if len(run) > 1]
        return Pending([(part, self._threads.submit(read, rows[part])) for part, read in parts])

    def fetch(self, rows: Ints) -> None:
        """Asks the system to load the bytes of `rows` into its cache, without waiting; does nothing for loose files."""
        if len(rows) and self.index.shards is not None:
            self._threads.submit(self._fetch, rows)

    def read(self, row: int) -> Read:
        """The bytes of an image, or why they are bad. After a storage error it opens and reads the file again."""
        for pause_s in (*RETRIED_AFTER_S, None):
            try:
                return _judged(self._pread(*self.index.location(row)))
            except OSError as error:
                if error.errno == errno.ESPIPE:
                    return Read(b"", NO_FILE)
                if pause_s is None or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
                    return Read(b"", f"cannot be read: {error.strerror}")
                self._forget(self.index.location(row)[0])
                time.sleep(pause_s)
        raise AssertionError

    def close(self) -> None:
        """Waits for the reads under way and cancels those that have not started."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._open.clear()

    def _read_each(self, rows: Ints) -> list[Read]:
        return [self.read(int(row)) for row in rows]

    def _read_run(self, rows: Ints) -> list[Read]:
        """Neighbours in a shard, by one read, or each by itself if that fails."""
        starts = self.index.offset[rows]
        ends = starts + self.index.length[rows]
        first = int(starts[0])
        try:
            held = memoryview(self._pread(self.index.location(int(rows[0]))[0], first, int(ends.max()) - first))
        except OSError:
            return self._read_each(rows)
        return [_judged(bytes(held[start:end])) for start, end in zip(starts - first, ends - first, strict=True)]

    def _pread(self, path: str, offset: int, length: int) -> bytes:
        """Bytes of a file; fewer if it ends before."""
        if self.latency_s:
            time.sleep(self.latency_s)
        descriptor = self._descriptor(path)
        encoded = os.pread(descriptor.number, length, offset)
        while len(encoded) < length:
            more = os.pread(descriptor.number, length - len(encoded), offset + len(encoded))
            if not more:
                break
            encoded += more
        return encoded

    def _fetch(self, rows: Ints) -> None:
        index = self.index
        rows = rows[self._stored_order(rows)]
        starts, ends = index.offset[rows], index.offset[rows] + index.length[rows]
        for run in self._runs(rows, GAP):
            descriptor = self._descriptor(index.location(int(rows[run.start]))[0])
            length = int(ends[run.stop - 1] - starts[run.start])
            os.posix_fadvise(descriptor.number, int(starts[run.start]), length, os.POSIX_FADV_WILLNEED)

    def _stored_order(self, rows: Ints) -> Ints:
        """The order in which the shards hold the rows."""
        return np.lexsort((self.index.offset[rows], self.index.shard[rows]))

    def _runs(self, rows: Ints, gap: int, most_bytes: int | None = None) -> list[range]:
        """Places of rows, in the order of storage, that follow one another in a shard, at most `gap` bytes apart."""
        starts, shards = self.index.offset[rows], self.index.shard[rows]
        ends = starts + self.index.length[rows]
        apart = (np.diff(shards) != 0) | (starts[1:] - ends[:-1] > gap)
        borders = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
        runs = [range(start, stop) for start, stop in pairwise(borders) if stop > start]
        return runs if most_bytes is None else [part for run in runs for part in _cut(run, starts, ends, most_bytes)]

    def _descriptor(self, path: str) -> _Descriptor:
        """The file open for reading. A shard stays open; if it is dropped from the cache, until its last read ends."""
        if self.index.shards is None:
            return _Descriptor(path)
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        opened = _Descriptor(path)
        with self._lock:
            self._open[path] = opened
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return opened

    def _forget(self, path: str) -> None:
        with self._lock:
            self._open.pop(path, None)


def _judged(encoded: bytes) -> Read:
    try:
        return Read(decodable(encoded))
    except DecodeError as error:
        return Read(encoded, str(error))


def _few(count: int) -> list[Ints]:
    """Places from 0 up to `count`, a task's worth at a time."""
    return [np.arange(at, min(at + READS_PER_TASK, count)) for at in range(0, count, READS_PER_TASK)]


def _cut(run: range, starts: Ints, ends: Ints, most_bytes: int) -> Iterator[range]:
    """Parts of a run of at most so many bytes, or of one image."""
    first = run.start
    for at in run[1:]:
        if ends[at] - starts[first] > most_bytes:
            yield range(first, at)
            first = at
    yield range(first, run.stop)


class _Descriptor:
    """An open file that is closed when its last user drops it."""

    def __init__(self, path: str) -> None:
        self.number = open_file(path)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
