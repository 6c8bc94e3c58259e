"""Every file of a root is used, or left out with a reason: splits and folders as they are in life, the account."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from raised import fails

from jobs import cli
from pipeline.data.account import LeftOut
from pipeline.data.check import check
from pipeline.data.config import DataConfig
from pipeline.data.index import Splits, account_of, open_index, open_splits
from pipeline.data.pack import pack
from pipeline.errors import DataError
from tests import images
from tests.test_index import files

PHOTO = images.jpeg(24, 20)


def fill(root: Path, folders: Sequence[str], each: int = 3) -> Path:
    """`each` images in every one of the folders."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for image in range(each):
            (root / folder / f"{image}.jpg").write_bytes(images.jpeg(24, 20, seed=10 * number + image))
    return root


def splits_of(root: Path, **keys: object) -> Splits:
    return open_splits(DataConfig(**{"root": root, "max_bad_share": 1, **keys}), 0)


def left_out(root: Path, *, lost: bool) -> dict[str, int]:
    """How many files are left out for each reason."""
    counts: dict[str, int] = {}
    for each in open_index(root).meta.left_out:
        if each.lost == lost:
            counts[each.reason] = counts.get(each.reason, 0) + each.count
    return counts


def notes(root: Path) -> str:
    config = DataConfig(root=root, max_bad_share=1)
    return "\n".join(account_of(open_splits(config, 0), config, 0).lines())


CLASSES = ("a", "b")


def both(train: str, val: str) -> list[str]:
    return [f"{split}/{name}" for split in (train, val) for name in CLASSES]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "valid"),
        ("train", "validation"),
        ("Train", "Val"),
        ("TRAIN", "VAL"),
        ("training", "testing"),
        ("train", "test"),
        ("images/train", "images/val"),
        ("data/images/Training", "data/images/Validation"),
        ("train2017", "val2017"),
        ("training_set/training_set", "test_set/test_set"),
        ("seg_train", "seg_test"),
        ("TrainingSet", "ValidationSet"),
        ("train_images", "val-images"),
        ("trn", "dev"),
    ],
)
def test_splits_of_other_names_are_used_as_splits(tmp_path: Path, train: str, val: str) -> None:
    splits = splits_of(fill(tmp_path, both(train, val)))
    assert splits.train.classes == CLASSES
    assert {Path(name).parent.parent.as_posix() for name in files(splits.train)} == {train}
    assert {Path(name).parent.parent.as_posix() for name in files(splits.val)} == {val}
    assert left_out(tmp_path, lost=True) == {}


def test_a_test_split_beside_val_is_not_used_and_that_is_stated(tmp_path: Path) -> None:
    fill(tmp_path, [*both("train", "val"), "test/a", "test/b"])
    (tmp_path / "test" / "labels.csv").touch()
    splits = splits_of(tmp_path, max_bad_share=0)
    assert (len(splits.train), len(splits.val)) == (6, 6)
    assert left_out(tmp_path, lost=False) == {"image in the test split": 6, "file in the test split": 1}
    fill(tmp_path / "flat", [*both("train", "val"), "test"])
    splits_of(tmp_path / "flat", max_bad_share=0)
    assert left_out(tmp_path / "flat", lost=False) == {"image in a test split without class folders": 3}


def _flat_val(root: Path) -> None:
    fill(root, ["train/a", "train/b", "val"])


def _imagenets_flat_val(root: Path) -> None:
    fill(root, ["train/n01440764", "train/n01443537"])
    (root / "val").mkdir()
    (root / "val/ILSVRC2012_val_00000001.JPEG").write_bytes(PHOTO)


