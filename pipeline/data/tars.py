"""Lists the images of tars: shards of KEY.jpg|jpeg|png with KEY.cls, KEY.json or KEY.txt, or tars of class folders."""

from __future__ import annotations

import itertools
import os
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.account import Tally
from pipeline.data.class_names import CLASSES, JSONS, read_classes, read_classes_json
from pipeline.data.image_headers import EXTENSIONS, kind
from pipeline.data.labels import MOST_BYTES, NO_LABEL, SIDECARS, LabelReader, check_from_zero
from pipeline.data.listing import SCAN_THREADS, Listing, packing_command
from pipeline.data.naming import is_visible, of_imagenet, shown, why_no_image
from pipeline.data.tree import ClassFolders, NameTree, find_class_folders
from pipeline.errors import DataError

MAGIC_BYTES = 16
SPLITS_FIRST = ("train", None, "val")  # the order of rows
Tars = Sequence[tuple[str | None, Path]]  # (split, path)


# ---- shards


def from_shards(root: Path, tars: Tars, tally: Tally | None = None, *, classes_at: Path | None = None) -> Listing:
    """The images of `tars`, each (split, path); those with a wrong label or key are left out.

    Images of equal keys in different tars are different images. tally: what is left out beside the tars. classes_at:
    the folder of classes.txt, if it is not `root`. Raises DataError for a damaged tar, without classes, without any
    labelled image, and for labels that count from 1.
    """
    tars = sorted(tars, key=lambda each: (each[0] != "train", each[1].name))
    with ThreadPoolExecutor(SCAN_THREADS) as threads:
        scans = list(threads.map(lambda item: scan_shard(item[1]), tars))
    check_labelled(classes_at or root, tars, scans)
    classes = _classes_of_shards(classes_at or root)
    reader, rows = LabelReader(classes), _ShardRows(len(classes), tally or Tally())
    for number, ((split, path), scan) in enumerate(zip(tars, scans, strict=True)):
        rows.add(number, split, os.path.relpath(path, root), scan, reader)
    for split, counts in rows.labels.items():
        check_from_zero(root, split, counts, classes)
    if not rows.names:
        reason = next(iter(rows.set_aside), ("", "no image"))[1]
        raise DataError(
            f"{root}: no image with a label in {len(tars)} tars ({reason}); each needs KEY.jpg|png and KEY.cls",
            key="data.root",
            subject=root,
        )
    return Listing(
        root=root,
        classes=classes,
        names=rows.names,
        shards=tuple(os.path.relpath(path, root) for _, path in tars),
        shard=np.array(rows.shard, dtype=np.int32),
        offset=np.array(rows.offset, dtype=np.int64),
        length=np.array(rows.length, dtype=np.int64),
        label=np.array(rows.label, dtype=np.int32),
        num_train=rows.num_train,
        has_splits=any(split == "val" for split, _ in tars),
        times=np.array([path.stat().st_mtime_ns for _, path in tars], dtype=np.int64),
        set_aside=rows.set_aside,
        left_out=rows.tally.left_out(),
    )


@dataclass
class _ShardRows:
    """The images of all shards so far, as columns, and what was left out."""

    num_classes: int
    tally: Tally
    names: list[str] = field(default_factory=list)
    shard: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    set_aside: list[tuple[str, str]] = field(default_factory=list)
    labels: dict[str | None, Counter[int]] = field(default_factory=dict)  # by split, also those out of range
    num_train: int = 0

    def add(self, number: int, split: str | None, path: str, scan: ShardScan, reader: LabelReader) -> None:
        """Adds the images of the shard with this number."""
        counts, seen = self.labels.setdefault(split, Counter()), set[str]()
        for image, read in scan.labelled(reader):
            if isinstance(read, int):
                counts[read] += 1
            reason = self._fault(read) or (f"duplicate key: twice in {path}" if image.key in seen else None)
            seen.add(image.key)
            if reason:
                self.set_aside.append((f"{path}/{image.name}", reason))
                kind, _, detail = reason.partition(": ")
                self.tally.add(kind, f"{path}/{image.name}: {detail}", split=split)
                continue
            self.names.append(image.name)
            self.shard.append(number)
            self.offset.append(image.offset)
            self.length.append(image.length)
            self.label.append(int(read))
        for reason, name, lost in scan.left_out:
            self.tally.add(reason, f"{path}/{name}", split=split, lost=lost)
        self.num_train = len(self.names) if split == "train" else self.num_train

    def _fault(self, read: int | str) -> str | None:
        if isinstance(read, str):
            return read
        return None if 0 <= read < self.num_classes else f"wrong label: {read}, of {self.num_classes} classes"


