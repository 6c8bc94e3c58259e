"""Shards and tars of class folders as they are in life: every label is read right, or the image is left out by name."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from raised import fails

from pipeline.data.config import DataConfig
from pipeline.data.index import ImageIndex, account_of, open_index, open_splits
from pipeline.data.pack import pack
from pipeline.data.tars import tar_members
from pipeline.errors import DataError
from tests import images
from tests.test_index import files, read

PHOTOS = [images.jpeg(24, 20, seed=seed) for seed in range(6)]
CLASSES = ("ant", "bee", "cow")
Members = Iterable[tuple[str, bytes]]


def write_tar(path: Path, members: Members, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shards(root: Path, labels: Callable[[int, str], Members], key: Callable[[int], str] = "{:04d}".format) -> Path:
    """A train and a val shard of six images; `labels(number, key)` are the members beside image `number`."""
    for split in ("train", "val"):
        members = [pair for n in range(6) for pair in [(f"{key(n)}.jpg", PHOTOS[n]), *labels(n, key(n))]]
        write_tar(root / f"{split}-0.tar", members)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def cls(number: int, key: str) -> Members:
    return [(f"{key}.cls", str(number % 3).encode())]


def splits_of(root: Path, **keys: object):  # type: ignore[no-untyped-def]
    return open_splits(DataConfig(**{"root": root, "max_bad_share": 1, **keys}), 0)


def content(index: ImageIndex) -> list[tuple[bytes, str]]:
    return sorted((read(index, row), index.classes[index.label[row]]) for row in range(len(index)))


RIGHT = sorted((PHOTOS[n], CLASSES[n % 3]) for n in range(6))


@pytest.mark.parametrize(
    "labels",
    [
        cls,
        lambda n, key: [(f"{key}.json", json.dumps({"label": n % 3, "width": 24}).encode())],
        lambda n, key: [(f"{key}.json", json.dumps({"class_name": CLASSES[n % 3], "y": 9}).encode())],
        lambda n, key: [(f"{key}.txt", CLASSES[n % 3].encode() + b"\n")],
        lambda n, key: [(f"{key}.cls", CLASSES[n % 3].encode())],
        lambda n, key: [(f"{key}.txt", b"a caption"), (f"{key}.json", b'{"url": ""}'), *cls(n, key)],
        lambda n, key: [(f"{key}.json", b'{"url": ""}'), (f"{key}.txt", b"%d" % (n % 3))],
        lambda n, key: [*cls(n, key), (f"{key}.mask.png", images.png()), (f"{key}.depth.jpg", PHOTOS[0])],
        lambda n, key: [*cls(n, key), *cls(n, key)],
    ],
)
def test_labels_are_read_from_every_usual_place(tmp_path: Path, labels: Callable[[int, str], Members]) -> None:
    splits = splits_of(shards(tmp_path, labels), max_bad_share=0)
    assert content(splits.train) == content(splits.val) == RIGHT


@pytest.mark.parametrize(
    "key",
    [
        "a/b/{}".format,
        "ant/{}".format,
        "{}.v1".format,
        "a.b/{}.c.d".format,
        "./{}".format,
        "é {}".format,
        "long" * 40 + "{}".format(""),
    ],
)
def test_keys_may_have_folders_dots_and_any_length(tmp_path: Path, key: Callable[[int], str] | str) -> None:
    name = key if callable(key) else lambda n: f"{key}{n}"
    assert content(splits_of(shards(tmp_path, cls, name), max_bad_share=0).train) == RIGHT


def test_the_label_of_a_sample_is_that_of_its_one_image_with_dots(tmp_path: Path) -> None:
    root = shards(tmp_path, lambda n, key: cls(n, key.partition(".")[0]), "{}.img".format)
    assert content(splits_of(root, max_bad_share=0).train) == RIGHT


TEXTS = {
    b"1\n": 1,
    b"1\r\n": 1,
    b"  1 \t": 1,
    b"001": 1,
    b"\xef\xbb\xbf1": 1,
    b"1.0": 1,
    b"+1": 1,
    b'"1"': 1,
    b"1\0": 1,
    b" " * 60 + b"1": 1,
    b'{"label": 1}': 1,
    b"[1]": 1,
    b"bee": 1,
    b'"bee"': 1,
    b'{"label": "bee"}': 1,
    b"-1": None,
    b"3": None,
    b"1.5": None,
    b"1 2": None,
    b"[1, 2]": None,
    b"": None,
    b"Bee": None,
    b"0x1": None,
    b"true": None,
    b"null": None,
    b"nan": None,
    b"1e0": None,
    b"9" * 60: None,
    b"\x80\x04K\x01.": None,
    b"\xff\xfe1\0": None,
    b"{": None,
    b"[" * 9_000: None,
    b'{"caption": "bee"}': None,
}


def test_a_text_is_a_label_or_is_refused_and_never_guessed(tmp_path: Path) -> None:
    members = [pair for n, text in enumerate(TEXTS) for pair in [(f"{n}.jpg", PHOTOS[0]), (f"{n}.cls", text)]]
    write_tar(tmp_path / "train-0.tar", members)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    index = open_index(tmp_path)
    got = {int(Path(name).stem): int(label) for name, label in zip(files(index), index.label, strict=True)}
    assert got == {n: label for n, label in enumerate(TEXTS.values()) if label is not None}
    assert len(index.meta.set_aside) == list(TEXTS.values()).count(None)
    (each,) = (each for each in index.meta.left_out if each.lost)
    assert (each.reason, each.split, each.count) == ("wrong label", "train", len(index.meta.set_aside))


def test_keys_that_begin_anew_in_each_shard_are_different_images(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train-{number}.tar", [("0.jpg", PHOTOS[number]), ("0.cls", b"%d" % number)])
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    index = open_index(tmp_path)
    assert files(index) == [f"train-{number}.tar/0.jpg" for number in range(3)]
    assert content(index) == sorted((PHOTOS[n], CLASSES[n]) for n in range(3))
    pack(tmp_path, tmp_path.parent / "packed", workers=1)
    assert content(open_index(tmp_path.parent / "packed")) == content(index)


@pytest.mark.parametrize("second", [b"0", b"1"])
def test_a_key_that_a_shard_has_twice_counts_once_and_never_with_a_label_in_doubt(
    tmp_path: Path, second: bytes
) -> None:
    members = [("a.jpg", PHOTOS[0]), ("a.cls", b"0"), ("b.jpg", PHOTOS[1]), ("b.cls", b"1")]
    write_tar(tmp_path / "train-0.tar", [*members, ("a.jpg", PHOTOS[2]), ("a.cls", second)])
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    index = open_index(tmp_path)
    used = [(PHOTOS[1], "bee"), *([(PHOTOS[0], "ant")] if second == b"0" else [])]
    assert content(index) == sorted(used)
    assert sum(each.count for each in index.meta.left_out if each.lost) == 3 - len(used)
    with fails(DataError, "data.max_bad_share"):
        splits_of(tmp_path, max_bad_share=0.01)


@pytest.mark.parametrize("splits", [("train", "val"), ("val",), ("train",)])
def test_labels_that_count_from_1_are_refused(tmp_path: Path, splits: Sequence[str]) -> None:
    for split in ("train", "val"):
        first = 1 if split in splits else 0
        members = [pair for n in range(6) for pair in [(f"{n}.jpg", PHOTOS[n]), (f"{n}.cls", b"%d" % (n % 3 + first))]]
        write_tar(tmp_path / f"{split}-0.tar", members)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    with fails(DataError, "classes.txt", subject="3"):
        open_index(tmp_path)
    (tmp_path / "classes.txt").write_text("nothing\nant\nbee\ncow\n")  # the way out
    assert len(splits_of(tmp_path, max_bad_share=0).val) == 6


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("classes.json", ["ant", "bee", "cow"]),
        ("class_to_idx.json", {"cow": 2, "ant": 0, "bee": 1}),
        ("idx_to_class.json", {"2": "cow", "0": "ant", "1": "bee"}),
    ],
)
def test_classes_are_read_from_json(tmp_path: Path, name: str, stored: object) -> None:
    root = shards(tmp_path, cls)
    (root / "classes.txt").unlink()
    (root / name).write_text(json.dumps(stored))
    assert content(splits_of(root, max_bad_share=0).train) == RIGHT


@pytest.mark.parametrize("stored", [None, [], {"ant": 0, "bee": 0}, {"ant": 1, "bee": 2}, ["ant", 3], "ant", {"a": []}])
def test_shards_without_certain_classes_are_refused(tmp_path: Path, stored: object) -> None:
    root = shards(tmp_path, cls)
    (root / "classes.txt").unlink()
    if stored is not None:
        (root / "classes.json").write_text(json.dumps(stored))
    with fails(DataError, "classes.txt" if stored is None else "classes.json"):
        open_index(root)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("training-{}.tar", "validation-{}.tar"),
        ("Train_{}.tar", "Val_{}.tar"),
        ("cifar-train.{}.tar", "cifar-test.{}.tar"),
        ("train/{}.tar", "valid/{}.tar"),
        ("TRAIN/{}.tar", "testing/{}.tar"),
        ("train{}.tar", "dev{}.tar"),
    ],
)
def test_shards_of_splits_with_other_names_are_used_as_splits(tmp_path: Path, train: str, val: str) -> None:
    for pattern in (train, val):
        for number in range(2):
            write_tar(tmp_path / pattern.format(number), [("0.jpg", PHOTOS[number]), ("0.cls", b"0")])
    (tmp_path / "classes.txt").write_text("ant\n")
    splits = splits_of(tmp_path, max_bad_share=0)
    assert {name.rpartition("/")[0] for name in files(splits.train)} == {train.format(0), train.format(1)}
    assert {name.rpartition("/")[0] for name in files(splits.val)} == {val.format(0), val.format(1)}


def test_shards_of_a_test_split_are_stated_and_those_of_no_split_refused(tmp_path: Path) -> None:
    write_tar(shards(tmp_path, cls) / "test-0.tar", [("0.jpg", PHOTOS[0]), ("0.cls", b"0")])
    splits_of(tmp_path, max_bad_share=0)
    assert [str(each) for each in open_index(tmp_path).meta.left_out] == ["1 tar of a test split (test-0.tar)"]
    write_tar(tmp_path / "extra-0.tar", [])
    with fails(DataError, "data.root", subject="extra-0.tar"):
        open_index(tmp_path)


def test_a_val_tar_beside_class_folders_of_train_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train/ant").mkdir(parents=True)
    (tmp_path / "train/ant/0.jpg").write_bytes(PHOTOS[0])
    write_tar(tmp_path / "val.tar", [])
    with fails(DataError, "data.root", subject="val.tar"):
        open_index(tmp_path)


def test_what_lies_beside_shards_is_counted(tmp_path: Path) -> None:
    root = shards(tmp_path, cls)
    for name in ("README.md", "dataset.json", "loose.jpg", "x.parquet", ".DS_Store"):
        (root / name).write_bytes(b"")
    (root / "more").mkdir()
    (root / "more/0.jpg").write_bytes(PHOTOS[0])
    lost = {each.reason: each.count for each in open_index(root).meta.left_out if each.lost}
    assert lost == {"image outside class folders": 1, "extension .parquet": 1, "image beside the tars": 1}


# ---- members that are not plain files


@pytest.mark.parametrize("after", ["another tar", "garbage"])
def test_a_tar_with_other_bytes_after_its_end_is_refused_by_name(after: str, tmp_path: Path) -> None:
    root = shards(tmp_path / "set", cls)
    shard = root / "train-0.tar"
    shard.write_bytes(shard.read_bytes() + (shard.read_bytes() if after == "another tar" else b"left over"))
    with fails(DataError, "data.root", subject=shard):
        open_index(root)


def test_a_pipe_named_as_a_shard_is_left_out_by_name(tmp_path: Path) -> None:
    root = shards(tmp_path / "set", cls)
    os.mkfifo(root / "train-1.tar")  # opening it would wait for a writer
    reasons = {each.reason for each in open_index(root).meta.left_out}
    assert reasons == {"pipe, socket or device"}


def test_links_in_a_tar_are_their_targets(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for split in ("train", "val"):
        for number, name in enumerate(("a", "b")):
            (tree / split / name).mkdir(parents=True)
            (tree / split / name / "0.jpg").write_bytes(PHOTOS[number])
    (tree / "train/a/hard.jpg").hardlink_to(tree / "train/a/0.jpg")
    (tree / "val/a/hard.jpg").hardlink_to(tree / "train/a/0.jpg")
    (tree / "train/b/soft.jpg").symlink_to("0.jpg")
    (tree / "train/b/soft2.jpg").symlink_to("soft.jpg")
    (tree / "train/b/up.jpg").symlink_to("../../val/b/0.jpg")
    (tree / "train/c").symlink_to("b")
    (tree / "val/c").symlink_to("../train/b")
    (tree / "train/a/self").symlink_to(".")
    (tree / "train/a/dead.jpg").symlink_to("nowhere.jpg")
    (tree / "train/a/loop.jpg").symlink_to("loop.jpg")
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        tar.add(tree, "tree")
    report = pack(tmp_path / "tree.tar", tmp_path / "packed", workers=1)
    assert report.images == {"train": 10, "val": 7}  # b's links are in c as well
    assert {(each.reason, each.count, each.lost) for each in report.left_out} == {
        ("link that leads nowhere", 2, True),
        ("link to a folder that contains it", 1, False),
    }
    got = content(open_splits(DataConfig(root=tmp_path / "packed"), 0).train)
    assert got == sorted([(PHOTOS[0], "a")] * 2 + [(PHOTOS[1], "b")] * 4 + [(PHOTOS[1], "c")] * 4)


def test_sparse_members_are_read_where_they_have_no_holes_and_are_left_out_by_name_otherwise(tmp_path: Path) -> None:
    def member(name: str, sparse: str, stored: bytes, size: int) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
        content = sparse.encode().ljust(512, b"\0") + stored
        info.size = len(content)
        return info, content

    size = len(PHOTOS[0])
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for info, stored in (
            member("a/whole.jpg", f"1\n0\n{size}\n", PHOTOS[0], size),
            member("a/holes.jpg", "2\n0\n512\n4096\n512\n", bytes(1024), 4608),
            member("b/whole.jpg", f"1\n0\n{size}\n", PHOTOS[0], size),
        ):
            tar.addfile(info, io.BytesIO(stored))
    left_out: list[tuple[str, str, bool]] = []
    found = list(tar_members(tmp_path / "set.tar", left_out))
    assert [name for name, _, _ in found] == ["a/whole.jpg", "b/whole.jpg"]
    for _, offset, length in found:
        assert (tmp_path / "set.tar").read_bytes()[offset : offset + length] == PHOTOS[0]
    assert left_out == [("file with holes (sparse)", "a/holes.jpg", True)]


# ---- tars of class folders


def tree_members(prefix: str = "", classes: Sequence[str] = ("a", "b")) -> Members:
    return [(f"{prefix}{name}/{number}.jpg", PHOTOS[number]) for name in classes for number in range(2)]


@pytest.mark.parametrize("prefix", [("", ""), ("train/", "val/"), ("imagenet/", "imagenet/"), ("./", "./")])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tars_of_class_folders_for_both_splits_are_packed(tmp_path: Path, prefix: Sequence[str], suffix: str) -> None:
    source = tmp_path / "source"
    mode = "w:gz" if suffix == ".tar.gz" else "w"
    write_tar(source / f"train{suffix}", tree_members(prefix[0]), mode)
    write_tar(source / f"val{suffix}", tree_members(prefix[1], ["b"]), mode)
    with fails(DataError, "data.root", subject="source") as caught:
        open_index(source)
    assert "adaptnet data pack" in str(caught.value)
    assert pack(source, tmp_path / "packed", workers=1).images == {"train": 4, "val": 2}
    splits = splits_of(tmp_path / "packed", max_bad_share=0)
    assert content(splits.train) == sorted((PHOTOS[n], name) for name in ("a", "b") for n in range(2))
    assert content(splits.val) == sorted((PHOTOS[n], "b") for n in range(2))


def test_what_systems_leave_in_a_tar_is_no_class_and_an_image_without_a_class_is_counted(tmp_path: Path) -> None:
    odd = ["__MACOSX/train/a/._0.jpg", "__MACOSX/x.jpg", "train/@eaDir/a.jpg", "train/.ipynb_checkpoints/a.jpg"]
    odd += ["train/a/._0.jpg", ".DS_Store", "train/a/Thumbs.db", "train/beside.jpg", "extra/x/0.jpg", "train/a/n.txt"]
    members = [*tree_members("train/"), *tree_members("val/"), *((name, PHOTOS[0]) for name in odd)]
    report = pack(write_tar(tmp_path / "set.tar", members), tmp_path / "packed", workers=1)
    assert (report.images, report.num_classes) == ({"train": 4, "val": 4}, 2)
    lost = {each.reason: each.count for each in report.left_out if each.lost}
    assert lost == {"image outside class folders": 1, "image outside the splits": 1}
    assert sum(each.count for each in report.left_out) == len(odd)


IMAGENETS = {
    "ILSVRC2012_img_train.tar": ["n01440764.tar", "n01443537.tar"],
    "ILSVRC2012_img_val.tar": ["ILSVRC2012_val_00000001.JPEG"],
    "train_images_0.tar.gz": ["n01440764_1_n01440764.JPEG"],
    "val_images.tar.gz": ["ILSVRC2012_val_00000001_n01440764.JPEG"],
    "train/n01440764.tar": ["n01440764_1.JPEG"],
}


@pytest.mark.parametrize("name", [*IMAGENETS, "all"])
def test_imagenets_own_tars_and_the_mirrors_are_refused_with_the_command_that_imports_them(
    tmp_path: Path, name: str
) -> None:
    for tar in [name] if name != "all" else [*list(IMAGENETS)[:2], "ILSVRC2012_devkit_t12.tar.gz"]:
        members = [(member, PHOTOS[0]) for member in IMAGENETS.get(tar, ["ILSVRC2012_devkit_t12/data/meta.mat"])]
        write_tar(tmp_path / "source" / tar, members, "w:gz" if tar.endswith("gz") else "w")
    for use in (open_index, lambda root: pack(root, tmp_path / "packed", workers=1)):
        with fails(DataError, "data.root") as caught:
            use(tmp_path / "source")
        assert "adaptnet data import imagenet" in str(caught.value)


def test_a_pack_states_what_its_source_left_out(tmp_path: Path) -> None:
    root = shards(tmp_path / "set", lambda n, key: cls(n, key) if n else [])
    report = pack(root, tmp_path / "packed", workers=1)
    assert [(each.reason, each.split, each.count) for each in report.left_out] == [
        ("wrong label", "train", 1),
        ("wrong label", "val", 1),
    ]
    config = DataConfig(root=tmp_path / "packed", max_bad_share=0)
    told = "\n".join(account_of(open_splits(config, 0), config, 0).lines())
    assert "5 of 5 train, 5 of 5 val images used" in told
