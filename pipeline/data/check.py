"""Decodes every image of a set and reports which are bad, and why; changes nothing."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pipeline.data.account import LeftOut
from pipeline.data.image_headers import upright_size
from pipeline.data.index import COMPLETE, open_index
from pipeline.data.listing import Listing
from pipeline.data.naming import split_of
from pipeline.data.parallel import in_processes, num_cpus
from pipeline.data.sources import find
from pipeline.data.store import Progress
from pipeline.data.verdict import TOGETHER, DecodeError, Pixels, WholeDecoder, read_image

CHECKED_PER_TASK = 256
MOST_PIXELS = 1 << 25  # of images that are decoded together: 100 MB


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`."""

    images: int  # number of images checked
    bad: tuple[tuple[str, str], ...]  # (file, reason)
    checksums: bool  # whether the bytes were compared with the CRC-32s of packing
    left_out: tuple[LeftOut, ...]  # all that is not used, by reason
    seconds: float

    bad_share: float  # of all images or of those of train, the larger: what training compares with data.max_bad_share


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

    def read(self) -> bytes:
        """The encoded image. Raises DecodeError if it cannot be read or is not what was packed."""
        encoded = read_image(self.path, self.offset, self.length)
        if self.crc32 is not None and zlib.crc32(encoded) != self.crc32:
            raise DecodeError("damaged: the bytes are not those that were packed (CRC-32 differs)")
        return encoded


def check(root: Path, *, workers: int | None = None, progress: Progress | None = None) -> CheckReport:
    """Decodes every image under `root` in place; in a packed set it also compares the CRC-32 with that of packing.

    Raises DataError if no images can be read in place (archives are checked while they are packed).
    """
    started = time.monotonic()
    root = root.expanduser().absolute()
    wrong: list[tuple[str, str]] = []
    if (root / COMPLETE).exists():
        index = open_index(root)
        left_out, num_train = index.meta.left_out, index.meta.num_train
        crc32 = index.crc32
        assert crc32 is not None
        images = [StoredImage(index.file(n), *index.location(n), crc32=int(crc32[n])) for n in range(len(index))]
    else:
        listing = find(root)
        images, left_out, num_train = list(stored_images(listing)), listing.left_out, listing.num_train
        wrong = list(listing.set_aside)
    tasks = [images[start : start + CHECKED_PER_TASK] for start in range(0, len(images), CHECKED_PER_TASK)]
    bad, done = list(wrong), 0
    for position, faults in in_processes(check_images, tasks, workers or num_cpus()):
        bad.extend(faults)
        done += len(tasks[position])
        if progress:
            progress("checking", done, len(images))
    names = {name for name, _ in bad}
    train = [image.name in names for image in images[:num_train]]
    return CheckReport(
        images=len(images) + len(wrong),
        bad=tuple(sorted(bad)),
        checksums=any(image.crc32 is not None for image in images),
        left_out=left_out,
        bad_share=max(
            _share(len(bad), len(images) + len(wrong), left_out),
            _share(sum(train), len(train), [each for each in left_out if each.split == "train"]),
        ),
        seconds=time.monotonic() - started,
    )


def _share(bad: int, images: int, left_out: Sequence[LeftOut]) -> float:
    """The share of bad and lost images in these images and the lost ones."""
    lost = sum(each.count for each in left_out if each.lost)
    return (bad + lost) / max(1, images + lost)


def check_images(images: Sequence[StoredImage]) -> list[tuple[str, str]]:
    """(name, reason) of each bad image."""
    return [(image.name, str(picture)) for image, _, picture in decoded(images) if isinstance(picture, DecodeError)]


def decoded(images: Iterable[StoredImage]) -> Iterator[tuple[StoredImage, bytes, Pixels | DecodeError]]:
    """Each image with its bytes and its upright picture [H, W, 3], or why it is bad, in order."""
    decoder = WholeDecoder()
    for group in _groups(images):
        good = [content for _, content in group if isinstance(content, bytes)]
        pictures = iter(decoder.pictures(good))
        for image, content in group:
            yield (image, content, next(pictures)) if isinstance(content, bytes) else (image, b"", content)


def _groups(images: Iterable[StoredImage]) -> Iterator[list[tuple[StoredImage, bytes | DecodeError]]]:
    """The images with their bytes, as many at a time as are decoded together: few, and of few pixels."""
    group, pixels = list[tuple[StoredImage, bytes | DecodeError]](), 0
    for image in images:
        content: bytes | DecodeError
        try:
            content = image.read()
        except DecodeError as error:
            content = error
        height, width = (upright_size(content) if isinstance(content, bytes) else None) or (0, 0)
        if group and (len(group) == TOGETHER or pixels + height * width > MOST_PIXELS):
            yield group
            group, pixels = [], 0
        group.append((image, content))
        pixels += height * width
    yield group


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
