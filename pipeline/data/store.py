"""Writes an index folder: sizes from the images' headers, read in parallel; one .npy per column; names as one blob.

The folder is written atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.data.image_headers import HEAD_BYTES, MAX_BYTES, MAX_PIXELS, upright_size
from pipeline.data.integrity import damage, write_checksums
from pipeline.data.listing import Listing
from pipeline.errors import DataError
from pipeline.runs.files import whole_folder

FORMAT = 1
Progress: TypeAlias = Callable[[str, int, int], None]  # (task, done, total); with total 0 a message to be shown once
HEADER_THREADS = 16
HEADERS_PER_TASK = 1024


def read_sizes(listing: Listing, progress: Progress | None = None) -> NDArray[np.int32]:
    """Upright (height, width) of each image, [N, 2]; (0, 0) if the header is unreadable or its size absurd."""
    sizes = np.zeros((len(listing.names), 2), dtype=np.int32)
    starts = range(0, len(sizes), HEADERS_PER_TASK)

    def read(start: int) -> int:
        rows = range(start, min(start + HEADERS_PER_TASK, len(sizes)))
        sizes[rows.start : rows.stop] = _sizes_of(listing, rows)
        return len(rows)

    done = 0
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        for count in threads.map(read, starts):
            done += count
            if progress:
                progress("reading image headers", done, len(sizes))
    return sizes


def _sizes_of(listing: Listing, rows: range) -> list[tuple[int, int]]:
    opened: dict[str, int] = {}
    sizes = []
    try:
        for row in rows:
            path = f"{listing.root}/{listing.held_by(row)}"
            sizes.append(_size_of(path, opened, int(listing.offset[row]), int(listing.length[row])))
            if listing.shards is None and (descriptor := opened.pop(path, None)) is not None:
                os.close(descriptor)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return sizes


def _size_of(path: str, opened: dict[str, int], offset: int, length: int) -> tuple[int, int]:
    if length > MAX_BYTES:
        return 0, 0
    try:
        if path not in opened:
            opened[path] = open_file(path)
        head = os.pread(opened[path], min(length, HEAD_BYTES), offset)
        size = upright_size(head, partial=length > HEAD_BYTES)
        if size is None and length > HEAD_BYTES:
            size = upright_size(os.pread(opened[path], length, offset))
    except OSError:
        return 0, 0
    return size if size and size[0] * size[1] <= MAX_PIXELS else (0, 0)


def open_file(path: str) -> int:
    """A descriptor for `os.pread`. Never waits, as for the writer of a FIFO, of which reading then fails."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def write(
    listing: Listing,
    sizes: NDArray[np.int32],
    places: Sequence[Path],
    crc32: NDArray[np.uint32] | None = None,
) -> Path:
    """Writes an index folder, named by the listing's key, into the first of `places` that is writable; returns it.

    sizes [N, 2] upright (height, width). The folder of another process that was faster is used as it is.
    Raises DataError if no place is writable.
    """
    columns: dict[str, NDArray[np.generic]] = {
        "shard": listing.shard,
        "offset": listing.offset,
        "length": listing.length,
        "label": listing.label,
        "height": np.ascontiguousarray(sizes[:, 0]),
        "width": np.ascontiguousarray(sizes[:, 1]),
    }
    columns |= {"crc32": crc32} if crc32 is not None else {}
    columns |= _name_columns(listing.names)
    meta = {
        "format": FORMAT,
        "images": len(listing.names),
        "num_train": listing.num_train,
        "has_splits": listing.has_splits,
        "classes": listing.classes,
        "shards": listing.shards,
        "identity": listing.identity,
        "ignored": sum(each.count for each in listing.left_out) - len(listing.set_aside),
        "set_aside": listing.set_aside,
    }
    meta |= {"left_out": [each.to_json() for each in listing.left_out]} if listing.left_out else {}
    meta |= {"notes": listing.notes} if listing.notes else {}
    refused = []
    for place in places:
        try:
            return _write_aside(place, listing.key, columns, meta, listing.folders)
        except OSError as error:
            refused.append(f"{place} ({error.strerror})")
    raise DataError(
        f"the index of {listing.root} cannot be written to {', '.join(refused)}; set data.index",
        key="data.index",
        subject=listing.root,
    )


def _write_aside(
    place: Path, key: str, columns: dict[str, NDArray[np.generic]], meta: dict[str, object], folders: dict[str, int]
) -> Path:
    try:
        with whole_folder(place / key) as aside:
            for name, column in columns.items():
                np.save(aside / f"{name}.npy", column)
            (aside / "folders.json").write_text(json.dumps(folders), encoding="utf-8")
            (aside / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            write_checksums(aside)
    except OSError:
        if damage(place / key, len(columns["label"])) is not None:
            raise
    return place / key


def _name_columns(names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    start = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(each) for each in encoded], out=start[1:])
    digests = b"".join(hashlib.blake2b(each, digest_size=8).digest() for each in encoded)
    return {
        "names": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "names_start": start,
        "name_hash": np.frombuffer(digests, dtype="<u8"),
    }
