"""Finds the splits and class folders in a tree of folders, on disk or in a tar.

Splits are recognised by their names (naming.split_of) and by structure: a split holds class folders, a class folder
holds images. A root in which these disagree is refused, never guessed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from pipeline.data.class_names import CLASSES
from pipeline.data.naming import is_visible, of_imagenet, shown, split_of, why_no_image
from pipeline.errors import DataError

MOST_WRAPPERS = 10  # of a root with more folders these are classes, and are not searched for splits
DEEPEST = 4  # levels of folders above the splits
LOOKED_AT = 10_000  # folders that are searched for an image


@dataclass(frozen=True)
class Glance:
    """What a folder holds directly: its visible folders and its images, by name."""

    folders: tuple[str, ...]
    images: tuple[str, ...]


class Tree(Protocol):
    """Folders below a root, which "" names."""

    @property
    def name(self) -> str:
        """The tree in messages."""
        ...

    def glance(self, at: str) -> Glance:
        """What the folder `at` holds. Raises DataError if it cannot be read."""
        ...

    def folders_alone(self, at: str) -> tuple[str, ...] | None:
        """The visible folders in `at`; None if it holds images itself, of which the first is enough."""
        ...


@dataclass(frozen=True)
class ClassFolders:
    """Where the class folders are: (split, the folder that contains them); the split of a plain folder is None.

    base: the folder that contains the splits. unused: (folder, reason, whether its images are lost).
    """

    base: str
    splits: tuple[tuple[str | None, str], ...]
    unused: tuple[tuple[str, str, bool], ...] = ()
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class FolderTree:
    """The folders on disk below `root`."""

    root: Path

    @property
    def name(self) -> str:
        """The root's path."""
        return str(self.root)

    def glance(self, at: str) -> Glance:
        """What a folder holds. Links that lead nowhere or to a folder that contains them are left out."""
        folder = str(self.root / at)
        found = entries(folder)
        folders = [each.name for each in found if _leads_on(each, folder)]
        images = [each.name for each in found if why_no_image(each.name) is None and not is_folder(each)]
        return Glance(tuple(sorted(folders)), tuple(sorted(images)))

    def folders_alone(self, at: str) -> tuple[str, ...] | None:
        """The visible folders in `at`; None at the first image."""
        folder, folders = str(self.root / at), []
        try:
            with os.scandir(folder) as found:
                for entry in found:
                    if _leads_on(entry, folder):
                        folders.append(entry.name)
                    elif why_no_image(entry.name) is None:
                        return None
        except OSError as error:
            raise unreadable(folder, error) from None
        return tuple(sorted(folders))


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, in no order. Raises DataError if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise unreadable(folder, error) from None


def unreadable(folder: str, error: OSError) -> DataError:
    """The error for a folder of which nothing can be said."""
    return DataError(
        f"{shown(folder)}: the folder cannot be read ({error.strerror}), so its images cannot be counted; permit "
        "access or move it out of the root",
        key="data.root",
        subject=folder,
    )


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # a chain of links without an end
        return False


def _leads_on(entry: os.DirEntry[str], folder: str) -> bool:
    return is_folder(entry) and is_visible(entry.name) and not is_loop(entry, folder)


