"""The sample stream: which images each step trains on, and how they are cropped and augmented; numpy only.

Everything is a pure function of (seed, epoch, sample index): the random numbers come from a counter-based generator
(philox.py), so any rank can compute any sample of any epoch at any time. Positions count along the endless
concatenation of epochs; batch k holds positions kB ... (k+1)B-1, so that no batch is short and one may span epochs.
With `data.aug_repeats` = m a batch holds m copies of B/m images, first one copy of each, then the next. Its images are
places kB/m ... (k+1)B/m-1 of an endless concatenation of rounds, each of which has every image once. An epoch still has
N positions: N/m images in m copies. Without repeats, places are positions and rounds are epochs.
N images, B of a global batch, b of a rank's share of it, L lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import ranks
from pipeline.data import augment
from pipeline.data.balance import BalancedOrder
from pipeline.data.config import DataConfig
from pipeline.data.index import ImageIndex
from pipeline.data.philox import ALL_BITS, Ints, Purpose, SampleKeys, below, key_words, philox
from pipeline.errors import ConfigError

FILES_PER_RUN = 64  # loose files that block shuffle treats as one shard
ORDERS_KEPT = 2  # epochs: a batch at their border spans two


@dataclass(frozen=True)
class BatchPlan:
    """One rank's share of a global batch.

    windows [b, 4]: y, x, height, width in upright pixels; with random-pad they may lie partly outside the image.
    """

    step: int
    epoch: int  # epoch of the batch's first sample, which determines side_px unless data.side_choices does
    side_px: int
    rows: Ints  # [b]
    positions: Ints  # [b]
    epochs: Ints  # [b], of each sample's random numbers: by copy of an image, and by lap of a class if balanced
    windows: NDArray[np.int32]
    draws: Mapping[str, NDArray[np.generic]]  # draws of each operation of data.augment, [b, ...]


@dataclass(frozen=True)
class EpochOrder:
    """The rows of one epoch, `rows` [N], in the order of training.

    Block shuffle also has `stored` [N], the rows in the order in which the lanes read the shards; lane l reads
    stored[starts[l]:starts[l + 1]]. Balanced sampling has `laps` [N]: how often each row was drawn before, so that an
    image that comes several times in an epoch is augmented anew each time.
    """

    rows: NDArray[np.int32]
    stored: NDArray[np.int32] | None = None
    starts: Ints | None = None
    laps: Ints | None = None


class Stream:
    """The batches of all steps, the same for every world size and after every restart."""

    def __init__(self, index: ImageIndex, config: DataConfig, *, seed: int, batch_size: int) -> None:
        """batch_size counts the images of all ranks.

        Raises ConfigError for an empty index, and where batch_size is no multiple of `data.aug_repeats`.
        """
        if len(index) == 0:
            raise ConfigError(
                f"data.root (={index.root}): no images to train on; all of them are validation or held-out images",
                key="data.root",
                subject=index.root,
            )
        if batch_size % config.aug_repeats:
            raise ConfigError(
                f"data.aug_repeats (={config.aug_repeats}) must divide training.batch_size (={batch_size})",
                key="data.aug_repeats",
                subject=config.aug_repeats,
            )
        self.config, self.seed, self.batch_size, self.num_images = config, seed, batch_size, len(index)
        self.distinct = batch_size // config.aug_repeats  # images of a batch without their copies
        self.height, self.width = index.height, index.width
        self.lanes: Lanes | None = None
        self.balance = BalancedOrder(index.label, seed) if config.sampling == "balanced" else None
        self._orders: dict[int, EpochOrder] = {}
        if config.shuffle == "block":
            starts = np.arange(0, len(index), FILES_PER_RUN) if index.shards is None else _run_starts(index.shard)
            count = min(config.lanes, self.distinct, len(index))
            self.lanes = Lanes(np.append(starts, len(index)), count, config.window, seed)

    @property
    def steps_per_epoch(self) -> float:
        """Images of an epoch over those of a batch; not rounded."""
        return self.num_images / self.batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch of the first position of a step's batch."""
        return step * self.batch_size // self.num_images

    def side_of(self, step: int) -> int:
        """Side in pixels of the images of a step: one of `data.side_choices`, each equally likely, or by the epoch."""
        choices = self.config.side_choices
        if not choices:
            return self.config.side_at(self.epoch_of(step))
        drawn = philox([np.array([step]), 0, 0, Purpose.SIDE], [self.seed, 0])[0]
        return choices[int(below(drawn, np.array([len(choices)]))[0])]

    def places(self, positions: Ints) -> tuple[Ints, Ints]:
        """The place of each position's image in the endless concatenation of rounds, and which copy of it it is."""
        steps, within = np.divmod(positions, self.batch_size)
        copies, place = np.divmod(within, self.distinct)
        return steps * self.distinct + place, copies

    def plan(self, step: int, rank: int, world: int) -> BatchPlan:
        """The share of the batch at `step` that `rank` gets: a contiguous slice, or in block shuffle that of its lanes.

        Any step may be planned at any time. Raises ConfigError where block shuffle has fewer lanes than ranks.
        """
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        if self.lanes is None:
            positions = positions[ranks.shard(self.batch_size, rank, world)]
        else:
            mine, lane = self.lanes.of_rank(rank, world), self.lanes.at(self.places(positions)[0])
            positions = positions[(lane >= mine.start) & (lane < mine.stop)]
        places, copies = self.places(positions)
        rounds, within = np.divmod(places, self.num_images)
        rows, base = np.empty_like(positions), rounds.copy()
        for number in np.unique(rounds):
            here = rounds == number
            order = self.order(int(number))
            rows[here] = order.rows[within[here]]
            if order.laps is not None:
                base[here] = order.laps[within[here]]
        epochs, side_px = base * self.config.aug_repeats + copies, self.side_of(step)
        return BatchPlan(
            step=step,
            epoch=self.epoch_of(step),
            side_px=side_px,
            rows=rows,
            positions=positions,
            epochs=epochs,
            windows=self.windows(epochs, rows, rows, side_px),
            draws=augment.draw(self.config.augment, SampleKeys(self.seed, epochs, rows), side_px),
        )

    def windows(self, epochs: Ints, rows: Ints, images: Ints, side_px: int) -> NDArray[np.int32]:
        """The windows [b, 4] in `images` with the random numbers of `rows`; an image may replace that of its row."""
        height, width = self.height[images].astype(np.int64), self.width[images].astype(np.int64)
        return augment.windows(self.config.augment, side_px, SampleKeys(self.seed, epochs, rows), height, width)

    def ahead(self, plan: BatchPlan) -> Ints:
        """Rows whose bytes are to be fetched while `plan` is read; none in full shuffle.

        For each image that a lane reads, it fetches the image that is stored one window later. Storage thus sees a
        sequential stream for every lane, and reads within a window find their bytes in the cache.
        """
        if self.lanes is None:
            return np.empty(0, np.int64)
        places, copies = self.places(plan.positions)
        return self.lanes.ahead(places[copies == 0], self.order)

    def most_rows(self, rank: int, world: int) -> int:
        """The largest b of any step. Raises ConfigError where a rank would get no image."""
        if self.batch_size < world:
            raise ConfigError(
                f"training.batch_size (={self.batch_size}) is below the {world} workers: each needs an image",
                key="training.batch_size",
                subject=self.batch_size,
            )
        if self.lanes is None:
            share = ranks.shard(self.batch_size, rank, world)
            return int(share.stop) - int(share.start)
        each = -(-self.distinct // self.lanes.count) * self.config.aug_repeats
        return each * len(self.lanes.of_rank(rank, world))

    def row_bounds(self, world: int) -> tuple[int, int]:
        """The smallest and the largest b of any rank in any step. Raises ConfigError where a rank would get none."""
        most = [self.most_rows(rank, world) for rank in range(world)]
        if self.lanes is None:
            return min(most), max(most)
        each = self.distinct // self.lanes.count * self.config.aug_repeats
        return min(each * len(self.lanes.of_rank(rank, world)) for rank in range(world)), max(most)

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch, or of a round if images are repeated; that of the last ones is cached."""
        if epoch not in self._orders:
            if self.lanes is None:
                self._orders[epoch] = self._full_order(epoch)
            else:
                self._orders[epoch] = self.lanes.order(epoch)
            for old in list(self._orders)[:-ORDERS_KEPT]:
                del self._orders[old]
        return self._orders[epoch]

    def _full_order(self, epoch: int) -> EpochOrder:
        shuffled = permutation(self.num_images, self.seed, epoch, Purpose.ORDER)
        if self.balance is None:
            return EpochOrder(shuffled)
        rows, laps = self.balance.slots(epoch)
        return EpochOrder(rows[shuffled].astype(np.int32), laps=laps[shuffled])


class Lanes:
    """Block shuffle: L lanes, each of which reads its own run of whole shards and shuffles within a window.

    Position p of the endless stream belongs to lane `at(p)`, which depends on p mod L alone: any L consecutive
    positions hold one of each lane, also across the border of two epochs. Lanes take turns in bit-reversed order, so
    that any contiguous range of lanes, such as that of a rank, has about its share of any few positions.
    """

    def __init__(self, runs: Ints, count: int, window: int, seed: int) -> None:
        """runs [G + 1]: the first row of each shard, and N."""
        self.runs, self.count, self.window, self.seed = runs, count, window, seed
        self.num_images = int(runs[-1])
        self.turns = _reversed_bits(count)

    def of_rank(self, rank: int, world: int) -> range:
        """The lanes of a rank. Raises ConfigError where there are more ranks than lanes."""
        mine = ranks.shard(self.count, rank, world)
        if mine.start == mine.stop:
            raise ConfigError(
                f"data.lanes: {self.count} lanes (at most one per image of a batch or of the set) for {world} workers, "
                "and each needs one; raise data.lanes, use fewer workers, or set data.shuffle=full",
                key="data.lanes",
                subject=self.count,
            )
        return range(mine.start, mine.stop)

    def at(self, positions: Ints) -> Ints:
        """The lane of each position."""
        return self.turns[positions % self.count]

    def order(self, epoch: int) -> EpochOrder:
        """The shards in random order, cut into the lanes' runs, each shuffled within its windows."""
        shards = permutation(len(self.runs) - 1, self.seed, epoch, Purpose.SHARDS)
        lengths = np.diff(self.runs)[shards]
        stored = np.repeat(self.runs[shards] - (np.cumsum(lengths) - lengths), lengths) + np.arange(self.num_images)
        starts = self._starts(epoch)
        in_lane = np.arange(self.num_images) - np.repeat(starts[:-1], np.diff(starts))
        windows = -(-np.diff(starts) // self.window)
        group = np.repeat(np.cumsum(windows) - windows, np.diff(starts)) + in_lane // self.window
        shuffled = stored[permutation(self.num_images, self.seed, epoch, Purpose.ORDER, group)]
        within = np.arange(self.num_images)
        lane = self.at(within + epoch * self.num_images)
        rows = shuffled[starts[lane] + within // self.count]
        return EpochOrder(rows.astype(np.int32), stored.astype(np.int32), starts)

    def ahead(self, positions: Ints, order: Callable[[int], EpochOrder]) -> Ints:
        """The rows that are stored one window after those at `positions`, in the next epoch where a run ends."""
        distance = min(self.window, self.num_images // self.count)
        epochs, within = np.divmod(positions, self.num_images)
        lane, rows = self.at(positions), []
        for epoch in np.unique(epochs):
            here = epochs == epoch
            now, lanes = order(int(epoch)), lane[here]
            assert now.stored is not None and now.starts is not None
            due = within[here] // self.count + distance
            left = due - np.diff(now.starts)[lanes]
            rows.append(now.stored[(now.starts[lanes] + due)[left < 0]])
            if (left >= 0).any():
                after = order(int(epoch) + 1)
                assert after.stored is not None and after.starts is not None
                rows.append(after.stored[(after.starts[lanes] + left)[left >= 0]])
        return np.concatenate(rows).astype(np.int64)

    def _starts(self, epoch: int) -> Ints:
        """Where each lane's run begins among the stored images of an epoch, and the end of the last: [L + 1].

        A run has as many images as the lane has turns in the epoch.
        """
        every, more = divmod(self.num_images, self.count)
        turn = (np.arange(self.count) - epoch * self.num_images) % self.count
        lengths = np.empty(self.count, np.int64)
        lengths[self.turns] = every + (turn < more)
        return np.concatenate([[0], np.cumsum(lengths)])


def _run_starts(shard: NDArray[np.int32]) -> Ints:
    return np.flatnonzero(np.diff(shard, prepend=shard[0] - 1))


def _reversed_bits(count: int) -> Ints:
    """0 ... count-1 in the order of van der Corput's sequence: neighbours in it are far apart."""
    bits = max(1, (count - 1).bit_length())
    numbers = np.arange(1 << bits)
    reverse = sum(((numbers >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    order = np.asarray(reverse, dtype=np.int64)
    return order[order < count]


def permutation(length: int, seed: int, epoch: int, purpose: Purpose, group: Ints | None = None) -> NDArray[np.int32]:
    """A permutation of 0 ... length-1 drawn from (seed, epoch, purpose).

    `group` [length], rising from 0: every group is permuted in its own place. The lowest bits of each random key are
    the position, which breaks ties, so every machine gets the same permutation.
    """
    keys = np.random.Philox(key=key_words(seed, epoch), counter=[0, 0, 0, purpose]).random_raw(length)
    place = (1 << length.bit_length()) - 1
    if group is not None and (bits := int(group[-1]).bit_length()):
        keys = (keys >> np.uint64(bits)) | (group.astype(np.uint64) << np.uint64(64 - bits))
    keys = (keys & np.uint64(~place & ALL_BITS)) | np.arange(length, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(place)).astype(np.int32)
