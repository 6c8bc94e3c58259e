"""Readers of image sets in the form in which they are published: place of the bytes, label and split of each image.

No member of an archive is extracted to the path that it names. JPEGs are read in place, from uncompressed tars; arrays
of pixels are written as PNG. The publisher's test split becomes `val`.
"""

from __future__ import annotations

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.data.archives import unpack
from pipeline.data.image_headers import EXTENSIONS
from pipeline.data.listing import SCAN_THREADS, TAR
from pipeline.data.pickled import unpickle
from pipeline.data.store import Progress
from pipeline.data.tars import tar_members
from pipeline.errors import DataError
from pipeline.runs.files import whole_file

Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class PublishedImage:
    """Where an encoded image is stored, with its label and split."""

    split: str  # train or val
    name: str
    label: int
    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class PublishedSet:
    """What a reader returns: names of the classes by label, and the images."""

    classes: tuple[str, ...]
    entries: Sequence[PublishedImage]


@dataclass(frozen=True)
class ReaderContext:
    """The given files by their role, a folder for what a reader unpacks, and a callback for progress."""

    files: Mapping[str, Path]
    scratch: Path
    progress: Progress | None = None

    def archive(self, role: str) -> Archive:
        """The members of a .tar, .tar.gz or .zip; compressed ones are first turned into a tar in the scratch folder."""
        path = self.files[role]
        tar = path
        if path.suffix.lower() != ".tar":
            tar = self.scratch / f"{TAR.sub('', path.name)}.tar"
            if not tar.exists():
                tar.parent.mkdir(parents=True, exist_ok=True)
                (_zip_to_tar if path.suffix.lower() == ".zip" else unpack)(path, tar)
        return Archive(tar, {_plain(name): (offset, length) for name, offset, length in tar_members(tar)})

    def pngs(self, split: str, images: Pixels, labels: Iterable[int]) -> Iterator[PublishedImage]:
        """Writes images [N, H, W, 3] as PNGs into one file of the scratch folder."""
        from PIL import Image

        self.scratch.mkdir(parents=True, exist_ok=True)
        path = self.scratch / f"{split}.pngs"
        with open(path, "ab") as file:
            for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
                start = file.tell()
                file.write(buffer.getvalue())
                yield PublishedImage(
                    split, f"{label:04d}/{split}_{start:012d}.png", label, path, start, file.tell() - start
                )
                if self.progress and number % 1000 == 0:
                    self.progress(f"encoding {split}", number, len(images))


@dataclass(frozen=True)
class Archive:
    """An uncompressed tar: (offset, length) of its members by name, without a leading `./`."""

    path: Path
    members: Mapping[str, tuple[int, int]]

    def read(self, name: str) -> bytes:
        """The content of the one member whose path ends in `name`. Raises DataError unless there is exactly one."""
        offset, length = self.members[self.find(name)]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def find(self, name: str) -> str:
        """The path of the one member that ends in `name`. Raises DataError unless there is exactly one."""
        matching = [member for member in self.members if member == name or member.endswith(f"/{name}")]
        if len(matching) != 1:
            count = "more than one" if matching else "no"
            raise DataError(
                f"{self.path.name}: {count} {name} in it; download it again", key="files", subject=self.path.name
            )
        return matching[0]

    def lines(self, name: str) -> list[str]:
        """The lines of a text member, stripped, without empty ones."""
        return [line.strip() for line in self.read(name).decode("utf-8").splitlines() if line.strip()]

    def entry(self, split: str, member: str, label: int) -> PublishedImage:
        """A member as an image. Raises DataError if the archive, whose annotations name it, does not contain it."""
        if member not in self.members:
            raise DataError(
                f"{self.path.name}: its lists name {member}, which is not in it; download it again",
                key="files",
                subject=member,
            )
        return PublishedImage(
            split, f"{label:04d}/{PurePosixPath(member).name}", label, self.path, *self.members[member]
        )


def cifar10(context: ReaderContext) -> PublishedSet:
    """CIFAR-10 from its Python version."""
    return _cifar(
        context, [f"data_batch_{n}" for n in range(1, 6)], "test_batch", "batches.meta", "label_names", "labels"
    )


def cifar100(context: ReaderContext) -> PublishedSet:
    """CIFAR-100 with its 100 fine labels, from its Python version."""
    return _cifar(context, ["train"], "test", "meta", "fine_label_names", "fine_labels")


def _cifar(context: ReaderContext, train: Sequence[str], test: str, meta: str, names: str, labels: str) -> PublishedSet:
    archive = context.archive("archive")
    entries: list[PublishedImage] = []
    for split, members in (("train", train), ("val", [test])):
        for member in members:
            batch = unpickle(archive.read(member), f"{archive.path.name}: {member}")
            images, numbers = np.asarray(batch["data"]), batch[labels]
            if images.dtype != np.uint8 or images.shape[1:] != (3 * 32 * 32,):
                raise ValueError(f"{member}: data of {images.dtype} and shape {images.shape}, not rows of 3,072 bytes")
            if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
                raise ValueError(f"{member}: its {labels} are not a list of integers")
            pixels = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            entries += context.pngs(split, pixels, numbers)
    classes = unpickle(archive.read(meta), f"{archive.path.name}: {meta}")[names]
    if not isinstance(classes, list):
        raise ValueError(f"{meta}: its {names} are not a list")
    return PublishedSet(tuple(map(_text, classes)), entries)


