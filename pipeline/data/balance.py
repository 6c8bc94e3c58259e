"""Balanced sampling: the order of an epoch in which every class has the same share of the images.

Slots count along the endless concatenation of epochs; slot p belongs to class p mod K and is the (p div K)-th image
drawn from that class. A class is drawn in laps: each lap holds all its images once, in an order that is drawn from
(seed, lap, image). So an image of a class of n images comes N/(K n) times an epoch, always within one of that.
N images, K classes that have images, E images of all laps that an epoch touches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.philox import Ints, Purpose, philox


class BalancedOrder:
    """The images of each slot; a pure function of (seed, epoch)."""

    def __init__(self, labels: NDArray[np.int32], seed: int) -> None:
        """labels [N]."""
        self.seed, self.by_class = seed, np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        self.counts = counts[counts > 0]
        self.firsts = np.cumsum(self.counts) - self.counts

    def slots(self, epoch: int) -> tuple[Ints, Ints]:
        """The row of each slot of an epoch, and the lap in which it is drawn: both [N]. A row has each lap once."""
        slots = np.arange(epoch * len(self.by_class), (epoch + 1) * len(self.by_class), dtype=np.int64)
        draw, cls = np.divmod(slots, len(self.counts))
        laps, place = np.divmod(draw, self.counts[cls])
        first, last = self._laps(cls, laps)
        rows, starts = self._lap_orders(first, last)
        return rows[starts[cls] + (laps - first[cls]) * self.counts[cls] + place], laps

    def _laps(self, cls: Ints, laps: Ints) -> tuple[Ints, Ints]:
        """The first and the last lap of each class, [K]; a class without a slot in this epoch has none."""
        first = np.full(len(self.counts), np.iinfo(np.int64).max)
        last = np.full(len(self.counts), -1)
        np.minimum.at(first, cls, laps)
        np.maximum.at(last, cls, laps)
        return np.where(last < 0, 0, first), last

    def _lap_orders(self, first: Ints, last: Ints) -> tuple[Ints, Ints]:
        """The rows [E] by class, lap and order within it, and where each class begins, [K]."""
        sizes = np.where(last < 0, 0, last - first + 1) * self.counts
        starts = np.cumsum(sizes) - sizes
        cls = np.repeat(np.arange(len(sizes)), sizes)
        lap, place = np.divmod(np.arange(len(cls)) - starts[cls], self.counts[cls])
        lap += first[cls]
        rows = self.by_class[self.firsts[cls] + place]
        keys = philox([rows, 0, 0, Purpose.BALANCE], [self.seed, lap])[0]
        return rows[np.lexsort((rows, keys, lap, cls))], starts
