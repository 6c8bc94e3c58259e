"""Packs known image sets from the files of their publishers into tar shards with an index, as pack.py does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.listing import Listing
from pipeline.data.pack import QUALITY, PackReport, pack_listing
from pipeline.data.published import READERS, PublishedImage, PublishedSet, ReaderContext
from pipeline.data.store import Progress
from pipeline.errors import ConfigError, DataError
from pipeline.runs.files import write_json

READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class File:
    """A file of a set under its publisher's name; md5 as in torchvision, or None if torchvision has none."""

    role: str
    name: str
    md5: str | None = None
    optional: bool = False


SETS: Mapping[str, tuple[tuple[File, ...], ...]] = {  # the alternatives for the files of each set, the usual one first
    "cifar10": ((File("archive", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),),
    "cifar100": ((File("archive", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),),
    "svhn": (
        (
            File("train", "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
            File("test", "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
            File("extra", "extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7", optional=True),
        ),
    ),
    "stl10": ((File("archive", "stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb"),),),
    "tiny-imagenet": ((File("archive", "tiny-imagenet-200.zip"),),),
    "aircraft": ((File("archive", "fgvc-aircraft-2013b.tar.gz"),),),
    "flowers102": (
        (
            File("images", "102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
            File("labels", "imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
            File("splits", "setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
        ),
    ),
    "cars": (
        (
            File("train", "cars_train.tgz"),
            File("test", "cars_test.tgz"),
            File("devkit", "car_devkit.tgz"),
            File("test labels", "cars_test_annos_withlabels.mat"),
        ),
    ),
    "cub": ((File("archive", "CUB_200_2011.tgz"),),),
    "imagenet": (
        (
            File("train", "ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e"),
            File("val", "ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622"),
            File("devkit", "ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"),
        ),
        (File("folder", "FOLDER"), File("devkit", "ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf")),
        (File("folder", "FOLDER"), File("solution", "LOC_val_solution.csv")),
    ),
}


def import_set(
    name: str,
    files: Sequence[Path],
    destination: Path,
    *,
    checksums: bool = True,
    side: int | None = None,
    quality: int = QUALITY,
    shard_bytes: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Packs the set `name` from its publisher's files into `destination`; source.json there lists them with their md5.

    The other arguments are those of `pack`. After an interruption, the same call resumes. Raises ConfigError for an
    unknown set and for files of another one, DataError for a damaged file or, with `checksums`, an unexpected md5.
    """
    given = _roles(name, [file.expanduser().absolute() for file in files])
    stats = [(file.name, path.name, path.stat().st_size, path.stat().st_mtime_ns) for file, path in given]

    def make(scratch: Path) -> Listing:
        sums = {path.name: _checked(file, path, checksums, progress) for file, path in given if path.is_file()}
        context = ReaderContext({file.role: path for file, path in given}, scratch, progress)
        for left in scratch.glob("*.pngs"):
            left.unlink()  # written by an interrupted call
        published = _read(name, context)
        listing = _listing(published.entries, published.classes, destination)
        source = {"set": name, "files": [{"name": n, "md5": md5} for n, md5 in sums.items()]}
        write_json(destination / "source.json", source)
        return listing

    return pack_listing(
        hashlib.sha256(repr((name, stats)).encode()).hexdigest()[:16],
        make,
        destination.expanduser().absolute(),
        side=side,
        quality=quality,
        shard_bytes=shard_bytes,
        workers=workers,
        progress=progress,
    )


def _read(name: str, context: ReaderContext) -> PublishedSet:
    """The published set. Raises DataError if the files are not in its publisher's form."""
    try:
        published = READERS[name](context)
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{name}: the files are not in the publisher's form ({what}); download them again",
            key="files",
            subject=name,
        ) from error
    classes, labels = published.classes, {entry.label for entry in published.entries}
    if len(set(classes)) < len(classes) or not all(name.strip() for name in classes):
        raise DataError(f"{name}: a class has no name, or two have the same; download the files again", key="files")
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise DataError(
            f"{name}: labels from {min(labels)} to {max(labels)}, of {len(classes)} classes; download the files again",
            key="files",
            subject=max(labels),
        )
    return published


def _roles(name: str, files: Sequence[Path]) -> list[tuple[File, Path]]:
    """Each given file with its role, by its name. Raises ConfigError listing the files that the set needs."""
    if name not in SETS:
        raise ConfigError(f"{name}: no such set; known: {', '.join(SETS)}", key="set", subject=name)
    for path in files:
        if not path.exists():
            raise ConfigError(f"{path}: no such file", key="files", subject=path)
    for way in SETS[name]:
        matched = [(file, path) for file in way for path in files if _is(file, path)]
        needed = {file.role for file in way if not file.optional}
        if len(matched) == len(files) and needed <= {file.role for file, _ in matched}:
            return matched
    ways = " or ".join(" ".join(f"[{file.name}]" if file.optional else file.name for file in way) for way in SETS[name])
    raise ConfigError(
        f"{name}: got {', '.join(path.name for path in files) or 'no files'}; it is imported from {ways}, under the "
        "publisher's names",
        key="files",
        subject=", ".join(path.name for path in files),
    )


def _is(file: File, path: Path) -> bool:
    return path.is_dir() if file.name == "FOLDER" else path.name == file.name and path.is_file()


def _checked(file: File, path: Path, checksums: bool, progress: Progress | None) -> str:
    """The md5 of a file. Raises DataError if `checksums` and the publisher's is another."""
    digest, done, size = hashlib.md5(usedforsecurity=False), 0, path.stat().st_size
    with open(path, "rb") as content:
        while block := content.read(READ_AT_ONCE):
            digest.update(block)
            done += len(block)
            if progress:
                progress(f"checksum of {path.name}, MiB", done >> 20, max(1, size >> 20))
    if checksums and file.md5 is not None and digest.hexdigest() != file.md5:
        raise DataError(
            f"{path}: its md5 is {digest.hexdigest()}, that of the publisher {file.md5}; download it again, or accept "
            "it with --no-checksum",
            key="--no-checksum",
            subject=path,
        )
    return digest.hexdigest()


def _listing(entries: Sequence[PublishedImage], classes: tuple[str, ...], root: Path) -> Listing:
    """The images in the order of their bytes, train first; paths relative to `root`."""
    if not entries:
        raise DataError("the files contain no image", key="files")
    ordered = sorted(entries, key=lambda entry: (entry.split != "train", str(entry.path), entry.offset, entry.name))
    paths = sorted({entry.path for entry in ordered})
    number = {path: position for position, path in enumerate(paths)}
    return Listing(
        root=root,
        classes=classes,
        names=[entry.name for entry in ordered],
        shards=tuple(os.path.relpath(path, root) for path in paths),
        shard=np.array([number[entry.path] for entry in ordered], dtype=np.int32),
        offset=np.array([entry.offset for entry in ordered], dtype=np.int64),
        length=np.array([entry.length for entry in ordered], dtype=np.int64),
        label=np.array([entry.label for entry in ordered], dtype=np.int32),
        num_train=sum(entry.split == "train" for entry in ordered),
        has_splits=True,
        times=np.array([path.stat().st_mtime_ns for path in paths], dtype=np.int64),
    )
