"""Lists the images of class folders: train/<class>/** and val/<class>/**, or <class>/** alone.

Files that are not used are counted with their reasons: dead links, other extensions, images outside class folders.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.account import Tally
from pipeline.data.class_names import CLASSES, read_classes
from pipeline.data.image_headers import EXTENSIONS, kind
from pipeline.data.listing import SCAN_THREADS, Listing
from pipeline.data.naming import OURS, is_system, is_visible, shown, split_of, why_no_image
from pipeline.data.tree import ClassFolders, FolderTree, entries, is_folder, is_loop, unreadable
from pipeline.errors import DataError

MANY_CLASSES = 5  # that a message names
MAGIC_BYTES = 16
_Identity = tuple[int, int]  # device and inode of a folder


def from_folders(root: Path, found: ClassFolders) -> Listing:
    """The images in the class folders of `root`.

    Raises DataError for a class folder without images, a folder that cannot be read, and a class of val that train
    lacks.
    """
    tally = Tally()
    work = [
        (split, path)
        for split, folder in sorted(found.splits, key=lambda each: each[0] == "val")
        for path in class_folders(root / folder)
    ]
    above = _parents(root)
    with ThreadPoolExecutor(SCAN_THREADS) as threads:
        scans = list(threads.map(lambda item: _scan_class(item[1], root, item[0], above), work))
    _check_filled(work, scans)
    classes = _classes_of_folders(root, [(split, path.name) for split, path in work])
    position = {name: label for label, name in enumerate(classes)}
    files = [file for scan in scans for file in scan.files]
    labels, counts = [position[path.name] for _, path in work], [len(scan.files) for scan in scans]
    _count_beside(root, found, tally)
    for scan in scans:
        tally.merge(scan.tally.left_out())
    return Listing(
        root=root,
        classes=classes,
        names=[each[0] for each in files],
        shards=None,
        shard=np.arange(len(files), dtype=np.int32),
        offset=np.zeros(len(files), dtype=np.int64),
        length=np.array([each[1] for each in files], dtype=np.int64),
        label=np.repeat(np.array(labels, dtype=np.int32), counts),
        num_train=sum(count for (split, _), count in zip(work, counts, strict=True) if split != "val"),
        has_splits=any(split == "val" for split, _ in work),
        times=np.array([each[2] for each in files], dtype=np.int64),
        folders={name: time for scan in scans for name, time in scan.folders},
        left_out=tally.left_out(),
        notes=found.notes,
    )


def class_folders(folder: Path) -> list[Path]:
    """The class folders in a folder by name: without hidden ones, those of an operating system, and loops of links."""
    return [folder / name for name in FolderTree(folder).glance("").folders]


def _check_filled(work: Sequence[tuple[str | None, Path]], scans: Sequence[_Scan]) -> None:
    """Raises DataError for class folders without images, and for splits inside class folders."""
    empty = [str(path) for (_, path), scan in zip(work, scans, strict=True) if not scan.files]
    if empty:
        listed = ", ".join(map(shown, empty[:MANY_CLASSES]))
        raise DataError(
            f"{listed}: class folder without images ({' '.join(sorted(EXTENSIONS))}); fill or remove it",
            key="data.root",
            subject=listed,
        )
    if inside := [scan.split_inside for scan in scans if scan.split_inside]:
        raise DataError(
            f"{shown(inside[0])}: named as a split, inside a class folder; sort the images into train/<class>/ and "
            "val/<class>/, or rename the folder if it is none",
            key="data.root",
            subject=inside[0],
        )


# ---- one class folder


@dataclass
class _Scan:
    split: str | None
    files: list[tuple[str, int, int]] = field(default_factory=list)  # (path under the root, bytes, ns)
    folders: list[tuple[str, int]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    split_inside: str | None = None  # a folder with the name of a split directly in the class folder

    def count(self, reason: str, name: str, *, lost: bool) -> None:
        self.tally.add(reason, name, split=self.split, lost=lost)

    def leave_out(self, entry: os.DirEntry[str], start: int) -> None:
        """Counts what is no image by its name."""
        reason, lost = why_left_out(entry)
        self.count(reason, entry.path[start:], lost=lost)


def _parents(folder: Path) -> frozenset[_Identity]:
    """The folder and all that contain it: a link to one of these would be followed without end."""
    resolved = folder.resolve()
    return frozenset(_identity(os.stat(path)) for path in (resolved, *resolved.parents))


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _scan_class(folder: Path, root: Path, split: str | None, above: frozenset[_Identity]) -> _Scan:
    scan = _Scan(split)
    waiting = [(str(folder), above | {_identity(os.stat(folder.parent))})]
    start = len(str(root).rstrip("/")) + 1
    while waiting:
        here, parents = waiting.pop()
        try:
            status = os.stat(here)
            if (me := _identity(status)) in parents:
                scan.count("link to a folder that contains it", here[start:], lost=False)
                continue
            scan.folders.append((here[start:], status.st_mtime_ns))
            waiting += [(path, parents | {me}) for path in _scan_folder(here, start, scan)]
        except OSError as error:
            raise unreadable(here, error) from None
    scan.split_inside = _split_inside(folder, scan, start)
    scan.files.sort()
    return scan


def _scan_folder(here: str, start: int, scan: _Scan) -> list[str]:
    """Adds what a folder holds to the scan; returns the folders in it."""
    folders: list[str] = []
    with os.scandir(here) as found:
        for entry in found:
            try:
                _add(entry, start, scan, folders)
            except OSError:
                scan.count("link that leads nowhere", entry.path[start:], lost=True)
    return folders


def _add(entry: os.DirEntry[str], start: int, scan: _Scan, folders: list[str]) -> None:
    """Adds an entry to the scan, or to `folders`."""
    if entry.name.startswith("."):
        scan.leave_out(entry, start)
    elif entry.is_dir():
        _enter(entry, start, scan, folders)
    elif os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
        scan.leave_out(entry, start)
    elif stat.S_ISREG((status := entry.stat()).st_mode):
        scan.files.append((entry.path[start:], status.st_size, status.st_mtime_ns))
    else:
        scan.count("not a regular file", entry.path[start:], lost=True)


def _enter(entry: os.DirEntry[str], start: int, scan: _Scan, folders: list[str]) -> None:
    if is_system(entry.name):
        scan.count("made by the operating system", entry.path[start:], lost=False)
    else:
        folders.append(entry.path)


def why_left_out(entry: os.DirEntry[str]) -> tuple[str, bool]:
    """(reason, whether it may be an image) of an entry that is not used as an image."""
    name = entry.name
    if name.startswith(".") and is_folder(entry):
        return "hidden folder", False
    named = why_no_image(name)
    if _is_pipe_or_device(entry):
        return "pipe, socket or device", named is None
    if named is None:
        return "image outside class folders", True
    reason, lost = named
    return reason, _looks_like_image(entry) if lost is None else lost


def _is_pipe_or_device(entry: os.DirEntry[str]) -> bool:
    try:
        mode = entry.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _looks_like_image(entry: os.DirEntry[str]) -> bool:
    try:
        if not stat.S_ISREG(entry.stat().st_mode):
            return False
        with open(entry.path, "rb") as file:
            return kind(file.read(MAGIC_BYTES)) is not None
    except OSError:
        return True  # what cannot be read may be an image


def _split_inside(folder: Path, scan: _Scan, start: int) -> str | None:
    depth = str(folder)[start:].count("/") + 1
    names = (name for name, _ in scan.folders if name.count("/") == depth)
    return next((name for name in names if split_of(name.rpartition("/")[2]) is not None), None)


# ---- what is beside the class folders


def _count_beside(root: Path, found: ClassFolders, tally: Tally) -> None:
    """Counts the files of the root, of the splits' folders, and of folders that are no split."""
    split_at = {folder: split for split, folder in found.splits}
    unused = list(found.unused)
    for folder in dict.fromkeys(["", *_chain(found.base), *split_at]):
        for entry in entries(str(root / folder)):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if name == CLASSES or entry.name in OURS or _is_known(entry, name, folder, found):
                continue
            if is_folder(entry) and is_visible(entry.name) and not is_loop(entry, str(root / folder)):
                unused.append((name, "outside the splits", True))
            else:
                reason, lost = _why_beside(entry, str(root / folder))
                tally.add(reason, name, split=split_at.get(folder), lost=lost)
    for folder, reason, lost in unused:
        count_files(root, folder, reason, tally, lost=lost)


