"""Decoded images that stay in memory: of a set that fits, each image is decoded once per process.

A loader keeps a picture when it decodes it for the first time, whole; afterwards it cuts every window from there. On a
CPU a window of a whole picture is bitwise what the decoder gives for that window. What does not decode whole is not
kept: its windows are decoded as without memory, so the same images count as bad. The decoder of a GPU has other pixels
than a CPU's for lossy formats and for resizes: of a run that decodes on a GPU only lossless pictures that are not
resized stay in memory, which the CPU decodes to the same pixels.
N images of an index, H, W height and width of one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from pipeline import ranks
from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.image_headers import kind
from pipeline.data.index import ImageIndex
from pipeline.data.philox import Ints
from pipeline.data.verdict import Pixels
from pipeline.errors import ConfigError

SHARE = 8  # a worker's pictures take at most one part in so many of its share of the node's memory
LOSSLESS = ("png", "bmp")
CGROUP = Path("/sys/fs/cgroup/memory.max")


class NotKept(Exception):
    """A GPU's decoder has other pixels for this set than memory would have."""


@dataclass(frozen=True)
class Whole:
    """An encoded image that is to be decoded whole, H x W, and kept: `keep` gets the picture and returns the copy."""

    encoded: bytes
    height: int
    width: int
    keep: Callable[[Pixels], Pixels]


Item: TypeAlias = "bytes | Whole | Pixels"  # bytes of which a window is decoded, or a picture from memory


class Kept(Sequence[Pixels]):
    """Pictures from memory, the rows [b]."""

    def __init__(self, pictures: Pictures, rows: Ints) -> None:
        self._pictures, self._rows = pictures, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, position: int) -> Pixels: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[Pixels]: ...
    def __getitem__(self, position: int | slice) -> Pixels | Sequence[Pixels]:
        if isinstance(position, slice):
            return Kept(self._pictures, self._rows[position])
        return self._pictures.picture(int(self._rows[position]))

    def squares(self, geometry: CropGeometry) -> Pixels | None:
        """The squares [b, S, S, 3] of all images at once, if these have one size and are not resized; else None."""
        alike = self._pictures.alike
        if alike is None or not unresized(geometry):
            return None
        corners = geometry.windows[:, :2] + geometry.origins  # of the squares, which may begin outside
        return _cut_together(alike[self._rows], corners, geometry.side_px)


def unresized(geometry: CropGeometry) -> bool:
    """Whether all windows have the size already to which they would be resized."""
    return np.array_equal(geometry.sizes, geometry.windows[:, 2:])


def _cut_together(pictures: Pixels, corners: NDArray[np.int32], side: int) -> Pixels:
    """The squares [b, S, S, 3] at `corners` [b, 2] = y, x of pictures [b, H, W, 3], with zeros beyond their edges."""
    count, height, width, _ = pictures.shape
    before = np.maximum(0, -corners.min(axis=0))
    after = np.maximum(0, corners.max(axis=0) + side - (height, width))
    lengths = np.add((height, width), before + after)
    whole = np.zeros((count, *lengths, 3), dtype=np.uint8)
    whole[:, before[0] : before[0] + height, before[1] : before[1] + width] = pictures
    lines = whole.reshape(count, whole.shape[1], -1)  # whole lines are copied, not pixels
    places = np.lib.stride_tricks.sliding_window_view(lines, (side, 3 * side), axis=(1, 2))
    y, x = (corners + before).T
    squares: Pixels = places[np.arange(count), y, 3 * x].reshape(count, side, side, 3)
    return squares


class Pictures:
    """The decoded images of an index, in memory that is used only as they arrive.

    exact: the run decodes on a GPU, so that only lossless pictures without a resize may be kept.
    """

    def __init__(self, index: ImageIndex, *, exact: bool = False) -> None:
        self.exact = exact
        sizes = np.stack([index.height, index.width], axis=-1)
        self._sizes = sizes.tolist()
        self._ends = np.cumsum(_bytes_of_each(index)).tolist()
        self._pixels = np.frombuffer(mmap.mmap(-1, max(1, self._ends[-1]), flags=mmap.MAP_PRIVATE), dtype=np.uint8)
        of_one_size = (sizes == sizes[0]).all()
        self.alike = self._pixels.reshape(len(index), *self._sizes[0], 3) if of_one_size else None  # all [N, H, W, 3]
        self._kept = np.zeros(len(index), dtype=bool)
        self._refused: set[int] = set()

    def kept(self, rows: Ints) -> Kept:
        """The pictures of rows [b], all of which are in memory."""
        return Kept(self, rows)

    def missing(self, rows: Ints) -> NDArray[np.bool_]:
        """Which of the rows [b] are not in memory, [b]."""
        return ~self._kept[rows]

    def picture(self, row: int) -> Pixels:
        """The kept picture of a row, [H, W, 3]."""
        height, width = self._sizes[row]
        end = self._ends[row]
        return self._pixels[end - height * width * 3 : end].reshape(height, width, 3)

    def item(self, row: int, encoded: bytes) -> Item:
        """What the decoder gets for a row that is not in memory. Raises NotKept where a GPU has other pixels."""
        if row in self._refused:
            return encoded
        if self.exact and kind(encoded) not in LOSSLESS:
            raise NotKept
        height, width = self._sizes[row]
        return Whole(encoded, height, width, lambda picture: self._keep(row, picture))

    def check(self, geometry: CropGeometry) -> None:
        """Raises NotKept where a GPU would resize windows, which rounds otherwise than a CPU."""
        if self.exact and not unresized(geometry):
            raise NotKept

    def refuse(self, row: int) -> None:
        """Keeps no picture of this row: it does not decode whole."""
        self._refused.add(row)

    def _keep(self, row: int, picture: Pixels) -> Pixels:
        held = self.picture(row)
        held[:] = picture
        self._kept[row] = True
        return held


def chosen(index: ImageIndex, in_memory: object, *, gpu: bool) -> Pictures | None:
    """The memory for the images of `index` as `data.in_memory` asks; None where they are decoded each time.

    auto: if they take at most `bound` bytes; true: in any case. gpu: the run decodes on a GPU. Raises ConfigError
    where `true` asks for more than the node has.
    """
    need = int(_bytes_of_each(index).sum())
    if in_memory is False or not need:
        return None
    if in_memory is True and need > node_bytes():
        raise ConfigError(
            f"data.in_memory (=true): the decoded images take {need:,} bytes, the node has {node_bytes():,}; set "
            "data.in_memory=auto",
            key="data.in_memory",
            subject=in_memory,
        )
    named = index.file(0).lower().endswith(tuple(f".{each}" for each in LOSSLESS))
    fits = in_memory is True or (need <= bound() and (named or not gpu))
    return Pictures(index, exact=gpu) if fits else None


def bound() -> int:
    """Bytes that one rank's pictures may take under `auto`: an eighth of the node's memory by its ranks on the node."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.world())
    return node_bytes() // max(1, here) // SHARE


def node_bytes() -> int:
    """Bytes of memory that this node's processes may use: the machine's, or its control group's if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(CGROUP.read_text()))
    except (OSError, ValueError):  # without a limit it reads "max"
        return machine


def _bytes_of_each(index: ImageIndex) -> Ints:
    return index.height.astype(np.int64) * index.width.astype(np.int64) * 3
