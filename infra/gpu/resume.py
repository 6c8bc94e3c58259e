"""Killed and resumed: the weights equal those of a run without a kill. And DDP of one rank over NCCL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from infra.gpu.run import Run
from infra.gpu.speed import setup_of
from pipeline.bench.step import LoopSetup, fresh, plan_of
from pipeline.config import Duration
from pipeline.runs.records import Meta
from pipeline.training import state
from pipeline.training.checkpoint import Checkpointer, LocalStorage, newest_good, read
from pipeline.training.config import CheckpointConfig
from pipeline.training.loop import train
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, train_step

RECIPE, BATCH, CLASSES = "convnet_aig/cifar10_small", 32, 10
STEPS, SAVE_EVERY = 40, 5


class Saves:
    """The loop's events: saves into a folder, and does nothing else."""

    def __init__(self, folder: Path) -> None:
        self.storage = LocalStorage(folder / "checkpoints")
        self.storage.root.mkdir(parents=True, exist_ok=True)
        self._saver = Checkpointer(self.storage, folder / "staging", CheckpointConfig(keep_last=3))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the loss."""
        print(f"step {step}: loss {values['train/loss']:.6f}", flush=True)

    def evaluate(self, current: TrainState) -> None: ...

    def save(self, current: TrainState, *, wait: bool) -> None:
        """Saves the state; no best one is retained."""
        meta = Meta(step=current.step, fingerprint={}, recipe={}, classes=(), metrics={}, best_key="top1")
        self._saver.save(current, meta, {}, wait=wait)

    def last_good(self) -> str | None:
        return None

    def wants_to_stop(self) -> bool:
        return False


def _setup(run: Run, *keys: str) -> LoopSetup:
    return setup_of(run, RECIPE, 4 if run.small else BATCH, run.small, "training.compile=false", *keys, classes=CLASSES)


def _batches(setup: LoopSetup, device: torch.device, start: int, pause_s: float) -> Iterator[Sequence[MicroBatch]]:
    step, side = start, setup.config.data.side_px
    while True:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(setup.batch_size, 3, side, side, generator=generator)
        labels = torch.randint(CLASSES, (setup.batch_size,), generator=generator).to(device)
        time.sleep(pause_s)
        yield [MicroBatch(images.to(device).contiguous(memory_format=torch.channels_last), labels, labels)]
        step += 1


def _deterministic() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def trained(folder: Path, run: Run, pause_s: float) -> None:
    """Trains in `folder` to the end, from its newest checkpoint if there is one."""
    _deterministic()
    setup, events = _setup(run), Saves(folder)
    device, current = fresh(setup)
    name = newest_good(events.storage, lambda damaged, why: print(damaged, why))
    if name is not None:
        state.restore(current, read(events.storage.fetch(name)))
        print(f"resumed at step {current.step}", flush=True)
    save, log = (Duration(value=steps, unit="steps") for steps in (SAVE_EVERY, 5))
    plan = replace(plan_of(setup, current, device), total_steps=STEPS, save_every=save, log_every=log)
    current.net.train()
    train(plan, current, _batches(setup, device, current.step, pause_s), events)
    torch.save({key: value.cpu() for key, value in current.net.state_dict().items()}, folder / "end.pt")


def resume(run: Run) -> None:
    """Three processes: one runs to the end, one is killed after a checkpoint, one resumes from it."""
    run.case("killed and resumed", lambda: _resume(run))


def _resume(run: Run) -> None:
    whole, cut = run.work / "whole", run.work / "cut"
    straight = _start(run, whole, 0.0)
    killed_at = _kill(run, cut)
    _finish(straight)
    _finish(_start(run, cut, 0.0))
    mine, other = (torch.load(folder / "end.pt") for folder in (whole, cut))
    most = max(float((mine[key].double() - other[key].double()).abs().max()) for key in mine)
    resumed = [text for text in (run.work / "cut.log").read_text().splitlines() if text.startswith("resumed")]
    run.row("largest difference of the weights", most, "", f"killed with {killed_at} saved, {' '.join(resumed)}")


def _start(run: Run, folder: Path, pause_s: float) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    given = json.dumps({"folder": str(folder), "small": run.small, "pause_s": pause_s})
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with open(f"{folder}.log", "ab") as log:
        command = [sys.executable, "-u", "-m", "infra.gpu.resume", given]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _kill(run: Run, folder: Path, patience_s: float = 600.0) -> str:
    """Kills a training after its second checkpoint; the names of those that it leaves."""
    process, ends = _start(run, folder, 0.2), time.monotonic() + patience_s
    storage = LocalStorage(folder / "checkpoints")
    while len(storage.names()) < 2:
        if process.poll() is not None or time.monotonic() > ends:
            process.kill()
            raise RuntimeError(f"no two checkpoints before the end: {_end_of(folder)}")
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return ", ".join(storage.names())


def _finish(process: subprocess.Popen[bytes], patience_s: float = 600.0) -> None:
    if process.wait(patience_s) != 0:
        raise RuntimeError(f"exit code {process.returncode} of {process.args!r}"[:250])


def _end_of(folder: Path) -> str:
    return (Path(f"{folder}.log").read_text(errors="replace").strip().splitlines() or ["no output"])[-1][:200]


def nccl(run: Run) -> None:
    """Ten steps under DDP of one rank, against the same steps without it."""
    run.case("ten steps", lambda: _nccl(run))


def _nccl(run: Run) -> None:
    import torch.distributed as dist

    alone = _ten_steps(run, ddp=False)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo" if run.small else "nccl", store=store, rank=0, world_size=1)
    grouped = _ten_steps(run, ddp=True)
    one = torch.ones(1 << 20, device=run.device)
    dist.all_reduce(one)
    dist.destroy_process_group()
    most = max(float((alone[key].double() - grouped[key].double()).abs().max()) for key in alone)
    run.row("largest difference of the weights", most, "", "after ten steps with and without DDP")


def _ten_steps(run: Run, *, ddp: bool) -> dict[str, torch.Tensor]:
    _deterministic()
    setup = _setup(run, "training.precision=fp32")
    device, current = fresh(setup)
    plan, meter = plan_of(setup, current, device), Meter()
    if ddp:
        ids = [0] if device.type == "cuda" else None
        plan = replace(plan, forward=DistributedDataParallel(current.net, device_ids=ids, gradient_as_bucket_view=True))
    current.net.train()
    source = _batches(setup, device, 0, 0.0)
    for _ in range(10):
        train_step(plan, current, next(source), meter)
    return {key: value.cpu() for key, value in current.net.state_dict().items()}


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    place = Path(options["folder"])
    trained(place, Run("resume", place, place, place, small=options["small"]), options["pause_s"])
