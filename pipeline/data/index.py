"""The index of a set of images: memory-mapped arrays in one folder, built from class folders or tar shards.

An index folder (store.py) is named by a hash of the names, sizes and modification times of the files. A set that has
changed gets a new index, and processes that build one at the same time build the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.data.account import EXAMPLES, Account, LeftOut, SplitCount
from pipeline.data.integrity import damage
from pipeline.data.listing import Listing, packing_command
from pipeline.data.naming import shown
from pipeline.data.sources import find, folders_unchanged
from pipeline.data.store import FORMAT, Progress, read_sizes, write
from pipeline.errors import DataError
from pipeline.runs.files import read_json, remark

if TYPE_CHECKING:  # it imports torch, which the processes that pack and check do without
    from pipeline.data.config import DataConfig

COMPLETE = "COMPLETE.json"  # file of a packed set, written last: {"shards": {name: bytes}, "index": folder}
PACKING = ".packing"  # folder of intermediate files in a set that is being packed
LARGEST_SHARD = 256 << 20  # bytes
NAMED = 5  # classes that a note names
MANY_FILES = 100_000  # loose files; of a larger set only the folders' modification times are checked
Rows: TypeAlias = "slice | NDArray[np.int64]"


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """Images in a fixed order. Pickles as paths and rows; arrays are mapped on first use.

    shard [N] i32   the file of the image: the tar's number, or for loose files the image's own number
    offset [N] i64, length [N] i64   bytes of the encoded image in that file
    label [N] i32   position in `classes`
    height, width [N] i32   in pixels after the EXIF orientation; 0 if the header has no size, or an absurd one
    name_hash [N] u64   of the image's name, from which splits are drawn
    """

    folder: Path
    root: Path
    rows: Rows

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def subset(self, rows: NDArray[np.int64] | Sequence[int] | slice) -> ImageIndex:
        """The images at `rows` of this index, in that order."""
        if isinstance(self.rows, slice):
            if isinstance(rows, slice):
                start, stop, step = rows.indices(len(self))
                if step == 1:
                    return ImageIndex(
                        self.folder, self.root, slice(self.rows.start + start, self.rows.start + max(start, stop))
                    )
                rows = np.arange(start, stop, step)
            return ImageIndex(self.folder, self.root, np.asarray(rows, dtype=np.int64) + self.rows.start)
        return ImageIndex(self.folder, self.root, self.rows[rows])

    @property
    def whole(self) -> ImageIndex:
        """All images of the set of which this is a part."""
        return ImageIndex(self.folder, self.root, slice(0, self.meta.images))

    def file(self, row: int) -> str:
        """The image's name in messages: its path under the root, or tar/member."""
        name = self._name(row)
        return name if self.shards is None else f"{self.shards[int(self.shard[row])]}/{name}"

    def location(self, row: int) -> tuple[str, int, int]:
        """(path, offset, length) of the encoded image, for `os.preadv`."""
        held_by = self._name(row) if self.shards is None else self.shards[int(self.shard[row])]
        return f"{self.root}/{held_by}", int(self.offset[row]), int(self.length[row])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by label."""
        return self.meta.classes

    @property
    def shards(self) -> tuple[str, ...] | None:
        """Tars relative to the root, by shard number; None for loose files."""
        return self.meta.shards

    @cached_property
    def identity(self) -> str:
        """16 hex digits that are equal for the same names, sizes, labels and classes, whatever the root."""
        rows = np.arange(self.rows.start, self.rows.stop) if isinstance(self.rows, slice) else self.rows
        if np.array_equal(rows, np.arange(self.meta.images)):
            return self.meta.identity
        return hashlib.sha256(self.meta.identity.encode() + rows.astype("<i8").tobytes()).hexdigest()[:16]

    @cached_property
    def shard(self) -> NDArray[np.int32]:
        """The file of each image, [N]: a tar's number, or for loose files the image's own."""
        return self._column("shard")

    @cached_property
    def offset(self) -> NDArray[np.int64]:
        """Where the bytes of each image begin in its file, [N]."""
        return self._column("offset")

    @cached_property
    def length(self) -> NDArray[np.int64]:
        """The bytes of each encoded image, [N]."""
        return self._column("length")

    @cached_property
    def label(self) -> NDArray[np.int32]:
        """The class of each image, [N]."""
        return self._column("label")

    @property
    def class_counts(self) -> tuple[int, ...]:
        """The number of images of each class."""
        return tuple(np.bincount(self.label, minlength=len(self.classes)).tolist())

    @cached_property
    def height(self) -> NDArray[np.int32]:
        """Upright pixels, [N]; 0 if unknown."""
        return self._column("height")

    @cached_property
    def width(self) -> NDArray[np.int32]:
        """Upright pixels, [N]; 0 if unknown."""
        return self._column("width")

    @cached_property
    def name_hash(self) -> NDArray[np.uint64]:
        """A hash of each image's name, [N]."""
        return self._column("name_hash")

    @cached_property
    def crc32(self) -> NDArray[np.uint32] | None:
        """CRC-32 of the encoded bytes if `data pack` has stored it, for `data check`; else None."""
        return self._column("crc32") if (self.folder / "crc32.npy").exists() else None

    def _name(self, row: int) -> str:
        at = int(self.rows.start + range(len(self))[row] if isinstance(self.rows, slice) else self.rows[row])
        start, stop = self._names_start[at : at + 2]
        return self._names[start:stop].tobytes().decode("utf-8", "surrogateescape")

    @cached_property
    def _names(self) -> NDArray[np.uint8]:
        return _mapped(self.folder / "names.npy")

    @cached_property
    def _names_start(self) -> NDArray[np.int64]:
        return _mapped(self.folder / "names_start.npy")

    @cached_property
    def meta(self) -> IndexMeta:
        """What the index folder says of the whole set."""
        return read_meta(self.folder)

    def _column(self, name: str) -> NDArray[Any]:
        return _mapped(self.folder / f"{name}.npy")[self.rows]

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "root": self.root, "rows": self.rows}