def _classes_of_shards(root: Path) -> tuple[str, ...]:
    classes = read_classes(root) or read_classes_json(root)
    if not classes:
        raise DataError(
            f"{root}: no {CLASSES} beside the shards (nor {JSONS[0]}); write one class per line: an integer in KEY.cls "
            "is a 0-based line of it",
            key=CLASSES,
            subject=root,
        )
    return classes


class ShardImage(NamedTuple):
    """An image in a shard. key: its name without the extension."""

    name: str
    key: str
    offset: int
    length: int


@dataclass
class ShardScan:
    """What a shard holds: images, the places of the texts beside them, and (reason, name, lost) of the rest."""

    path: Path
    images: list[ShardImage] = field(default_factory=list)
    texts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)  # extension -> key -> place
    repeated: list[tuple[str, str, tuple[int, int]]] = field(default_factory=list)  # further texts of a key
    left_out: list[tuple[str, str, bool]] = field(default_factory=list)

    @property
    def has_labels(self) -> bool:
        """Whether any image may have a label."""
        return any(self.texts.values())

    def labelled(self, reader: LabelReader) -> Iterator[tuple[ShardImage, int | str]]:
        """Each image with its label or the reason why it has none."""
        with open(self.path, "rb") as file:
            descriptor, plain = file.fileno(), self.texts[".cls"]
            doubtful = self._doubtful(reader, descriptor)
            for image in self.images:
                if image.key in doubtful:
                    yield image, f"wrong label: several {doubtful[image.key]} with different texts"
                elif (place := plain.get(image.key)) is not None:
                    yield image, reader.read(_text_at(descriptor, place))
                else:
                    yield image, self._other_label(image.key, reader, descriptor)

    def _doubtful(self, reader: LabelReader, descriptor: int) -> dict[str, str]:
        """{key: extension} where a key has several texts that do not agree."""
        return {
            key: extension
            for extension, key, place in self.repeated
            if reader.read(_text_at(descriptor, place)) != reader.read(_text_at(descriptor, self.texts[extension][key]))
        }

    def _other_label(self, key: str, reader: LabelReader, descriptor: int) -> int | str:
        """From KEY.json or KEY.txt, or from the texts of the key that WebDataset reads."""
        reason = "wrong label: no KEY.cls beside it"
        for texts in self.texts.values():
            for at in dict.fromkeys((key, _wds_key(key))):
                if (place := texts.get(at)) is None:
                    continue
                label = reader.read(_text_at(descriptor, place))
                if label != NO_LABEL:
                    return label
                reason = NO_LABEL
        return reason


def _text_at(descriptor: int, place: tuple[int, int]) -> bytes:
    return os.pread(descriptor, min(place[1], MOST_BYTES), place[0])


