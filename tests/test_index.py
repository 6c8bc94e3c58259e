"""Tests of the index: what is found, where it is stored, that it is built once, and how it is divided."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from raised import fails

from pipeline.data import index as index_module
from pipeline.data.bad import BadImages
from pipeline.data.config import DataConfig
from pipeline.data.index import ImageIndex, open_index, open_splits, synthetic
from pipeline.errors import DataError
from tests import images

PHOTO = images.photo(40, 30)


def class_folders(root: Path, classes: tuple[str, ...] = ("ant", "bee", "cow"), each: int = 4) -> Path:
    """Different sizes, extensions of either case, one file in a folder of its own."""
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            for number in range(each):
                extension = (".jpg", ".JPEG", ".png")[number % 3]
                path = root / split / name / ("deep" if number == 3 else "") / f"{name}_{number}{extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                maker = images.png if extension == ".png" else images.jpeg
                path.write_bytes(maker(20 + number, 16 + label, seed=number))
    return root


def shards(root: Path, members: Mapping[str, Mapping[str, bytes]], classes: str = "ant\nbee\n") -> Path:
    """{tar: {member: bytes}} written unchanged."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text(classes)
    for name, content in members.items():
        with tarfile.open(root / name, "w") as tar:
            for member, encoded in content.items():
                info = tarfile.TarInfo(member)
                info.size = len(encoded)
                tar.addfile(info, io.BytesIO(encoded))
    return root


def read(index: ImageIndex, row: int) -> bytes:
    path, offset, length = index.location(row)
    descriptor = os.open(path, os.O_RDONLY)
    buffer = bytearray(length)
    assert os.preadv(descriptor, [buffer], offset) == length
    os.close(descriptor)
    return bytes(buffer)


def files(index: ImageIndex) -> list[str]:
    return [index.file(row) for row in range(len(index))]


def splits_of(root: Path, seed: int = 0, **keys: object):  # type: ignore[no-untyped-def]
    return open_splits(DataConfig(root=root, **keys), seed)


