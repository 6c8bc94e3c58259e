"""Freed memory is retained for the next step; running out of memory is reported as such."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import run_config
from pipeline.data import toy
from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import worker
from pipeline.runs.records import error_left
from pipeline.training import fitting
from pipeline.training.memory import oom_message

GIVEN_BACK = """
import sys
import psutil, torch
from pipeline.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
resident = lambda: psutil.Process().memory_info().rss
parts = [torch.ones(6 << 20) for _ in range(8)]  # 192 MiB
before = resident()
del parts
print((before - resident()) >> 20)
"""


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has this setting")
def test_memory_that_a_step_frees_stays_with_the_process() -> None:
    assert _given_back("kept") < 10
    assert _given_back("plain") > 100  # what the setting is for


def _given_back(mode: str) -> int:
    """MiB."""
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


SPENT = """
import resource, sys
import psutil
from jobs import cli
from pipeline.execution import launch
from pipeline.execution import worker
own = psutil.Process().memory_info().data
resource.setrlimit(resource.RLIMIT_DATA, (own + (2 << 30), -1))
cli.main(sys.argv[1:])
"""


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process this way")
def test_running_out_of_memory_is_one_error_that_names_a_smaller_setting_that_works(tmp_path: Path) -> None:
    """A process that may have 2 GiB more than it begins with, and a step that needs more."""
    images = toy.make(tmp_path / "set", num_classes=4, train=320, val=80, side_px=32, seed=5)
    own = [f"data.root={images}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "tracking.register=null"]
    own += ["compute.workers=0", "training.batch_size=4096", "training.epochs=12.8", "evaluation.latency_repeats=0"]
    words = ["train", "convnet_aig/toy", "--run-dir", str(tmp_path / "run"), *own]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, "-c", SPENT, *words]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert sum(line.startswith("adaptnet: ") for line in done.stderr.splitlines()) == 1
    assert "compute.max_batch_per_worker" in done.stderr and "Traceback" not in done.stderr
    error = error_left(tmp_path / "run")
    assert error is not None and (error.key, error.subject) == ("training.batch_size", "4096")
    for value in ("64", "auto"):
        again = [*line, f"compute.max_batch_per_worker={value}"]
        again[again.index(str(tmp_path / "run"))] = str(tmp_path / value)
        done = subprocess.run(again, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0 and "finished" in done.stdout, done.stdout + done.stderr
    found = fitting.remembered(tmp_path / "auto")
    assert found is not None and found.max_batch is not None and found.max_batch < 4096


def test_out_of_memory_with_fewer_workers_than_the_most_is_a_resource_error() -> None:
    """An elastic job that has lost nodes is requeued then; others are not."""
    for workers, kind in (("1", ConfigError), ("[1,2]", ResourceError)):
        config = run_config.load("convnet_aig/toy", [f"compute.workers={workers}"])
        assert type(worker.out_of_memory(config, "bad_alloc")) is kind


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            "CUDA out of memory. Tried to allocate 2 GiB",
        ),
        (RuntimeError("x\n[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "[enforce fail] Def"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuDNN error"),
        (MemoryError(), "Python could not allocate"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_out_of_memory_errors_are_recognised(error: Exception, message: str | None) -> None:
    found = oom_message(error)
    assert found is None if message is None else found is not None and found.startswith(message)
