"""Packs a set of images into tar shards with an index; decodes every image; lists bad ones in a report.

Source: class folders, tar shards (.tar, .tar.gz), or a tar of class folders. Destination: train-000000.tar … and
val-000000.tar … of KEY.jpg|png with KEY.cls, classes.txt, index/, report.json and, last, COMPLETE.json. The bytes
depend only on the source and the options, not on the number of processes. Train is shuffled with a fixed seed, so that
a window over a few shards contains all classes. An interrupted pack resumes: finished shards are kept.
"""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
from numpy.typing import NDArray

from pipeline.data.account import LeftOut
from pipeline.data.archives import key_of_tars, listing_of_tars
from pipeline.data.check import StoredImage, decoded, stored_images
from pipeline.data.class_names import write_classes
from pipeline.data.folders import from_folders
from pipeline.data.image_headers import kind, orientation, upright_size
from pipeline.data.index import COMPLETE, LARGEST_SHARD, PACKING
from pipeline.data.listing import Listing
from pipeline.data.parallel import in_processes, num_cpus
from pipeline.data.sources import layout
from pipeline.data.store import Progress, write
from pipeline.data.verdict import DecodeError, Pixels
from pipeline.errors import DataError, ResourceError
from pipeline.runs.files import move_file, write_json

QUALITY = 92  # JPEG quality of images that `side` shrinks
MIX_SEED = 20_220  # seed of the order of train; part of the format, so it never changes
SHARDS_AIMED_AT = 64
SMALLEST_SHARD = 4 << 20  # bytes
LONGEST_JPEG = 65_500  # pixels that the encoder takes
_SUFFIX = {"png": ".png", "webp": ".webp", "bmp": ".bmp", "tiff": ".tif"}  # .jpg for JPEG, and for what is named as it


class PackOrigin(TypedDict):
    """What a pack is made from: if it differs, the pack is another one."""

    source: str
    side: int | None
    quality: int | None
    shard_bytes: int | None


class ShardRecord(TypedDict):
    """What a finished shard contains."""

    bytes: int
    images: int  # bad ones included
    rows: list[tuple[str, int, int, int, int, int, int]]  # name, label, offset, length, height, width, CRC-32
    bad: list[tuple[str, str]]  # (file, reason)


@dataclass(frozen=True)
class PackReport:
    """What a pack contains and what was left out."""

    destination: Path
    images: dict[str, int]  # number of images by split
    num_classes: int
    shards: int
    kept_shards: int  # shards that an earlier call finished
    bytes: int
    set_aside: tuple[tuple[str, str], ...]  # (file, reason)
    left_out: tuple[LeftOut, ...]  # all that is not used of the source, by reason
    seconds: float