def test_class_folders_have_imagefolders_labels_and_are_read_byte_for_byte(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = class_folders(tmp_path)
    far = images.jpeg(50, 60)  # its size comes after more metadata than is read at first
    (root / "train/ant/far.jpg").write_bytes(far[:2] + b"\xff\xe2\xff\xf0" + bytes(0xFFEE) + far[2:])
    splits = splits_of(root)
    for split in ("train", "val"):
        index, peer = getattr(splits, split), ImageFolder(root / split)
        assert list(index.classes) == peer.classes
        assert {(str(root / index.file(n)), int(index.label[n])) for n in range(len(index))} == set(peer.samples)
        for row in range(len(index)):
            encoded = (root / index.file(row)).read_bytes()
            assert read(index, row) == encoded
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
            assert (index.width[row], index.height[row]) == upright.size
    assert len(splits.held_out) == 0


def test_shards_are_read_at_the_offsets_of_their_members(tmp_path: Path) -> None:
    content = {"a": images.jpeg(seed=1), "b": images.png(seed=2), "c": images.turned_jpeg(PHOTO, 6)}
    root = shards(
        tmp_path,
        {
            "train-000000.tar": {"a.JPG": content["a"], "a.cls": b"1\n", "b.png": content["b"], "b.cls": b"0"},
            "train-000001.tar": {"c.cls": b"1", "c.jpeg": content["c"], "c.json": b"{}"},
            "val-000000.tar": {"a.jpg": content["b"], "a.cls": b"0"},
        },
    )
    splits = splits_of(root)
    assert files(splits.train) == ["train-000000.tar/a.JPG", "train-000000.tar/b.png", "train-000001.tar/c.jpeg"]
    assert [read(splits.train, row) for row in range(3)] == [content["a"], content["b"], content["c"]]
    assert read(splits.val, 0) == content["b"]
    assert splits.train.label.tolist() == [1, 0, 1]
    assert splits.train.shard.tolist() == [0, 0, 1]
    assert (splits.train.width[2], splits.train.height[2]) == PHOTO.size
    assert splits.train.classes == ("ant", "bee")


def test_shards_in_split_folders_are_found(tmp_path: Path) -> None:
    root = shards(tmp_path, {})
    for split in ("train", "val"):
        shards(root / split, {"0.tar": {"a.jpg": images.jpeg(), "a.cls": b"1"}})
    splits = splits_of(root)
    assert (files(splits.train), files(splits.val)) == (["train/0.tar/a.jpg"], ["val/0.tar/a.jpg"])


def test_images_with_a_wrong_label_or_key_are_set_aside(tmp_path: Path) -> None:
    good = images.jpeg()
    tar = {"a.jpg": good, "a.cls": b"1", "b.jpg": good, "b.cls": b"x", "c.jpg": good, "c.cls": b"2", "d.jpg": good}
    root = shards(tmp_path, {"train-0.tar": {**tar, "a.png": good}, "train-1.tar": {"a.jpg": good, "a.cls": b"0"}})
    index = open_index(root)
    assert files(index) == ["train-0.tar/a.jpg", "train-1.tar/a.jpg"]
    assert dict(index.meta.set_aside) == {
        "train-0.tar/b.jpg": "wrong label: 'x' is neither an integer nor a class",
        "train-0.tar/c.jpg": "wrong label: 2, of 2 classes",
        "train-0.tar/d.jpg": "wrong label: no KEY.cls beside it",
        "train-0.tar/a.png": "duplicate key: twice in train-0.tar",
    }


@pytest.mark.parametrize("encoded", [images.EMPTY, images.TEXT, images.bomb_png(), b"\xff\xd8\xff\xe0"])
def test_an_index_is_built_in_spite_of_a_header_without_a_size(tmp_path: Path, encoded: bytes) -> None:
    (class_folders(tmp_path) / "train/bee/broken.jpg").write_bytes(encoded)
    index = splits_of(tmp_path, max_bad_share=0.1).train
    unread = np.flatnonzero(index.height == 0)
    assert [index.file(row) for row in unread] == ["train/bee/broken.jpg"]
    assert index.width[unread[0]] == 0
    assert unread[0] in BadImages(index, max_share=0.1)


def test_the_identity_depends_on_the_content_and_not_on_the_folder(tmp_path: Path) -> None:
    here, there = class_folders(tmp_path / "here"), tmp_path / "there" / "deep"
    shutil.copytree(here, there)  # other times, other place
    one, other = splits_of(here), splits_of(there)
    assert one.train.identity == other.train.identity
    assert one.val.identity == other.val.identity != one.train.identity
    os.rename(there / "train/ant/ant_0.jpg", there / "train/ant/ant_00.jpg")  # in the same place of the order
    assert splits_of(there).train.identity != one.train.identity


def test_the_index_is_built_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    root, built = class_folders(tmp_path), []
    config = DataConfig(root=root)

    def opened() -> ImageIndex:
        return open_splits(config, 0, lambda what, done, total: total and built.append(what)).train

    first = opened()
    assert built and first.folder.parent == root / ".adaptnet-index"
    built.clear()
    assert opened().folder == first.folder and not built
    (root / "train/ant/ant_0.jpg").write_bytes(images.jpeg(99, 77))
    changed = opened()
    assert built and (changed.width[0], changed.height[0]) == (99, 77)
    assert (first.width[0], first.height[0]) == (20, 16)  # who has the old one open keeps it
    as_long = images.jpeg(66, 44)
    (root / "train/ant/ant_0.jpg").write_bytes(as_long + bytes(int(changed.length[0]) - len(as_long)))
    assert opened().width[0] == 66  # by its time


def test_the_index_is_in_the_given_folder_or_for_read_only_data_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = class_folders(tmp_path / "data")
    told = splits_of(root, index=tmp_path / "told").train
    assert told.folder.parent == tmp_path / "told" and not (root / ".adaptnet-index").exists()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root.chmod(0o555)
    cached = splits_of(root).train
    root.chmod(0o755)
    assert cached.folder.parent == tmp_path / "home/.cache/adaptnet/index"
    (tmp_path / "file").touch()
    with fails(DataError, "data.index", subject=root):
        splits_of(root, index=tmp_path / "file")


BUILD = """
import sys, time
from pathlib import Path
from pipeline.data.index import open_index
while time.time() < float(sys.argv[2]):
    pass
index = open_index(Path(sys.argv[1]))
print(index.folder, len(index), int(index.height.sum()))
"""


def test_processes_that_build_at_the_same_time_share_one_index(tmp_path: Path) -> None:
    root = class_folders(tmp_path, each=40)
    start = [sys.executable, "-c", BUILD, str(root), str(time.time() + 1.5)]
    running = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    messages = {process.communicate(timeout=300)[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(messages) == 1
    assert [path.name for path in (root / ".adaptnet-index").iterdir()] == [Path(messages.pop().split()[0]).name]


def test_of_many_files_only_the_folders_are_checked_and_packing_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MANY_FILES", 10)
    root, messages = class_folders(tmp_path), []
    first = open_index(root, progress=lambda what, done, total: messages.append((what, total)))
    assert any(total == 0 and f"adaptnet data pack {root}" in what for what, total in messages)
    monkeypatch.setattr(index_module, "find", None)  # a listing would fail
    assert open_index(root).folder == first.folder
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "MANY_FILES", 10)
    (root / "val/cow/deep/new.jpg").write_bytes(images.jpeg())
    assert len(open_index(root)) == len(first) + 1
    (root / "train/dog").mkdir()
    (root / "train/dog/new.jpg").write_bytes(images.jpeg())
    assert len(open_index(root)) == len(first) + 2


def test_a_plain_folder_is_split_by_seed_whatever_its_path(tmp_path: Path) -> None:
    here, there = class_folders(tmp_path / "here", each=20) / "train", tmp_path / "there"
    shutil.copytree(here, there)
    one, other, third = splits_of(here, 5), splits_of(there, 5), splits_of(here, 6)
    assert files(one.val) == files(other.val) != files(third.val)
    assert sorted(files(one.train) + files(one.val)) == sorted(files(open_index(here)))
    assert np.bincount(one.val.label).tolist() == [2, 2, 2]  # a tenth of 20


def test_held_out_images_are_a_share_of_train_drawn_by_seed(tmp_path: Path) -> None:
    root = class_folders(tmp_path, each=25)
    whole, parts, others = splits_of(root), splits_of(root, held_out=0.2), splits_of(root, 1, held_out=0.2)
    assert sorted(files(parts.train) + files(parts.held_out)) == sorted(files(whole.train))
    assert files(parts.val) == files(whole.val)
    assert np.bincount(parts.held_out.label).tolist() == [5, 5, 5]
    assert files(parts.held_out) != files(others.held_out)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.37, 0.9])