def svhn(context: ReaderContext) -> PublishedSet:
    """SVHN. Label 10 of the publisher, the digit 0, becomes 0. `extra_32x32.mat` is added to train if it is given."""
    entries: list[PublishedImage] = []
    for role, split in (("train", "train"), ("extra", "train"), ("test", "val")):
        if role in context.files:
            arrays = _mat(context.files[role])
            labels = [int(label) % 10 for label in np.asarray(arrays["y"]).reshape(-1)]
            entries += context.pngs(split, np.ascontiguousarray(np.transpose(arrays["X"], (3, 0, 1, 2))), labels)
    return PublishedSet(tuple("0123456789"), entries)


def stl10(context: ReaderContext) -> PublishedSet:
    """STL-10 without the 100,000 images that have no label."""
    archive = context.archive("archive")
    entries: list[PublishedImage] = []
    for split, stem in (("train", "train"), ("val", "test")):
        columns = np.frombuffer(archive.read(f"{stem}_X.bin"), dtype=np.uint8).reshape(-1, 3, 96, 96)
        labels = np.frombuffer(archive.read(f"{stem}_y.bin"), dtype=np.uint8).astype(int) - 1
        entries += context.pngs(split, np.ascontiguousarray(columns.transpose(0, 3, 2, 1)), labels.tolist())
    return PublishedSet(tuple(archive.lines("class_names.txt")), entries)


def tiny_imagenet(context: ReaderContext) -> PublishedSet:
    """Tiny ImageNet; its test images have no labels and are left out."""
    archive = context.archive("archive")
    classes = tuple(sorted(archive.lines("wnids.txt")))
    label = {wnid: number for number, wnid in enumerate(classes)}
    entries = []
    for member in archive.members:
        parts = PurePosixPath(member).parts
        if len(parts) >= 4 and parts[-4] == "train" and parts[-2] == "images" and _is_image(member):
            entries.append(archive.entry("train", member, label[parts[-3]]))
    annotations = archive.find("val_annotations.txt")
    folder = PurePosixPath(annotations).parent / "images"
    for line in archive.lines("val_annotations.txt"):
        name, wnid = line.split("\t")[:2]
        entries.append(archive.entry("val", str(folder / name), label[wnid]))
    return PublishedSet(classes, entries)


def aircraft(context: ReaderContext) -> PublishedSet:
    """FGVC-Aircraft by its 100 variants; train is the publisher's train and val. The copyright line remains."""
    archive = context.archive("archive")
    classes = tuple(archive.lines("data/variants.txt"))
    label = {variant: number for number, variant in enumerate(classes)}
    folder = PurePosixPath(archive.find("data/variants.txt")).parent / "images"
    entries = []
    for split, stem in (("train", "trainval"), ("val", "test")):
        for line in archive.lines(f"data/images_variant_{stem}.txt"):
            number, _, variant = line.partition(" ")
            entries.append(archive.entry(split, str(folder / f"{number}.jpg"), label[variant]))
    return PublishedSet(classes, entries)


def flowers102(context: ReaderContext) -> PublishedSet:
    """Oxford Flowers 102; train is the publisher's train and validation. Class names are torchvision's."""
    from torchvision.datasets import Flowers102

    archive = context.archive("images")
    labels = np.asarray(_mat(context.files["labels"])["labels"]).reshape(-1)
    splits = _mat(context.files["splits"])
    entries = []
    for split, keys in (("train", ("trnid", "valid")), ("val", ("tstid",))):
        for number in np.concatenate([np.asarray(splits[key]).reshape(-1) for key in keys]):
            member = f"jpg/image_{int(number):05d}.jpg"
            entries.append(archive.entry(split, member, int(labels[int(number) - 1]) - 1))
    return PublishedSet(tuple(Flowers102.classes), entries)


def cars(context: ReaderContext) -> PublishedSet:
    """Stanford Cars."""
    kit = context.archive("devkit")
    names = np.asarray(_mat(io.BytesIO(kit.read("cars_meta.mat")))["class_names"]).reshape(-1)
    classes = tuple(str(np.asarray(name).item()) for name in names)
    train = _mat(io.BytesIO(kit.read("cars_train_annos.mat")))["annotations"]
    test = _mat(context.files["test labels"])["annotations"]
    entries = []
    for split, role, rows in (("train", "train", train), ("val", "test", test)):
        archive = context.archive(role)
        for row in np.asarray(rows).reshape(-1):
            member = f"cars_{role}/{np.asarray(row['fname']).item()}"
            entries.append(archive.entry(split, member, int(np.asarray(row["class"]).item()) - 1))
    return PublishedSet(classes, entries)


