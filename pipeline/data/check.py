"""Decodes every image of a set and reports which are bad, and why; changes nothing."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pipeline.data.account import LeftOut
from pipeline.data.index import COMPLETE, open_index
from pipeline.data.listing import Listing
from pipeline.data.naming import split_of
from pipeline.data.parallel import in_processes, num_cpus
from pipeline.data.sources import find
from pipeline.data.store import Progress
from pipeline.data.verdict import DecodeError, Pixels, WholeDecoder, read_image

CHECKED_PER_TASK = 256


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`."""

    images: int  # number of images checked
    bad: tuple[tuple[str, str], ...]  # (file, reason)
    checksums: bool  # whether the bytes were compared with the CRC-32s of packing
    left_out: tuple[LeftOut, ...]  # all that is not used, by reason
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

    def read_whole(self, decoder: WholeDecoder) -> tuple[bytes, Pixels]:
        """The bytes and the upright picture [H, W, 3]. Raises DecodeError with the reason if the image is bad."""
        encoded = read_image(self.path, self.offset, self.length)
        if self.crc32 is not None and zlib.crc32(encoded) != self.crc32:
            raise DecodeError("damaged: the bytes are not those that were packed (CRC-32 differs)")
        return encoded, decoder.picture(encoded)


def check(root: Path, *, workers: int | None = None, progress: Progress | None = None) -> CheckReport:
    """Decodes every image under `root` in place; in a packed set it also compares the CRC-32 with that of packing.

    Raises DataError if no images can be read in place (archives are checked while they are packed).
    """
    started = time.monotonic()
    root = root.expanduser().absolute()
    wrong: list[tuple[str, str]] = []
    if (root / COMPLETE).exists():
        index = open_index(root)
        left_out = index.meta.left_out
        crc32 = index.crc32
        assert crc32 is not None
        images = [StoredImage(index.file(n), *index.location(n), crc32=int(crc32[n])) for n in range(len(index))]
    else:
        listing = find(root)
        images, left_out = list(stored_images(listing)), listing.left_out
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
        left_out=left_out,
        seconds=time.monotonic() - started,
    )


def check_images(images: Sequence[StoredImage]) -> list[tuple[str, str]]:
    """(name, reason) of each bad image."""
    decoder, bad = WholeDecoder(), []
    for image in images:
        try:
            image.read_whole(decoder)
        except DecodeError as error:
            bad.append((image.name, str(error)))
    return bad


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
    folder, _, base = (below if strip_split and split_of(top) and below.count("/") else name).rpartition("/")
    key = os.path.splitext(base)[0].replace(".", "_")
    key = f"{folder}/{key}" if folder else key
    return key if len(os.fsencode(key)) <= 80 else f"long/{sha256(os.fsencode(key)).hexdigest()[:40]}"
