"""Reads encoded images in threads, ahead of their use, from file descriptors that stay open."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import ImageIndex
from pipeline.data.store import open_file
from pipeline.data.verdict import NO_FILE, DecodeError, decodable

READS_PER_TASK = 4
RETRIED_AFTER_S = (0.1, 1.0, 5.0)
DESCRIPTORS_SHARE = 4  # at most a quarter of the process's descriptors stay open
GAP = 1 << 16  # bytes; two images with a smaller gap are fetched together


@dataclass(frozen=True)
class Read:
    """The bytes of an image for the decoder, and the reason if they cannot be decoded."""

    encoded: bytes
    reason: str | None = None


Pending: TypeAlias = "Sequence[Future[list[Read]]]"


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

    def start(self, rows: Sequence[int] | NDArray[np.int64]) -> Pending:
        """Starts to read `rows`; the futures give them in order, a few each."""
        starts = range(0, len(rows), READS_PER_TASK)
        return [self._threads.submit(self._read_all, rows[at : at + READS_PER_TASK]) for at in starts]

    def fetch(self, rows: NDArray[np.int64]) -> None:
        """Asks the system to load the bytes of `rows` into its cache, without waiting; does nothing for loose files."""
        if len(rows) and self.index.shards is not None:
            self._threads.submit(self._fetch, rows)

    def read(self, row: int) -> Read:
        """The bytes of an image, or why they are bad. After a storage error it opens and reads the file again."""
        for pause_s in (*RETRIED_AFTER_S, None):
            try:
                encoded = self._bytes(row)
                return Read(decodable(encoded))
            except DecodeError as error:
                return Read(encoded, str(error))
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

    def _read_all(self, rows: Iterable[int]) -> list[Read]:
        return [self.read(int(row)) for row in rows]

    def _bytes(self, row: int) -> bytes:
        if self.latency_s:
            time.sleep(self.latency_s)
        path, offset, length = self.index.location(row)
        descriptor = self._descriptor(path)
        encoded = os.pread(descriptor.number, length, offset)
        while len(encoded) < length:
            more = os.pread(descriptor.number, length - len(encoded), offset + len(encoded))
            if not more:  # the file ends within the image
                break
            encoded += more
        return encoded

    def _fetch(self, rows: NDArray[np.int64]) -> None:
        index = self.index
        rows = rows[np.lexsort((index.offset[rows], index.shard[rows]))]
        starts, ends = index.offset[rows], index.offset[rows] + index.length[rows]
        gaps = np.flatnonzero((np.diff(index.shard[rows]) != 0) | (starts[1:] - ends[:-1] > GAP))
        for first, last in zip(np.append(0, gaps + 1), np.append(gaps, -1), strict=True):
            descriptor = self._descriptor(index.location(int(rows[first]))[0])
            length = int(ends[last] - starts[first])
            os.posix_fadvise(descriptor.number, int(starts[first]), length, os.POSIX_FADV_WILLNEED)

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


class _Descriptor:
    """An open file that is closed when its last user drops it."""

    def __init__(self, path: str) -> None:
        self.number = open_file(path)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
