"""`adaptnet data` from end to end, as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import main
from tests import images


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)


def test_toy_pack_check_and_info_follow_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy, packed = tmp_path / "toy", tmp_path / "packed"
    assert run("data", "toy", toy, "--train", 40, "--val", 20, "--side", 24) == 0
    (toy / "train/00-disc/broken.jpg").write_bytes(images.truncated_jpeg())
    assert run("data", "check", toy, "--workers", 1) == 1
    assert "61 images decoded" in (said := capsys.readouterr().out) and "train/00-disc/broken.jpg: truncated" in said
    assert run("data", "pack", toy, packed, "--workers", 1) == 0
    assert "40 train, 20 val" in (said := capsys.readouterr().out) and "broken.jpg: truncated JPEG" in said
    assert run("data", "check", packed, "--workers", 1) == 0
    assert "60 images decoded, and bytes compared with those packed" in capsys.readouterr().out
    assert run("data", "info", packed) == 0
    said = capsys.readouterr().out
    assert "10, each of 4 to 4 training images: 00-disc" in said and f"index        {packed}/index/" in said


def test_a_user_error_is_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "info", tmp_path / "nothing") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"adaptnet: {tmp_path}/nothing: no such folder") and "Traceback" not in printed.err
    assert run("data", "info", tmp_path, "--validation-share", 2) == 2
    assert "validation_share (=2.0)" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [[], ["toy"], ["pack"], ["check"], ["info"]])
def test_every_help_shows_an_example(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", *verb, "--help") == 0
    assert f"adaptnet data {verb[0] if verb else 'toy'} " in capsys.readouterr().out
