"""Lists the images of class folders or tar shards in a fixed order, train first.

Class folders: train/<class>/** and val/<class>/**, or <class>/** alone. Tar shards: train-*.tar and val-*.tar, or
train/*.tar and val/*.tar, of KEY.jpg|jpeg|png with KEY.cls (an integer, a 0-based line of classes.txt, or the name of
a class), KEY.json or KEY.txt. Splits may have other usual names (naming.SPLIT_WORDS), and folders above them.
Compressed shards and tars of class folders are recognised, and refused with the command that packs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.account import Tally
from pipeline.data.class_names import CLASSES, JSONS, read_classes
from pipeline.data.folders import class_folders, count_files, from_folders, why_left_out
from pipeline.data.labels import SIDECARS
from pipeline.data.listing import TAR, Listing, packing_command
from pipeline.data.naming import OURS, is_system, is_visible, shown, split_of, splits_of_tar
from pipeline.data.tars import Tars, check_not_imagenet, first_names, from_shards
from pipeline.data.tree import ClassFolders, FolderTree, entries, find_class_folders, is_folder
from pipeline.errors import DataError

_EXPECTED = "train/<class>/*.jpg with val/<class>/*.jpg, <class>/*.jpg, or train-*.tar with val-*.tar and classes.txt"


@dataclass(frozen=True)
class SourceLayout:
    """The layout of a root: its tars, each with its split, or its class folders.

    The split of a tar is None if its name names none, as for a tar of class folders. unused: tars of another split.
    """

    root: Path
    tars: tuple[tuple[str | None, Path], ...] = ()
    folders: ClassFolders | None = None
    unused: tuple[Path, ...] = ()

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
            f"generate a small set for a first try: adaptnet data toy toy-data",
            key="data.root",
            subject=root,
        )
    tars = _tars_in(root)
    named = [(split, path) for split, path in tars if split is not None]
    found = None if named and not _has_split_folders(root) else find_class_folders(FolderTree(root), read_classes(root))
    if found is not None:
        _check_not_mixed(root, found, named)
        return SourceLayout(root, folders=found)
    if not tars:
        raise DataError(
            f"{root}: contains neither class folders nor tars; expected {_EXPECTED}", key="data.root", subject=root
        )
    return _of_tars(root, tars)


def _has_split_folders(root: Path) -> bool:
    """Whether folders named as splits hold more than tars."""
    places = [root / entry.name for entry in entries(str(root)) if is_folder(entry) and split_of(entry.name)]
    return any(FolderTree(place).folders_alone("") != () for place in places)


def _check_not_mixed(root: Path, found: ClassFolders, tars: Sequence[tuple[str, Path]]) -> None:
    """Raises DataError if a split is class folders and another one a tar."""
    have = {split for split, _ in found.splits}
    other = next((path for split, path in tars if split == "val" and None not in have and "val" not in have), None)
    if other is not None:
        raise DataError(
            f"{root}: train is class folders, but val is the tar {shown(other.name)}; unpack it, or pack each and use "
            "the shards, or move it out of the root: then a share of train (data.validation_share) is drawn",
            key="data.root",
            subject=other.name,
        )


def _of_tars(root: Path, tars: Sequence[tuple[str | None, Path]]) -> SourceLayout:
    """The test split is val where there is no other val. Raises DataError for tars of no split beside others."""
    nameless = [path.name for split, path in tars if split is None]
    if len(nameless) < len(tars) and nameless:
        check_not_imagenet_archive(tars)
        listed = ", ".join(map(shown, nameless[:3]))
        raise DataError(
            f"{root}: {listed} is neither train, val nor test by its name, beside tars that are; rename it, or move it "
            "out of the root",
            key="data.root",
            subject=listed,
        )
    has_val = any(split == "val" for split, _ in tars)
    used = [("val" if split == "test" else split, path) for split, path in tars if split != "test" or not has_val]
    unused = [path for split, path in tars if split == "test" and has_val]
    return SourceLayout(root, tars=tuple(used), unused=tuple(unused))


def find(root: Path) -> Listing:
    """The images under `root`, for training that reads them in place.

    Raises DataError if that is impossible; the message contains the command that packs them.
    """
    laid_out = layout(root)
    if laid_out.needs_packing:
        check_not_imagenet_archive(laid_out.tars)
        raise DataError(
            f"{root}: contains {laid_out.needs_packing}. Pack it once and train on the result:\n"
            f"  {packing_command(root)}",
            key="data.root",
            subject=root,
        )
    if laid_out.folders is not None:
        return from_folders(root, laid_out.folders)
    return from_shards(root, laid_out.tars, count_beside_tars(laid_out))


def check_not_imagenet_archive(tars: Tars) -> None:
    """Raises DataError if the tars are ImageNet's own or a mirror's, by the names of their first members."""
    for _, path in tars[:2]:
        names = first_names(path)
        if not any(name.lower().endswith(SIDECARS) for name in names) and not any("/" in name for name in names):
            check_not_imagenet(path, names)


def count_beside_tars(laid_out: SourceLayout) -> Tally:
    """Counts the files of a root of tars that are no part of it."""
    tally, used = Tally(), {path for _, path in laid_out.tars}
    for entry in entries(str(laid_out.root)) if laid_out.root.is_dir() else ():
        path = laid_out.root / entry.name
        if path in used or entry.name in (CLASSES, *JSONS, *OURS) or path in {each.parent for each in used}:
            continue
        if path in laid_out.unused or path in {each.parent for each in laid_out.unused}:
            tally.add("tar of a test split", entry.name, lost=False)
        elif is_folder(entry) and is_visible(entry.name):
            count_files(laid_out.root, entry.name, "beside the tars", tally, lost=True)
        else:
            reason, lost = why_left_out(entry)
            tally.add(reason, entry.name, lost=lost and not is_system(entry.name))
    return tally


def folders_unchanged(root: Path, folders: dict[str, int]) -> bool:
    """Whether the class folders are those of a listing, with the same modification times.

    This finds added and removed files, but no file that was overwritten in place.
    """
    try:
        found = layout(root).folders
        if found is None:
            return False
        places = [root / folder for _, folder in found.splits]
        present = {path.relative_to(root).as_posix() for place in places for path in class_folders(place)}
        return present <= folders.keys() and all((root / n).stat().st_mtime_ns == t for n, t in folders.items())
    except (OSError, DataError):
        return False


def _tars_in(root: Path) -> list[tuple[str | None, Path]]:
    """(split, path) of the tars in a root and in folders that are named as splits."""
    folders = [root / entry.name for entry in entries(str(root)) if is_folder(entry) and split_of(entry.name)]
    return [
        (split_of(place.name) if place != root else _split_by_name(path), path)
        for place in [root, *sorted(folders)]
        for path in sorted(place / entry.name for entry in entries(str(place)))
        if TAR.search(path.name) and is_visible(path.name) and path.is_file()
    ]


def _split_by_name(path: Path) -> str | None:
    splits = splits_of_tar(TAR.sub("", path.name))
    return next(iter(splits)) if len(splits) == 1 else None
