"""Batches of images for the decoder: read ahead of their use, with unreadable images already replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from pipeline.data import augment
from pipeline.data.bad import BadImages
from pipeline.data.config import DataConfig
from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.in_memory import Item, Pictures
from pipeline.data.index import ImageIndex
from pipeline.data.philox import Ints
from pipeline.data.reader import Pending, Read, Reader
from pipeline.data.stream import BatchPlan, Stream

B = TypeVar("B")


@dataclass(frozen=True)
class Request:
    """A batch for the decoder: b images, encoded or from memory, and what to cut from them."""

    rows: Ints  # [b], of the images that are shown
    images: Sequence[Item]
    geometry: CropGeometry
    unreadable: Sequence[tuple[int, str]] = ()  # (row, reason) of images whose bytes cannot be decoded
    plan: BatchPlan | None = None  # set for a training step only


class Source(Protocol[B]):
    """Batches by number, each in two parts."""

    def begin(self, number: int) -> B:
        """Starts to read a batch."""

    def finish(self, begun: B) -> Request:
        """Waits for the bytes and deals with unreadable images."""


def read_ahead(source: Source[B], numbers: Iterable[int], ahead: int) -> Iterator[Request]:
    """The batches in order, while the next `ahead` are being read."""
    under_way: deque[B] = deque()
    for number in numbers:
        under_way.append(source.begin(number))
        if len(under_way) > ahead:
            yield source.finish(under_way.popleft())
    while under_way:
        yield source.finish(under_way.popleft())


@dataclass(frozen=True)
class BegunStep:
    """A step whose images are being read: those at the positions `missing` of `rows`."""

    plan: BatchPlan
    rows: Ints
    missing: Ints
    reads: Pending


class TrainSource:
    """The steps of the stream; a bad image is replaced before it is decoded.

    known: bad images; those that are found here are added. pictures: images in memory, which are not read.
    """

    def __init__(
        self,
        stream: Stream,
        reader: Reader,
        known: BadImages,
        rank: int,
        world: int,
        pictures: Pictures | None = None,
    ) -> None:
        self.stream, self.reader, self.known, self.rank, self.world = stream, reader, known, rank, world
        self.pictures = pictures

    def begin(self, number: int) -> BegunStep:
        """Starts to read the batch of step `number`, and fetches the bytes that block shuffle needs later."""
        plan = self.stream.plan(number, self.rank, self.world)
        rows = plan.rows.copy()
        for position in [at for at, row in enumerate(rows) if int(row) in self.known]:
            rows[position] = self.known.replacement(int(rows[position]))
        missing = self._missing(rows)
        begun = self.reader.start(rows[missing])
        ahead = self.stream.ahead(plan)
        self.reader.fetch(ahead[self._missing(ahead)])
        return BegunStep(plan, rows, missing, begun)

    def finish(self, begun: BegunStep) -> Request:
        """The batch, with unreadable images replaced. Raises DataError if a class has no readable image left."""
        plan, rows = begun.plan, begun.rows
        reads = dict(zip(begun.missing.tolist(), begun.reads.result(), strict=True))
        unreadable = []
        for at, read in reads.items():
            while read.reason:
                if self.known.add(int(rows[at]), read.reason):
                    unreadable.append((int(rows[at]), read.reason))
                rows[at] = self.known.replacement(int(plan.rows[at]))
                read = reads[at] = self.reader.read(int(rows[at]))
        geometry = self._geometry(plan, rows)
        return Request(rows, self._images(rows, reads, geometry), geometry, unreadable, plan)

    def _missing(self, rows: Ints) -> Ints:
        """Positions of the rows that have to be read."""
        return np.arange(len(rows)) if self.pictures is None else np.flatnonzero(self.pictures.missing(rows))

    def _images(self, rows: Ints, reads: Mapping[int, Read], geometry: CropGeometry) -> Sequence[Item]:
        pictures = self.pictures
        if pictures is None:
            return [read.encoded for read in reads.values()]
        pictures.check(geometry)
        if not reads:
            return pictures.kept(rows)
        return [
            pictures.item(row, reads[at].encoded) if at in reads else pictures.picture(row)
            for at, row in enumerate(rows.tolist())
        ]

    def _geometry(self, plan: BatchPlan, rows: Ints) -> CropGeometry:
        index, windows = self.reader.index, plan.windows
        if (rows != plan.rows).any():
            windows = self.stream.windows(plan.epochs, plan.rows, rows, plan.side_px)
        sizes = np.stack([index.height[rows], index.width[rows]], axis=-1)
        return augment.crop_of(self.stream.config.augment).geometry(windows, sizes, plan.side_px)


class EvalSource:
    """`rows` of an index in their order, `batch_size` at a time; bad images are left out.

    lost: {row: reason} of images that are known as bad.
    """

    def __init__(
        self, index: ImageIndex, config: DataConfig, reader: Reader, rows: Ints, batch_size: int, lost: dict[int, str]
    ) -> None:
        self.index, self.config, self.reader = index, config, reader
        self.rows, self.batch_size, self.lost = rows, batch_size, lost

    def begin(self, number: int) -> tuple[Ints, Pending]:
        """Starts to read a batch without the images that are known as bad."""
        rows = self.rows[number * self.batch_size : (number + 1) * self.batch_size]
        rows = np.array([row for row in rows if int(row) not in self.lost], dtype=np.int64)
        return rows, self.reader.start(rows)

    def finish(self, begun: tuple[Ints, Pending]) -> Request:
        """The batch without the images whose bytes turn out to be bad."""
        rows, pending = begun
        reads = pending.result()
        unreadable = [(int(row), read.reason) for row, read in zip(rows, reads, strict=True) if read.reason]
        readable = np.array([read.reason is None for read in reads], dtype=bool)
        rows = rows[readable]
        sizes = np.stack([self.index.height[rows], self.index.width[rows]], axis=-1)
        encoded = [read.encoded for read in reads if read.reason is None]
        return Request(rows, encoded, self.config.eval_geometry(sizes), unreadable)
