"""`adaptnet data` from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
from raised import fails

from jobs import cli
from pipeline.errors import ConfigError, DataError
from tests import images


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(each) for each in arguments])
    return int(ended.value.code or 0)


def test_toy_check_pack_and_info_work_in_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy, packed = tmp_path / "toy", tmp_path / "packed"
    assert run("data", "toy", toy, "--train", 40, "--val", 20, "--side", 24) == 0
    (toy / "train/00-disc/broken.jpg").write_bytes(images.truncated_jpeg())
    assert run("data", "check", toy, "--workers", 1) == 1
    printed = capsys.readouterr().out
    assert "61 images" in printed and "train/00-disc/broken.jpg: " in printed
    assert run("data", "pack", toy, packed, "--workers", 1) == 0
    printed = capsys.readouterr().out
    assert "40 train, 20 val" in printed and "broken.jpg: " in printed
    assert run("data", "check", packed, "--workers", 1) == 0
    assert "60 images" in capsys.readouterr().out
    assert run("data", "info", packed) == 0
    printed = capsys.readouterr().out
    assert "10, each of 4 to 4 training images: 00-disc" in printed and f"index        {packed}/index/" in printed


@pytest.mark.parametrize(
    ("train", "val", "unused", "refused"),
    [
        pytest.param(60, 0, "broken.jpg", True, id="more than 1 %"),
        pytest.param(120, 0, "broken.jpg", False, id="less"),
        pytest.param(60, 60, "broken.jpg", True, id="more than 1 % of train, less of all"),
        pytest.param(60, 0, "a.heic", True, id="left out"),
    ],
)
def test_check_says_whether_training_refuses_the_set(
    train: int, val: int, unused: str, refused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", train), ("val", val)) if val else (("", train),):
        folder = tmp_path / split / "class"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.jpg").write_bytes(images.jpeg(8, 8))
    (tmp_path / ("train" if val else "") / "class" / unused).write_bytes(images.truncated_jpeg())
    assert run("data", "check", tmp_path, "--workers", 1) == 1
    assert ("data.max_bad_share" in capsys.readouterr().out) is refused


def test_a_user_error_is_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "info", tmp_path / "nothing") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"adaptnet: {tmp_path}/nothing: ") and "Traceback" not in printed.err
    with fails(ConfigError, "validation_share", subject="2.0"):
        cli.app(args=["data", "info", str(tmp_path), "--validation-share", "2"])


@pytest.mark.parametrize("verb", [[], ["toy"], ["pack"], ["check"], ["info"]])
def test_every_help_shows_an_example(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", *verb, "--help") == 0
    assert f"adaptnet data {verb[0] if verb else 'toy'} " in capsys.readouterr().out


def test_info_lists_the_images_of_each_class_and_says_where_a_new_index_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, name, count in (("train", "many", 12), ("train", "few", 2), ("val", "many", 3), ("val", "few", 1)):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.jpg").write_bytes(images.jpeg(8, 8))
    assert run("data", "info", tmp_path) == 0
    first = capsys.readouterr()
    rows = [line.split() for line in first.out.splitlines()]
    assert ["few", "2", "1"] in rows and ["many", "12", "3"] in rows
    assert first.out.count("warning: ") == 2, "unequal classes, and few images in val"
    assert str(tmp_path / ".adaptnet-index") in first.err
    assert run("data", "info", tmp_path) == 0
    assert str(tmp_path / ".adaptnet-index") not in capsys.readouterr().err, "said once"


def test_a_missing_folder_is_not_offered_as_the_place_of_a_toy_set(tmp_path: Path) -> None:
    with fails(DataError, "data.root", subject="nothing") as caught:
        cli.app(args=["data", "info", str(tmp_path / "nothing")])
    assert f"data toy {tmp_path}" not in str(caught.value)
