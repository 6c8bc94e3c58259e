"""Counter-based random numbers: every number is a pure function of its counter and key, and nothing has a state.

Any number of any sample can be computed at any time, by any rank. b images of a batch.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), Philox4x64-10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]


class Purpose(IntEnum):
    """What numbers are for: the last word of Philox's counter, so that no two purposes share a number.

    A new augmentation declares its own number, 13 or above.
    """

    ORDER = 0
    SHARDS = 1
    CROP = 2
    FLIP = 3
    MIX = 4
    LOW_PASS = 5
    AUTO_AUGMENT = 6
    THREE_AUGMENT = 7
    COLOR_JITTER = 8
    GRAYSCALE = 9
    BLUR = 10
    ERASING = 11
    SIDE = 12
    BALANCE = 31


@dataclass(frozen=True)
class SampleKeys:
    """What the random numbers of images are computed from: `seed`, and each image's epoch and row."""

    seed: int
    epochs: Ints  # [b]
    rows: Ints  # [b], in the index

    def __len__(self) -> int:
        return len(self.rows)

    def words(self, purpose: int, number: int = 0) -> tuple[Words, Words, Words, Words]:
        """Four random words [b] of each image for `purpose`; `number` counts further draws of the same purpose."""
        return philox([self.rows, number, 0, purpose], [self.seed, self.epochs])

    def only(self, chosen: Ints) -> SampleKeys:
        """The keys of the images at these positions."""
        return SampleKeys(self.seed, self.epochs[chosen], self.rows[chosen])


def uniform(words: Words) -> NDArray[np.float64]:
    """Words as numbers in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def between(words: Words, low: float, high: float) -> NDArray[np.float64]:
    """Words as numbers in [low, high)."""
    return low + (high - low) * uniform(words)


def below(words: Words, limit: Ints) -> Ints:
    """Words as integers from 0 to below `limit`."""
    return (uniform(words) * limit).astype(np.int64)


def philox(counter: Sequence[ArrayLike], key: Sequence[ArrayLike]) -> tuple[Words, Words, Words, Words]:
    """Philox4x64-10 of every counter (4 words) under every key (2 words), broadcast together: 4 random words each.

    numpy's own Philox gives the same words, but adds 1 to its counter before it draws.
    """
    c0, c1, c2, c3, k0, k1 = np.broadcast_arrays(*(np.asarray(word).astype(np.uint64) for word in (*counter, *key)))
    even, odd, keys = (
        np.stack([c0, c2]),
        np.stack([c1, c3]),
        np.stack([k0, k1]),
    )  # together: half as many calls of numpy
    columns = (2, *(1,) * (even.ndim - 1))
    factors, steps = _PHILOX_M.reshape(columns), _PHILOX_W.reshape(columns)
    for _ in range(10):
        high, low = _multiply(factors, even)
        even, odd = high[::-1] ^ odd ^ keys, low[::-1]
        keys = keys + steps
    return even[0], odd[0], even[1], odd[1]


def _multiply(a: Words, b: Words) -> tuple[Words, Words]:
    """The high and the low 64 bits of a * b. Source: Warren, Hacker's Delight, 8-2."""
    a0, a1, b0, b1 = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a1 * b0 + ((a0 * b0) >> _HALF)
    lower = a0 * b1 + (middle & _LOW)
    return a1 * b1 + (middle >> _HALF) + (lower >> _HALF), a * b


def key_words(seed: int, number: int) -> Words:
    """The two words of a Philox key; any integers will do."""
    return np.array([seed & ALL_BITS, number & ALL_BITS], dtype=np.uint64)


ALL_BITS = (1 << 64) - 1
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_PHILOX_M = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], dtype=np.uint64)
_PHILOX_W = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64)
