"""Training speed: our loop against a bare one, compiled and graphed; launches, idle share and memory of a step."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from infra.gpu.environment import wait
from infra.gpu.run import Run
from pipeline import run_config
from pipeline.bench.step import LoopSetup, bare, batches, fresh, micros, ours, plan_of
from pipeline.data.config import DataConfig
from pipeline.data.dali import TrainBatch
from pipeline.training.step import Meter, MicroBatch, micro_batches, train_step, wrap

RESNET = "baseline/imagenet_resnet50"
BATCHES, SMALL_BATCHES = (256, 32, 128), (4, 2)
GRAPHS = "training.cuda_graphs=true"
PROFILED: dict[str, tuple[str, int, tuple[str, ...]]] = {  # name: recipe, batch, keys
    "ResNet-50": (RESNET, 32, ()),
    "ResNet-50, graphs": (RESNET, 32, (GRAPHS,)),
    "AIG-110, graphs": ("convnet_aig/cifar10_110", 128, (GRAPHS,)),
    "RANet-32, graphs": ("ranet/imagenet_32", 32, (GRAPHS,)),
    "ARRN-T": ("arrn/imagenet:t", 32, ()),
    "RANet-32": ("ranet/imagenet_32", 32, ()),
    "AIG-50": ("convnet_aig/imagenet_50", 32, ()),
    "Shape Adaptor ResNet-50": ("shape_adaptor/imagenet_resnet50", 32, ()),
    "AIG-110": ("convnet_aig/cifar10_110", 128, ()),
    "ResNet-50, batch 256": (RESNET, 256, ()),
}
EAGER = "training.compile=false"
MILD = "training.optimizer.lr=0.01"  # on noise, the recipe's rate might diverge; speed does not depend on it
ANNOTATIONS = ("Optimizer.", "ProfilerStep", "DistributedDataParallel")  # spans of the host that are shown on the GPU
Step = Callable[[Sequence[MicroBatch]], object]


def setup_of(
    run: Run, recipe: str, batch: int, small: bool, *keys: str, classes: int = 1000, steps: int = 20
) -> LoopSetup:
    """A recipe's net and optimizer at this batch size, on this run's device; small: with tiny images."""
    tiny = ("data.side_px=64",) if small and "imagenet" in recipe and "ranet" not in recipe else ()
    tiny = (*tiny, "family.net=resnet18") if small and recipe == RESNET else tiny
    common = ("data.root=unused", f"training.batch_size={batch}", f"compute.device={run.device.type}")
    config = run_config.load(recipe, [*common, *tiny, *keys], data_home="unused")
    return LoopSetup(config, classes, 10 if small else steps)


def speed(run: Run) -> None:
    """ResNet-50, eager: images/s of our loop and of the loop of PyTorch's tutorials, in turns."""
    for batch in SMALL_BATCHES if run.small else BATCHES:
        run.case(f"ours over bare, batch {batch}", partial(_against_bare, run, batch))


def _against_bare(run: Run, batch: int) -> None:
    setup = setup_of(run, RESNET, batch, run.small, EAGER, MILD, steps=40 if batch < 100 else 20)
    rounds = 1 if run.small else 2
    pairs = [(ours(setup), bare(setup)) for _ in range(rounds)]
    run.row(f"ours, batch {batch}", median(mine for mine, _ in pairs), "images/s", "eager")
    run.row(f"bare, batch {batch}", median(other for _, other in pairs), "images/s", "eager")
    run.row(f"ours over bare, batch {batch}", max(mine / other for mine, other in pairs), "", _each(pairs))


def _each(pairs: Sequence[tuple[float, float]]) -> str:
    return "; ".join(f"{mine:.0f} / {other:.0f}" for mine, other in pairs)


def compiled(run: Run) -> None:
    """The same with torch.compile, and with CUDA graphs."""
    large, small = SMALL_BATCHES if run.small else (256, 32)
    with_compiler, with_graphs = ("compiled", "training.compile=true"), ("graphed", GRAPHS, EAGER)
    for batch, keys in ((large, with_compiler), (small, with_graphs), (large, with_graphs), (small, with_compiler)):
        run.case(f"{keys[0]} over eager, batch {batch}", partial(_compiled, run, batch, *keys))
    run.case("torch.compile works here", lambda: _compiles(run))


def _compiles(run: Run) -> None:
    training = setup_of(run, RESNET, 2, run.small, "training.compile=true").config.training
    _, warnings = wrap(torch.nn.Identity(), training, run.device)
    run.row("torch.compile works here", "; ".join(warnings) or "yes")