def test_every_class_gives_its_share_to_within_one_image(tmp_path: Path, share: float) -> None:
    index = synthetic(5_000, 7, tmp_path)
    taken, rest = index_module._divide(index, share, 3, "purpose")
    assert len(taken) == round(share * 5_000) and len(taken) + len(rest) == 5_000
    counts, whole = np.bincount(taken.label, minlength=7), np.bincount(index.label)
    assert np.abs(counts - share * whole).max() <= 1


def test_an_index_pickles_as_paths_and_rows_and_its_subsets_are_its_rows(tmp_path: Path) -> None:
    index = synthetic(50_000, 10, tmp_path)
    index.height.sum()
    part = index.subset(slice(1_000, 2_000))
    assert len(pickle.dumps(part)) < 500
    copy = pickle.loads(pickle.dumps(part))
    scattered = part.subset([5, 3, 900]).subset([2, 0])
    assert np.array_equal(copy.offset, index.offset[1_000:2_000])
    assert scattered.length.tolist() == index.length[[1_900, 1_005]].tolist()
    assert files(scattered) == [index.file(1_900), index.file(1_005)]
    assert scattered.location(0) == index.location(1_900)
    assert scattered.identity == index.subset([1_900, 1_005]).identity != part.identity
    assert index.subset(slice(0, 50_000)).identity == index.identity == index.subset(range(50_000)).identity


def test_an_index_of_imagenets_size_opens_in_a_second_and_is_small(tmp_path: Path) -> None:
    folder = synthetic(1_281_167, 1_000, tmp_path).folder
    start = time.process_time()
    index = ImageIndex(folder, tmp_path, slice(0, 1_281_167))
    columns = [index.shard, index.offset, index.length, index.label, index.height, index.width]
    assert index.location(1_281_166)[2] == index.length[-1]
    assert time.process_time() - start < 1
    assert sum(column.nbytes for column in columns) < 50e6
    assert not any(column.flags.owndata for column in columns)  # mapped, not copied


def _empty_class(root: Path) -> None:
    (class_folders(root) / "train/dog").mkdir()


def _unknown_class(root: Path) -> None:
    (class_folders(root) / "val/dog").mkdir()
    (root / "val/dog/1.jpg").write_bytes(images.jpeg())


def _cut_tar(root: Path, size: int) -> None:
    shards(root, {"train-0.tar": {"a.jpg": images.jpeg(), "a.cls": b"0"}})
    whole = (root / "train-0.tar").read_bytes()
    (root / "train-0.tar").write_bytes(whole[:size])


def _no_classes(root: Path) -> None:
    shards(root, {"train-0.tar": {"a.jpg": images.jpeg(), "a.cls": b"0"}})
    (root / "classes.txt").unlink()


def _compressed(root: Path) -> None:
    root.mkdir()
    with tarfile.open(root / "train-0.tar.gz", "w:gz"):
        pass


def _tree_tar(root: Path) -> None:
    class_folders(root.parent / "source")
    root.mkdir()
    with tarfile.open(root / "flowers.tar", "w") as tar:
        tar.add(root.parent / "source", "flowers")


@pytest.mark.parametrize(
    ("make", "key", "subject"),
    [
        (lambda root: None, "data.root", "data"),
        (lambda root: root.mkdir(), "data.root", "data"),
        (_empty_class, "data.root", "train/dog"),
        (_unknown_class, "data.root", "dog"),
        (lambda root: _cut_tar(root, 2_000), "data.root", "train-0.tar"),  # inside a member
        (lambda root: _cut_tar(root, 512 + 2_560), "data.root", "train-0.tar"),  # before the end marker
        (lambda root: _cut_tar(root, 512 + 2_560 + 99), "data.root", "train-0.tar"),
        (_no_classes, "classes.txt", "data"),
        (_compressed, "data.root", "data"),
        (_tree_tar, "data.root", "data"),
    ],
)
def test_a_root_that_cannot_be_read_is_refused(
    tmp_path: Path, make: Callable[[Path], object], key: str, subject: str
) -> None:
    make(tmp_path / "data")
    with fails(DataError, key, subject=subject):
        splits_of(tmp_path / "data")


def test_a_tar_beside_class_folders_is_one_file_that_is_left_out(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w"):
        pass
    assert len(splits_of(root, max_bad_share=0.1).train) == 12
    with fails(DataError, "data.max_bad_share"):
        splits_of(root)
