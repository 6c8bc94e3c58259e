"""Training images/s of our loop against a bare PyTorch loop, and of Ray Train against torchrun, two workers each.

Both sides of a pair train the same net on the same tensors, in one run, interleaved.
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
from typing import TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import ranks
from pipeline.bench.rows import BenchRow, compare, interleave
from pipeline.config import as_mapping
from pipeline.errors import ResourceError
from pipeline.execution import cluster
from pipeline.installation import module
from pipeline.run_config import ComputeConfig, RunConfig
from pipeline.training import state, step
from pipeline.training.loop import device_of, train
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import TrainingPlan, use_bf16
from pipeline.training.state import TrainState
from pipeline.training.step import MicroBatch

WARM = 3  # steps that are not timed
WARM_WORKERS = 150  # with workers: Ray's own actors start during the first steps and compete for the cores
LAP = 10  # steps between two readings of the clock; the rate is the median lap's, since other loads come in bursts
POOL = 4  # batches held in memory
T = TypeVar("T")
OURS, BARE, RAY, TORCHRUN = "our loop", "bare loop", "our loop, Ray Train x2", "bare DDP loop, torchrun x2"


@dataclass(frozen=True)
class LoopSetup:
    """What both sides train: a recipe's net on random images [b, 3, S, S], b of them for each worker."""

    config: RunConfig
    num_classes: int
    steps: int
    warm: int = WARM  # untimed steps before them

    @property
    def batch_size(self) -> int:
        """The global batch size, over all workers."""
        return self.config.training.batch_size


def loops(config: RunConfig, *, num_classes: int = 10, steps: int = 60, rounds: int = 5) -> list[BenchRow]:
    """Compares our loop with the bare one, in this process."""
    setup = LoopSetup(config, num_classes, steps)
    rates = interleave({OURS: lambda: ours(setup), BARE: lambda: bare(setup)}, rounds)
    return compare(rates, OURS)


def workers(config: RunConfig, *, num_classes: int = 10, steps: int = 60, rounds: int = 5) -> list[BenchRow]:
    """Compares our loop in two workers of Ray Train with a bare DDP loop in two processes of torchrun."""
    setup = LoopSetup(config, num_classes, steps, WARM_WORKERS)
    with TemporaryDirectory(prefix="adaptnet-bench-") as folder, cluster.cluster(_compute(config)):
        runs = {
            RAY: lambda: _under_ray(setup, Path(folder)),
            TORCHRUN: lambda: _under_torchrun(setup, Path(folder)),
        }
        rates = interleave(runs, rounds)
    return compare(rates, RAY)


def _compute(config: RunConfig) -> ComputeConfig:
    return config.compute.model_copy(update={"workers": 2})


def ours(setup: LoopSetup) -> float:
    """Images/s of `training.loop.train` over all ranks, timed on this one. Collective."""
    device, current = fresh(setup)
    laps = Laps(device, setup.warm)
    train(plan_of(setup, current, device), current, laps.over(micros(batches(setup, device))), _Nothing())
    return laps.rate(setup.batch_size)