def _compiled(run: Run, batch: int, name: str, *keys: str) -> None:
    torch._dynamo.reset()
    start = time.perf_counter()
    setup = setup_of(run, RESNET, batch, run.small, MILD, *keys, steps=40 if batch < 100 else 20)
    rate = ours(setup)
    eager = ours(setup_of(run, RESNET, batch, run.small, EAGER, MILD, steps=20))
    detail = f"{time.perf_counter() - start:.0f} s with compilation"
    run.row(f"{name}, batch {batch}", rate, "images/s", detail)
    over = "over eager" if name == "compiled" else f"{name} over eager"
    run.row(f"{over}, batch {batch}", rate / eager, "", f"eager: {eager:.0f} images/s")


# --- one step, looked at closely -----------------------------------------------------------------------------------


def stepper(setup: LoopSetup) -> Callable[[], object]:
    """A function that runs one training step on images that are there."""
    device, current = fresh(setup)
    plan, meter, source = plan_of(setup, current, device), Meter(), micros(batches(setup, device))
    current.net.train()
    return lambda: train_step(plan, current, next(source), meter)


def loaded_stepper(setup: LoopSetup, data: DataConfig) -> tuple[Callable[[TrainBatch], Sequence[MicroBatch]], Step]:
    """(from a loader's batch to micro-batches, one training step on these)."""
    device, current = fresh(setup)
    plan, meter = plan_of(setup, current, device), Meter()
    current.net.train()
    return lambda batch: micro_batches(plan, data, batch, 1), lambda parts: train_step(plan, current, parts, meter)


def profiles(run: Run) -> None:
    """Each family's step: images/s, launches, the share of the time in which the GPU has nothing to do, memory."""
    run.case("ARRN-T, noise", lambda: _same_noise(run))
    for name, (recipe, batch, keys) in PROFILED.items():
        size = 2 if run.small else batch
        run.case(name, partial(_profiled, run, name, recipe, size, keys))


def _profiled(run: Run, name: str, recipe: str, batch: int, keys: tuple[str, ...]) -> None:
    setup = setup_of(run, recipe, batch, run.small, EAGER, *keys)
    step, counted = stepper(setup), 1 if run.small else 3
    if not run.small:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if run.small else 4):
        step()
    seconds = _seconds(step, 1 if run.small else 10)
    size = setup.batch_size
    run.row(f"{name}, images/s", size / seconds, "images/s", f"batch {size}, {1e3 * seconds:.1f} ms a step")
    if run.small:
        return
    run.row(f"{name}, peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    run.row(f"{name}, host", *_hosts(step))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(counted):
            step()
        wait()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if str(event.device_type).endswith("CUDA") and not event.name.startswith(ANNOTATIONS)
    )
    run.row(f"{name}, launches a step", float(round(len(spans) / counted)))
    busy_s = covered(spans) / 1e6 / counted
    run.row(f"{name}, idle share", max(0.0, 1 - busy_s / seconds), "", f"busy {1e3 * busy_s:.1f} ms a step")


def _hosts(step: Callable[[], object]) -> tuple[float, str, str]:
    """(ms of a step under cProfile, the unit, the functions that take most of it by themselves)."""
    wait()
    seen = cProfile.Profile()
    seen.runcall(lambda: [step() for _ in range(2)])
    wait()
    stats: Any = pstats.Stats(seen)
    own = sorted(((spent[2], name) for name, spent in stats.stats.items()), reverse=True)[:7]
    places = (f"{1e3 * spent / 2:.1f} {Path(file).name}:{line} {name[:60]}" for spent, (file, line, name) in own)
    return 1e3 * stats.total_tt / 2, "ms", "; ".join(places)


def _same_noise(run: Run) -> None:
    """ARRN-T with the noise of eight steps, so with eight sets of batch sizes inside it, and with the same again."""
    recipe, batch, keys = PROFILED["ARRN-T"]
    setup = setup_of(run, recipe, 2 if run.small else batch, run.small, EAGER, *keys)
    device, current = fresh(setup)
    plan, meter, source = plan_of(setup, current, device), Meter(), micros(batches(setup, device))
    current.net.train()

    def step() -> None:
        train_step(plan, current, next(source), meter)

    step()
    for words in ("first time", "again"):
        current.step = 1
        run.row(f"ARRN-T, noise of 8 steps, {words}", 1e3 * _seconds(step, 2 if run.small else 8), "ms a step")


def _seconds(step: Callable[[], object], steps: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of spans that are sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
