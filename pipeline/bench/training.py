"""A training step of each family against that of a plain ResNet of the same MACs, and where each spends its time.

Both run `train_step`: forward, loss, backward and optimizer, on random images. The excess of a family's time per MAC
over the plain net's is the cost of its operations with few or no MACs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from pipeline import cost, run_config
from pipeline import family as families
from pipeline.bench.rows import chosen, interleave, on_threads
from pipeline.bench.step import LoopSetup, batches, fresh, micros, plan_of
from pipeline.training.step import Meter, train_step

RECIPES: Mapping[str, Sequence[str]] = {  # dropping of parts in training is switched off, so that all MACs are computed
    "convnet_aig/cifar10_small": (),
    "arrn/cifar10_small": ("family.drop=0", "family.level_weights=[]"),
    "ranet/cifar10_small": (),
    "shape_adaptor/cifar10_small": ("family.alpha_every=20",),
}
COMMON = ("data.root=unused", "training.schedule.warmup_epochs=0", "compute.device=cpu")
PLAIN = "baseline/cifar10_resnet110"  # its depth is chosen by MACs
DEPTHS = range(8, 111, 6)
CLASSES, STEPS, PROFILED = 10, 12, 3
KINDS: Mapping[str, Sequence[str]] = {  # parts of the names of torch's operators
    "convolution": ("convolution", "conv2d", "conv_depthwise", "addmm", "aten::mm", "bmm"),
    "norm": ("batch_norm",),
    "moves": ("cat", "copy_", "pad2d", "upsample", "index", "slice", "select", "fill_", "zero_", "clone", "gather"),
}
OPTIMIZER, OTHER = "optimizer", "pointwise"


@dataclass(frozen=True)
class StepTiming:
    """A measured training step: forward MACs per image, ms per image, and each kind of operator's share of the time."""

    name: str
    depth: int | None  # set for a plain net only
    mmacs: float
    ms: float
    shares: Mapping[str, float]


@dataclass(frozen=True)
class StepComparison:
    """`quotient` is the family's time per MAC over the plain net's, the median over the rounds."""

    family: StepTiming
    plain: StepTiming
    quotient: float


def training(
    recipes: Sequence[str] | None = None, *, batch_size: int = 64, rounds: int = 5, threads: int | None = None
) -> Iterator[StepComparison]:
    """Compares each recipe's net (default: a small one of each family) with the plain net on `threads` CPU threads."""
    with on_threads(threads):
        for name in chosen("training", recipes, RECIPES):
            yield _compared(name, batch_size, rounds)


def _compared(recipe: str, batch_size: int, rounds: int) -> StepComparison:
    ours = _setup(recipe, batch_size, RECIPES[recipe])
    mmacs = _macs(ours) / 1e6
    plains = {depth: _setup(PLAIN, batch_size, [f"family.depth={depth}"]) for depth in DEPTHS}
    with torch.device("meta"):  # shapes only
        sizes = {depth: _macs(setup) / 1e6 for depth, setup in plains.items()}
    depth = min(sizes, key=lambda each: abs(sizes[each] - mmacs))
    steps = {"ours": _stepper(ours), "plain": _stepper(plains[depth])}
    seconds = interleave({name: partial(_seconds, step) for name, step in steps.items()}, rounds + 1)
    mine, theirs = seconds["ours"][1:], seconds["plain"][1:]  # the first round warms up
    quotient = median(a / b for a, b in zip(mine, theirs, strict=True)) * sizes[depth] / mmacs
    return StepComparison(
        StepTiming(recipe, None, mmacs, 1e3 * median(mine) / batch_size, _shares(steps["ours"])),
        StepTiming("ResNet", depth, sizes[depth], 1e3 * median(theirs) / batch_size, _shares(steps["plain"])),
        quotient,
    )


def _setup(recipe: str, batch_size: int, overrides: Sequence[str]) -> LoopSetup:
    keys = [*COMMON, f"training.batch_size={batch_size}", *overrides]
    return LoopSetup(run_config.load(recipe, keys), CLASSES, STEPS)


def _macs(setup: LoopSetup) -> int:
    config = setup.config
    net = families.find(config.family.name).build(config.family, CLASSES).eval()
    return cost.measure(net, torch.zeros(1, 3, config.data.side_px, config.data.side_px)).macs


def _stepper(setup: LoopSetup) -> Callable[[], object]:
    """A function that runs one training step."""
    device, current = fresh(setup)
    plan, meter, source = plan_of(setup, current, device), Meter(), micros(batches(setup, device))
    return lambda: train_step(plan, current, next(source), meter)


def _seconds(step: Callable[[], object]) -> float:
    """Seconds per step, the mean of STEPS, since some steps do more than others."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - start) / STEPS


def _shares(step: Callable[[], object]) -> dict[str, float]:
    """Each kind of operator's share of the operators' own CPU time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED):
            step()
    times = dict.fromkeys((*KINDS, OPTIMIZER, OTHER), 0.0)
    for event in profiled.events():
        if event.name.startswith("aten::"):
            times[_kind(event)] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: value / total for kind, value in times.items()}


def _kind(event: FunctionEvent) -> str:
    parent: FunctionEvent | None = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return OPTIMIZER
        parent = parent.cpu_parent
    return next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), OTHER)
