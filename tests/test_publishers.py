"""Each set's published format, written tiny, comes back through our own index: images, labels, classes, splits."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from raised import fails
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN, Flowers102
from torchvision.datasets.imagenet import ARCHIVE_META

from pipeline.data.index import open_index
from pipeline.data.publishers import SETS, import_set
from pipeline.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def pixels(count: int, height: int, width: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def jpeg(value: int, side: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side + value % 3, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_of(members: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def mat_of(**values: object) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, values)
    return buffer.getvalue()


Image_ = tuple[str, str, bytes | NDArray[np.uint8]]  # split, class, bytes or pixels


def cifar(folder: str, meta: dict[str, object], batches: dict[str, dict[str, object]]) -> bytes:
    members = {f"{folder}/{name}": pickle.dumps(value, 2) for name, value in {**batches, **meta}.items()}  # type: ignore[arg-type]
    return tar_of(members)


def flat(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def write_cifar10(home: Path) -> list[Image_]:
    names, images = ["ant", "bee", "cat"], pixels(12, 32, 32)
    batches: dict[str, dict[str, object]] = {}
    for number in range(6):
        rows = images[2 * number : 2 * number + 2]
        batches["test_batch" if number == 5 else f"data_batch_{number + 1}"] = {
            b"data": flat(rows),
            b"labels": [number % 3, (number + 1) % 3],
        }
    content = cifar("cifar-10-batches-py", {"batches.meta": {b"label_names": [n.encode() for n in names]}}, batches)
    (home / "cifar-10-python.tar.gz").write_bytes(content)
    return [("train" if n < 10 else "val", names[(n // 2 + n % 2) % 3], images[n]) for n in range(12)]


def write_cifar100(home: Path) -> list[Image_]:
    images = pixels(4, 32, 32)
    batches = {
        "train": {b"data": flat(images[:3]), b"fine_labels": [1, 0, 1], b"coarse_labels": [0, 0, 0]},
        "test": {b"data": flat(images[3:]), b"fine_labels": [0], b"coarse_labels": [0]},
    }
    content = cifar("cifar-100-python", {"meta": {b"fine_label_names": [b"apple", b"bus"]}}, batches)  # type: ignore[arg-type]
    (home / "cifar-100-python.tar.gz").write_bytes(content)
    return [("train" if n < 3 else "val", ["bus", "apple", "bus", "apple"][n], images[n]) for n in range(4)]


def write_svhn(home: Path, extra: bool = False) -> list[Image_]:
    found: list[Image_] = []
    parts = [("train", "train", [1, 10, 9]), ("test", "val", [10, 3])] + ([("extra", "train", [5])] if extra else [])
    for stem, split, labels in parts:
        images = pixels(len(labels), 32, 32)
        content = mat_of(X=images.transpose(1, 2, 3, 0), y=np.array(labels, np.uint8)[:, None])
        (home / f"{stem}_32x32.mat").write_bytes(content)
        found += [(split, str(label % 10), image) for label, image in zip(labels, images, strict=True)]
    return found


def write_stl10(home: Path) -> list[Image_]:
    images, labels = pixels(5, 96, 96), [1, 3, 2, 2, 1]
    columns = np.ascontiguousarray(images.transpose(0, 3, 2, 1))
    members = {
        "stl10_binary/train_X.bin": columns[:3].tobytes(),
        "stl10_binary/train_y.bin": bytes(labels[:3]),
        "stl10_binary/test_X.bin": columns[3:].tobytes(),
        "stl10_binary/test_y.bin": bytes(labels[3:]),
        "stl10_binary/unlabeled_X.bin": columns[:1].tobytes(),
        "stl10_binary/class_names.txt": b"airplane\nbird\ncar\n",
    }
    (home / "stl10_binary.tar.gz").write_bytes(tar_of(members))
    names = ["airplane", "bird", "car"]
    return [("train" if n < 3 else "val", names[labels[n] - 1], images[n]) for n in range(5)]


def write_tiny_imagenet(home: Path) -> list[Image_]:
    top, found = "tiny-imagenet-200", [("train", "n02", jpeg(5)), ("train", "n01", jpeg(9)), ("val", "n02", jpeg(40))]
    with zipfile.ZipFile(home / "tiny-imagenet-200.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{top}/wnids.txt", "n02\nn01\n")
        file.writestr(f"{top}/train/n02/images/n02_0.JPEG", found[0][2])
        file.writestr(f"{top}/train/n02/n02_boxes.txt", "n02_0.JPEG\t0\t0\t1\t1\n")
        file.writestr(f"{top}/train/n01/images/n01_0.JPEG", found[1][2])
        file.writestr(f"{top}/val/images/val_0.JPEG", found[2][2])
        file.writestr(f"{top}/val/val_annotations.txt", "val_0.JPEG\tn02\t0\t0\t5\t5\n")
        file.writestr(f"{top}/test/images/test_0.JPEG", jpeg(77))
    return list(found)


def write_aircraft(home: Path) -> list[Image_]:
    data = "fgvc-aircraft-2013b/data"
    found = [("train", "707-320", jpeg(3)), ("train", "A340-300/x", jpeg(4)), ("val", "707-320", jpeg(5))]
    members = {
        f"{data}/variants.txt": b"707-320\nA340-300/x\n",
        f"{data}/images_variant_train.txt": b"0000001 707-320\n",
        f"{data}/images_variant_trainval.txt": b"0000001 707-320\n0000002 A340-300/x\n",
        f"{data}/images_variant_test.txt": b"0000003 707-320\n",
        **{f"{data}/images/000000{n + 1}.jpg": image for n, (_, _, image) in enumerate(found)},
    }
    (home / "fgvc-aircraft-2013b.tar.gz").write_bytes(tar_of(members))
    return list(found)


def write_flowers102(home: Path) -> list[Image_]:
    images = [jpeg(10 * n) for n in range(4)]
    (home / "102flowers.tgz").write_bytes(tar_of({f"jpg/image_{n + 1:05d}.jpg": i for n, i in enumerate(images)}))
    (home / "imagelabels.mat").write_bytes(mat_of(labels=np.array([[77, 1, 77, 102]])))
    (home / "setid.mat").write_bytes(mat_of(trnid=np.array([[3]]), valid=np.array([[1]]), tstid=np.array([[2, 4]])))
    names = [Flowers102.classes[n] for n in (76, 0, 76, 101)]
    return [("val" if n in (1, 3) else "train", names[n], images[n]) for n in range(4)]


def write_cars(home: Path) -> list[Image_]:
    kinds = [("fname", object), ("class", object)]

    def annotations(rows: list[tuple[str, int]]) -> bytes:
        return mat_of(annotations=np.array([rows], dtype=kinds))

    images = [jpeg(20), jpeg(21), jpeg(22)]
    (home / "cars_train.tgz").write_bytes(
        tar_of({"cars_train/00001.jpg": images[0], "cars_train/00002.jpg": images[1]})
    )
    (home / "cars_test.tgz").write_bytes(tar_of({"cars_test/00001.jpg": images[2]}))
    names = np.array([["Ram C/V Cargo Van Minivan 2012", "smart fortwo"]], dtype=object)
    kit = {"devkit/cars_meta.mat": mat_of(class_names=names)}
    kit["devkit/cars_train_annos.mat"] = annotations([("00001.jpg", 2), ("00002.jpg", 1)])
    (home / "car_devkit.tgz").write_bytes(tar_of(kit))
    (home / "cars_test_annos_withlabels.mat").write_bytes(annotations([("00001.jpg", 2)]))
    ram, smart = names[0]
    return [("train", smart, images[0]), ("train", ram, images[1]), ("val", smart, images[2])]


def write_cub(home: Path) -> list[Image_]:
    found = [("train", "001.Albatross", jpeg(60)), ("val", "002.Crow", jpeg(61)), ("train", "002.Crow", jpeg(62))]
    top, paths = "CUB_200_2011", ["001.Albatross/a.jpg", "002.Crow/a.jpg", "002.Crow/b.jpg"]
    members = {
        "attributes.txt": b"1 x\n",
        f"{top}/images.txt": "".join(f"{n + 1} {p}\n" for n, p in enumerate(paths)).encode(),
        f"{top}/image_class_labels.txt": b"1 1\n2 2\n3 2\n",
        f"{top}/train_test_split.txt": b"1 1\n2 0\n3 1\n",
        f"{top}/classes.txt": b"1 001.Albatross\n2 002.Crow\n",
        **{f"{top}/images/{path}": image for path, (_, _, image) in zip(paths, found, strict=True)},
    }
    (home / "CUB_200_2011.tgz").write_bytes(tar_of(members))
    return list(found)


def devkit() -> bytes:
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(1, "n02", "dog", 0), (2, "n01", "cat", 0), (3, "n09", "animal", 2)]
    return tar_of(
        {
            "ILSVRC2012_devkit_t12/data/meta.mat": mat_of(synsets=np.array(rows, dtype=kinds)[:, None]),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n",
        }
    )


IMAGENET: list[Image_] = [
    ("train", "n01", jpeg(70)),
    ("train", "n01", jpeg(71)),
    ("train", "n02", jpeg(72)),
    ("val", "n01", jpeg(73)),
    ("val", "n02", jpeg(74)),
]


def write_imagenet(home: Path) -> list[Image_]:
    inner = {
        "n02.tar": tar_of({"n02_1.JPEG": IMAGENET[2][2]}, "w"),  # type: ignore[dict-item]
        "n01.tar": tar_of({"n01_1.JPEG": IMAGENET[0][2], "n01_2.JPEG": IMAGENET[1][2]}, "w"),  # type: ignore[dict-item]
    }
    (home / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner, "w"))
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": image for n, (_, _, image) in enumerate(IMAGENET[3:], 1)}
    (home / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val, "w"))  # type: ignore[arg-type]
    (home / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    return IMAGENET


def folder_of_imagenet(home: Path) -> Path:
    for number, (split, wnid, image) in enumerate(IMAGENET):
        folder = home / "ImageNet" / (f"train/{wnid}" if split == "train" else "val")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{wnid}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{number - 2:08d}.JPEG"
        (folder / name).write_bytes(image)  # type: ignore[arg-type]
    return home / "ImageNet"


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "stl10": write_stl10,
    "tiny-imagenet": write_tiny_imagenet,
    "aircraft": write_aircraft,
    "flowers102": write_flowers102,
    "cars": write_cars,
    "cub": write_cub,
    "imagenet": write_imagenet,
}


def stored(packed: Path) -> list[tuple[str, str, bytes]]:
    """(split, class, bytes) of every image of a packed set."""
    index = open_index(packed)
    splits = ["train"] * index.meta.num_train + ["val"] * (len(index) - index.meta.num_train)
    found = []
    for row, split in enumerate(splits):
        path, offset, length = index.file(row), *index.location(row)[1:]
        with open(index.location(row)[0], "rb") as file:
            file.seek(offset)
            found.append((split, index.classes[index.label[row]], file.read(length)))
        assert path
    return found


def same(found: list[tuple[str, str, bytes]], expected: list[Image_]) -> bool:
    """Whether both hold the same images under the same split and class, JPEGs byte for byte, arrays pixel for pixel."""

    def key(split: str, name: str, image: bytes | NDArray[np.uint8]) -> tuple[str, str, bytes]:
        if isinstance(image, bytes) and image.startswith(b"\x89PNG"):
            image = np.asarray(Image.open(io.BytesIO(image)))
        return split, name, image if isinstance(image, bytes) else image.tobytes()

    return sorted(key(*each) for each in found) == sorted(key(*each) for each in expected)


@pytest.mark.parametrize("name", SETS)
def test_each_set_is_packed_as_it_was_published(name: str, tmp_path: Path) -> None:
    home = tmp_path / "files"
    home.mkdir()
    expected = WRITERS[name](home)
    report = import_set(name, sorted(home.iterdir()), tmp_path / "packed", checksums=False, workers=1)
    assert same(stored(tmp_path / "packed"), expected) and not report.set_aside
    source = json.loads((tmp_path / "packed" / "source.json").read_text())
    assert source["set"] == name and {file["name"] for file in source["files"]} == {p.name for p in home.iterdir()}
    again = import_set(name, sorted(home.iterdir()), tmp_path / "packed", checksums=False, workers=1)
    assert again.images == report.images and again.shards == again.kept_shards


def test_svhns_extra_images_are_added_to_train_if_they_are_given(tmp_path: Path) -> None:
    expected = write_svhn(tmp_path, extra=True)
    import_set("svhn", sorted(tmp_path.glob("*.mat")), tmp_path / "packed", checksums=False, workers=1)
    assert same(stored(tmp_path / "packed"), expected)


@pytest.mark.parametrize("truth", ["ILSVRC2012_devkit_t12.tar.gz", "LOC_val_solution.csv"])
def test_imagenets_flat_val_is_labelled_by_its_ground_truth(truth: str, tmp_path: Path) -> None:
    folder = folder_of_imagenet(tmp_path)
    csv = "ImageId,PredictionString\nILSVRC2012_val_00000002,n02 1 2 3 4\nILSVRC2012_val_00000001,n01 1 2 3 4 \n"
    (tmp_path / truth).write_bytes(devkit() if truth.endswith(".gz") else csv.encode())
    import_set("imagenet", [folder, tmp_path / truth], tmp_path / "packed", checksums=False, workers=1)
    assert same(stored(tmp_path / "packed"), IMAGENET)
    (folder / "val" / "ILSVRC2012_val_00000003.JPEG").write_bytes(jpeg(1))
    with fails(DataError, "files", subject="ILSVRC2012_val_00000003.JPEG"):
        import_set("imagenet", [folder, tmp_path / truth], tmp_path / "again", checksums=False, workers=1)


def test_checksums_are_torchvisions_and_others_are_refused(tmp_path: Path) -> None:
    known = {file.name: file.md5 for ways in SETS.values() for way in ways for file in way if file.md5}
    theirs = {CIFAR10.filename: CIFAR10.tgz_md5, CIFAR100.filename: CIFAR100.tgz_md5, STL10.filename: STL10.tgz_md5}
    theirs |= {name: md5 for _, name, md5 in SVHN.split_list.values()}
    theirs |= dict(Flowers102._file_dict.values()) | dict(ARCHIVE_META.values())
    assert known == theirs
    write_cifar10(tmp_path)
    with fails(DataError, "--no-checksum", subject="cifar-10-python.tar.gz"):
        import_set("cifar10", [tmp_path / "cifar-10-python.tar.gz"], tmp_path / "packed", workers=1)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    content = tar_of({"cifar-10-batches-py/data_batch_1": pickle.dumps({b"data": Evil()}, 2)})
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    with fails(DataError, "files", subject="data_batch_1"):
        import_set("cifar10", [tmp_path / "cifar-10-python.tar.gz"], tmp_path / "packed", checksums=False, workers=1)


ROWS = np.zeros((2, 3072), np.uint8)
WRONG = {
    "no dictionary": pickle.dumps([1], 2),
    "no data": pickle.dumps({b"labels": [0, 1]}, 2),
    "no labels": pickle.dumps({b"data": ROWS}, 2),
    "fewer labels": pickle.dumps({b"data": ROWS, b"labels": [0]}, 2),
    "a label out of range": pickle.dumps({b"data": ROWS, b"labels": [0, 3]}, 2),
    "a negative label": pickle.dumps({b"data": ROWS, b"labels": [0, -1]}, 2),
    "labels in words": pickle.dumps({b"data": ROWS, b"labels": ["a", "b"]}, 2),
    "fractions": pickle.dumps({b"data": ROWS / 2, b"labels": [0, 1]}, 2),
    "shorter rows": pickle.dumps({b"data": ROWS[:, :100], b"labels": [0, 1]}, 2),
    "objects": pickle.dumps({b"data": ROWS.astype(object), b"labels": [0, 1]}, 2),
    "a key that is a tuple": pickle.dumps({(1, 2): 3}, 2),
    "tuples that overflow the stack": b"\x80\x02})" + b"\x85" * 300_000 + b"K\1s.",
    "a memo of 64 GiB": b"\x80\x02}r\xff\xff\xff\xff.",
    "a string of 1 TiB": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"abc.",
    "nothing": b"",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_batch_of_cifar_is_refused(what: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    with fails(DataError, "files"):
        import_damaged(tmp_path, "data_batch_2", WRONG[what])


def test_a_damaged_batch_of_cifar_is_read_or_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    whole = read_members(tmp_path)["data_batch_2"]
    draw = np.random.default_rng(0)
    for number in range(40):
        broken, at = bytearray(whole), int(draw.choice([draw.integers(200), draw.integers(len(whole))]))
        if number % 3 == 0:
            broken[at] ^= 1 << int(draw.integers(8))
        elif number % 3 == 1:
            del broken[at:]
        else:
            broken[at:at] = draw.bytes(3)
        with suppress(DataError):
            import_damaged(tmp_path, "data_batch_2", bytes(broken))


def read_members(home: Path) -> dict[str, bytes]:
    with tarfile.open(home / "cifar-10-python.tar.gz") as tar:
        return {Path(m.name).name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def import_damaged(home: Path, member: str, content: bytes) -> None:
    """Imports a copy of the set in which one member is another."""
    with tempfile.TemporaryDirectory(dir=home) as folder:
        copy = Path(folder) / "cifar-10-python.tar.gz"
        members = read_members(home) | {member: content}
        copy.write_bytes(tar_of({f"cifar-10-batches-py/{name}": each for name, each in members.items()}, "w:gz"))
        import_set("cifar10", [copy], Path(folder) / "packed", checksums=False, workers=1)


def test_files_of_another_set_and_damaged_files_are_refused(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    train, test = tmp_path / "train_32x32.mat", tmp_path / "test_32x32.mat"
    with fails(ConfigError, "set", subject="mnist"):
        import_set("mnist", [train], tmp_path / "packed")
    with fails(ConfigError, "files", subject="train_32x32.mat"):
        import_set("svhn", [train], tmp_path / "packed")
    with fails(ConfigError, "files", subject="nowhere.mat"):
        import_set("svhn", [train, tmp_path / "nowhere.mat"], tmp_path / "packed")
    with fails(ConfigError, "files", subject="train_32x32.mat, test_32x32.mat"):
        import_set("cars", [train, test], tmp_path / "packed")
    train.write_bytes(train.read_bytes()[:500])
    with fails(DataError, "files", subject="train_32x32.mat"):
        import_set("svhn", [train, test], tmp_path / "packed", checksums=False)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b nothing")
    with fails(DataError, "source", subject="cifar-10-python.tar.gz"):
        import_set("cifar10", [tmp_path / "cifar-10-python.tar.gz"], tmp_path / "other", checksums=False)
