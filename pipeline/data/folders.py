"""Lists the images of class folders: train/<class>/** and val/<class>/**, or <class>/** alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.image_headers import EXTENSIONS
from pipeline.data.listing import SCAN_THREADS, Listing, read_classes
from pipeline.errors import DataError


def from_folders(root: Path, folders: Sequence[tuple[str | None, Path]]) -> Listing:
    """The images in `folders`, each (split, folder of class folders); the split of a plain folder is None.

    Raises DataError for a class folder without images and for a class of val that train lacks.
    """
    work = [
        (split, path)
        for split, folder in sorted(folders, key=lambda each: each[0] == "val")
        for path in subfolders(folder)
    ]
    if not work:
        raise DataError(
            f"{root}: no class folders in {', '.join(str(f) for _, f in folders)}", key="data.root", subject=root
        )
    with ThreadPoolExecutor(SCAN_THREADS) as threads:
        scans = list(threads.map(lambda item: _scan_class(item[1], root), work))
    empty = [str(path) for (_, path), scan in zip(work, scans, strict=True) if not scan.files]
    if empty:
        extensions = " ".join(sorted(EXTENSIONS))
        listed = ", ".join(empty[:5])
        raise DataError(
            f"{listed}: class folder without images ({extensions}); fill or remove it", key="data.root", subject=listed
        )
    classes = _classes_of_folders(root, [(split, path.name) for split, path in work])
    position = {name: label for label, name in enumerate(classes)}
    files = [
        (name, size, time, position[path.name])
        for (_, path), scan in zip(work, scans, strict=True)
        for name, size, time in scan.files
    ]
    num_train = sum(len(scan.files) for (split, _), scan in zip(work, scans, strict=True) if split != "val")
    return Listing(
        root=root,
        classes=classes,
        names=[each[0] for each in files],
        shards=None,
        shard=np.arange(len(files), dtype=np.int32),
        offset=np.zeros(len(files), dtype=np.int64),
        length=np.array([each[1] for each in files], dtype=np.int64),
        label=np.array([each[3] for each in files], dtype=np.int32),
        num_train=num_train,
        has_splits=any(split == "val" for split, _ in work),
        times=np.array([each[2] for each in files], dtype=np.int64),
        folders={name: time for scan in scans for name, time in scan.folders},
        ignored=sum(scan.ignored for scan in scans) + sum(_beside(folder) for _, folder in folders),
    )


def _beside(folder: Path) -> int:
    """The number of images outside class folders."""
    return sum(path.suffix.lower() in EXTENSIONS and path.is_file() for path in folder.iterdir())


@dataclass
class _Scan:
    files: list[tuple[str, int, int]] = field(default_factory=list)  # (path under the root, bytes, ns)
    folders: list[tuple[str, int]] = field(default_factory=list)
    ignored: int = 0


def _scan_class(folder: Path, root: Path) -> _Scan:
    scan, waiting = _Scan(), [str(folder)]
    start = len(str(root).rstrip("/")) + 1
    while waiting:
        here = waiting.pop()
        scan.folders.append((here[start:], os.stat(here).st_mtime_ns))
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    stat = entry.stat()
                    scan.files.append((entry.path[start:], stat.st_size, stat.st_mtime_ns))
                else:
                    scan.ignored += 1
    scan.files.sort()
    return scan


def _classes_of_folders(root: Path, folders: Sequence[tuple[str | None, str]]) -> tuple[str, ...]:
    """The lines of classes.txt, or without it the folder names in sorted order, as in torchvision's ImageFolder."""
    train = {name for split, name in folders if split != "val"} or {name for _, name in folders}
    classes = read_classes(root) or tuple(sorted(train))
    indexed = set(classes)
    for split, name in folders:
        if name not in indexed:
            source = "classes.txt" if (root / "classes.txt").exists() else "train"
            known = f"{', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}"
            raise DataError(
                f"{root}: class {name!r} of {split or 'the root'} is not in {source}; known: {known}",
                key="data.root",
                subject=name,
            )
    return classes


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
