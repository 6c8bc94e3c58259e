"""One Ray cluster for all tests of a session: starting Ray takes longer than most of what is tested on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.execution import allocation, sockets

CPUS = 2
ATTEMPTS = 3  # Ray gives a node 30 s to start, which a busy machine may exceed
TRAINING = ("RayTrainWorker", "TrainController")  # Ray's names of a training's processes


@dataclass(frozen=True)
class Head:
    """A head with CPUS CPUs that requires no token."""

    address: str
    process: psutil.Popen

    def workers(self) -> list[psutil.Process]:
        """The workers of trainings on this cluster."""
        return self._named("RayTrainWorker")

    def is_idle(self) -> bool:
        """Whether no process of a training is left."""
        return not self._named(*TRAINING)

    def _named(self, *names: str) -> list[psutil.Process]:
        found = []
        for process in self.process.children(recursive=True):
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if any(name in line for name in names) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@contextmanager
def head(folder: Path) -> Iterator[Head]:
    """Starts a head with its log in `folder`, and ends it afterwards."""
    scratch = Path(f"/tmp/adaptnet-tests-{os.getpid()}")
    started = _start(folder, scratch)
    try:
        yield started
    finally:
        _end(started.process)
        shutil.rmtree(scratch, ignore_errors=True)


def _start(folder: Path, scratch: Path) -> Head:
    for attempt in range(ATTEMPTS):
        address = f"{sockets.HERE}:{sockets.free_port()}"
        log = folder / f"head-{attempt}.log"
        process = _ray_start(address, scratch, log)
        while process.poll() is None:
            if "Ray runtime started" in log.read_text(errors="replace") and sockets.listens(address):
                return Head(address, process)
            time.sleep(0.2)
        _end(process)
    raise AssertionError(f"Ray did not start: {log.read_text(errors='replace')[-3000:]}")


def _ray_start(address: str, scratch: Path, log: Path) -> psutil.Popen:
    port = address.rpartition(":")[2]
    line = f"start --head --block --node-ip-address={sockets.HERE} --port={port} --num-cpus={CPUS}"
    line += f" --include-dashboard=false --disable-usage-stats --object-store-memory=100000000 --temp-dir={scratch}"
    env = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PYTHONUNBUFFERED": "1",
    }
    with open(log, "wb") as file:
        return psutil.Popen(
            ["sh", "-c", allocation.SUPERVISED, "sh", str(Path(sys.executable).parent / "ray"), *line.split()],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=allocation.end_with_parent,  # also if the tests are killed
        )


def _end(process: psutil.Popen) -> None:
    family = [process]
    with suppress(psutil.Error):
        family += process.children(recursive=True)
        process.terminate()
    _, left = psutil.wait_procs(family, timeout=15)
    for each in left:
        with suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(left, timeout=300)