@pytest.mark.parametrize(
    ("folders", "subject"),
    [
        (["train/a", "train/b", "val"], "val"),  # images without labels
        (["a", "b", "val"], "val"),  # a class or a split?
        (["train", "val"], "val"),
        (["TRAIN", "Test"], "Test"),
        (["train/a", "Train/a"], "Train"),
        (["train/a", "val/a", "valid/a"], "val, valid"),
        (["a/train", "a/test", "b/train", "b/test"], "a, b"),  # splits inside classes
        (["fold1/train/a", "fold1/val/a", "fold2/train/a", "fold2/val/a"], "fold1, fold2"),
        (["images/train/a", "images/val/a", "cat"], "images"),
        (["images/train", "images/val"], "images/val"),  # YOLO's
        ([*(f"c{n:02d}" for n in range(12)), "c05/test"], "c05/test"),
    ],
)
def test_splits_that_are_in_doubt_are_refused_by_name(tmp_path: Path, folders: Sequence[str], subject: str) -> None:
    with fails(DataError, "data.root", subject=subject):
        splits_of(fill(tmp_path, folders))


def test_an_empty_val_folder_is_not_replaced_by_a_share_of_train(tmp_path: Path) -> None:
    fill(tmp_path, ["train/a", "train/b"])
    (tmp_path / "val").mkdir()
    with fails(DataError, "data.root", subject="val"):
        splits_of(tmp_path)


def test_imagenets_flat_val_is_refused_with_the_command_that_labels_it(tmp_path: Path) -> None:
    _imagenets_flat_val(tmp_path)
    with fails(DataError, "data.root", subject="val") as caught:
        splits_of(tmp_path)
    assert f"adaptnet data import imagenet {tmp_path} " in str(caught.value)


def test_a_class_may_be_named_as_a_split_if_classes_txt_lists_it(tmp_path: Path) -> None:
    fill(tmp_path, ["bus", "car", "train"])
    with fails(DataError, "data.root", subject="train"):
        splits_of(tmp_path)
    (tmp_path / "classes.txt").write_text("bus\ncar\ntrain\n")
    assert splits_of(tmp_path).val.classes == ("bus", "car", "train")
    fill(tmp_path / "nested", ["train/bus", "train/train", "val/bus", "val/train"])
    assert splits_of(tmp_path / "nested").train.classes == ("bus", "train")


def test_a_folder_around_the_classes_is_no_class(tmp_path: Path) -> None:
    fill(tmp_path, ["photos/a", "photos/b"])
    assert splits_of(tmp_path).val.classes == CLASSES


def test_a_drawn_val_split_leaves_every_class_an_image_and_is_stated(tmp_path: Path) -> None:
    fill(tmp_path, [f"one{n}" for n in range(5)], each=1)
    fill(tmp_path, [f"ten{n}" for n in range(5)], each=10)
    for share in (0.1, 0.5, 0.9):
        for seed in range(5):
            config = DataConfig(root=tmp_path, validation_share=share, held_out=0.3)
            splits = open_splits(config, seed)
            assert np.bincount(splits.train.label, minlength=10).min() >= 1
            assert len(splits.val) == 55 - len(splits.train) - len(splits.held_out) > 0
    assert "drawn" in notes(tmp_path) and "one0" in notes(tmp_path)


# ---- folders as they are in life


def odd_folders(root: Path) -> None:
    """What operating systems, file servers, editors and people leave among images."""
    fill(root, ["@eaDir/a", "__MACOSX/train/a", "train/@eaDir", "train/__MACOSX", "train/lost+found"])
    fill(root, ["train/a/@eaDir", "train/.ipynb_checkpoints", ".git"])
    for name in (".DS_Store", "Thumbs.db", "README.md", "train/.DS_Store", "train/a/Thumbs.db", "train/a/._0.jpg"):
        (root / name).write_bytes(b"x")
    (root / "train/a/self").symlink_to(".")
    (root / "train/a/up").symlink_to("..")
    (root / "train/a/out").symlink_to("../../..")
    (root / "train/loop").symlink_to("..")


def test_what_systems_leave_is_neither_class_nor_image_and_costs_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "set", both("train", "val"))
    odd_folders(tmp_path / "set")
    splits = splits_of(tmp_path / "set", max_bad_share=0)
    assert splits.train.classes == CLASSES
    assert (len(splits.train), len(splits.val)) == (6, 6)
    assert left_out(tmp_path / "set", lost=False) == {
        "made by the operating system": 11,
        "hidden folder": 2,
        "extension .md": 1,
        "link to a folder that contains it": 4,
    }
    assert check(tmp_path / "set", workers=1).images == 12


