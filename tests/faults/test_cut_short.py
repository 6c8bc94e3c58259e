"""Packing, indexing and sending to MLflow, cut short by a kill or a full disk at an exact operation on files.

The operations are drawn with a fixed seed, for a share of FAULTS_MINUTES (3 by default; make test-faults). The same
command goes on, and what it ends with is equal to what an uninterrupted one ends with, byte by byte; in MLflow nothing
is missing and nothing is there twice.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import dying
import pytest
from dying import Fault
from mlflow_here import database

from pipeline.data import toy
from pipeline.tracking import connect

pytestmark = pytest.mark.faults
MINUTES = float(os.environ.get("FAULTS_MINUTES", "3"))
SEED = int(os.environ.get("FAULTS_SEED", "16"))
KILLED = -signal.SIGKILL
SMALL = ["family.depth=8", "data.side_px=16", "training.batch_size=16", "training.epochs=5", "checkpoint.every=2 steps"]
OFTEN = ["logging.every=2 steps", "evaluation.every=1 epochs", "evaluation.latency_repeats=0", "name=killed"]
AWAY = ["tracking.uri=http://127.0.0.1:9", "tracking.patience_s=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "set", num_classes=2, train=64, val=16, side_px=16, seed=2)


def training(images: Path, run_dir: Path, *overrides: str) -> list[str]:
    keys = [f"data.root={images}", *SMALL, *OFTEN, "compute.workers=0", "tracking.register=killed"]
    return ["train", "baseline/toy", *keys, *overrides, "--run-dir", str(run_dir)]


def place(folder: Path) -> Path:
    """A folder for a run, with a database beside it."""
    folder.mkdir()
    shutil.copyfile(database().path, folder / "mlflow.db")
    return folder / "run"


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[tuple[str, int]], int]:
    """What MLflow holds of a run that it could follow."""
    home = tmp_path_factory.mktemp("whole")
    run_dir = place(home / "home")
    assert dying.run(training(images, run_dir), home / "log") == 0, dying.tail(home / "log")
    return tracked(run_dir)


def tracked(run_dir: Path) -> tuple[int, list[tuple[str, int]], int]:
    """How many runs of this name MLflow holds, the (key, step) of each of their values, and how many versions."""
    client = connect(f"sqlite:///{run_dir.parent}/mlflow.db")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])  # type: ignore[attr-defined]
    runs = [run for run in found if run.data.tags["mlflow.runName"] == run_dir.name]
    points = [
        (key, point.step)
        for run in runs
        for key in run.data.metrics
        if not key.startswith(("system/", "time/", "memory/"))
        for point in client.get_metric_history(run.info.run_id, key)  # type: ignore[attr-defined]
    ]
    assert points
    return len(runs), sorted(points), len(client.search_model_versions("name = 'killed'"))  # type: ignore[attr-defined]


def until(share: float) -> Iterator[int]:
    """0, 1, 2 ... until this share of the minutes has passed; 0 in any case."""
    deadline, number = time.monotonic() + 60 * MINUTES * share, 0
    while number == 0 or time.monotonic() < deadline:
        yield number
        number += 1


@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_pack_that_is_cut_short_ends_with_the_same_shards(images: Path, tmp_path: Path, kind: str) -> None:
    draw, log, home = random.Random(SEED), tmp_path / "log", tmp_path / "packs"
    home.mkdir()
    count = dying.operations(["data", "pack", str(images), str(home / "whole"), "--shard-mb", "1"], log, home)
    expected = files_of(home / "whole")
    for number in until(1 / 16):
        packed = home / f"packed{number}"
        words = ["data", "pack", str(images), str(packed), "--shard-mb", "1"]
        fault = Fault(packed.parent, draw.randrange(count), "kill" if kind == "kill" else "full")
        assert dying.run(words, log, fault) == (KILLED if kind == "kill" else 2), dying.tail(log)
        assert dying.run(words, log) == 0, dying.tail(log)
        assert files_of(packed) == expected, fault
    assert "Traceback" not in log.read_text()


def files_of(folder: Path) -> dict[str, bytes]:
    """The visible files of a pack or an index by name; a report holds times and places."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("report.json", "COMPLETE.json")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.mark.parametrize("kind", ["kill", "full"])
def test_an_index_that_is_cut_short_at_any_operation_is_built_again(images: Path, tmp_path: Path, kind: str) -> None:
    log, home = tmp_path / "log", tmp_path / "indexes"
    home.mkdir()
    count = dying.operations(["data", "info", str(images), "--index", str(home / "whole")], log, home)
    expected = files_of(home / "whole")
    for number in range(0, count, 1 if kind == "kill" and MINUTES > 3 else 3):
        words = ["data", "info", str(images), "--index", str(home / f"cut{number}")]
        fault = Fault(home, number, "kill" if kind == "kill" else "full")
        assert dying.run(words, log, fault) in ((KILLED,) if kind == "kill" else (0, 2)), dying.tail(log)
        assert dying.run(words, log) == 0, dying.tail(log)
        assert files_of(home / f"cut{number}") == expected, fault
    assert "Traceback" not in log.read_text()


def test_a_sync_that_is_killed_sends_nothing_twice_and_forgets_nothing(
    images: Path, whole: tuple[int, list[tuple[str, int]], int], tmp_path: Path
) -> None:
    """Of a run whose server was away while it trained; it registers the net, too."""
    draw, log = random.Random(SEED), tmp_path / "log"
    trained = place(tmp_path / "trained")
    assert dying.run(training(images, trained, *AWAY), log) == 0, dying.tail(log)
    home = tmp_path / "counted"
    shutil.copytree(trained, place(home))
    count = dying.operations(["runs", "sync", str(home / "run"), "--uri", f"sqlite:///{home}/mlflow.db"], log, home)
    assert tracked(home / "run") == whole
    for number in until(1 / 16):
        home = tmp_path / f"home{number}"
        shutil.copytree(trained, place(home))
        words = ["runs", "sync", str(home / "run"), "--uri", f"sqlite:///{home}/mlflow.db"]
        for _ in range(2):
            assert dying.run(words, log, Fault(home, draw.randrange(count), "kill")) in (0, KILLED), dying.tail(log)
        assert dying.run(words, log) == 0, dying.tail(log)
        assert tracked(home / "run") == whole, f"round {number} of seed {SEED}"
    assert "Traceback" not in log.read_text()