@dataclass(frozen=True)
class Splits:
    """The parts of a set. `held_out` are training images set aside for calibration; it may be empty, as may `val`."""

    train: ImageIndex
    held_out: ImageIndex
    val: ImageIndex


@dataclass(frozen=True)
class IndexMeta:
    """meta.json of an index folder."""

    images: int
    num_train: int  # the rows before this are the train split if `has_splits`
    has_splits: bool
    classes: tuple[str, ...]
    shards: tuple[str, ...] | None
    identity: str
    ignored: int  # files that are not used and are no part of set_aside
    set_aside: tuple[tuple[str, str], ...]  # (name, reason) of images with a wrong label or key, which are not rows
    left_out: tuple[LeftOut, ...] = ()  # all that is not used, by reason; of an earlier version none but `ignored`
    notes: tuple[str, ...] = ()  # facts about the splits


def open_splits(
    config: DataConfig, seed: int, progress: Progress | None = None, *, trained_on: str | None = None
) -> Splits:
    """The train, held-out and validation images under `config.root`; builds the index if none exists.

    From a root without a val split, `validation_share` of the images are drawn, the same for the same seed and names
    whatever the root; `held_out` is drawn from the rest in the same way. With `trained_on`, the identity of the images
    that a net has seen, all images of another set without a val split are val. `progress` gets the account of the root.
    Raises DataError if there are no images, or more than `config.max_bad_share` of them are not used.
    """
    index = open_index(config.root, config.index, progress)
    meta = index.meta
    if meta.has_splits:
        train, val = index.subset(slice(0, meta.num_train)), index.subset(slice(meta.num_train, len(index)))
    else:
        val, train = _divide(index, config.validation_share, seed, "validation")
    held_out, rest = _divide(train, config.held_out, seed, "held out")
    splits = Splits(rest, held_out, val)
    if trained_on is not None and not meta.has_splits and rest.identity != trained_on:
        nothing = index.subset(slice(0, 0))
        splits = Splits(nothing, nothing, index)
    stated = account_of(splits, config, seed)
    if progress:
        progress("\n".join(stated.lines()), 0, 0)
    stated.check(config.max_bad_share)
    return splits