def cub(context: ReaderContext) -> PublishedSet:
    """CUB-200-2011."""
    archive = context.archive("archive")
    listed = archive.find("images.txt")
    folder = PurePosixPath(listed).parent

    def table(name: str) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in archive.lines(str(folder / name)))

    paths, labels, trained = table("images.txt"), table("image_class_labels.txt"), table("train_test_split.txt")
    classes = table("classes.txt")
    entries = [
        archive.entry("train" if trained[n] == "1" else "val", str(folder / "images" / path), int(labels[n]) - 1)
        for n, path in paths.items()
    ]
    return PublishedSet(tuple(classes[str(n + 1)] for n in range(len(classes))), entries)


def imagenet(context: ReaderContext) -> PublishedSet:
    """ImageNet from its two tars, read in place, or from a folder with train/<wnid>/ and a flat val/."""
    validation = _validation(context)
    if "folder" in context.files:
        images = list(_imagenet_folder(context.files["folder"]))
    else:
        images = [*_imagenet_train(context.files["train"]), *_imagenet_val(context.files["val"])]
    wnids = tuple(sorted({wnid for wnid, *_ in images if wnid is not None}))
    label = {wnid: number for number, wnid in enumerate(wnids)}
    entries = []
    for wnid, name, path, offset, length in images:
        split, known = ("train", wnid) if wnid is not None else ("val", validation.get(Path(name).stem))
        if known not in label:
            why = "no ground truth" if known is None else f"the class {known}, which train lacks"
            raise DataError(f"{path}: {name} has {why}", key="files", subject=name)
        entries.append(PublishedImage(split, f"{known}/{Path(name).name}", label[known], path, offset, length))
    return PublishedSet(wnids, entries)


Located: TypeAlias = tuple[str | None, str, Path, int, int]  # wnid or None for val, name, path, offset, length


def _imagenet_train(path: Path) -> Iterator[Located]:
    """The images of a tar that contains one tar per class."""
    classes = [(name, offset) for name, offset, _ in tar_members(path) if name.endswith(".tar")]
    with ThreadPoolExecutor(SCAN_THREADS) as threads:
        for (name, _), images in zip(classes, threads.map(lambda each: _inner(path, each[1]), classes), strict=True):
            yield from ((Path(name).stem, image, path, offset, length) for image, offset, length in images)


def _inner(path: Path, start: int) -> list[tuple[str, int, int]]:
    """(name, offset in `path`, length) of each image in the inner tar that begins at byte `start`."""
    with open(path, "rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                return [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and _is_image(m.name)]
        except tarfile.TarError as error:
            raise DataError(
                f"{path}: the tar at its byte {start} is damaged ({error}); download it again",
                key="files",
                subject=path,
            ) from None


def _imagenet_val(path: Path) -> Iterator[Located]:
    yield from ((None, name, path, offset, length) for name, offset, length in tar_members(path) if _is_image(name))


def _imagenet_folder(root: Path) -> Iterator[Located]:
    for folder in sorted((root / "train").iterdir()):
        if folder.is_dir():
            yield from ((folder.name, path.name, path, 0, size) for path, size in _images_in(folder))
    yield from ((None, path.name, path, 0, size) for path, size in _images_in(root / "val"))


def _images_in(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_size) for path in folder.iterdir() if _is_image(path.name))


def _validation(context: ReaderContext) -> dict[str, str]:
    """The wnid of each validation image, by stem: from the development kit, or from LOC_val_solution.csv."""
    if "solution" in context.files:
        with open(context.files["solution"], newline="", encoding="utf-8") as file:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    kit = context.archive("devkit")
    synsets = np.asarray(_mat(io.BytesIO(kit.read("meta.mat")), squeeze_me=True)["synsets"]).reshape(-1)
    wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    truth = kit.lines("ILSVRC2012_validation_ground_truth.txt")
    return {f"ILSVRC2012_val_{number:08d}": wnid[int(line)] for number, line in enumerate(truth, 1)}


READERS: Mapping[str, Callable[[ReaderContext], PublishedSet]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "stl10": stl10,
    "tiny-imagenet": tiny_imagenet,
    "aircraft": aircraft,
    "flowers102": flowers102,
    "cars": cars,
    "cub": cub,
    "imagenet": imagenet,
}


def _mat(source: Path | io.BytesIO, **options: bool) -> Mapping[str, Any]:
    from scipy.io import loadmat

    try:
        content: Mapping[str, Any] = loadmat(source, **options)
    except Exception as error:  # scipy raises a dozen kinds for damaged files
        name = source if isinstance(source, Path) else "a .mat file"
        raise DataError(f"{name}: cannot be read ({error})", key="files", subject=name) from None
    return content


def _zip_to_tar(path: Path, to: Path) -> None:
    try:
        with whole_file(to) as aside, zipfile.ZipFile(path) as source, tarfile.open(aside, "w") as target:
            for member in source.infolist():
                if not member.is_dir():
                    info = tarfile.TarInfo(member.filename)
                    info.size = member.file_size
                    with source.open(member) as content:
                        target.addfile(info, content)
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path}: not a complete zip file ({error}); download it again", key="files", subject=path
        ) from None


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_image(name: str) -> bool:
    base = PurePosixPath(name).name
    return not base.startswith(".") and PurePosixPath(base).suffix.lower() in EXTENSIONS
