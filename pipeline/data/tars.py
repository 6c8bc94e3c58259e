"""Lists the images of tars: shards of KEY.jpg|jpeg|png with KEY.cls, or one tar of class folders."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.data.image_headers import EXTENSIONS
from pipeline.data.listing import SCAN_THREADS, SPLITS, Listing
from pipeline.errors import DataError


def from_shards(root: Path, tars: Sequence[tuple[str | None, Path]], classes: tuple[str, ...]) -> Listing:
    """The images of `tars`, each (split, path); those with a wrong label or key are left out.

    Raises DataError for a damaged tar, without classes, and without any labelled image.
    """
    if not classes:
        raise DataError(
            f"{root}: no classes.txt beside the shards; KEY.cls contains a 0-based line of it",
            key="classes.txt",
            subject=root,
        )
    tars = sorted(tars, key=lambda each: (each[0] != "train", each[1].name))
    with ThreadPoolExecutor(SCAN_THREADS) as threads:
        scans = list(threads.map(lambda item: scan_shard(item[1]), tars))
    rows: list[tuple[str, int, int, int, int]] = []  # name, shard, offset, length, label
    set_aside: list[tuple[str, str]] = []
    seen: dict[tuple[str | None, str], str] = {}
    num_train = 0
    for number, ((split, path), members) in enumerate(zip(tars, scans, strict=True)):
        for member in members:
            reason = _label_fault(member, len(classes)) or _repeated(seen, (split, member.key), path.name)
            if reason:
                set_aside.append((f"{os.path.relpath(path, root)}/{member.name}", reason))
                continue
            rows.append((member.name, number, member.offset, member.length, int(member.label or 0)))
        num_train = len(rows) if split == "train" else num_train
    if not rows:
        raise DataError(
            f"{root}: no image with a label in {len(tars)} tars; each needs KEY.jpg|png and KEY.cls",
            key="data.root",
            subject=root,
        )
    return Listing(
        root=root,
        classes=classes,
        names=[row[0] for row in rows],
        shards=tuple(os.path.relpath(path, root) for _, path in tars),
        shard=np.array([row[1] for row in rows], dtype=np.int32),
        offset=np.array([row[2] for row in rows], dtype=np.int64),
        length=np.array([row[3] for row in rows], dtype=np.int64),
        label=np.array([row[4] for row in rows], dtype=np.int32),
        num_train=num_train,
        has_splits=any(split == "val" for split, _ in tars),
        times=np.array([path.stat().st_mtime_ns for _, path in tars], dtype=np.int64),
        set_aside=set_aside,
    )


@dataclass(frozen=True)
class ShardMember:
    """An image in a tar; `label` is the text of its KEY.cls, or None if there is none."""

    name: str
    key: str
    offset: int
    length: int
    label: str | None


def scan_shard(path: Path) -> list[ShardMember]:
    """The images of one tar in their order. Raises DataError if the tar is damaged."""
    images: list[tuple[str, str, int, int]] = []
    labels: dict[str, str] = {}
    with open(path, "rb") as file:
        for name, offset, length in tar_members(path):
            key, extension = os.path.splitext(name)
            if extension.lower() in EXTENSIONS:
                images.append((name, key, offset, length))
            elif extension.lower() == ".cls":
                labels[key] = os.pread(file.fileno(), min(length, 32), offset).decode("ascii", "replace").strip()
    return [ShardMember(name, key, offset, length, labels.get(key)) for name, key, offset, length in images]


def tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its bytes, length) of each regular file of an uncompressed tar. Raises DataError if damaged."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("it ends inside a member")
                    yield member.name, member.offset_data, member.size
                tar.members.clear()  # type: ignore[attr-defined]  # else tarfile stores every header
            if not _is_end(path, tar.offset):
                raise tarfile.ReadError(f"no end marker at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not a complete tar ({error}); copy it again or remove it", key="data.root", subject=path
        ) from None


def _label_fault(member: ShardMember, num_classes: int) -> str | None:
    if member.label is None:
        return "wrong label: no KEY.cls beside it"
    if not re.fullmatch(r"\d{1,9}", member.label):
        return f"wrong label: {member.label!r} is not an integer from 0"
    return None if int(member.label) < num_classes else f"wrong label: {member.label}, of {num_classes} classes"


def _repeated(seen: dict[tuple[str | None, str], str], key: tuple[str | None, str], tar: str) -> str | None:
    first = seen.get(key)
    seen.setdefault(key, tar)
    return None if first is None else f"duplicate key: first in {first}"


def _is_end(path: Path, offset: int) -> bool:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), tarfile.BLOCKSIZE, offset) == bytes(tarfile.BLOCKSIZE)


def from_tree_tar(path: Path, classes: tuple[str, ...] = ()) -> Listing:
    """The images in an uncompressed tar of class folders, with or without train/ and val/ and a common top folder.

    Raises DataError if there are none, and for a class of val that train lacks.
    """
    members = [(name, offset, length) for name, offset, length in tar_members(path) if _is_image(name)]
    parts = _without_common_top([[p for p in PurePosixPath(name).parts if p != "."] for name, _, _ in members])
    splits = bool(parts) and all(each[0] in SPLITS for each in parts)
    places = [(SPLITS[each[0]], each[1:]) if splits else (None, each) for each in parts]
    flat = next((members[n][0] for n, (_, inner) in enumerate(places) if len(inner) < 2), None)
    if not members or flat:
        fault = f"{flat} is in no class folder" if flat else "no file has an image's extension"
        expected = "<class>/*.jpg or train/<class>/*.jpg"
        raise DataError(f"{path}: {fault}; expected {expected} in it", key="data.root", subject=path)
    if not classes:
        train = {inner[0] for split, inner in places if split != "val"} or {inner[0] for _, inner in places}
        classes = tuple(sorted(train))
    unknown = next((inner[0] for _, inner in places if inner[0] not in set(classes)), None)
    if unknown:
        raise DataError(f"{path}: class {unknown!r} is not in classes.txt or train", key="data.root", subject=unknown)
    position = {name: label for label, name in enumerate(classes)}
    order = sorted(range(len(members)), key=lambda n: (places[n][0] == "val", places[n][1]))
    return Listing(
        root=path.parent,
        classes=classes,
        names=["/".join(places[n][1]) for n in order],
        shards=(path.name,),
        shard=np.zeros(len(order), dtype=np.int32),
        offset=np.array([members[n][1] for n in order], dtype=np.int64),
        length=np.array([members[n][2] for n in order], dtype=np.int64),
        label=np.array([position[places[n][1][0]] for n in order], dtype=np.int32),
        num_train=sum(split != "val" for split, _ in places),
        has_splits=any(split == "val" for split, _ in places),
        times=np.array([path.stat().st_mtime_ns], dtype=np.int64),
    )


def _without_common_top(parts: list[list[str]]) -> list[list[str]]:
    while parts and parts[0][0] not in SPLITS and all(len(p) > 2 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    return parts


def _is_image(name: str) -> bool:
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in EXTENSIONS
