"""The acceptance run on a machine without a GPU: what it says, and that no part ends it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from infra.gpu import photographs
from infra.gpu.accept import Conductor, ResultTable, line
from infra.gpu.expected import EXPECTED, Expected
from infra.gpu.parts import PARTS, Part
from infra.gpu.run import Run

ROOT = Path(__file__).parents[2]


def dies(run: Run) -> None:
    """A part whose second case kills its process."""
    run.case("before", lambda: run.row("before", 1.0))
    run.case("dies", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    run.case("raises", lambda: _raise())
    run.case("after", lambda: run.row("after", 2.0))


def _raise(text: str = "no such luck") -> None:
    raise ValueError(text)


def breaks_the_gpu(run: Run) -> None:
    """A part whose first case leaves the GPU unusable for its process."""
    run.case("breaks", lambda: _raise("CUDA error: an illegal memory access was encountered"))
    run.case("after", lambda: run.row("after", 2.0))


def hangs(run: Run) -> None:
    """A part that never ends."""
    run.case("hangs", lambda: time.sleep(3600))


def here(name: str, limit_s: float = 300.0) -> Part:
    return Part(name, f"tests.gpu.test_accept:{name}", (), limit_s, "a part of a test")


@pytest.fixture
def conductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conductor:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    return Conductor(ResultTable(tmp_path / "rows.json"), tmp_path, tmp_path, time.monotonic() + 600, small=True)


@pytest.mark.long
def test_a_part_that_dies_by_a_signal_is_a_row_and_its_other_cases_still_run(conductor: Conductor) -> None:
    conductor.run(here("dies"))
    rows = [(row["what"], row["value"], row["verdict"]) for row in conductor.table.rows]
    assert rows == [
        ("before", 1.0, "measured"),
        ("dies", "died: SIGSEGV", "failed"),
        ("raises", "ValueError: no such luck", "failed"),
        ("after", 2.0, "measured"),
    ]
    assert conductor.table.path is not None
    assert json.loads(conductor.table.path.read_text())["rows"] == conductor.table.rows


@pytest.mark.long
def test_after_an_error_of_the_gpu_the_other_cases_run_in_a_new_process(conductor: Conductor) -> None:
    conductor.run(here("breaks_the_gpu"))
    assert [(row["what"], row["verdict"]) for row in conductor.table.rows] == [
        ("breaks", "failed"),
        ("after", "measured"),
    ]


def test_a_part_that_hangs_is_a_row(conductor: Conductor) -> None:
    conductor.run(here("hangs", limit_s=2.0))
    assert [row["value"] for row in conductor.table.rows] == ["out of time"]


def test_a_part_that_does_not_fit_is_left_out(conductor: Conductor) -> None:
    conductor.ends = time.monotonic() + 1
    conductor.run(here("hangs"))
    assert [row["verdict"] for row in conductor.table.rows] == ["left out: no time"]


def test_a_part_that_cannot_be_imported_is_a_row(conductor: Conductor) -> None:
    conductor.run(Part("nowhere", "infra.gpu.nowhere:nowhere", (), 300.0, "nothing"))
    assert [(row["what"], row["value"]) for row in conductor.table.rows] == [("nothing", "exit code 1")]


@pytest.mark.long
def test_without_a_gpu_every_part_says_that_it_needs_one(tmp_path: Path) -> None:
    out = tmp_path / "accept.json"
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "DATA": "", "WHEELS": ""}
    command = [ROOT / "infra/gpu/accept.sh", "--json", out, "--work", tmp_path / "work", "--patience", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [part["name"] for part in found["parts"]] == [part.name for part in PARTS]
    states = {part["name"]: part["state"] for part in found["parts"]}
    assert states == {part.name: "needs a GPU" if part.needs else "run" for part in PARTS}
    assert done.stdout.count("needs a GPU") >= 2 * (len(PARTS) - 1)  # as it happens, and in the table
    assert found["facts"]["gpu"] is False and "finished" in found


def test_expected_ranges() -> None:
    assert Expected(1, 2, "derived").holds(2) and not Expected(1, 2, "derived").holds(2.1)
    assert Expected(0.98, None, "derived").holds(1e9) and not Expected(None, 0, "measured").holds(float("nan"))
    assert {key.partition(":")[0] for key in EXPECTED} <= {part.name for part in PARTS}
    assert "ok" in line({"part": "speed", "what": "ours", "value": 2.5, "unit": "images/s", "verdict": "ok"})


def test_jpegs_are_drawn_where_none_are_given(tmp_path: Path) -> None:
    drawn = photographs.jpegs_in("", tmp_path / "drawn", few=True)
    pictures = photographs.encoded(drawn)
    assert len(pictures) == photographs.FEW
    assert Image.open(io.BytesIO(pictures[0])).size == (500, 375)
    copied = photographs.encoded(photographs.jpegs_in(str(drawn), tmp_path / "copied"))
    assert sorted(copied) == sorted(pictures)