def is_loop(entry: os.DirEntry[str], folder: str) -> bool:
    """Whether an entry of `folder` is a link to that folder or to one that contains it."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    return os.path.commonpath([os.path.realpath(folder), target]) == target


@dataclass(frozen=True)
class NameTree:
    """The folders of an archive, by the names of its images."""

    name: str
    images: Sequence[str]

    def glance(self, at: str) -> Glance:
        """What a folder of the archive holds."""
        folders, images = self._held[at]
        return Glance(tuple(sorted(folders)), tuple(sorted(images)))

    def folders_alone(self, at: str) -> tuple[str, ...] | None:
        """The folders in `at`; None if it holds images."""
        folders, images = self._held[at]
        return None if images else tuple(sorted(folders))

    @cached_property
    def _held(self) -> dict[str, tuple[set[str], set[str]]]:
        held: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
        for name in self.images:
            folder, _, base = name.rpartition("/")
            held[folder][1].add(base)
            while folder and folder.rpartition("/")[2] not in held[folder.rpartition("/")[0]][0]:
                folder, _, base = folder.rpartition("/")
                held[folder][0].add(base)
        return held


def find_class_folders(tree: Tree, classes: Collection[str], at: str = "") -> ClassFolders | None:
    """The class folders of a tree; None if it has none. `classes` are those that classes.txt lists.

    Raises DataError if splits and class folders cannot be told apart, or a split has images without class folders.
    """
    here = tree.glance(at)
    named = {name: split for name in here.folders if name not in classes and (split := split_of(name)) is not None}
    if named:
        return _of_splits(tree, at, here, named)
    if (inner := _wrapper(tree, at, here, classes)) is not None:
        return find_class_folders(tree, classes, inner)
    return ClassFolders(at, ((None, at),)) if here.folders else None


# ---- splits


def _of_splits(tree: Tree, at: str, here: Glance, named: dict[str, str]) -> ClassFolders | None:
    places = {name: _innermost(tree, _join(at, name)) for name in named}
    held = {name: tree.glance(place) for name, place in places.items()}
    with_classes = {name: split for name, split in named.items() if held[name].folders}
    flat = {name: split for name, split in named.items() if held[name].images and not held[name].folders}
    others = [name for name in here.folders if name not in named]
    if not with_classes:
        if not flat:
            return None
        raise _beside_classes(tree, at, sorted(flat), others) if others else _flat(tree, places, held, flat)
    _check_once(tree, at, with_classes)
    needed = {name: split for name, split in flat.items() if split != "test"}
    if needed:
        raise _flat(tree, places, held, needed)
    if empty := [name for name, split in named.items() if split != "test" and name not in with_classes]:
        raise _empty(tree, _join(at, empty[0]))
    return _used(at, places, with_classes, flat, others)


def _used(
    at: str, places: dict[str, str], with_classes: dict[str, str], flat: dict[str, str], others: Sequence[str]
) -> ClassFolders:
    """The test split is val where there is no other val."""
    found = {split: places[name] for name, split in with_classes.items()}
    unused = [(_join(at, name), "outside the splits", True) for name in others]
    unused += [(_join(at, name), "in a test split without class folders", False) for name in flat]
    notes: tuple[str, ...] = ()
    if "test" in found and "val" in found:
        unused.append((found.pop("test"), "in the test split", False))
    elif "test" in found:
        notes = (f"val is {shown(found['test'])}: there is no other validation split",)
        found["val"] = found.pop("test")
    return ClassFolders(at, tuple((split, found[split]) for split in sorted(found)), tuple(sorted(unused)), notes)


def _innermost(tree: Tree, at: str) -> str:
    """The folder itself, or one of the same split alone in it, as in training_set/training_set/."""
    held = tree.glance(at)
    alone = held.folders[0] if len(held.folders) == 1 and not held.images else None
    if alone is not None and split_of(alone) is not None and split_of(alone) == split_of(at.rpartition("/")[2]):
        return _innermost(tree, _join(at, alone))
    return at


def _check_once(tree: Tree, at: str, with_classes: dict[str, str]) -> None:
    for split in set(with_classes.values()):
        same = [name for name in with_classes if with_classes[name] == split]
        if len(same) > 1:
            listed = ", ".join(same)
            raise DataError(
                f"{_path(tree, at)}: {listed} all mean {split} by their names; keep one of them in the root, or merge "
                "them",
                key="data.root",
                subject=listed,
            )


def _flat(tree: Tree, places: dict[str, str], held: dict[str, Glance], flat: dict[str, str]) -> DataError:
    name = min(flat, key=lambda each: (flat[each] == "train", each))
    path, images = _path(tree, places[name]), held[name].images
    ways = f"sort them into {path}/<class>/"
    if flat[name] != "train":
        ways += ", or move the folder out of the root: then a share of train (data.validation_share) is drawn"
    if any(of_imagenet(each.images) for each in held.values()) or _has_synsets(held.values()):
        ways += (
            f". Of ImageNet, `adaptnet data import imagenet {tree.name} ILSVRC2012_devkit_t12.tar.gz --out "
            "packed/imagenet` labels them (or with LOC_val_solution.csv)"
        )
    return DataError(
        f"{path}: holds {len(images):,} images ({shown(images[0])}, …) but no class folders, so they have no labels; "
        f"{ways}",
        key="data.root",
        subject=path,
    )


def _has_synsets(glances: Collection[Glance]) -> bool:
    """Whether folders are named n01440764 and so on, as ImageNet's classes are."""
    return any(of_imagenet([f"{name}.tar"]) for glance in glances for name in glance.folders[:1])