def account_of(splits: Splits, config: DataConfig, seed: int) -> Account:
    """How many images of the root are used, by split, and what is left out."""
    meta = splits.val.whole.meta
    parts = {"train": splits.train, "held-out": splits.held_out, "val": splits.val}
    counts = tuple(_count(name, part) for name, part in parts.items() if len(part) or name == "val")
    return Account(str(splits.val.root), counts, meta.left_out, (*meta.notes, *_notes(splits, config, seed)))


def _count(name: str, part: ImageIndex) -> SplitCount:
    unread = np.flatnonzero(part.height == 0)
    return SplitCount(name, len(part), len(unread), part.file(int(unread[0])) if len(unread) else "")


def _notes(splits: Splits, config: DataConfig, seed: int) -> Iterator[str]:
    classes, meta = splits.val.classes, splits.val.whole.meta
    if not meta.has_splits and len(splits.val) == meta.images:
        yield "the root has no val split and is not the set that the net was trained on: all images are val"
    elif not meta.has_splits:
        drawn = f"data.validation_share={config.validation_share:g}, seed {seed}"
        yield f"the root has no val split: val is a share of the images that is drawn ({drawn})"
    for name, part in (("train", splits.train), ("val", splits.val)):
        missing = np.flatnonzero(np.bincount(part.label, minlength=len(classes)) == 0)
        if len(missing) and len(part):
            listed = ", ".join(shown(classes[label]) for label in missing[:NAMED])
            yield (
                f"{name} has no image of {len(missing):,} of {len(classes):,} classes: {listed}"
                f"{', …' if len(missing) > NAMED else ''}"
            )
    if same := _same_but_for_case(classes):
        yield f"different classes that differ only by case: {', '.join(map(shown, same[:NAMED]))}"


def _same_but_for_case(classes: Sequence[str]) -> list[str]:
    folded = [name.casefold() for name in classes]
    if len(set(folded)) == len(folded):
        return []
    return [name for name, same in zip(classes, folded, strict=True) if folded.count(same) > 1]


def open_index(root: Path, folder: Path | None = None, progress: Progress | None = None) -> ImageIndex:
    """All images under `root`, train first; the index is opened, or built in `folder` (by default see `_places`).

    Raises DataError if there are no images, and if the index can be written nowhere.
    """
    root = root.expanduser().absolute()
    packed = root / COMPLETE
    if packed.exists():
        return _open_packed(root, packed)
    if (root / PACKING).exists():
        raise DataError(
            f"{root}: its packing was interrupted; run the same `adaptnet data pack` again to resume it",
            key="data.root",
            subject=root,
        )
    places = [folder.expanduser().absolute()] if folder else _places(root)
    for cached in _cached(places):
        of_many_files = cached.meta.shards is None and cached.meta.images > MANY_FILES
        if of_many_files and folders_unchanged(root, cached.class_folders) and _is_whole(cached.folder):
            return ImageIndex(cached.folder, root, slice(0, cached.meta.images))
    listing = find(root)
    if listing.shards is None and len(listing.names) > MANY_FILES and progress:
        many = f"{len(listing.names):,} loose files; packing makes reading faster and listing unnecessary:"
        progress(f"{many}\n  {packing_command(root)}", 0, 0)
    for place in places:
        if _is_whole(place / listing.key):
            return ImageIndex(place / listing.key, root, slice(0, len(listing.names)))
    index = build(listing, places, progress)
    if progress:
        progress(f"wrote the index of the images to {index.folder}; data.index=FOLDER puts it elsewhere", 0, 0)
    return index