def count_files(root: Path, folder: str, reason: str, tally: Tally, *, lost: bool) -> None:
    """Counts all files below a folder that is not used; its images as `lost` says."""
    start = len(str(root).rstrip("/")) + 1
    for entry in _files_below(str(root / folder)):
        if why_no_image(entry.name) is None:
            tally.add(f"image {reason}", entry.path[start:], lost=lost)
        else:
            tally.add(f"file {reason}", entry.path[start:], lost=lost and why_left_out(entry)[1])


def _chain(base: str) -> list[str]:
    """The folder `base` and those above it, without the root."""
    parts = base.split("/") if base else []
    return ["/".join(parts[: number + 1]) for number in range(len(parts))]


def _is_known(entry: os.DirEntry[str], name: str, folder: str, found: ClassFolders) -> bool:
    """Whether an entry is a class folder, leads to one, or is a folder that is counted as unused."""
    if not is_folder(entry) or not is_visible(entry.name):
        return False
    if any(folder == each for _, each in found.splits):
        return not is_loop(entry, os.path.dirname(entry.path))
    places = [each for _, each in found.splits] + [each for each, _, _ in found.unused]
    return any(f"{each}/".startswith(f"{name}/") for each in places)


def _why_beside(entry: os.DirEntry[str], folder: str) -> tuple[str, bool]:
    if is_system(entry.name):
        return "made by the operating system", False
    if is_folder(entry):
        loop = is_visible(entry.name) and is_loop(entry, folder)
        return ("link to a folder that contains it" if loop else "hidden folder", False)
    if not os.path.exists(entry.path):
        return "link that leads nowhere", True
    return why_left_out(entry)


