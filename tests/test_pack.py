"""Tests of packing and checking: bytes pass, bad images are named, and any interruption changes nothing in the end."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raised import fails

from pipeline.data.check import CheckReport, check
from pipeline.data.config import DataConfig
from pipeline.data.index import ImageIndex, open_index, open_splits
from pipeline.data.pack import PackReport, pack
from pipeline.errors import DataError, ResourceError
from tests import images
from tests.test_index import class_folders, files, read, shards

PHOTO = images.photo()


def tree_tar(path: Path, root: Path, top: str, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        tar.add(root, top)
    return path


def content(index: ImageIndex) -> set[tuple[bytes, str]]:
    """What a set is, whatever it is called: bytes and class of each image."""
    return {(read(index, row), index.classes[index.label[row]]) for row in range(len(index))}


def folder_bytes(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def packed(source: Path, destination: Path, **options: object) -> PackReport:
    return pack(source, destination, **{"workers": 1} | options)  # type: ignore[arg-type]


def not_used(report: PackReport | CheckReport) -> int:
    return sum(each.count for each in report.left_out)


def reasons(report: PackReport) -> dict[str, str]:
    return {Path(name).name: reason for name, reason in report.set_aside}


def test_every_image_is_packed_byte_for_byte_with_its_class_and_split(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", each=5)
    report = packed(source, tmp_path / "out", shard_bytes=4_000)
    before, after = (open_splits(DataConfig(root=root), 0) for root in (source, tmp_path / "out"))
    assert content(after.train) == content(before.train) and content(after.val) == content(before.val)
    assert report.images == {"train": 15, "val": 15} and report.set_aside == ()
    assert report.shards > 2 and not (tmp_path / "out/.packing").exists()
    assert after.train.classes == before.train.classes == tuple((tmp_path / "out/classes.txt").read_text().split())


def test_a_shard_is_an_ordinary_tar_of_key_jpg_and_key_cls(tmp_path: Path) -> None:
    packed(class_folders(tmp_path / "source"), tmp_path / "out")
    index = open_index(tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        names = tar.getnames()
        for row in range(index.meta.num_train):
            name = index.file(row).partition("/")[2]
            key = os.path.splitext(name)[0]
            assert key.startswith(index.classes[index.label[row]] + "/") and "." not in key
            assert tar.extractfile(name).read() == read(index, row)  # type: ignore[union-attr]
            assert tar.extractfile(f"{key}.cls").read() == str(index.label[row]).encode()  # type: ignore[union-attr]
    assert len(names) == len(set(names)) == 2 * index.meta.num_train


def test_keys_differ_where_names_differ_only_in_extension_or_dots(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "ant"
    folder.mkdir(parents=True)
    for number, name in enumerate(["a.jpg", "a.png", "a.b.jpg", "a_b.jpg", "é" * 120 + ".jpg"]):
        (folder / name).write_bytes(images.jpeg(seed=number))
    report = packed(tmp_path / "source", tmp_path / "out")
    index = open_index(tmp_path / "out")
    assert report.images["train"] == 5 and len(set(files(index))) == 5
    assert content(index) == content(open_index(tmp_path / "source"))


def test_sources_of_every_layout_give_the_same_set(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source")
    expected = content(open_index(source))
    packed(source, tmp_path / "first")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    shutil.copy(tmp_path / "first/classes.txt", zipped)
    for tar in (tmp_path / "first").glob("*.tar"):
        (zipped / f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes()))
    sources = {
        "tar with splits": tree_tar(tmp_path / "a/set.tar", source, "."),
        "tar below a folder": tree_tar(tmp_path / "b/set.tar", source, "my-set"),
        "its folder": tree_tar(tmp_path / "c/set.tar.gz", source, "my-set", "w:gz").parent,
        "compressed shards": zipped,
    }
    for number, (layout, place) in enumerate(sources.items()):
        report = packed(place, tmp_path / f"out{number}")
        index = open_index(tmp_path / f"out{number}")
        assert (content(index), report.images) == (expected, {"train": 12, "val": 12}), layout
    plain = tree_tar(tmp_path / "d/set.tar", source / "train", ".")
    assert packed(plain, tmp_path / "plain").images == {"train": 12, "val": 0}
    assert len(open_splits(DataConfig(root=tmp_path / "plain"), 0).val) == 1  # a tenth, by seed


def test_bad_images_are_set_aside_with_their_reasons_and_odd_ones_are_not(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source")
    bad = {
        "empty.jpg": (images.EMPTY, "empty file"),
        "text.jpg": (images.TEXT, "not an image (unknown first bytes)"),
        "page.png": (b"<!DOCTYPE html><html>", "not a readable format: HTML"),
        "cut.JPEG": (images.truncated_jpeg(), "truncated JPEG (no end marker)"),
        "bomb.png": (images.bomb_png(), "absurd size: 30000 x 30000, above the limit of 178,956,970 pixels"),
    }
    odd = {
        "grey.jpg": images.grey_jpeg(PHOTO),
        "cmyk.jpg": images.cmyk_jpeg(PHOTO),
        "ycck.jpg": images.ycck_jpeg(PHOTO),
        "deep.png": images.png_16_bit(PHOTO),
        "palette.png": images.palette_png(PHOTO),
        "turned.jpg": images.turned_jpeg(PHOTO, 6),
        "png.JPEG": images.png(),
        "gif.png": images.GIF,
    }
    for name, (encoded, _) in bad.items():
        (source / "train/ant" / name).write_bytes(encoded)
    for name, encoded in odd.items():
        (source / "train/bee" / name).write_bytes(encoded)
    (source / "train/cow/notes.txt").touch()
    (source / "train/lost.jpg").write_bytes(images.jpeg())
    report = packed(source, tmp_path / "out")
    assert reasons(report) == {name: reason for name, (_, reason) in bad.items()}
    assert report.images["train"] == 12 + len(odd) and not_used(report) == 2
    assert set(odd.values()) <= {encoded for encoded, _ in content(open_index(tmp_path / "out"))}
    in_place = check(source, workers=1)
    assert in_place.bad == report.set_aside and not_used(in_place) == 2
    stored = json.loads((tmp_path / "out/report.json").read_text())
    assert [(each["file"], each["reason"]) for each in stored["set_aside"]] == list(report.set_aside)


def test_images_with_wrong_labels_or_repeated_keys_are_set_aside(tmp_path: Path) -> None:
    good = images.jpeg()
    tar = {"a.jpg": good, "a.cls": b"1", "b.jpg": good, "b.cls": b"x", "c.jpg": good, "c.cls": b"7", "a.png": good}
    source = shards(tmp_path / "source", {"train-0.tar": tar})
    report = packed(source, tmp_path / "out")
    assert reasons(report) == {
        "a.png": "duplicate key: twice in train-0.tar",
        "b.jpg": "wrong label: 'x' is neither an integer nor a class",
        "c.jpg": "wrong label: 7, of 2 classes",
    }
    assert check(source, workers=1).bad == report.set_aside


def test_the_bytes_do_not_depend_on_processes_or_interruptions(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", each=8)
    whole = packed(source, tmp_path / "one", shard_bytes=4_000)
    assert whole.shards > 4
    packed(source, tmp_path / "two", shard_bytes=4_000, workers=2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")

    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    broken = tmp_path / "three"
    with pytest.raises(KeyboardInterrupt):
        packed(source, broken, shard_bytes=4_000, progress=stop)
    with fails(DataError, "data.root", subject=broken):
        open_index(broken)
    kept = sorted(broken.glob("*.tar"))
    times = {path: path.stat().st_mtime_ns for path in kept}
    kept[0].write_bytes(kept[0].read_bytes()[:1000])  # damaged meanwhile
    report = packed(source, broken, shard_bytes=4_000)
    assert report.kept_shards == len(kept) - 1 > 0
    assert all(path.stat().st_mtime_ns == times[path] for path in kept[1:])
    assert folder_bytes(broken) == folder_bytes(tmp_path / "one")
    assert packed(source, broken, shard_bytes=4_000).kept_shards == whole.shards  # whole: nothing is done


def test_train_is_shuffled_so_that_every_shard_contains_all_classes(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", each=30)
    packed(source, tmp_path / "out", shard_bytes=12_000)
    index = open_splits(DataConfig(root=tmp_path / "out"), 0).train
    assert index.shard[-1] >= 2
    for shard in range(int(index.shard[-1]) + 1):
        assert set(index.label[index.shard == shard]) == {0, 1, 2}


def test_side_shrinks_upright_and_copies_smaller_images(tmp_path: Path) -> None:
    folder = tmp_path / "source/ant"
    folder.mkdir(parents=True)
    (folder / "large.jpg").write_bytes(images.jpeg(400, 300))
    (folder / "turned.jpg").write_bytes(images.turned_jpeg(images.photo(300, 200), 6))
    (folder / "small.png").write_bytes(images.png(90, 60))
    packed(tmp_path / "source", tmp_path / "out", side=100)
    index = open_index(tmp_path / "out")
    found = {Path(index.file(row)).name: row for row in range(3)}
    sizes = {name: (int(index.width[row]), int(index.height[row])) for name, row in found.items()}
    assert sizes == {"large.jpg": (133, 100), "turned.jpg": (150, 100), "small.png": (90, 60)}
    assert read(index, found["small.png"]) == images.png(90, 60)
    turned = np.asarray(Image.open(io.BytesIO(read(index, found["turned.jpg"])))).astype(int)
    upright = images.photo(300, 200).resize((150, 100), Image.Resampling.LANCZOS)
    assert np.abs(turned - np.asarray(upright)).mean() < 3


def test_check_of_a_packed_set_finds_a_changed_byte_that_decoders_accept(tmp_path: Path) -> None:
    packed(class_folders(tmp_path / "source"), tmp_path / "out")
    assert check(tmp_path / "out", workers=2).bad == ()
    index = open_index(tmp_path / "out")
    row = next(row for row in range(len(index)) if index.file(row).endswith("jpg"))
    path, offset, length = index.location(row)
    with open(path, "r+b") as file:
        file.seek(offset + length - 20)
        before = file.read(1)[0]
        file.seek(offset + length - 20)
        file.write(bytes([before ^ 1]))
    report = check(tmp_path / "out", workers=1)
    assert report.checksums and report.images == len(index)
    assert [(name, "CRC-32" in reason) for name, reason in report.bad] == [(index.file(row), True)]


def test_a_missing_or_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    packed(class_folders(tmp_path / "source"), tmp_path / "out")
    shard = tmp_path / "out/train-000000.tar"
    with open(shard, "r+b") as file:
        file.truncate(5_000)
    with fails(DataError, "data.root", subject=shard):
        open_index(tmp_path / "out")
    shard.unlink()
    with fails(DataError, "data.root", subject=shard):
        open_index(tmp_path / "out")


def test_a_packed_set_can_be_moved_and_copied(tmp_path: Path) -> None:
    packed(class_folders(tmp_path / "source"), tmp_path / "out")
    before = open_index(tmp_path / "out")
    expected, identity = content(before), before.identity
    shutil.copytree(tmp_path / "out", tmp_path / "copy")  # new times
    shutil.rmtree(tmp_path / "out")
    moved = open_index(tmp_path / "copy")
    assert (content(moved), moved.identity) == (expected, identity)
    assert moved.folder.is_relative_to(tmp_path / "copy/index")


def test_a_destination_with_other_content_is_refused_and_not_changed(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with fails(DataError, "destination", subject="thesis.tex"):
        packed(source, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    packed(source, tmp_path / "out")
    with fails(DataError, "destination", subject="side"):
        packed(source, tmp_path / "out", side=8)
    (source / "train/ant/more.jpg").write_bytes(images.jpeg())
    with fails(DataError, "destination", subject="source"):
        packed(source, tmp_path / "out")
    with fails(DataError, "destination", subject=source / "out"):
        packed(source, source / "out")


def test_unreadable_sources_and_unwritable_destinations_are_refused(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source")
    (tmp_path / "file").touch()
    with fails(ResourceError, "destination", subject="file"):
        packed(source, tmp_path / "file/out")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    (zipped / "train-0.tar.gz").write_bytes(gzip.compress(bytes(100_000))[:-30])
    with fails(DataError, "source", subject="train-0.tar.gz"):
        packed(zipped, tmp_path / "out")
    only_bad = tmp_path / "bad/ant/a.jpg"
    only_bad.parent.mkdir(parents=True)
    only_bad.write_bytes(images.TEXT)
    with fails(DataError, "source", subject=tmp_path / "bad"):
        packed(tmp_path / "bad", tmp_path / "out2")


@pytest.mark.data
def test_real_photographs_are_packed_from_their_tar(tmp_path: Path, data_home: Path) -> None:
    report = pack(data_home / "flower-photos-subset", tmp_path / "out", side=128)
    assert report.images == {"train": 350, "val": 90} and report.set_aside == ()
    index = open_index(tmp_path / "out")
    assert int(np.minimum(index.height, index.width).max()) == 128
    assert index.classes == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    for row in range(0, len(index), 40):
        assert Image.open(io.BytesIO(read(index, row))).size == (index.width[row], index.height[row])
