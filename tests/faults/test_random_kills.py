"""Random kills for FAULTS_MINUTES (3 by default; make test-faults): whatever was killed, and wherever, the same command
ends with the weights of an uninterrupted run, bit by bit, and a pack with the same shards.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from disks import full_disk
from safetensors.torch import load_file

from pipeline import run_config
from pipeline.data import toy
from pipeline.data.index import open_index
from pipeline.errors import AdaptNetError
from pipeline.execution import launch

pytestmark = [pytest.mark.ray, pytest.mark.faults]
MINUTES = float(os.environ.get("FAULTS_MINUTES", "3"))
SEED = int(os.environ.get("FAULTS_SEED", "16"))
ROOT = Path(__file__).parents[2]
NAMES = {  # words of the command lines of what is killed
    "worker": ("RayTrainWorker",),
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs_server",),
    "all": ("",),
}
LAST = "step-00000020"
SMALL = ["family.depth=8", "data.side_px=16", "training.batch_size=16", "training.epochs=5", "checkpoint.every=2 steps"]
QUIET = ["tracking.register=null", "tracking.uri=http://127.0.0.1:9", "tracking.patience_s=0", "name=killed"]
OFTEN = ["logging.every=2 steps", "evaluation.every=1 epochs", "evaluation.latency_repeats=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "set", num_classes=2, train=64, val=16, side_px=16, seed=2)


def overrides(images: Path, workers: int) -> list[str]:
    patient = ["compute.start_patience_s=600"] if workers else []
    return [f"data.root={images}", *SMALL, *QUIET, *OFTEN, f"compute.workers={workers}", *patient]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of an uninterrupted run in this process."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert launch.train(run_config.load("baseline/toy", overrides(images, 0)), run_dir).step == 20
    return weights(run_dir)


def weights(run_dir: Path) -> dict[str, bytes]:
    tensors = load_file(run_dir / "checkpoints" / LAST / "net.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def started(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        command = [sys.executable, "-m", "jobs.cli", *words]
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)


def struck(process: subprocess.Popen[bytes], kind: str, draw: random.Random) -> None:
    """Kills the driver, or processes of Ray below it; some are stopped for a while first."""
    family = [psutil.Process(process.pid)] if kind == "driver" else below(process, NAMES[kind])
    for victim in family:
        with contextlib.suppress(psutil.Error):
            if draw.random() < 0.3:
                victim.send_signal(signal.SIGSTOP)
                time.sleep(draw.uniform(0, 1))
            victim.kill()
    if kind == "all":
        process.kill()


def below(process: subprocess.Popen[bytes], words: tuple[str, ...]) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(word in " ".join(child.cmdline()) for word in words):
                    found.append(child)
    return found


def ended(process: subprocess.Popen[bytes], log: Path) -> int:
    """The exit code; the processes below a killed driver end by themselves."""
    family = below(process, ("",))
    try:
        code = process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it neither ended nor trained\n{log.read_text()[-3000:]}")
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive, alive
    return code


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_killed_at_random_ends_with_the_same_weights(
    images: Path, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    """In training, saving, evaluating and at its start and end; without Ray only the driver can be killed."""
    draw, deadline = random.Random(SEED + workers), time.monotonic() + 60 * MINUTES / 3
    rounds = kills = 0
    while rounds == 0 or time.monotonic() < deadline:
        run_dir, log = tmp_path / f"run{rounds}", tmp_path / f"log{rounds}"
        words = ["train", "baseline/toy", *overrides(images, workers), "--run-dir", str(run_dir)]
        for _ in range(draw.randint(1, 3)):
            process = started(words, log)
            patience = time.monotonic() + draw.uniform(2, 40 if workers else 20)
            while process.poll() is None and time.monotonic() < patience:
                time.sleep(0.05)
            kind = draw.choice([*NAMES, "driver"]) if workers else "driver"
            if process.poll() is None:
                kills += 1
                struck(process, kind, draw)
            code, text = ended(process, log), log.read_text()
            assert code in (0, 2, -signal.SIGKILL) or "ended with exit code 1" in text, text[-3000:]  # by Ray, at once
        assert ended(started(words, log), log) == 0, log.read_text()[-3000:]
        assert "Traceback" not in log.read_text() or workers, log.read_text()[-3000:]
        assert weights(run_dir) == whole, f"round {rounds} of seed {SEED + workers}"
        rounds += 1
    print(f"{rounds} runs, {kills} kills")


def test_a_pack_that_is_killed_at_random_ends_with_the_same_shards(images: Path, tmp_path: Path) -> None:
    draw, deadline = random.Random(SEED), time.monotonic() + 60 * MINUTES / 6
    whole, log = tmp_path / "whole", tmp_path / "log"
    assert ended(started(["data", "pack", str(images), str(whole)], log), log) == 0, log.read_text()
    shards = {path.name: path.read_bytes() for path in whole.rglob("*.tar")}
    rounds = 0
    while rounds == 0 or time.monotonic() < deadline:
        packed = tmp_path / f"packed{rounds}"
        for _ in range(2):
            process = started(["data", "pack", str(images), str(packed)], log)
            time.sleep(draw.uniform(0.2, 6))
            process.kill()
            process.wait()
        assert ended(started(["data", "pack", str(images), str(packed)], log), log) == 0, log.read_text()[-3000:]
        assert {path.name: path.read_bytes() for path in packed.rglob("*.tar")} == shards
        assert open_index(packed).identity == open_index(whole).identity
        rounds += 1


def test_a_disk_that_is_full_at_random_costs_no_weight(images: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """No file of the process may grow beyond a random size; then the disk has room again."""
    draw, config = random.Random(SEED), run_config.load("baseline/toy", overrides(images, 0))
    for number in range(3):
        run_dir = tmp_path / f"run{number}"
        with full_disk(draw.choice([0, 500, 5_000, 50_000, 200_000])), contextlib.suppress(AdaptNetError):
            launch.train(config, run_dir)
        assert launch.train(config, run_dir).finished
        assert weights(run_dir) == whole