def build(listing: Listing, places: Sequence[Path], progress: Progress | None = None) -> ImageIndex:
    """Reads the headers of all images in parallel and writes the index into the first of `places` that is writable.

    An unreadable header gives height and width 0. Raises DataError if no place is writable.
    """
    sizes = read_sizes(listing, progress)
    folder = write(listing, sizes, places)
    return ImageIndex(folder, listing.root, slice(0, len(listing.names)))


@dataclass(frozen=True)
class _CachedIndex:
    folder: Path
    meta: IndexMeta

    @property
    def class_folders(self) -> dict[str, int]:
        """The times of the class folders; empty if they are damaged."""
        try:
            times = read_json(self.folder / "folders.json")
        except (OSError, ValueError):
            return {}
        return {name: time for name, time in times.items() if type(time) is int} if isinstance(times, dict) else {}


def _cached(places: Sequence[Path]) -> Iterator[_CachedIndex]:
    for place in places:
        for path in sorted(place.glob("[!.]*/meta.json")):  # a hidden folder is still being written
            try:
                yield _CachedIndex(path.parent, read_meta(path.parent))
            except DataError:
                continue  # written by another version; a new index gets another name


def _is_whole(folder: Path) -> bool:
    """Whether an index folder exists and is not damaged; a damaged one is removed, with a remark."""
    if not folder.exists():
        return False
    try:
        reason = damage(folder, read_meta(folder).images)
    except DataError as error:
        reason = str(error)
    if reason is None:
        return True
    remark(folder, f"{reason}; it is rebuilt")
    with suppress(OSError):  # read-only: it is built in another place
        shutil.rmtree(folder)
    return False


def _places(root: Path) -> list[Path]:
    """Folders for the index: beside the data unless that is read-only, then the user's cache.

    Beside the data, every node that sees the images sees their index; a home folder may be another one on each node.
    """
    beside = root / ".adaptnet-index"
    writable = root.is_dir() and root.stat().st_mode & 0o222 and os.access(root, os.W_OK)
    cache = Path.home() / ".cache" / "adaptnet" / "index"
    return [beside, cache] if writable or beside.is_dir() else [cache]


def _open_packed(root: Path, packed: Path) -> ImageIndex:
    """The index that `data pack` has written. Raises DataError if a shard is missing or has another size."""
    try:
        complete = read_json(packed)
        shards, place = complete["shards"], complete["index"]  # type: ignore[index,call-overload]
        sizes = {str(name): int(size) for name, size in shards.items()}  # type: ignore[union-attr,arg-type]
        folder = root / str(place)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{packed}: damaged ({error}); copy it again, or pack the images again", key="data.root", subject=packed
        ) from None
    for name, size in sizes.items():
        present = (root / name).stat().st_size if (root / name).exists() else None
        if present != size:
            what = "is missing" if present is None else f"has {present:,} bytes"
            raise DataError(
                f"{root / name}: {what}, but had {size:,} when it was packed; copy it again or pack again",
                key="data.root",
                subject=root / name,
            )
    images = read_meta(folder).images
    reason = damage(folder, images)
    if reason is not None:
        raise DataError(
            f"{folder}: damaged ({reason}); copy it again, or pack the images again", key="data.root", subject=folder
        )
    return ImageIndex(folder, root, slice(0, images))


def _divide(index: ImageIndex, share: float, seed: int, purpose: str) -> tuple[ImageIndex, ImageIndex]:
    """(round(share N) of the images, the others); of every class the share to within one image, but never its last.

    The images are sorted by class and, within it, by a random order of their names; every 1/share-th is taken. What
    would be all of a class leaves one image to the others, so that fewer are taken.
    """
    count = round(share * len(index))
    if count == 0:
        return index.subset(slice(0, 0)), index
    key = int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:16], "little")
    salt, factor, phase = np.random.Philox(key=key).random_raw(3)  # raw numbers are the same in every version of numpy
    order = np.lexsort(((index.name_hash ^ salt) * (factor | np.uint64(1)), index.label))
    taken = np.zeros(len(index), dtype=bool)
    taken[order[((np.arange(count) + phase / 2**64) * len(index) / count).astype(np.int64)]] = True
    left = np.bincount(index.label[~taken], minlength=len(index.classes))
    last = order[np.flatnonzero(np.diff(index.label[order], append=-1))]  # the last image of each class in the order
    taken[last[left[index.label[last]] == 0]] = False
    return index.subset(np.flatnonzero(taken)), index.subset(np.flatnonzero(~taken))


