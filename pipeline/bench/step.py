"""Training images/s of our loop against a bare PyTorch loop over the same net and tensors, and with two workers
under Ray Train against two processes under torchrun. Each pair is measured in one run, interleaved.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import ranks
from pipeline.bench.rows import BenchRow, compare, interleave
from pipeline.config import Duration, as_mapping
from pipeline.errors import ResourceError
from pipeline.execution import cluster
from pipeline.run_config import ComputeConfig, RunConfig
from pipeline.training import state, step
from pipeline.training.loop import Plan, device_of, train
from pipeline.training.memory import keep_freed_memory
from pipeline.training.state import TrainState
from pipeline.training.step import Micro, Task

WARM = 3  # steps that are not timed
WARM_WORKERS = 150  # of workers: Ray's own actors start beside the first steps, and take their share of few cores
LAP = (
    10  # steps between two looks at the clock; a turn's rate is that of its median lap, for other loads come in bursts
)
POOL = 4  # batches held in memory
T = TypeVar("T")
OURS, BARE, RAY, TORCHRUN = "our loop", "bare loop", "our loop, Ray Train x2", "bare DDP loop, torchrun x2"


@dataclass(frozen=True)
class LoopSetup:
    """What both sides train: a recipe's net on random images [b, 3, S, S], b for each worker."""

    config: RunConfig
    num_classes: int
    steps: int
    warm: int = WARM  # steps before them

    @property
    def batch_size(self) -> int:
        return self.config.training.batch_size


def loops(config: RunConfig, *, num_classes: int = 10, steps: int = 60, rounds: int = 5) -> list[BenchRow]:
    """Our loop against the bare one, in this process."""
    setting = LoopSetup(config, num_classes, steps)
    found = interleave({OURS: lambda: ours(setting), BARE: lambda: bare(setting)}, rounds)
    return compare(found, OURS)


def workers(config: RunConfig, *, num_classes: int = 10, steps: int = 60, rounds: int = 5) -> list[BenchRow]:
    """Our loop in two workers of Ray Train against a bare DDP loop in two processes of torchrun."""
    setting = LoopSetup(config, num_classes, steps, WARM_WORKERS)
    with TemporaryDirectory(prefix="adaptnet-bench-") as folder, cluster.cluster(_compute(config)):
        runs = {
            RAY: lambda: _under_ray(setting, Path(folder)),
            TORCHRUN: lambda: _under_torchrun(setting, Path(folder)),
        }
        found = interleave(runs, rounds)
    return compare(found, RAY)


def _compute(config: RunConfig) -> ComputeConfig:
    return config.compute.model_copy(update={"workers": 2})


def ours(setting: LoopSetup) -> float:
    """Images/s of `training.loop.train`, of all ranks, timed on this one."""
    device, current = fresh(setting)
    task, laps = task_of(setting, current, device), Laps(device, setting.warm)
    train(task, current, laps.over(micros(batches(setting, device))), _plan(setting, _total(setting)), _Nothing())
    return laps.rate(setting.batch_size)


