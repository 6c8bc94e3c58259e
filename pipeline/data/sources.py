"""Lists the images of class folders or tar shards in a fixed order, train first.

Class folders: train/<class>/** and val/<class>/**, or <class>/** alone. Tar shards: train-*.tar and val-*.tar, or
train/*.tar and val/*.tar, of KEY.jpg|jpeg|png with KEY.cls (an ASCII integer, a 0-based line of classes.txt).
Compressed shards and tars of class folders are recognised, and refused with the command that packs them.
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
_EXPECTED = "train/<class>/*.jpg with val/<class>/*.jpg, <class>/*.jpg, or train-*.tar with val-*.tar and classes.txt"
_SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|val|validation)(?=[-_.]|\d)", re.IGNORECASE)


@dataclass(frozen=True)
class SourceLayout:
    """The layout of a root: its tars or folders, each with its split.

    The split is None for a tar of class folders and for a plain folder of class folders.
    """

    root: Path
    tars: tuple[tuple[str | None, Path], ...] = ()
    folders: tuple[tuple[str | None, Path], ...] = ()  # (split, folder of class folders)

    @property
    def needs_packing(self) -> str | None:
        """Why training cannot read the images in place, or None."""
        if any(not path.name.lower().endswith(".tar") for _, path in self.tars):
            return "compressed tars, which have no random access"
        return "a tar of class folders, not of KEY.jpg with KEY.cls" if any(s is None for s, _ in self.tars) else None


def layout(root: Path) -> SourceLayout:
    """The layout of a root. Raises DataError if `root` does not exist, is empty or has an unknown layout."""
    if root.is_file():
        if not TAR.search(root.name):
            raise DataError(f"{root}: a file, but not a tar; expected {_EXPECTED}", key="data.root", subject=root)
        return SourceLayout(root.parent, tars=((None, root),))
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; expected {_EXPECTED} in it. Give another folder (in a recipe: data.root), or "
            f"generate a small set for a first try: adaptnet data toy {root}",
            key="data.root",
            subject=root,
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
        raise DataError(
            f"{root}: contains neither class folders nor tars; expected {_EXPECTED}", key="data.root", subject=root
        )
    return SourceLayout(root, tars=tuple(tars))


def find(root: Path) -> Listing:
    """The images under `root`, for training that reads them in place.

    Raises DataError if that is impossible; the message contains the command that packs them.
    """
    laid_out = layout(root)
    if laid_out.needs_packing:
        raise DataError(
            f"{root}: contains {laid_out.needs_packing}. Pack it once and train on the result:\n"
            f"  adaptnet data pack {root} {default_destination(root)}",
            key="data.root",
            subject=root,
        )
    return (
        from_shards(root, laid_out.tars, read_classes(root)) if laid_out.tars else from_folders(root, laid_out.folders)
    )


def default_destination(root: Path) -> Path:
    """The folder that messages suggest for the pack of `root`."""
    return Path("packed") / TAR.sub("", root.resolve().name)


def folders_unchanged(root: Path, folders: dict[str, int]) -> bool:
    """Whether the class folders are those of a listing, with the same modification times.

    This finds added and removed files, but no file that was overwritten in place.
    """
    try:
        laid_out = layout(root)
        present = {path.relative_to(root).as_posix() for _, folder in laid_out.folders for path in subfolders(folder)}
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
