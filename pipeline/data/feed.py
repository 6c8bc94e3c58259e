"""From positions to bytes: the batches that a loader is to decode, read ahead, what is bad already settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.data import augment
from pipeline.data.bad import BadImages
from pipeline.data.config import DataConfig
from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.index import ImageIndex
from pipeline.data.philox import Ints
from pipeline.data.reader import Pending, Read, Reader
from pipeline.data.stream import BatchPlan, Stream


@dataclass(frozen=True)
class Request:
    """A batch before it is decoded."""

    rows: Ints  # [b], the images shown
    encoded: Sequence[bytes]
    geometry: CropGeometry
    unreadable: Sequence[tuple[int, str]] = ()  # rows whose bytes cannot be decoded, and why
    plan: BatchPlan | None = None  # of a training step


class Source(Protocol):
    """Batches by number, in two parts: `begin` starts to read, `finish` waits for the bytes and settles what is bad."""

    def begin(self, number: int) -> Any: ...

    def finish(self, begun: Any) -> Request: ...


def read_ahead(source: Source, numbers: Iterable[int], ahead: int) -> Iterator[Request]:
    """The batches in order, the reads of `ahead` more under way."""
    under_way: deque[Any] = deque()
    for number in numbers:
        under_way.append(source.begin(number))
        if len(under_way) > ahead:
            yield source.finish(under_way.popleft())
    while under_way:
        yield source.finish(under_way.popleft())


class TrainSource:
    """Steps of the stream; a bad image is replaced before it is decoded. `known` grows by those found here."""

    def __init__(self, stream: Stream, reader: Reader, known: BadImages, rank: int, world: int) -> None:
        self.stream, self.reader, self.known, self.rank, self.world = stream, reader, known, rank, world

    def begin(self, number: int) -> tuple[BatchPlan, Ints, Pending]:
        plan = self.stream.plan(number, self.rank, self.world)
        rows = plan.rows.copy()
        for position in [at for at, row in enumerate(rows) if int(row) in self.known]:
            rows[position] = self.known.replacement(int(rows[position]))
        begun = self.reader.start(rows)
        self.reader.fetch(self.stream.ahead(plan))
        return plan, rows, begun

    def finish(self, begun: tuple[BatchPlan, Ints, Pending]) -> Request:
        plan, rows, futures = begun
        reads: list[Read] = [read for future in futures for read in future.result()]
        found = []
        for at, read in enumerate(reads):
            while read.reason:
                if self.known.add(int(rows[at]), read.reason):
                    found.append((int(rows[at]), read.reason))
                rows[at] = self.known.replacement(int(plan.rows[at]))
                read = reads[at] = self.reader.read(int(rows[at]))
        index = self.reader.index
        windows = plan.windows
        if (rows != plan.rows).any():
            windows = self.stream.windows(plan.epochs, plan.rows, rows, plan.side_px)
        sizes = np.stack([index.height[rows], index.width[rows]], axis=-1)
        geometry = augment.crop_of(self.stream.config.augment).geometry(windows, sizes, plan.side_px)
        return Request(rows, [read.encoded for read in reads], geometry, found, plan)


class EvalSource:
    """Rows in their order; a bad image is left out."""

    def __init__(
        self, index: ImageIndex, config: DataConfig, reader: Reader, rows: Ints, batch_size: int, lost: dict[int, str]
    ) -> None:
        self.index, self.config, self.reader = index, config, reader
        self.rows, self.batch_size, self.lost = rows, batch_size, lost

    def begin(self, number: int) -> tuple[Ints, Pending]:
        rows = self.rows[number * self.batch_size : (number + 1) * self.batch_size]
        rows = np.array([row for row in rows if int(row) not in self.lost], dtype=np.int64)
        return rows, self.reader.start(rows)

    def finish(self, begun: tuple[Ints, Pending]) -> Request:
        rows, futures = begun
        reads: list[Read] = [read for future in futures for read in future.result()]
        found = [(int(row), read.reason) for row, read in zip(rows, reads, strict=True) if read.reason]
        whole = np.array([read.reason is None for read in reads], dtype=bool)
        rows = rows[whole]
        sizes = np.stack([self.index.height[rows], self.index.width[rows]], axis=-1)
        encoded = [read.encoded for read in reads if read.reason is None]
        return Request(rows, encoded, self.config.eval_geometry(sizes), found)