def test_what_may_be_an_image_counts_in_max_bad_share(tmp_path: Path) -> None:
    fill(tmp_path, [*both("train", "val"), "extra"])
    (tmp_path / "train/a/gone.jpg").symlink_to("nowhere/gone.jpg")
    (tmp_path / "train/a/turning.jpg").symlink_to("turning.jpg")
    lost = {
        "train/a/x.heic": b"",
        "train/a/x.npy": b"",
        "train/a/x.zip": b"",
        "more.tar.gz": b"",
        "train/a/.x.jpg": PHOTO,
        "train/a/x.jpg.part": PHOTO,
        "train/b/x.jpg ": PHOTO,
        "train/b/scraped": PHOTO,
        "train/beside.jpg": PHOTO,
        "root.png": PHOTO,
    }
    for name, content in {**lost, "train/a/x.txt": b"", "train/b/LICENSE": b"text"}.items():
        (tmp_path / name).write_bytes(content)
    assert left_out(tmp_path, lost=True) == {
        "image outside the splits": 3,
        "link that leads nowhere": 2,
        "image outside class folders": 2,
        "extension .heic (convert it to JPEG, e.g. with heif-convert)": 1,
        "extension .npy": 1,
        "extension .zip": 1,
        "extension .gz": 1,
        "extension .part": 1,
        "hidden image": 1,
        "no extension": 1,
        "no extension of an image": 1,
    }
    assert left_out(tmp_path, lost=False) == {"extension .txt": 1, "no extension": 1}
    assert "6 of 16 train, 6 of 6 val images used" in notes(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "check", str(tmp_path), "--workers", "1"])
    assert ended.value.code == 1
    with fails(DataError, "data.max_bad_share", subject="0.5"):
        splits_of(tmp_path, max_bad_share=0.5)
    assert len(splits_of(tmp_path, max_bad_share=0.65).train) == 6


def test_the_account_is_that_of_today(tmp_path: Path) -> None:
    fill(tmp_path, both("train", "val"))
    assert open_index(tmp_path).meta.left_out == ()
    (tmp_path / "train/a/x.gif").write_bytes(images.GIF)
    (tmp_path / "test").mkdir()
    assert [(each.reason, each.split, each.count) for each in open_index(tmp_path).meta.left_out if each.lost] in (
        [("extension .gif", "train", 1)],
        [],  # where GIF is read
    )


def test_an_account_survives_json() -> None:
    each = LeftOut("extension .x", "train", 3, lost=True, examples=("a.x", "b.x"))
    assert LeftOut.from_json(each.to_json()) == each  # type: ignore[arg-type]


