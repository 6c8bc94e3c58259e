"""The list of images from which an index is built: names and sizes in a fixed order."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.account import LeftOut

SCAN_THREADS = 16


@dataclass(frozen=True)
class Listing:
    """The images of a set, listed without decoding.

    `names` are paths under the root, or members of a tar; `shard offset length label` have an entry for each.
    `shards` are tars relative to the root, or None for loose files, of which `shard` is the number.
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
    times: NDArray[np.int64]  # modification times in ns of each loose file, or of each tar
    folders: dict[str, int] = field(default_factory=dict)  # times in ns of all class folders and their subfolders
    set_aside: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of images with a wrong label or key
    left_out: tuple[LeftOut, ...] = ()  # all that is not used, by reason and split; what is set aside is part of it
    notes: tuple[str, ...] = ()  # facts about the splits, each a sentence

    def held_by(self, row: int) -> str:
        """The file with the image, relative to the root."""
        return self.names[row] if self.shards is None else self.shards[self.shard[row]]

    @cached_property
    def key(self) -> str:
        """16 hex digits that change when a name, size, modification time or the account of what is left out changes."""
        account = repr((self.left_out, self.notes)).encode() if self.left_out or self.notes else b""
        return hashlib.sha256(self.identity.encode() + self.times.tobytes() + account).hexdigest()[:16]

    @cached_property
    def identity(self) -> str:
        """16 hex digits of names, sizes, labels, classes and splits, whatever the root and the modification times."""
        digest = hashlib.sha256(repr((self.classes, self.shards, self.num_train, self.has_splits)).encode())
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        for column in (self.shard, self.length, self.label):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


TAR = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)


def packing_command(root: Path) -> str:
    """The command that messages suggest for packing `root`."""
    return f"adaptnet data pack {root} {Path('packed') / TAR.sub('', root.resolve().name)}"