def _wds_key(key: str) -> str:
    """The key as WebDataset reads it: up to the first dot of the file's name."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.partition(".")[0]


def scan_shard(path: Path) -> ShardScan:
    """What one tar holds, its images in their order. Raises DataError if the tar is damaged."""
    scan = ShardScan(path, texts={extension: {} for extension in SIDECARS})
    with open(path, "rb") as file:
        for name, offset, length in tar_members(path, scan.left_out):
            key, extension = os.path.splitext(name)
            extension = extension.lower()
            if extension in EXTENSIONS and not _is_hidden(name):
                scan.images.append(ShardImage(name, key, offset, length))
            elif extension in scan.texts:
                first = scan.texts[extension].setdefault(key, (offset, length))
                if first[0] != offset:
                    scan.repeated.append((extension, key, (offset, length)))
            else:
                reason, lost = _why_left_out(name, file.fileno(), offset)
                scan.left_out.append((reason, name, lost))
    _leave_out_parts(scan)
    return scan


def _leave_out_parts(scan: ShardScan) -> None:
    """Leaves out images like KEY.mask.png beside KEY.jpg: further parts of a sample, as in WebDataset."""
    dotted = [image for image in scan.images if _wds_key(image.key) != image.key]
    if not dotted:
        return
    own = {image.key for image in scan.images if any(image.key in keys for keys in scan.texts.values())}
    whole = {image.key for image in scan.images if _wds_key(image.key) == image.key}
    parts = {image.name for image in dotted if image.key not in own and _wds_key(image.key) in whole}
    scan.images = [image for image in scan.images if image.name not in parts]
    scan.left_out += [("further part of a sample", name, False) for name in sorted(parts)]


def _is_hidden(name: str) -> bool:
    return not all(is_visible(part) for part in name.split("/") if part != ".")


def _why_left_out(name: str, descriptor: int, offset: int) -> tuple[str, bool]:
    if _is_hidden(posixpath.dirname(name)):
        return "in a hidden folder or one of the operating system", False
    reason, lost = why_no_image(posixpath.basename(name)) or ("image outside class folders", True)
    return reason, kind(os.pread(descriptor, MAGIC_BYTES, offset)) is not None if lost is None else lost


def check_labelled(root: Path, tars: Tars, scans: Sequence[ShardScan]) -> None:
    """Raises DataError if no image of these tars has a label: they are tars of class folders, or ImageNet's own."""
    if any(scan.has_labels for scan in scans):
        return
    if are_trees(scans):
        raise DataError(
            f"{root}: contains tars of class folders, not of KEY.jpg with KEY.cls. Pack them once and train on the "
            f"result:\n  {packing_command(root)}",
            key="data.root",
            subject=root,
        )
    names = [each.name for scan in scans for each in scan.images[:3]]
    check_not_imagenet(root, [*names, *(name for scan in scans for _, name, _ in scan.left_out[:3])])


def are_trees(scans: Sequence[ShardScan]) -> bool:
    """Whether the tars hold images in folders, and no texts that may be labels."""
    images = [image for scan in scans for image in scan.images]
    return bool(images) and not any(scan.has_labels for scan in scans) and all("/" in _plain(i.name) for i in images)


def check_not_imagenet(root: Path, names: Sequence[str]) -> None:
    """Raises DataError if files are named as ImageNet's, which have no class folders."""
    if of_imagenet(names):
        raise DataError(
            f"{root}: these are ImageNet's own files or a mirror's ({shown(names[0])}, …), which have neither class "
            "folders nor labels beside the images; import them with their publisher's names:\n  adaptnet data import "
            "imagenet ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz --out "
            "packed/imagenet",
            key="data.root",
            subject=root,
        )


# ---- members