def bare(setting: LoopSetup) -> float:
    """Images/s of the loop of every PyTorch tutorial, with DDP where there are ranks; keeps memory as ours does."""
    keep_freed_memory()
    device, current = fresh(setting)
    net: nn.Module = current.net
    if ranks.world() > 1:
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(current.net.parameters(), lr=0.01, momentum=0.9)
    amp, laps = step.use_bf16(setting.config.training.precision, device), Laps(device, setting.warm)
    for _, (images, labels) in zip(range(_total(setting)), laps.over(batches(setting, device)), strict=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(images).logits
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
    return laps.rate(setting.batch_size)


def _total(setting: LoopSetup) -> int:
    """Steps of a turn: whole laps, and one step more, at whose start the last lap ends."""
    return setting.warm + max(1, round(setting.steps / LAP)) * LAP + 1


class Laps:
    """Looks at the clock where a loop asks for a batch: every LAP steps after the first `warm`."""

    def __init__(self, device: torch.device, warm: int) -> None:
        self._device, self._warm, self._times = device, warm, list[float]()

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        for number, batch in enumerate(batches):
            if number >= self._warm and (number - self._warm) % LAP == 0:
                self._times.append(_now(self._device))
            yield batch

    def rate(self, batch_size: int) -> float:
        """Images/s of the median lap."""
        return batch_size * LAP / median(b - a for a, b in pairwise(self._times))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fresh(setting: LoopSetup) -> tuple[torch.device, TrainState]:
    """This rank's device, and the net and optimizers on it."""
    from pipeline import family

    config = setting.config
    device = device_of(config.compute.device)
    if device.type == "cuda":
        device = torch.device("cuda", ranks.rank() % torch.cuda.device_count())
    training = config.training.model_copy(update={"ema_decay": None, "clip_norm": None, "label_smoothing": 0.0})
    current = state.fresh(
        family.find(config.family.name),
        config.family,
        training,
        num_classes=setting.num_classes,
        seed=1,
        device=device,
        channels_last=config.training.channels_last,
    )
    return device, current


def task_of(setting: LoopSetup, current: TrainState, device: torch.device) -> Task:
    """What `train_step` needs besides the state."""
    from pipeline import family

    config = setting.config
    forward, remarks = step.wrap(current.net, config.training, device)
    return Task(
        family=family.find(config.family.name),
        config=config.family,
        training=config.training,
        seed=1,
        num_classes=setting.num_classes,
        device=device,
        epochs_per_step=1e-6,
        forward=forward,
        remarks=remarks,
        autocast=step.use_bf16(config.training.precision, device),
        channels_last=config.training.channels_last,
    )


def _plan(setting: LoopSetup, total_steps: int) -> Plan:
    never = Duration(value=1e9, unit="steps")
    often = setting.config.logging.every
    return Plan(total_steps, 1e-6, setting.batch_size, often, never, never)


def batches(setting: LoopSetup, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The same few random batches over and over: this rank's rows of them."""
    rows = ranks.shard(setting.batch_size, ranks.rank(), ranks.world())
    generator = torch.Generator().manual_seed(1)
    side, pool = setting.config.data.side_px, []
    layout = torch.channels_last if setting.config.training.channels_last else torch.contiguous_format
    for _ in range(POOL):
        images = torch.randn(rows.stop - rows.start, 3, side, side, generator=generator)
        labels = torch.randint(setting.num_classes, (len(images),), generator=generator)
        pool.append((images.to(device).contiguous(memory_format=layout), labels.to(device)))
    while True:
        yield from pool


def micros(found: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Sequence[Micro]]:
    """Each batch as one micro-batch."""
    for images, labels in found:
        yield [Micro(images, labels, labels)]


class _Nothing:
    """Events that are heard by nobody."""

    def log(self, at: int, values: Mapping[str, float]) -> None: ...

    def evaluate(self, current: TrainState) -> None: ...

    def save(self, current: TrainState, *, wait: bool) -> None: ...

    def last_good(self) -> str | None:
        return None

    def wants_to_stop(self) -> bool:
        return False


def _under_ray(setting: LoopSetup, folder: Path) -> float:
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = device_of(setting.config.compute.device).type == "cuda"
    path = folder / "ray.json"
    TorchTrainer(
        _measure_ours,
        train_loop_config={"setting": setting, "path": str(path)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=2, use_gpu=gpu),
        run_config=RayRunConfig(name=f"bench-{time.time_ns()}", storage_path=str(folder)),
    ).fit()
    rate: float = json.loads(path.read_text())
    return rate


def _measure_ours(arguments: dict[str, Any]) -> None:
    rate = ours(arguments["setting"])
    if ranks.rank() == 0:
        Path(arguments["path"]).write_text(json.dumps(rate))


def _under_torchrun(setting: LoopSetup, folder: Path) -> float:
    order, path = folder / "setting.json", folder / "torchrun.json"
    plain = {
        "recipe": as_mapping(setting.config),
        "num_classes": setting.num_classes,
        "steps": setting.steps,
        "warm": setting.warm,
    }
    order.write_text(json.dumps(plain), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "pipeline.bench.torchrun", str(order), str(path)], capture_output=True, text=True
    )
    if done.returncode:
        raise ResourceError(f"torchrun failed: {done.stderr.strip().splitlines()[-1]}")
    rate: float = json.loads(path.read_text())
    return rate
