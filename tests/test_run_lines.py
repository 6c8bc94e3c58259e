"""A run on the terminal: the bar fits any width, what it drops is fixed, and a log has no control characters."""

from __future__ import annotations

import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import run_lines
from jobs.run_lines import KEPT, RunLines, bar_line, progress_parts
from pipeline.runs.journal import Journal, read_all

ROOT = Path(__file__).parents[1]
VALUES = {
    "step": 1234,
    "train/loss": 1.2345,
    "train/top1": 0.4321,
    "train/epoch": 3.21,
    "val": 0.6543,
    "time/images_per_s": 1234.0,
    "time/data_share": 0.031,
    "time/interval_s": 10.0,
    "time/interval_steps": 20.0,
    "time/macs_per_s": 1.23e12,
    "time/macs_share_of_peak": 0.31,
    "system/memory_peak_bytes": 12.3e9,
}
NET = {"family": "tiny", "parameters": 201098, "macs": 12_345_678, "side_px": 32}
DATA = {"root": "/data/toy", "classes": 10, "train_images": 1500, "val_images": 500}
STARTED = {"total_steps": 188, "workers": 2, "device": "a CPU", "precision": "fp32", "epochs": 8.0, "batch_size": 64}


def kept_at(width: int, values: dict[str, float] = VALUES, total: int = 12345) -> list[str]:
    """What the bar holds at this width, in the order of KEPT."""
    line, parts = bar_line(values, total, width), progress_parts(values, total)
    return [name for name in KEPT if ("[" in line if name == "bar" else parts[name] in line)]


@pytest.mark.parametrize(
    ("width", "last"), [(15, "step"), (40, "left"), (60, "val"), (80, "bar"), (120, "epoch"), (160, "memory")]
)
def test_the_bar_holds_what_comes_first_as_far_as_it_fits(width: int, last: str) -> None:
    kept = kept_at(width)
    assert kept == list(KEPT[: len(kept)]) and kept[-1] == last


def test_no_bar_is_wider_than_its_terminal_and_a_wider_one_holds_no_less() -> None:
    draw = random.Random(7)
    for _ in range(50):
        total = draw.choice([0, 7, 10**7])
        values = {key: abs(value * 10 ** draw.uniform(-3, 3)) for key, value in VALUES.items() if draw.random() < 0.8}
        lines = [bar_line(values, total, width) for width in range(1, 200)]
        assert all(len(line) <= width for width, line in enumerate(lines, 1))
        sizes = [len(line.replace("#", "").replace(".", "").split()) for line in lines[20:]]
        assert sizes == sorted(sizes)


def test_what_is_not_known_is_not_shown() -> None:
    assert bar_line({}, 0, 80).startswith("[") and "step 0/?" in bar_line({}, 0, 80)
    assert set(progress_parts({"step": 3, "train/loss": 1.0}, 10)) == {"step", "loss"}
    assert progress_parts(VALUES, 12345)["macs"] == "1.23 TMAC/s (31 % of peak)"
    assert progress_parts(VALUES, 12345)["left"] == "1:32:36 left"


def test_the_header_comes_once_and_each_evaluation_has_a_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    shown = RunLines({"run": "runs/a"})
    journal.metrics(10, {"eval/a/top1": 0.9})
    shown.remember(read_all(journal.path))  # of an earlier start
    new = Journal(tmp_path, "new")
    for start in (0, 20):
        new.event("started", step=start, **STARTED, net=NET, data=DATA)
        for step, top1 in ((start + 30, 0.654), (start + 60, 0.95 + start / 1000)):
            new.metrics(step, {"train/loss": 1.5, "eval/a/top1": top1, "eval/a/loss": 1.0, "eval/b/top1": 0.1})
    new.event("finished", step=80)
    lines = shown.take(read_all(new.path))
    assert [line.split()[0] for line in lines if ":" in line][:3] == ["net", "data", "evaluation"]
    assert sum(line.startswith("net ") for line in lines) == 1
    assert "201,098 parameters, 12.3 MMACs at 32 px" in lines[0] and lines[4].split() == ["run", "runs/a"]
    assert [line for line in lines if line.startswith("[")] == [
        "[started] at step 0 of 188, 2 workers",
        "[started] at step 20 of 188, 2 workers",
    ]
    told = [line for line in lines if line.startswith("evaluation")]
    assert told[0] == "evaluation at step 30: val top-1 65.40 %, loss 1.0000; best 90.00 % at step 10"
    assert [line.endswith("the best so far") for line in told] == [False, True, False, True]
    assert shown.values["val"] == pytest.approx(0.97) and shown.total == 188