def _files_below(folder: str) -> Iterator[os.DirEntry[str]]:
    """All files in a folder and below; hidden folders and links to folders are not entered."""
    waiting = [folder]
    while waiting:
        for entry in entries(waiting.pop()):
            if not is_folder(entry):
                yield entry
            elif is_visible(entry.name) and not entry.is_symlink():
                waiting.append(entry.path)


def _classes_of_folders(root: Path, folders: Sequence[tuple[str | None, str]]) -> tuple[str, ...]:
    """The lines of classes.txt, or without it the folder names in sorted order, as in torchvision's ImageFolder."""
    train = {name for split, name in folders if split != "val"} or {name for _, name in folders}
    listed = read_classes(root)
    classes = listed or tuple(sorted(train))
    indexed = set(classes)
    for split, name in folders:
        if name not in indexed:
            known = f"{', '.join(map(shown, classes[:MANY_CLASSES]))}{', …' if len(classes) > MANY_CLASSES else ''}"
            raise DataError(
                f"{root}: class {shown(name)} of {split or 'the root'} is not in {CLASSES if listed else 'train'}"
                f"{close_name(name, classes)}; known: {known}",
                key="data.root",
                subject=name,
            )
    return classes


def close_name(name: str, classes: Sequence[str]) -> str:
    """A hint at a class that differs from `name` only by case or blanks; else empty."""
    same = next((each for each in classes if each.strip().casefold() == name.strip().casefold()), None)
    return "" if same is None else f" (it has {same!r})"
