"""Finds the images under a root: class folders or tar shards -> Listing, in a fixed order, train rows first.

Class folders: train/<class>/** and val/<class>/**, or <class>/** alone. Tar shards: train-*.tar and val-*.tar, or
train/*.tar and val/*.tar, of KEY.jpg|jpeg|png with KEY.cls (ASCII integer, 0-based line of classes.txt).
Compressed shards and tars of class folders are found too, and refused with the command that packs them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.folders import from_folders, subfolders
from pipeline.data.listing import SPLITS, Listing, read_classes
from pipeline.data.tars import from_shards
from pipeline.errors import DataError

TAR = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
_LOOKED_FOR = "train/<class>/*.jpg with val/<class>/*.jpg, <class>/*.jpg, or train-*.tar with val-*.tar and classes.txt"
_SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|val|validation)(?=[-_.]|\d)", re.IGNORECASE)


@dataclass(frozen=True)
class SourceLayout:
    """How a root is laid out. `tars` by split; a split of None is a tar of class folders, or a plain folder."""

    root: Path
    tars: tuple[tuple[str | None, Path], ...] = ()
    folders: tuple[tuple[str | None, Path], ...] = ()  # (split, folder of class folders)

    @property
    def needs_packing(self) -> str | None:
        """Why training cannot read it as it is, or None."""
        if any(not path.name.lower().endswith(".tar") for _, path in self.tars):
            return "compressed tars, which cannot be read at random"
        return "a tar of class folders, not of KEY.jpg with KEY.cls" if any(s is None for s, _ in self.tars) else None


def layout(root: Path) -> SourceLayout:
    """Raises DataError where `root` is missing, empty or of no known layout."""
    if root.is_file():
        if not TAR.search(root.name):
            raise DataError(f"{root}: a file, but no tar; looked for {_LOOKED_FOR}")
        return SourceLayout(root.parent, tars=((None, root),))
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; looked there for {_LOOKED_FOR}. Name another folder (in a recipe: data.root), or "
            f"draw a small set to try things on: adaptnet data toy {root}"
        )
    splits = [(SPLITS[name], root / name) for name in SPLITS if (root / name).is_dir()]
    if any(subfolders(folder) for _, folder in splits):
        return SourceLayout(root, folders=tuple(splits))
    tars = [(_split_of(path, root), path) for path in _tars_in(root)]
    named = [(split, path) for split, path in tars if split is not None]
    if named:
        return SourceLayout(root, tars=tuple(named))
    if not splits and subfolders(root):
        return SourceLayout(root, folders=((None, root),))
    if not tars:
        raise DataError(f"{root}: holds no class folders and no tars; looked for {_LOOKED_FOR}")
    return SourceLayout(root, tars=tuple(tars))


def find(root: Path) -> Listing:
    """The images under `root`, which training reads in place. Raises DataError where it cannot, with the way out."""
    found = layout(root)
    if found.needs_packing:
        raise DataError(
            f"{root}: holds {found.needs_packing}. Pack it once and train on the result:\n"
            f"  adaptnet data pack {root} {default_destination(root)}"
        )
    return from_shards(root, found.tars, read_classes(root)) if found.tars else from_folders(root, found.folders)


def default_destination(root: Path) -> Path:
    """Where the pack of `root` may go if the user says nothing better."""
    return Path("packed") / TAR.sub("", root.resolve().name)


def folders_unchanged(root: Path, folders: dict[str, int]) -> bool:
    """Whether the class folders are those of a listing and none of them lost or got an entry since.

    A file that was overwritten in place does not show: that needs a look at every file.
    """
    try:
        found = layout(root)
        present = {path.relative_to(root).as_posix() for _, folder in found.folders for path in subfolders(folder)}
        return present <= folders.keys() and all((root / n).stat().st_mtime_ns == t for n, t in folders.items())
    except (OSError, DataError):
        return False


def _split_of(path: Path, root: Path) -> str | None:
    if path.parent != root:
        return SPLITS[path.parent.name]
    match = _SPLIT_IN_NAME.search(path.name)
    return SPLITS[match[1].lower()] if match else None


def _tars_in(root: Path) -> list[Path]:
    places = [root, *(root / name for name in SPLITS if (root / name).is_dir())]
    return sorted(path for place in places for path in place.iterdir() if TAR.search(path.name) and path.is_file())