def bare(setup: LoopSetup) -> float:
    """Images/s of the loop of PyTorch's tutorials, with DDP if there are ranks; it retains freed memory as ours does.

    Collective.
    """
    keep_freed_memory()
    device, current = fresh(setup)
    net: nn.Module = current.net
    if ranks.world() > 1:
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(current.net.parameters(), lr=0.01, momentum=0.9)
    amp, laps = use_bf16(setup.config.training.precision, device), Laps(device, setup.warm)
    for _, (images, labels) in zip(range(_total(setup)), laps.over(batches(setup, device)), strict=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = net(images).logits
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
    return laps.rate(setup.batch_size)


def _total(setup: LoopSetup) -> int:
    """The steps of a turn: whole laps, and one more step, at whose start the last lap ends."""
    return setup.warm + max(1, round(setup.steps / LAP)) * LAP + 1


class Laps:
    """Reads the clock when a loop requests a batch: every LAP steps after the first `warm`."""

    def __init__(self, device: torch.device, warm: int) -> None:
        self._device, self._warm, self._times = device, warm, list[float]()

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        """Passes `batches` on and times them."""
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


def fresh(setup: LoopSetup) -> tuple[torch.device, TrainState]:
    """This rank's device, and a new state (net and optimizers) on it."""
    from pipeline import family

    config = setup.config
    device = device_of(config.compute.device)
    if device.type == "cuda":
        device = torch.device("cuda", ranks.rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    training = config.training.model_copy(update={"ema_decay": None, "clip_norm": None, "label_smoothing": 0.0})
    current = state.fresh(
        family.find(config.family.name),
        config.family,
        training,
        num_classes=setup.num_classes,
        seed=1,
        device=device,
        channels_last=config.training.channels_last,
    )
    return device, current


def plan_of(setup: LoopSetup, current: TrainState, device: torch.device) -> TrainingPlan:
    """The plan of `train` and `train_step`, without evaluations and saves."""
    from pipeline import family

    config = setup.config
    forward, _ = step.wrap(current.net, config.training, device)
    return TrainingPlan(
        family=family.find(config.family.name),
        config=config.family,
        training=config.training,
        seed=1,
        num_classes=setup.num_classes,
        device=device,
        forward=forward,
        batch_size=setup.batch_size,
        epochs_per_step=1e-6,
        total_steps=_total(setup),
        log_every=config.logging.every,
    )


def batches(setup: LoopSetup, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows of POOL random global batches, repeated endlessly: images [b, 3, S, S], labels [b]."""
    rows = ranks.shard(setup.batch_size, ranks.rank(), ranks.world())
    generator = torch.Generator().manual_seed(1)
    side, pool = setup.config.data.side_px, []
    layout = torch.channels_last if setup.config.training.channels_last else torch.contiguous_format
    for _ in range(POOL):
        images = torch.randn(rows.stop - rows.start, 3, side, side, generator=generator)
        labels = torch.randint(setup.num_classes, (len(images),), generator=generator)
        pool.append((images.to(device).contiguous(memory_format=layout), labels.to(device)))
    while True:
        yield from pool


def micros(source: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Sequence[MicroBatch]]:
    """Each batch as one micro-batch."""
    for images, labels in source:
        yield [MicroBatch(images, labels, labels)]


class _Nothing:
    """Events that do nothing."""

    def log(self, at: int, values: Mapping[str, float]) -> None: ...

    def evaluate(self, current: TrainState) -> None: ...

    def save(self, current: TrainState, *, wait: bool) -> None: ...

    def last_good(self) -> str | None:
        return None

    def wants_to_stop(self) -> bool:
        return False


def _under_ray(setup: LoopSetup, folder: Path) -> float:
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = device_of(setup.config.compute.device).type == "cuda"
    path = folder / "ray.json"
    TorchTrainer(
        _measure_ours,
        train_loop_config={"setup": setup, "path": str(path)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=2, use_gpu=gpu),
        run_config=RayRunConfig(name=f"bench-{time.time_ns()}", storage_path=str(folder)),
    ).fit()
    rate: float = json.loads(path.read_text())
    return rate


class _OursArguments(TypedDict):
    setup: LoopSetup
    path: str


def _measure_ours(arguments: _OursArguments) -> None:
    rate = ours(arguments["setup"])
    if ranks.rank() == 0:
        Path(arguments["path"]).write_text(json.dumps(rate))


def _under_torchrun(setup: LoopSetup, folder: Path) -> float:
    setup_file, path = folder / "setup.json", folder / "torchrun.json"
    plain = {
        "recipe": as_mapping(setup.config),
        "num_classes": setup.num_classes,
        "steps": setup.steps,
        "warm": setup.warm,
    }
    setup_file.write_text(json.dumps(plain), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", module("pipeline.bench.torchrun"), str(setup_file), str(path)], capture_output=True, text=True
    )
    if done.returncode:
        raise ResourceError(f"torchrun failed: {done.stderr.strip().splitlines()[-1]}", key="torchrun")
    rate: float = json.loads(path.read_text())
    return rate