def _mapped(path: Path) -> NDArray[Any]:
    try:
        mapped: NDArray[Any] = np.load(path, mmap_mode="r")
        return mapped.view(np.ndarray)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); set data.index to a folder that every node can read",
            key="data.index",
            subject=path,
        ) from None


def read_meta(folder: Path) -> IndexMeta:
    """meta.json of an index folder. Raises DataError if there is none of this format."""
    try:
        stored = read_json(folder / "meta.json")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no readable index ({error})", key="data.index", subject=folder) from None
    if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
        raise DataError(
            f"{folder}: an index of another format; delete it to build a new one", key="data.index", subject=folder
        )
    try:
        return _meta_of(stored)
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: meta.json is damaged ({error})", key="data.index", subject=folder) from None


def _meta_of(stored: dict[str, Any]) -> IndexMeta:
    shards = stored.pop("shards")
    left_out = tuple(map(LeftOut.from_json, stored.pop("left_out", _left_out_before(stored))))
    set_aside = tuple((str(name), str(reason)) for name, reason in stored.pop("set_aside"))
    classes, notes = (tuple(map(str, each)) for each in (stored.pop("classes"), stored.pop("notes", ())))
    meta = IndexMeta(
        **stored,
        classes=classes,
        shards=None if shards is None else tuple(map(str, shards)),
        set_aside=set_aside,
        left_out=left_out,
        notes=notes,
    )
    if not all(type(count) is int and count >= 0 for count in (meta.images, meta.num_train, meta.ignored)):
        raise ValueError("a count is no whole number")
    if not isinstance(meta.identity, str) or not isinstance(meta.has_splits, bool):
        raise TypeError("a value of a wrong type")
    return meta


def _left_out_before(stored: dict[str, Any]) -> list[list[object]]:
    """The unused files that an index of an earlier version lists."""
    names = [name for name, _ in stored["set_aside"]]
    aside = [["wrong label or duplicate key", None, len(names), True, names[:EXAMPLES]]] if names else []
    other = ["no image by its name, or in no class folder", None, stored["ignored"], False, []]
    return [*aside, *([other] if stored["ignored"] else [])]


def synthetic(images: int, classes: int, folder: Path) -> ImageIndex:
    """An index of images that do not exist, with the sizes and shards of a packed ImageNet, for benchmarks."""
    draw = np.random.default_rng(0)
    length = draw.lognormal(11.4, 0.6, images).astype(np.int64) + 1000
    shard = (np.cumsum(length) // LARGEST_SHARD).astype(np.int32)
    starts = np.cumsum(length) - length
    listing = Listing(
        root=folder,
        classes=tuple(f"n{number:08d}" for number in range(classes)),
        names=[f"n{number % classes:08d}/n{number % classes:08d}_{number}.jpg" for number in range(images)],
        shards=tuple(f"train-{number:06d}.tar" for number in range(int(shard[-1]) + 1)),
        shard=shard,
        offset=starts - starts[np.searchsorted(shard, shard)],
        length=length,
        label=(np.arange(images) % classes).astype(np.int32),
        num_train=images,
        has_splits=False,
        times=np.zeros(0, dtype=np.int64),
    )
    sizes = draw.integers(250, 600, (images, 2), dtype=np.int32)
    return ImageIndex(write(listing, sizes, [folder]), folder, slice(0, images))