def tar_members(path: Path, left_out: list[tuple[str, str, bool]] | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its bytes, length) of each file of an uncompressed tar; links have those of their target.

    (reason, name, lost) of what has no bytes of its own is added to `left_out`: links that lead nowhere, files with
    holes, devices. Raises DataError if the tar is damaged.
    """
    size, links = path.stat().st_size, list[tarfile.TarInfo]()
    left_out = [] if left_out is None else left_out
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.islnk() or member.issym():
                    links.append(member)
                elif (why := _why_unread(member, size)) is not None:
                    left_out.append(why)
                elif not member.isdir():
                    yield member.name, member.offset_data, member.size
                tar.members.clear()  # type: ignore[attr-defined]  # else tarfile stores every header
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not a complete tar ({error}); copy it again or remove it", key="data.root", subject=path
        ) from None
    if links:
        yield from _followed(path, links, left_out)


def _why_unread(member: tarfile.TarInfo, size_of_tar: int) -> tuple[str, str, bool] | None:
    """(reason, name, lost) of a member without bytes of its own, else None. Raises ReadError if the tar ends inside."""
    if member.isreg() and member.issparse():
        return None if _without_holes(member) else ("file with holes (sparse)", member.name, True)
    if member.isreg():
        if member.offset_data + member.size > size_of_tar:
            raise tarfile.ReadError("it ends inside a member")
        return None
    return None if member.isdir() else ("device or pipe", member.name, False)


def _without_holes(member: tarfile.TarInfo) -> bool:
    """Whether the bytes of a sparse member are stored in one piece."""
    pieces: Any = member.sparse  # [(offset, bytes)]; types of tarfile say otherwise
    return [piece for piece in pieces if piece[1]] == ([(0, member.size)] if member.size else [])


def _check_end(path: Path, offset: int) -> None:
    """Raises ReadError if the tar does not end at `offset`, DataError if anything but zeros follows its end."""
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end marker at byte {offset}")
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise DataError(
                    f"{path}: the tar ends at byte {offset:,}, and other bytes follow: several tars in one file, or a "
                    "damaged copy. Join tars with `tar --concatenate`, or copy the file again",
                    key="data.root",
                    subject=path,
                )


def _followed(
    path: Path, links: Sequence[tarfile.TarInfo], left_out: list[tuple[str, str, bool]]
) -> Iterator[tuple[str, int, int]]:
    """The files to which links lead, under the names of the links; of a link to a folder, all files in it."""
    with tarfile.open(path, "r:") as tar:
        files = {_plain(m.name): (m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()}
    waiting = {_plain(link.name): _target(link) for link in links}
    while found := _leading_to_files(waiting, files) or _leading_to_folders(waiting, files):
        for name in found.keys() & waiting.keys():
            del waiting[name]
        new = {name: place for inside in found.values() for name, place in inside.items()}
        files |= new
        yield from ((name, *place) for name, place in new.items())
    for name, target in waiting.items():
        if _contains(target, name) and target != name:
            left_out.append(("link to a folder that contains it", name, False))
        else:
            left_out.append(("link that leads nowhere", name, why_no_image(posixpath.basename(name)) is None))


_Places = dict[str, tuple[int, int]]  # name -> (offset, length)


def _leading_to_files(links: dict[str, str], files: _Places) -> dict[str, _Places]:
    return {name: {name: files[target]} for name, target in links.items() if target in files}


def _leading_to_folders(links: dict[str, str], files: _Places) -> dict[str, _Places]:
    """Of each link to a folder that does not contain the link: the files in it, under the link's name."""
    targets = {target for name, target in links.items() if not _contains(target, name)}
    inside: dict[str, list[str]] = {}
    for file in files if targets else ():
        folder = posixpath.dirname(file)
        while folder:
            if folder in targets:
                inside.setdefault(folder, []).append(file)
            folder = posixpath.dirname(folder)
    return {
        name: {name + file[len(target) :]: files[file] for file in inside[target]}
        for name, target in links.items()
        if target in inside and not _contains(target, name)
    }


def _contains(folder: str, name: str) -> bool:
    return folder == "." or f"{name}/".startswith(f"{folder}/")


def _target(link: tarfile.TarInfo) -> str:
    return _plain(link.linkname if link.islnk() else posixpath.join(posixpath.dirname(link.name), link.linkname))


def _plain(name: str) -> str:
    """A member's path without `./`, `..` within it, and a leading slash."""
    return posixpath.normpath(name).lstrip("/")


# ---- tars of class folders


