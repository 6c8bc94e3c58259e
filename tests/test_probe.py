"""The trial of a node's JPEG decoder in a child process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pipeline.data import probe
from pipeline.data.config import DataConfig

KILLS_ITSELF = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
WELL = (sys.executable, "-c", "")


def test_a_decoder_that_dies_is_a_fault_and_is_not_tried_again(tmp_path: Path) -> None:
    assert probe.tried(KILLS_ITSELF, tmp_path) == "ended by SIGSEGV"
    assert probe.tried(WELL, tmp_path) == "ended by SIGSEGV"


def test_a_decoder_that_works_is_not_tried_again(tmp_path: Path) -> None:
    assert probe.tried(WELL, tmp_path) == ""
    assert probe.tried(KILLS_ITSELF, tmp_path) == ""


def test_a_damaged_or_older_answer_is_tried_anew(tmp_path: Path) -> None:
    assert probe.tried(WELL, tmp_path) == ""
    (kept,) = tmp_path.iterdir()
    for text in ("{", "[]", '{"of": "nvidia-dali-cuda130 2.2.0", "fault": ""}'):
        kept.write_text(text)
        assert probe.tried(KILLS_ITSELF, tmp_path) == "ended by SIGSEGV"


def test_an_error_of_the_decoder_is_told_by_its_last_line(tmp_path: Path) -> None:
    assert probe.tried((sys.executable, "-c", "raise RuntimeError('error 8')"), tmp_path) == "RuntimeError: error 8"


def test_nothing_is_tried_where_the_cpu_decodes() -> None:
    assert probe.fault(DataConfig(root=Path("x")), torch.device("cpu")) == ""
    assert probe.fault(DataConfig(root=Path("x"), decoder="cpu"), torch.device("cuda", 0)) == ""
