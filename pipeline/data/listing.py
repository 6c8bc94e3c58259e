"""A list of images, from names and sizes alone, in a fixed order: what an index is built from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

SPLITS = {"train": "train", "val": "val", "validation": "val"}  # folder or part of a tar's name -> split
SCAN_THREADS = 16


@dataclass(frozen=True)
class Listing:
    """The images of a set, from names and sizes alone: nothing is decoded.

    `names` are paths under the root, or members of a tar; `shard offset length label` are columns over them.
    `shards` are tars relative to the root; None for loose files, where `shard` numbers the file itself.
    """

    root: Path
    classes: tuple[str, ...]
    names: list[str]
    shards: tuple[str, ...] | None
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    label: NDArray[np.int32]
    num_train: int
    has_splits: bool
    times: NDArray[np.int64]  # ns; of each loose file, or of each tar
    folders: dict[str, int] = field(default_factory=dict)  # ns, of every class folder and those within
    set_aside: list[tuple[str, str]] = field(default_factory=list)  # (name, reason): labels and keys that are wrong
    ignored: int = 0  # files that are no images by extension, images in no class folder

    def held_by(self, row: int) -> str:
        """The file that holds the image, relative to the root."""
        return self.names[row] if self.shards is None else self.shards[self.shard[row]]

    @cached_property
    def key(self) -> str:
        """16 hex digits that change when a name, size or time does."""
        return hashlib.sha256(self.identity.encode() + self.times.tobytes()).hexdigest()[:16]

    @cached_property
    def identity(self) -> str:
        """16 hex digits of names, sizes, labels, classes and splits; the place and the times do not count."""
        digest = hashlib.sha256(repr((self.classes, self.shards, self.num_train, self.has_splits)).encode())
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        for column in (self.shard, self.length, self.label):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def read_classes(root: Path) -> tuple[str, ...]:
    """The lines of classes.txt; empty without the file. Raises DataError if it is empty or names a class twice."""
    path = root / "classes.txt"
    if not path.exists():
        return ()
    classes = tuple(line.strip() for line in os.fsdecode(path.read_bytes()).splitlines() if line.strip())
    twice = sorted({name for name in classes if classes.count(name) > 1}) if len(set(classes)) < len(classes) else []
    if twice or not classes:
        raise DataError(f"{path}: {'names twice: ' + ', '.join(twice[:5]) if twice else 'empty'}; one class a line")
    return classes
