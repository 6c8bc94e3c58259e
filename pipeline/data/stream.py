"""The sample stream: order, crops, flips and low-passes as a pure function of (seed, epoch, sample index); numpy only.

All numbers come from Philox, a counter-based generator: there is no state, so any sample of any epoch can be asked
for at any time, by any rank. Positions count along the endless concatenation of epochs; batch k holds positions
kB ... (k+1)B-1, so that no batch is short and one may span epochs. N images, B of a global batch, b of a rank's share
of it, L lanes.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), Philox4x64-10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline import ranks
from pipeline.data.config import AugmentConfig, DataConfig
from pipeline.data.index import ImageIndex
from pipeline.errors import ConfigError

Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]
ATTEMPTS = 10  # at a window that fits the image, as many as torchvision's RandomResizedCrop makes
FILES_PER_RUN = 64  # of loose files: what block shuffle takes for a shard
ORDERS_KEPT = 2  # epochs: a batch at the border spans two


class Purpose(IntEnum):
    """What numbers are for: the last word of Philox's counter, so that no two purposes share any."""

    ORDER = 0
    SHARDS = 1
    CROP = 2
    FLIP = 3
    MIX = 4
    LOW_PASS = 5


@dataclass(frozen=True)
class BatchPlan:
    """One rank's share of a global batch.

    windows [b, 4]: y, x, height, width in upright pixels; with random-pad they may lie partly outside the image.
    """

    step: int
    epoch: int  # of the batch's first position, which sets side_px
    side_px: int
    rows: Ints  # [b]
    positions: Ints  # [b]
    epochs: Ints  # [b], of each sample
    windows: NDArray[np.int32]
    flips: NDArray[np.bool_]  # [b]
    levels: Ints  # [b], steps down augment.low_pass_px; 0: none


@dataclass(frozen=True)
class EpochOrder:
    """The rows of one epoch. `rows` [N] as they are trained on; block shuffle: `stored` [N] as lanes walk the shards,
    lane l holding stored[starts[l]:starts[l + 1]]."""

    rows: NDArray[np.int32]
    stored: NDArray[np.int32] | None = None
    starts: Ints | None = None


