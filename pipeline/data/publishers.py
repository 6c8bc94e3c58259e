"""The publishers' own files of known image sets -> tar shards with an index, as `data.pack` makes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.listing import Listing
from pipeline.data.pack import QUALITY, PackReport, pack_listing
from pipeline.data.published import READERS, PublishedImage, ReaderContext
from pipeline.data.store import Progress
from pipeline.errors import ConfigError, DataError
from pipeline.runs.files import write_json

READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class File:
    """A file of a set, as its publisher names it; md5 as torchvision knows it, None where it knows none."""

    role: str
    name: str
    md5: str | None = None
    optional: bool = False


SETS: Mapping[str, tuple[tuple[File, ...], ...]] = {  # the ways in which each set may be given, the usual one first
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
    """Packs the set `name` from its publisher's files into `destination`; source.json there names them and their md5.

    The other arguments are those of `pack`. Interrupted, the same call goes on. Raises ConfigError for an unknown set
    and for files that are not its own, DataError for a damaged one or, with `checksums`, an md5 that is not the known.
    """
    given = _roles(name, [file.expanduser().absolute() for file in files])
    stats = [(file.name, path.name, path.stat().st_size, path.stat().st_mtime_ns) for file, path in given]

    def make(scratch: Path) -> Listing:
        sums = {path.name: _checked(file, path, checksums, progress) for file, path in given if path.is_file()}
        context = ReaderContext({file.role: path for file, path in given}, scratch, progress)
        for left in scratch.glob("*.pngs"):
            left.unlink()  # of an interrupted call
        found = READERS[name](context)
        listing = _listing(found.entries, found.classes, destination)
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


def _roles(name: str, files: Sequence[Path]) -> list[tuple[File, Path]]:
    """Each file with what it is, by its name. Raises ConfigError listing what the set needs."""
    if name not in SETS:
        raise ConfigError(f"{name}: no set of this name is known; known: {', '.join(SETS)}")
    for path in files:
        if not path.exists():
            raise ConfigError(f"{path}: no such file")
    for way in SETS[name]:
        found = [(file, path) for file in way for path in files if _is(file, path)]
        needed = {file.role for file in way if not file.optional}
        if len(found) == len(files) and needed <= {file.role for file, _ in found}:
            return found
    ways = " or ".join(" ".join(f"[{file.name}]" if file.optional else file.name for file in way) for way in SETS[name])
    raise ConfigError(
        f"{name}: given {', '.join(path.name for path in files) or 'nothing'}; it is imported from {ways}, under the "
        "names that the publisher gave them"
    )


def _is(file: File, path: Path) -> bool:
    return path.is_dir() if file.name == "FOLDER" else path.name == file.name and path.is_file()


def _checked(file: File, path: Path, checksums: bool, progress: Progress | None) -> str:
    """The md5 of a file. Raises DataError where another is known."""
    digest, done, size = hashlib.md5(usedforsecurity=False), 0, path.stat().st_size
    with open(path, "rb") as content:
        while block := content.read(READ_AT_ONCE):
            digest.update(block)
            done += len(block)
            if progress:
                progress(f"checksum of {path.name}, MiB", done >> 20, max(1, size >> 20))
    if checksums and file.md5 is not None and digest.hexdigest() != file.md5:
        raise DataError(
            f"{path}: its md5 is {digest.hexdigest()}, the publisher's {file.md5}: fetch it again, or take it as it is "
            "with --no-checksum"
        )
    return digest.hexdigest()


def _listing(entries: Sequence[PublishedImage], classes: tuple[str, ...], root: Path) -> Listing:
    """The entries in the order in which their bytes lie, train first; paths relative to `root`."""
    if not entries:
        raise DataError("the files hold no image")
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