def pack(
    source: Path,
    destination: Path,
    *,
    side: int | None = None,
    quality: int = QUALITY,
    shard_bytes: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Packs `source` into `destination` in parallel; after an interruption, the same call resumes.

    Images are copied byte for byte. With `side` (pixels), those with a longer shorter side are turned upright, shrunk
    (antialiased) and written as JPEG of `quality`. Raises DataError if the source has no images or the destination
    contains something else, ResourceError on a full disk.
    """
    source, destination = source.expanduser().absolute(), destination.expanduser().absolute()
    if destination == source or source in destination.parents:
        raise DataError(
            f"{destination}: is inside the source {source}; pack to a folder outside of it",
            key="destination",
            subject=destination,
        )
    workers = workers or num_cpus()
    laid_out = layout(source)
    listing = from_folders(source, laid_out.folders) if laid_out.folders is not None else None
    return pack_listing(
        listing.key if listing else key_of_tars(laid_out),
        lambda scratch: listing or listing_of_tars(laid_out, scratch, workers, progress),
        destination,
        side=side,
        quality=quality,
        shard_bytes=shard_bytes,
        workers=workers,
        progress=progress,
    )


def pack_listing(
    key: str,
    make: Callable[[Path], Listing],
    destination: Path,
    *,
    side: int | None = None,
    quality: int = QUALITY,
    shard_bytes: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """`pack` for the images that `make(scratch)` lists; `key` changes whenever the images do.

    The scratch folder remains from one call to the next until the pack is complete.
    """
    started, workers = time.monotonic(), workers or num_cpus()
    made_from = PackOrigin(source=key, side=side, quality=quality if side else None, shard_bytes=shard_bytes)
    try:
        if not _claim(destination, made_from):
            return _report_of(destination, time.monotonic() - started, kept=None)
        with _only_one(destination):
            listing = make(destination / PACKING / "unpacked")
            tasks = _plan(listing, destination, shard_bytes, side, quality)
            due = [task for task in tasks if task.finished() is None]
            _pack_shards(due, workers, len(listing.names), progress)
            _finish(listing, destination, tasks, made_from)
    except OSError as error:
        raise ResourceError(
            f"{error.filename or destination}: {error.strerror or error}; free space or permit access, then run the "
            "same command again: finished shards are kept",
            key="destination",
            subject=error.filename or destination,
        ) from error
    return _report_of(destination, time.monotonic() - started, kept=len(tasks) - len(due))


def _pack_shards(due: Sequence[ShardTask], workers: int, total: int, progress: Progress | None) -> None:
    done = total - sum(len(task.images) for task in due)
    for position, _ in in_processes(pack_shard, due, workers):
        done += len(due[position].images)
        if progress:
            progress("packing", done, total)


def shrink(encoded: bytes, picture: Pixels, side: int, quality: int) -> bytes:
    """The upright picture [H, W, 3] of `encoded` with a shorter side of `side` pixels; `encoded` if it is not larger.

    As JPEG, or as PNG where it is too long for JPEG. A JPEG or PNG that EXIF turns is always encoded again.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    if min(height, width) <= side and orientation(encoded) == 1:
        return encoded
    scale = min(1.0, side / min(height, width))
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    small, buffer = Image.fromarray(picture).resize(shape, Image.Resampling.LANCZOS), io.BytesIO()
    small.save(buffer, "JPEG" if max(shape) <= LONGEST_JPEG else "PNG", quality=quality)
    return buffer.getvalue()


@dataclass(frozen=True)
class ShardTask:
    """One shard: its images in order, and where it is written."""

    name: str
    destination: Path
    images: tuple[StoredImage, ...]
    side: int | None
    quality: int

    @property
    def record(self) -> Path:
        """The file that lists what the finished shard contains."""
        return self.destination / PACKING / f"{self.name}.json"

    def finished(self) -> ShardRecord | None:
        """The record of this shard if it was packed before and still has the recorded size, else None."""
        try:
            record: ShardRecord = json.loads(self.record.read_text(encoding="utf-8"))
            size = (self.destination / self.name).stat().st_size
        except (OSError, ValueError):
            return None
        return record if record["bytes"] == size and record["images"] == len(self.images) else None


def _claim(destination: Path, made_from: PackOrigin) -> bool:
    """Reserves the destination for this pack; False if the pack is complete. Raises DataError if it is of another."""
    claim = destination / PACKING / "claim.json"
    holder = destination / COMPLETE if (destination / COMPLETE).exists() else claim
    if holder.exists():
        held = json.loads(holder.read_text(encoding="utf-8"))["made_from"]
        if held != made_from:
            differing = ", ".join(key for key, value in made_from.items() if held.get(key) != value)
            raise DataError(
                f"{destination}: contains a pack with a different {differing}; give another folder or delete it",
                key="destination",
                subject=differing,
            )
        return holder == claim
    strange = [path.name for path in destination.iterdir() if path.name != PACKING] if destination.exists() else []
    if strange:
        listed = ", ".join(sorted(strange)[:3])
        raise DataError(f"{destination}: not empty ({listed}); give a new folder", key="destination", subject=listed)
    write_json(claim, {"made_from": made_from}, indent=None)
    return True


@contextmanager
def _only_one(destination: Path) -> Iterator[None]:
    """Raises ResourceError while another process packs into `destination`."""
    with open(destination / PACKING / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"{destination}: another process is packing into it; wait for it",
                key="destination",
                subject=destination,
            ) from None
        yield


def _plan(
    listing: Listing, destination: Path, shard_bytes: int | None, side: int | None, quality: int
) -> list[ShardTask]:
    images = list(stored_images(listing))
    mixed = np.argsort(np.random.Philox(key=MIX_SEED).random_raw(listing.num_train), kind="stable")
    tasks = []
    for split, rows in (("train", mixed), ("val", np.arange(listing.num_train, len(images)))):
        for number, part in enumerate(_cut(listing.length[rows], shard_bytes)):
            chosen = tuple(images[row] for row in rows[part])
            tasks.append(ShardTask(f"{split}-{number:06d}.tar", destination, chosen, side, quality))
    return tasks


def _cut(lengths: NDArray[np.int64], shard_bytes: int | None) -> list[slice]:
    """Slices of about equal size in bytes; about SHARDS_AIMED_AT unless shards would be too small or too large."""
    if not len(lengths):
        return []
    total = int(lengths.sum())
    aim = shard_bytes or min(max(total // SHARDS_AIMED_AT, SMALLEST_SHARD), LARGEST_SHARD)
    count = min(max(1, round(total / aim)), len(lengths))
    ends = np.searchsorted(np.cumsum(lengths), np.arange(1, count) * total / count, side="left") + 1
    bounds = np.unique(np.concatenate([[0], ends, [len(lengths)]]))
    return [slice(int(start), int(stop)) for start, stop in pairwise(bounds)]


def pack_shard(task: ShardTask) -> None:
    """Writes one shard to a temporary file, renames it, then writes its record."""
    rows: list[tuple[str, int, int, int, int, int, int]] = []
    bad: list[tuple[str, str]] = []
    aside = task.destination / PACKING / f"{task.name}.part"
    with open(aside, "wb") as tar:
        for image, encoded, picture in decoded(task.images):
            if isinstance(picture, DecodeError):
                bad.append((image.name, str(picture)))
                continue
            if task.side is not None:
                encoded = shrink(encoded, picture, task.side, task.quality)
            name = image.key + _SUFFIX.get(kind(encoded) or "", ".jpg")
            offset = _add(tar, name, encoded)
            _add(tar, f"{image.key}.cls", str(image.label).encode())
            size = upright_size(encoded)
            assert size is not None
            rows.append((name, image.label, offset, len(encoded), *size, zlib.crc32(encoded)))
        tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE or tarfile.RECORDSIZE))
        size_of_tar = tar.tell()
    move_file(aside, task.destination / task.name)
    record = ShardRecord(bytes=size_of_tar, images=len(task.images), rows=rows, bad=bad)
    write_json(task.record, record, indent=None)


def _add(tar: BinaryIO, name: str, content: bytes) -> int:
    """Appends a member; returns the offset of its bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.write(member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
    start = tar.tell()
    tar.write(content)
    tar.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return start


def _finish(listing: Listing, destination: Path, tasks: Sequence[ShardTask], made_from: PackOrigin) -> None:
    """Writes index, classes, report and, last, the file that marks the pack as complete."""
    records = [task.finished() for task in tasks]
    assert None not in records
    shards = {task.name: record["bytes"] for task, record in zip(tasks, records, strict=True) if record}
    rows = [(number, *row) for number, record in enumerate(records) if record for row in record["rows"]]
    if not rows:
        raise DataError(
            f"{listing.root}: none of {len(listing.names)} images can be used", key="source", subject=listing.root
        )
    columns = np.array([row[2:] for row in rows], dtype=np.int64)  # label, offset, length, height, width, crc32
    num_train = sum(tasks[row[0]].name.startswith("train") for row in rows)
    packed = Listing(
        root=destination,
        classes=listing.classes,
        names=[row[1] for row in rows],
        shards=tuple(shards),
        shard=np.array([row[0] for row in rows], dtype=np.int32),
        offset=columns[:, 1].copy(),
        length=columns[:, 2].copy(),
        label=columns[:, 0].astype(np.int32),
        num_train=num_train,
        has_splits=listing.has_splits,
        times=np.zeros(len(shards), dtype=np.int64),
    )
    folder = write(packed, columns[:, 3:5].astype(np.int32), [destination / "index"], columns[:, 5].astype(np.uint32))
    write_classes(destination, listing.classes)
    bad = [*listing.set_aside, *(pair for record in records if record for pair in record["bad"])]
    report = {
        "images": {"train": num_train, "val": len(rows) - num_train},
        "num_classes": len(listing.classes),
        "bytes": sum(shards.values()),
        "set_aside": [{"file": name, "reason": reason} for name, reason in sorted(map(tuple, bad))],
        "left_out": [each.to_json() for each in listing.left_out],
    }
    write_json(destination / "report.json", report, indent=None)
    index = folder.relative_to(destination).as_posix()
    write_json(destination / COMPLETE, {"made_from": made_from, "shards": shards, "index": index}, indent=None)
    shutil.rmtree(destination / PACKING)


def _report_of(destination: Path, seconds: float, kept: int | None) -> PackReport:
    report = json.loads((destination / "report.json").read_text(encoding="utf-8"))
    complete = json.loads((destination / COMPLETE).read_text(encoding="utf-8"))
    return PackReport(
        destination=destination,
        images=report["images"],
        num_classes=report["num_classes"],
        shards=len(complete["shards"]),
        kept_shards=len(complete["shards"]) if kept is None else kept,
        bytes=report["bytes"],
        set_aside=tuple((each["file"], each["reason"]) for each in report["set_aside"]),
        left_out=tuple(map(LeftOut.from_json, report.get("left_out", []))),  # packs of earlier versions have none
        seconds=seconds,
    )
