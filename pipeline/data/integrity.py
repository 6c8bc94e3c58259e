"""Finds damage in an index folder: sizes, types and checksums of its columns, before anything is read from them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.runs.files import read_json

CHECKSUMS = "checksums.json"  # {file: [bytes, CRC-32]}; an index that an older version wrote has none
COLUMNS: Mapping[str, type[np.generic]] = {  # of each image
    **dict.fromkeys(("shard", "label", "height", "width"), np.int32),
    **dict.fromkeys(("offset", "length"), np.int64),
    "name_hash": np.uint64,
}


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files in a folder that is being made."""
    sums = {path.name: _measured(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")


def damage(folder: Path, images: int) -> str | None:
    """What is wrong with the files of an index of so many images; None if nothing is."""
    try:
        return _changed(folder) if (folder / CHECKSUMS).exists() else _misshapen(folder, images)
    except (OSError, ValueError, EOFError) as error:
        return str(error)


def _changed(folder: Path) -> str | None:
    sums = read_json(folder / CHECKSUMS)
    needed = {"meta.json", "names.npy", "names_start.npy", *(f"{name}.npy" for name in COLUMNS)}
    if not isinstance(sums, dict) or not needed <= set(sums):
        return f"{CHECKSUMS} is damaged"
    wrong = [name for name, measured in sums.items() if _measured(folder / name) != measured]
    return f"{wrong[0]} differs from its checksum" if wrong else None


def _misshapen(folder: Path, images: int) -> str | None:
    shapes: Mapping[str, tuple[int, type[np.generic]]] = {
        **{name: (images, kind) for name, kind in COLUMNS.items()},
        "names_start": (images + 1, np.int64),
    }
    for name, (length, kind) in shapes.items():
        column = np.load(folder / f"{name}.npy", mmap_mode="r")
        if column.shape != (length,) or column.dtype != kind:
            return f"{name}.npy has another shape or type"
    start, names = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("names_start", "names"))
    whole = start[0] == 0 and start[-1] == len(names) and bool((np.diff(start) >= 0).all())
    return None if whole else "names.npy does not fit names_start.npy"


def _measured(path: Path) -> list[int]:
    crc = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [size, crc]