def test_a_start_that_an_earlier_version_has_written_is_shown(tmp_path: Path) -> None:
    record = {"event": "started", "step": 5, "total_steps": 9, "workers": 1, "attempt": 1, "fence": 1, "time": 1.0}
    assert RunLines({"run": "a"}).take([record]) == ["run  a", "[started] at step 5 of 9, 1 worker"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 "), (12, "12 "), (999.7, "1 k"), (12345, "12.3 k"), (4.1e9, "4.1 G"), (2e18, "2e+03 P")]
)
def test_large_numbers_have_prefixes(value: float, text: str) -> None:
    assert run_lines.scaled(value) == text


FOLLOWED = f"""
import sys, time
from pathlib import Path
from jobs.verbs import progress
from pipeline.runs import progress as stored
from pipeline.runs.journal import Journal
progress.POLL_S = progress.LINE_EVERY_S = 0.02
run_dir = Path(sys.argv[1])
with progress.follow(run_dir, "sqlite:////x/mlflow.db") as view:
    view.index("reading image headers", 3, 3)
    view.start()
    now = time.time() + 1
    stored.write(run_dir, stored.RunProgress(phase="starting Ray", moved=now, written=now))
    time.sleep(0.3)
    journal = Journal(run_dir / "journal")
    journal.event("started", step=0, **{STARTED!r}, net={NET!r}, data={DATA!r})
    stored.write(run_dir, stored.RunProgress(phase="a step", moved=now, written=now))
    journal.metrics(30, {{"train/loss": 1.5, "train/top1": 0.25, "eval/a/top1": 0.654}})
    time.sleep(0.5)
"""


def followed(run_dir: Path, output: int) -> str:
    run_dir.mkdir()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    words = [sys.executable, "-c", FOLLOWED, str(run_dir)]
    done = subprocess.run(words, stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout or ""


def test_a_log_has_plain_lines_and_no_control_characters(tmp_path: Path) -> None:
    lines = followed(tmp_path / "run", subprocess.PIPE).splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[:2] == ["reading image headers: 3 of 3", "... starting Ray"]
    assert lines[-1].startswith("step 30/188  loss 1.5000  train 25.0 %  val 65.40 %")
    assert "MLflow    mlflow ui --backend-store-uri sqlite:////x/mlflow.db" in lines


def test_a_terminal_has_a_bar_below_the_lines_that_stay(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    followed(tmp_path / "run", theirs)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "starting Ray 0:00:0" in text and "evaluation at step 30: val top-1 65.40 %" in text
    assert "[###.................]" in text or "[##" in text
    assert text.rstrip().endswith(("\x1b[2K", "\x1b[?25h")), "the bar stays after its end"


def test_recipes_are_listed_and_shown_as_tables_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from jobs import shown_recipe
    from jobs.verbs.train import app
    from pipeline import run_config

    def told(*words: str) -> Any:
        return CliRunner().invoke(app, list(words), catch_exceptions=False).output

    listed = json.loads(told("--list", "--json"))
    assert {"recipe", "title"} == set(listed[0]) and "convnet_aig/toy" in [each["recipe"] for each in listed]
    given = ["convnet_aig/toy", "training.epochs=3", f"data.root={tmp_path}"]
    shown = tmp_path / "shown.yaml"
    shown.write_text(told(*given, "--show", "--json"))
    config = run_config.load(given[0], given[1:])
    assert run_config.load(str(shown)) == config
    rows = shown_recipe.table(config, shown_recipe.RecipeSource(given[0], given[1:], {})).splitlines()
    cells = {row.split()[0]: row.split()[1:] for row in rows[2:]}
    assert cells["training.epochs"] == ["3.0", "the", "command"] and cells["tracking.uri"][1:] == ["the", "default"]
    assert cells["training.batch_size"][1:] == ["the", "recipe"]
