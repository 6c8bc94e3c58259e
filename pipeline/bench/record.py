"""The CPU time in which a small net learns CIFAR-10: whole trainings from random weights, each with another seed.

Everything counts from the start of the training to its last evaluation: the start of Ray, decoding, training, saving,
the evaluation, and the journal. It is measured by looking at all processes below this one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import psutil

from pipeline.errors import ResourceError
from pipeline.execution import launch
from pipeline.execution.launch import Result
from pipeline.run_config import RunConfig

RECIPE = "baseline/cifar10_speedrun:record"
OVERRIDES = ("tracking.register=null", "evaluation.latency_repeats=0", "checkpoint.every=1000 epochs")
LOOKED_EVERY_S = 0.2


class CpuTime:
    """`with CpuTime() as used`: the CPU seconds of this process and of all below it in the block, and the wall time.

    What a process below uses after its last look, at most LOOKED_EVERY_S, is not counted.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, float], float] = {}  # by process id and start
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpu-time", daemon=True)
        self._began = self._own = 0.0
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> Self:
        self._look()
        self._before = dict(self._seconds)
        self._began, self._own = time.monotonic(), time.process_time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.monotonic() - self._began
        self._over.set()
        self._thread.join()
        self._look()
        below = sum(seconds - self._before.get(process, 0.0) for process, seconds in self._seconds.items())
        self.cpu_s = time.process_time() - self._own + below

    def _run(self) -> None:
        while not self._over.wait(LOOKED_EVERY_S):
            self._look()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    self._seconds[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:  # it has ended
                continue


@dataclass(frozen=True)
class TrainedOnce:
    """A whole training: top-1 of each policy on the test images, in 0..1, and its time."""

    seed: int
    top1: dict[str, float]
    cpu_s: float
    wall_s: float


def trained(config: RunConfig, runs: int) -> Iterator[TrainedOnce]:
    """Trains the recipe with its seed and the following ones, each in a folder that is removed afterwards.

    Raises ResourceError if a training is stopped.
    """
    for seed in range(config.seed, config.seed + runs):
        with TemporaryDirectory(prefix="adaptnet-bench-") as folder, CpuTime() as used:
            result = _train(config, seed, Path(folder))
        top1 = {report.policy: report.top1 for report in result.reports}
        yield TrainedOnce(seed, top1, used.cpu_s, used.wall_s)


def _train(config: RunConfig, seed: int, folder: Path) -> Result:
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"})
    result = launch.train(config.model_copy(update={"seed": seed, "tracking": tracking}), folder / config.name)
    if not result.finished:
        raise ResourceError("bench cifar10: the training was stopped, so there is no result", key="bench cifar10")
    return result