class Stream:
    """What every step trains on: the same for every world size and after every restart."""

    def __init__(self, index: ImageIndex, config: DataConfig, *, seed: int, batch_size: int) -> None:
        """batch_size counts the images of all ranks. Raises ConfigError for an empty index."""
        if len(index) == 0:
            raise ConfigError(f"data.root (={index.root}): no images to train on; validation and held-out took all")
        self.config, self.seed, self.batch_size, self.num_images = config, seed, batch_size, len(index)
        self.height, self.width = index.height, index.width
        self.lanes: Lanes | None = None
        self._orders: dict[int, EpochOrder] = {}
        if config.shuffle == "block":
            starts = np.arange(0, len(index), FILES_PER_RUN) if index.shards is None else _run_starts(index.shard)
            count = min(config.lanes, batch_size, len(index))
            self.lanes = Lanes(np.append(starts, len(index)), count, config.window, seed)

    @property
    def steps_per_epoch(self) -> float:
        return self.num_images / self.batch_size

    def epoch_of(self, step: int) -> int:
        """The epoch of the first position of a step's batch."""
        return step * self.batch_size // self.num_images

    def plan(self, step: int, rank: int, world: int) -> BatchPlan:
        """`rank`'s share of the batch at `step`: a contiguous slice of it; in block shuffle, that of its lanes."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        if self.lanes is None:
            positions = positions[ranks.shard(self.batch_size, rank, world)]
        else:
            mine, lane = self.lanes.of_rank(rank, world), self.lanes.at(positions)
            positions = positions[(lane >= mine.start) & (lane < mine.stop)]
        epochs, within = np.divmod(positions, self.num_images)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self.order(int(epoch)).rows[within[here]]
        first = self.epoch_of(step)
        return BatchPlan(
            step=step,
            epoch=first,
            side_px=self.config.side_at(first),
            rows=rows,
            positions=positions,
            epochs=epochs,
            windows=self.windows(epochs, rows, rows, self.config.side_at(first)),
            flips=flips(self.config.augment, self.seed, epochs, rows),
            levels=levels(self.config.augment, self.seed, epochs, rows),
        )

    def windows(self, epochs: Ints, rows: Ints, images: Ints, side_px: int) -> NDArray[np.int32]:
        """The windows [b, 4] that the draws of `rows` give in `images`: the same rows, or what stands in for them."""
        height, width = self.height[images].astype(np.int64), self.width[images].astype(np.int64)
        return crops(self.config.augment, side_px, self.seed, epochs, rows, height, width)

    def ahead(self, plan: BatchPlan) -> Ints:
        """Block shuffle: rows whose bytes to fetch while `plan` is read; full shuffle: none.

        For each image that it reads, a lane fetches the one that is stored a window further on, so that storage sees a
        sequential stream for every lane, and reads within a window find their bytes at hand.
        """
        return np.empty(0, np.int64) if self.lanes is None else self.lanes.ahead(plan.positions, self.order)

    def most_rows(self, rank: int, world: int) -> int:
        """What b never exceeds. Raises ConfigError where a rank would get no image."""
        if self.batch_size < world:
            raise ConfigError(
                f"training.batch_size (={self.batch_size}) is below the {world} workers: each needs an image"
            )
        if self.lanes is None:
            share = ranks.shard(self.batch_size, rank, world)
            return int(share.stop) - int(share.start)
        return -(-self.batch_size // self.lanes.count) * len(self.lanes.of_rank(rank, world))

    def row_bounds(self, world: int) -> tuple[int, int]:
        """(fewest, most) rows that a rank of `world` ever gets. Raises ConfigError where one would get none."""
        most = [self.most_rows(rank, world) for rank in range(world)]
        if self.lanes is None:
            return min(most), max(most)
        each = self.batch_size // self.lanes.count
        return min(each * len(self.lanes.of_rank(rank, world)) for rank in range(world)), max(most)

    def order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            if self.lanes is None:
                self._orders[epoch] = EpochOrder(permutation(self.num_images, self.seed, epoch, Purpose.ORDER))
            else:
                self._orders[epoch] = self.lanes.order(epoch)
            for old in list(self._orders)[:-ORDERS_KEPT]:
                del self._orders[old]
        return self._orders[epoch]


class Lanes:
    """Block shuffle: L walkers, each with its own run of whole shards and a window within which it shuffles.

    Position p of the endless stream belongs to lane `at(p)`, which depends on p mod L alone: any L positions in a row
    hold one of each lane, over the border of an epoch too. Lanes take their turns in the order of reversed bits, so
    that any contiguous range of lanes, a rank's, has about its share of any few positions.
    """

    def __init__(self, runs: Ints, count: int, window: int, seed: int) -> None:
        """runs [G + 1]: the first row of each shard, and N."""
        self.runs, self.count, self.window, self.seed = runs, count, window, seed
        self.num_images = int(runs[-1])
        self.turns = _reversed_bits(count)

    def of_rank(self, rank: int, world: int) -> range:
        """Raises ConfigError where there are more ranks than lanes."""
        mine = ranks.shard(self.count, rank, world)
        if mine.start == mine.stop:
            raise ConfigError(
                f"data.lanes: {self.count} lanes (no more than images in a batch or in the set) for {world} workers, "
                "and each needs one; raise data.lanes, take fewer workers, or set data.shuffle=full"
            )
        return range(mine.start, mine.stop)

    def at(self, positions: Ints) -> Ints:
        return self.turns[positions % self.count]

    def order(self, epoch: int) -> EpochOrder:
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
        distance = min(self.window, self.num_images // self.count)
        epochs, within = np.divmod(positions, self.num_images)
        lane, found = self.at(positions), []
        for epoch in np.unique(epochs):
            here = epochs == epoch
            now, lanes = order(int(epoch)), lane[here]
            assert now.stored is not None and now.starts is not None
            due = within[here] // self.count + distance
            left = due - np.diff(now.starts)[lanes]
            found.append(now.stored[(now.starts[lanes] + due)[left < 0]])
            if (left >= 0).any():
                after = order(int(epoch) + 1)
                assert after.stored is not None and after.starts is not None
                found.append(after.stored[(after.starts[lanes] + left)[left >= 0]])
        return np.concatenate(found).astype(np.int64)

    def _starts(self, epoch: int) -> Ints:
        """Where each lane's run begins among the stored images of an epoch, and its end: [L + 1].

        A lane gets as many images as it has turns in the epoch.
        """
        every, more = divmod(self.num_images, self.count)
        turn = (np.arange(self.count) - epoch * self.num_images) % self.count
        lengths = np.empty(self.count, np.int64)
        lengths[self.turns] = every + (turn < more)
        return np.concatenate([[0], np.cumsum(lengths)])


def _run_starts(shard: NDArray[np.int32]) -> Ints:
    return np.flatnonzero(np.diff(shard, prepend=shard[0] - 1))


def _reversed_bits(count: int) -> Ints:
    """0 ... count-1 in the order of van der Corput's sequence: any few neighbours lie far apart."""
    bits = max(1, (count - 1).bit_length())
    numbers = np.arange(1 << bits)
    reverse = sum(((numbers >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    order = np.asarray(reverse, dtype=np.int64)
    return order[order < count]


def permutation(length: int, seed: int, epoch: int, purpose: Purpose, group: Ints | None = None) -> NDArray[np.int32]:
    """A permutation of 0 ... length-1 drawn from (seed, epoch, purpose).

    `group` [length], rising from 0: every group is permuted in its own place. Equal random numbers, which have at least
    the bits that two numbers below `length` leave of 64, keep their order: so all machines agree.
    """
    keys = np.random.Philox(key=key_words(seed, epoch), counter=[0, 0, 0, purpose]).random_raw(length)
    place = (1 << length.bit_length()) - 1
    if group is not None and (bits := int(group[-1]).bit_length()):
        keys = (keys >> np.uint64(bits)) | (group.astype(np.uint64) << np.uint64(64 - bits))
    keys = (keys & np.uint64(~place & _ALL_BITS)) | np.arange(length, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(place)).astype(np.int32)


def crops(
    augment: AugmentConfig, side_px: int, seed: int, epochs: Ints, rows: Ints, height: Ints, width: Ints
) -> NDArray[np.int32]:
    """Windows [b, 4] = y, x, height, width in images of `height` x `width`; of an image without a size, zeros.

    random-resized: the distribution of torchvision's RandomResizedCrop. random-pad: side_px square, anywhere in the
    image with pad_px zeros around it. none: the largest square in the middle.
    """
    if augment.crop == "random-resized":
        windows = _random_resized(augment, seed, epochs, rows, height, width)
    elif augment.crop == "random-pad":
        windows = _random_pad(augment.pad_px, side_px, seed, epochs, rows, height, width)
    else:
        side = np.minimum(height, width)
        windows = np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=-1)
    windows[(height == 0) | (width == 0)] = 0
    return windows.astype(np.int32)


def _random_resized(augment: AugmentConfig, seed: int, epochs: Ints, rows: Ints, height: Ints, width: Ints) -> Ints:
    windows = _largest_in_ratio(augment.ratio, height, width)
    log_ratio = np.log(augment.ratio)
    due = np.arange(len(rows))
    for attempt in range(ATTEMPTS):
        draw = philox([rows[due], attempt, 0, Purpose.CROP], [seed, epochs[due]])
        area = height[due] * width[due] * _between(draw[0], *augment.scale)
        ratio = np.exp(_between(draw[1], *log_ratio))
        h, w = np.rint(np.sqrt(area / ratio)).astype(np.int64), np.rint(np.sqrt(area * ratio)).astype(np.int64)
        fits = (h > 0) & (h <= height[due]) & (w > 0) & (w <= width[due])
        y, x = _below(draw[2], height[due] - h + 1), _below(draw[3], width[due] - w + 1)
        windows[due[fits]] = np.stack([y, x, h, w], axis=-1)[fits]
        due = due[~fits]
        if not len(due):
            break
    return windows


def _largest_in_ratio(ratio: tuple[float, float], height: Ints, width: Ints) -> Ints:
    """The middle of an image, all of it where its width : height lies within `ratio`."""
    h = np.where(width < height * ratio[0], np.rint(width / ratio[0]), height).astype(np.int64)
    w = np.where(width > height * ratio[1], np.rint(height * ratio[1]), width).astype(np.int64)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=-1)


def _random_pad(pad_px: int, side_px: int, seed: int, epochs: Ints, rows: Ints, height: Ints, width: Ints) -> Ints:
    draw = philox([rows, 0, 0, Purpose.CROP], [seed, epochs])
    side = np.full_like(height, side_px)
    y, x = _offset(draw[0], height, pad_px, side_px), _offset(draw[1], width, pad_px, side_px)
    return np.stack([y, x, side, side], axis=-1)


def _offset(draw: Words, length: Ints, pad_px: int, side_px: int) -> Ints:
    """Where the window begins; it is centred where it is larger than the padded image."""
    places = length + 2 * pad_px - side_px + 1
    return np.where(places > 0, _below(draw, np.maximum(places, 1)) - pad_px, (length - side_px) // 2)


def flips(augment: AugmentConfig, seed: int, epochs: Ints, rows: Ints) -> NDArray[np.bool_]:
    """Which samples [b] are mirrored."""
    return uniform(philox([rows, 0, 0, Purpose.FLIP], [seed, epochs])[0]) < augment.flip


def levels(augment: AugmentConfig, seed: int, epochs: Ints, rows: Ints) -> Ints:
    """How far down `low_pass_px` each sample goes, [b]: one step with probability p, each further one with p again."""
    number = len(augment.low_pass_px)
    if number == 0:
        return np.zeros_like(rows)
    drawn = uniform(philox([rows, 0, 0, Purpose.LOW_PASS], [seed, epochs])[0])
    found: Ints = (drawn[:, None] < augment.low_pass ** np.arange(1, number + 1)).sum(1)
    return found


def uniform(words: Words) -> NDArray[np.float64]:
    """Words as numbers in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _between(words: Words, low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * uniform(words)


def _below(words: Words, limit: Ints) -> Ints:
    return (uniform(words) * limit).astype(np.int64)


def philox(counter: Sequence[ArrayLike], key: Sequence[ArrayLike]) -> tuple[Words, Words, Words, Words]:
    """Philox4x64-10 of every counter (4 words) under every key (2 words), broadcast together: 4 random words each.

    numpy's own Philox gives the same words, but adds 1 to its counter before it draws.
    """
    words = np.broadcast_arrays(*(np.asarray(word).astype(np.uint64) for word in (*counter, *key)))
    c0, c1, c2, c3, k0, k1 = words
    with np.errstate(over="ignore"):
        for _ in range(10):
            high0, low0 = _multiply(_PHILOX_M[0], c0)
            high1, low1 = _multiply(_PHILOX_M[1], c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + _PHILOX_W[0], k1 + _PHILOX_W[1]
    return c0, c1, c2, c3


def _multiply(a: np.uint64, b: Words) -> tuple[Words, Words]:
    """The high and the low 64 bits of a * b."""
    a0, a1, b0, b1 = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle0, middle1 = a0 * b1, a1 * b0
    carry = ((a0 * b0) >> _HALF) + (middle0 & _LOW) + (middle1 & _LOW)
    return a1 * b1 + (middle0 >> _HALF) + (middle1 >> _HALF) + (carry >> _HALF), a * b


def key_words(seed: int, number: int) -> Words:
    """The two words of a Philox key; any integers will do."""
    return np.array([seed & _ALL_BITS, number & _ALL_BITS], dtype=np.uint64)


_ALL_BITS = (1 << 64) - 1
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_PHILOX_M = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_PHILOX_W = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