def from_tree_tars(root: Path, tars: Tars, classes_at: Path | None = None) -> Listing:
    """The images in uncompressed tars of class folders, with or without train/ and val/ and a common top folder.

    A tar whose split is known contains that split alone. Raises DataError if there are no images in class folders, and
    for a class of val that train lacks.
    """
    listed, tally = read_classes(classes_at or root), Tally()
    rows = [
        row for number, (split, path) in enumerate(tars) for row in _rows_of_tree(number, split, path, listed, tally)
    ]
    classes = listed or tuple(sorted({row.name for row in rows if row.split != "val"} or {row.name for row in rows}))
    known = set(classes)
    if unknown := next((row.name for row in rows if row.name not in known), None):
        raise DataError(
            f"{root}: class {shown(unknown)} is not in {CLASSES if listed else 'train'}",
            key="data.root",
            subject=unknown,
        )
    position = {name: label for label, name in enumerate(classes)}
    rows.sort(key=lambda row: (SPLITS_FIRST.index(row.split), row.path.split("/")))
    return Listing(
        root=root,
        classes=classes,
        names=[row.path for row in rows],
        shards=tuple(os.path.relpath(path, root) for _, path in tars),
        shard=np.array([row.tar for row in rows], dtype=np.int32),
        offset=np.array([row.offset for row in rows], dtype=np.int64),
        length=np.array([row.length for row in rows], dtype=np.int64),
        label=np.array([position[row.name] for row in rows], dtype=np.int32),
        num_train=sum(row.split != "val" for row in rows),
        has_splits=any(row.split == "val" for row in rows),
        times=np.array([path.stat().st_mtime_ns for _, path in tars], dtype=np.int64),
        left_out=tally.left_out(),
    )


@dataclass(frozen=True, slots=True)
class _TreeRow:
    """An image in a tar of class folders. name: its class; path: below the folder of class folders."""

    split: str | None
    name: str
    path: str
    tar: int
    offset: int
    length: int


def _rows_of_tree(number: int, of_tar: str | None, path: Path, classes: Sequence[str], tally: Tally) -> list[_TreeRow]:
    members, left_out = _members_of_tree(path)
    found = _found_in_tree(path, list(members), [name for _, name, _ in left_out], classes)
    rows = []
    for name, (offset, length) in members.items():
        split, inner = _below(name, found)
        if "/" in inner:
            rows.append(_TreeRow(split or of_tar, inner.partition("/")[0], inner, number, offset, length))
        else:
            reason, lost = _why_unused(name, found)
            tally.add(reason, name, split=split or of_tar, lost=lost)
    for reason, name, lost in left_out:
        tally.add(reason, name, split=of_tar, lost=lost)
    return rows


def _below(name: str, found: ClassFolders) -> tuple[str | None, str]:
    """(split, path below the split's folder) of a member; ("", None) outside the splits."""
    inside = ((split, name[len(at) :].lstrip("/")) for split, at in found.splits if not at or name.startswith(f"{at}/"))
    return next(inside, (None, ""))


def _members_of_tree(path: Path) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str, bool]]]:
    """(offset, length) of the images by path, the last of equal ones as unpacking leaves it; what is left out."""
    members, left_out = dict[str, tuple[int, int]](), list[tuple[str, str, bool]]()
    with open(path, "rb") as file:
        for name, offset, length in tar_members(path, left_out):
            plain = _plain(name)
            if _is_hidden(plain) or plain.startswith("../") or why_no_image(posixpath.basename(plain)) is not None:
                reason, lost = _why_left_out(plain, file.fileno(), offset)
                left_out.append((reason, name, lost))
            else:
                members[plain] = (offset, length)
    return members, left_out


def _found_in_tree(path: Path, images: Sequence[str], others: Sequence[str], classes: Sequence[str]) -> ClassFolders:
    found = find_class_folders(NameTree(str(path), images), classes) if images else None
    if found is None:
        check_not_imagenet(path, [*images[:3], *others[:3]])
        fault = f"{shown(images[0])} is in no class folder" if images else "no file has an image's extension"
        raise DataError(
            f"{path}: {fault}; expected <class>/*.jpg or train/<class>/*.jpg in it", key="data.root", subject=path
        )
    return found


def _why_unused(name: str, found: ClassFolders) -> tuple[str, bool]:
    inside = ((reason, lost) for at, reason, lost in found.unused if name.startswith(f"{at}/"))
    reason, lost = next(inside, ("outside class folders", True))
    return f"image {reason}", lost


def first_names(path: Path, count: int = 4) -> list[str]:
    """The names of the first members of a tar, compressed or not; empty if it cannot be read."""
    try:
        with tarfile.open(path, "r:*") as tar:
            return [member.name for member in itertools.islice(tar, count)]
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        return []