NOBODY = 65534
UNREADABLE = """
import os, sys
from pathlib import Path
from pipeline.data.sources import find
from pipeline.errors import DataError
os.setuid(int(sys.argv[2]))
try:
    print(len(find(Path(sys.argv[1])).names))
except DataError as error:
    print(error.key, error.subject)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize(
    ("folder", "printed"), [("train/lost+found", "12"), ("train/c", "data.root"), ("train/a/deep", "data.root")]
)
def test_a_folder_that_cannot_be_read_is_refused_unless_it_is_the_systems(
    tmp_path: Path, folder: str, printed: str
) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and "pytest-of-" in str(path):
            path.chmod(0o755)
    fill(tmp_path, both("train", "val"))
    (tmp_path / folder).mkdir()
    (tmp_path / folder).chmod(0)
    told = subprocess.run(
        [sys.executable, "-c", UNREADABLE, str(tmp_path), str(NOBODY)], capture_output=True, text=True, check=False
    )
    assert told.stdout.split()[0] == printed, told.stderr
    assert printed == "12" or folder in told.stdout


ODD_NAMES = (
    "line\nbreak",
    "trail ",
    " lead",
    '"quoted"',
    "tab\tbed",
    "a\\nb",
    "\u2028",
    "é",
    "ｂ",
    "[bold]x",
    "\x85",
    "cr\r",
)


def test_odd_names_of_classes_survive_packing_and_packing_of_the_pack(tmp_path: Path) -> None:
    names = (*ODD_NAMES, os.fsdecode(b"latin-\xe9"), "x" * 250)
    root = fill(tmp_path / "set", [f"{split}/{name}" for split in ("train", "val") for name in names], each=1)
    expected = tuple(sorted(names))
    assert splits_of(root).train.classes == expected
    for source, target in (("set", "once"), ("once", "twice")):
        report = pack(tmp_path / source, tmp_path / target, workers=1)
        assert (report.images, report.set_aside) == ({"train": 14, "val": 14}, ())
    for place in ("once", "twice"):
        index = open_index(tmp_path / place)
        assert index.classes == expected
        assert sorted(index.label.tolist()) == sorted(2 * list(range(14)))


@pytest.mark.parametrize(
    "content",
    [
        b"a\nb\n",
        b"a\r\nb\r\n\r\n",
        b"\xef\xbb\xbfa\nb",
        "a\nb\n".encode("utf-16"),
        b"\xfe\xff" + "a\nb\n".encode("utf-16-be"),
        "a\nb\n".encode("utf-32"),
        b'"a"\n"b"\n',
        b"  a  \nb\n",
    ],
)
def test_classes_txt_is_read_in_every_encoding_that_it_announces(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path, both("train", "val"))
    (tmp_path / "classes.txt").write_bytes(content)
    assert splits_of(tmp_path).train.classes == CLASSES


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"a\n\nb\n", b"a\nb\na\n", "a\nb\n".encode("utf-16-le"), b"\xff\xfea", b"a\nb\n\0"]
)
def test_a_classes_txt_that_is_in_doubt_is_refused(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path, both("train", "val"))
    (tmp_path / "classes.txt").write_bytes(content)
    with fails(DataError, "classes.txt"):
        splits_of(tmp_path)


def _val_class(root: Path) -> None:
    fill(root, ["val/c"])


def _val_in_another_case(root: Path) -> None:
    fill(root, ["val/A"])


def _class_is_a_file(root: Path) -> None:
    (root / "train/c").write_bytes(b"text")
    fill(root, ["val/c"])


def _empty_class(root: Path) -> None:
    (root / "train/c").mkdir()


@pytest.mark.parametrize("make", [_val_class, _val_in_another_case, _class_is_a_file, _empty_class])
def test_classes_that_train_lacks_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    fill(tmp_path, both("train", "val"))
    make(tmp_path)
    with fails(DataError, "data.root"):
        splits_of(tmp_path)


def test_classes_that_differ_by_case_or_lack_images_are_named(tmp_path: Path) -> None:
    fill(tmp_path, ["train/a", "train/A", "train/b", "val/b"])
    (tmp_path / "classes.txt").write_text("A\na\nb\nc\n")
    told = notes(tmp_path)
    assert "differ only by case: A, a" in told
    assert "train has no image of 1 of 4 classes: c" in told and "val has no image of 3 of 4 classes: A, a, c" in told


# ---- the commands


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(each) for each in arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


TRAIN = ("training.epochs=1", "training.batch_size=4", "compute.workers=0", "tracking.register=null")
SMALL = ("family.depth=8", "data.side_px=16", "evaluation.latency_repeats=0", "evaluation.batch_size=4")


def test_train_and_evaluate_begin_with_the_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "set", both("train", "val"), each=8)
    (tmp_path / "set/train/a/gone.jpg").symlink_to("nowhere")
    train = ("train", "baseline/toy", "data.root=set", *TRAIN, *SMALL, "--run-dir", "run")
    code, out, err = run(capsys, *train)
    assert code == 2 and "max_bad_share" in err
    code, out, err = run(capsys, *train, "data.max_bad_share=0.1")
    assert code == 0, err
    stated = out.splitlines().index(f"{tmp_path}/set: 16 of 17 train, 16 of 16 val images used")
    assert "1 link that leads nowhere (train/a/gone.jpg)" in out.splitlines()[stated + 1]
    fill(tmp_path / "other", CLASSES, each=6)
    code, out, err = run(capsys, "evaluate", "run", f"data.root={tmp_path / 'other'}")
    assert code == 0, err
    assert f"{tmp_path}/other: 12 of 12 val images used" in out.splitlines()
