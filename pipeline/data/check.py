"""Decodes every image of a set and reports which are bad, and why; changes nothing."""

from __future__ import annotations

import io
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pipeline.data.image_headers import MAX_PIXELS, kind, looks_whole, upright_size
from pipeline.data.index import COMPLETE, open_index
from pipeline.data.listing import SPLITS, Listing
from pipeline.data.parallel import in_processes, num_cpus
from pipeline.data.sources import find
from pipeline.data.store import Progress

CHECKED_PER_TASK = 256


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`."""

    images: int  # number of images checked
    bad: tuple[tuple[str, str], ...]  # (file, reason)
    checksums: bool  # whether the bytes were compared with the CRC-32s of packing
    ignored: int  # files without an image's extension, images outside class folders
    seconds: float


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Where an encoded image is stored."""

    name: str  # shown in messages
    path: str
    offset: int
    length: int
    key: str = ""
    label: int = 0
    crc32: int | None = None

    def read_whole(self) -> tuple[bytes, str | None]:
        """(bytes, None) of a good image, (the bytes that exist, reason) of a bad one."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                encoded = os.pread(file.fileno(), self.length, self.offset)
        except OSError as error:
            return b"", f"cannot be read: {error.strerror}"
        if self.crc32 is not None and zlib.crc32(encoded) != self.crc32:
            return encoded, "damaged: the bytes are not those that were packed (CRC-32 differs)"
        return encoded, fault(encoded)


def check(root: Path, *, workers: int | None = None, progress: Progress | None = None) -> CheckReport:
    """Decodes every image under `root` in place; in a packed set it also compares the CRC-32 with that of packing.

    Raises DataError if no images can be read in place (archives are checked while they are packed).
    """
    started = time.monotonic()
    root = root.expanduser().absolute()
    wrong: list[tuple[str, str]] = []
    if (root / COMPLETE).exists():
        index, ignored = open_index(root), 0
        crc32 = index.crc32
        assert crc32 is not None
        images = [StoredImage(index.file(n), *index.location(n), crc32=int(crc32[n])) for n in range(len(index))]
    else:
        listing = find(root)
        images, ignored = list(stored_images(listing)), listing.ignored
        wrong = list(listing.set_aside)
    tasks = [images[start : start + CHECKED_PER_TASK] for start in range(0, len(images), CHECKED_PER_TASK)]
    bad, done = list(wrong), 0
    for position, faults in in_processes(check_images, tasks, workers or num_cpus()):
        bad.extend(faults)
        done += len(tasks[position])
        if progress:
            progress("checking", done, len(images))
    return CheckReport(
        images=len(images) + len(wrong),
        bad=tuple(sorted(bad)),
        checksums=any(image.crc32 is not None for image in images),
        ignored=ignored,
        seconds=time.monotonic() - started,
    )


def check_images(images: Sequence[StoredImage]) -> list[tuple[str, str]]:
    """(name, reason) of each bad image."""
    reasons = ((image.name, image.read_whole()[1]) for image in images)
    return [(name, reason) for name, reason in reasons if reason]


def fault(encoded: bytes) -> str | None:
    """Why these bytes cannot be used as an image, or None after decoding every pixel."""
    from PIL import Image

    reason = looks_whole(encoded)
    if reason:
        return reason
    size = upright_size(encoded)
    if size is None:
        return f"not an image (its {kind(encoded)} header gives no size)"
    if size[0] * size[1] > MAX_PIXELS:
        return f"absurd size: {size[1]} x {size[0]}, above the limit of {MAX_PIXELS:,} pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata and large pictures, which are not faults
            with Image.open(io.BytesIO(encoded)) as image:
                image.load()
    except Exception as error:  # Pillow's plugins raise anything on damaged data
        return f"does not decode: {error}"
    return None


def stored_images(listing: Listing) -> Iterator[StoredImage]:
    """The images of a listing; their keys are unique within train and within val."""
    used: set[tuple[bool, str]] = set()
    for row, name in enumerate(listing.names):
        path = f"{listing.root}/{listing.held_by(row)}"
        shown = name if listing.shards is None else f"{listing.held_by(row)}/{name}"
        key = stem = _key(name, strip_split=listing.shards is None)
        repeat = 1
        while (row < listing.num_train, key) in used:
            repeat += 1
            key = f"{stem}-{repeat}"
        used.add((row < listing.num_train, key))
        yield StoredImage(shown, path, int(listing.offset[row]), int(listing.length[row]), key, int(listing.label[row]))


def _key(name: str, strip_split: bool) -> str:
    """The key class/stem without dots, as webdataset requires; a hash if it is too long for a tar header."""
    top, _, below = name.partition("/")
    folder, _, base = (below if strip_split and top in SPLITS else name).rpartition("/")
    key = os.path.splitext(base)[0].replace(".", "_")
    key = f"{folder}/{key}" if folder else key
    return key if len(os.fsencode(key)) <= 80 else f"long/{sha256(os.fsencode(key)).hexdigest()[:40]}"