def _beside_classes(tree: Tree, at: str, flat: Sequence[str], others: Sequence[str]) -> DataError:
    listed = ", ".join(flat)
    return DataError(
        f"{_path(tree, at)}: {listed} means a split by its name, but holds images and no class folders, beside the "
        f"folders {', '.join(map(shown, others[:5]))}. If it is a class, write {CLASSES} in the root with the names of "
        "all classes, one per line; if not, move it out of the root",
        key="data.root",
        subject=listed,
    )


def _empty(tree: Tree, at: str) -> DataError:
    path = _path(tree, at)
    return DataError(
        f"{path}: a split by its name, but it holds neither class folders nor images; fill or remove it",
        key="data.root",
        subject=path,
    )


# ---- folders above the splits or classes


def _wrapper(tree: Tree, at: str, here: Glance, classes: Collection[str]) -> str | None:
    """The one folder that contains the splits, or all class folders; None if the folders here are the classes."""
    if at.count("/") > DEEPEST or len(here.folders) > MOST_WRAPPERS:
        return None
    folders = [name for name in here.folders if name not in classes]
    if len(here.folders) == 1 and folders and not here.images:
        return _join(at, folders[0]) if tree.folders_alone(_join(at, folders[0])) else None
    above = [name for name in folders if _leads_to_splits(tree, _join(at, name))]
    above = [name for name in above if _has_image(tree, _join(at, name))]
    if not above:
        return None
    if len(above) == 1 and not any(_has_image(tree, _join(at, name)) for name in folders if name not in above):
        return _join(at, above[0])
    listed = ", ".join(map(shown, above[:5]))
    raise DataError(
        f"{_path(tree, at)}: {listed} has folders named as splits in it, beside other folders with images; name the "
        "one that is meant as data.root, or sort the images into train/<class>/ and val/<class>/",
        key="data.root",
        subject=listed,
    )


def _leads_to_splits(tree: Tree, at: str) -> bool:
    folders = tree.folders_alone(at) if at.count("/") <= DEEPEST else None
    if folders is None:
        return False
    if any(split_of(name) for name in folders):
        return True
    return len(folders) == 1 and _leads_to_splits(tree, _join(at, folders[0]))


def _has_image(tree: Tree, at: str) -> bool:
    """Whether an image is in the folder or below it. At most LOOKED_AT folders are read."""
    waiting, seen = [at], 0
    while waiting and seen < LOOKED_AT:
        here = waiting.pop()
        folders, seen = tree.folders_alone(here), seen + 1
        if folders is None:
            return True
        waiting += [_join(here, name) for name in folders]
    return False


def _join(at: str, name: str) -> str:
    return f"{at}/{name}" if at else name


def _path(tree: Tree, at: str) -> str:
    return f"{tree.name}/{at}" if at else tree.name
