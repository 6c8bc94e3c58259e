"""A training step of each family against one of a plain ResNet of the same MACs, and what either spends its time on.

Both run `train_step`: forward, loss, backward and optimizer, on random images. What a family pays above the plain net's
time per MAC is what its operations cost that hold few or no MACs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline import cost, run_config
from pipeline import family as families
from pipeline.bench.rows import chosen, interleave, on_threads
from pipeline.bench.step import LoopSetup, batches, fresh, micros, task_of
from pipeline.training.step import Meter, train_step

RECIPES: Mapping[
    str, Sequence[str]
] = {  # with all that is dropped in training switched off, so that all MACs are spent
    "convnet_aig/cifar10_small": (),
    "arrn/cifar10_small": ("family.drop=0", "family.level_weights=[]"),
    "ranet/cifar10_small": (),
    "shape_adaptor/cifar10_small": ("family.alpha_every=20",),
}
COMMON = ("data.root=unused", "training.schedule.warmup_epochs=0", "compute.device=cpu")
PLAIN = "baseline/cifar10_resnet110"  # whose depth is chosen by MACs
DEPTHS = range(8, 111, 6)
CLASSES, STEPS, PROFILED = 10, 12, 3
KINDS: Mapping[str, Sequence[str]] = {  # parts of the names of torch's operators
    "convolution": ("convolution", "conv2d", "conv_depthwise", "addmm", "aten::mm", "bmm"),
    "norm": ("batch_norm",),
    "moves": ("cat", "copy_", "pad2d", "upsample", "index", "slice", "select", "fill_", "zero_", "clone", "gather"),
}
OPTIMIZER, OTHER = "optimizer", "pointwise"


@dataclass(frozen=True)
class Step:
    """A training step: MACs of an image's forward, ms of an image, and the share of each kind of operator."""

    name: str
    depth: int | None  # of a plain net
    mmacs: float
    ms: float
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Compared:
    """quotient: the family's time per MAC over the plain net's, the median of the rounds' own."""

    family: Step
    plain: Step
    quotient: float


def training(
    recipes: Sequence[str] | None = None, *, batch_size: int = 64, rounds: int = 5, threads: int | None = None
) -> Iterator[Compared]:
    """Each recipe's net (default: a CPU-sized one of each family) against the plain one, on `threads` CPU threads."""
    with on_threads(threads):
        for name in chosen("training", recipes, RECIPES):
            yield _compared(name, batch_size, rounds)


def _compared(recipe: str, batch_size: int, rounds: int) -> Compared:
    ours = _setting(recipe, batch_size, RECIPES[recipe])
    mmacs = _macs(ours) / 1e6
    plains = {depth: _setting(PLAIN, batch_size, [f"family.depth={depth}"]) for depth in DEPTHS}
    with torch.device("meta"):  # shapes alone
        sizes = {depth: _macs(setting) / 1e6 for depth, setting in plains.items()}
    depth = min(sizes, key=lambda each: abs(sizes[each] - mmacs))
    steps = {"ours": _stepper(ours), "plain": _stepper(plains[depth])}
    found = interleave({name: partial(_seconds, step) for name, step in steps.items()}, rounds + 1)
    mine, theirs = found["ours"][1:], found["plain"][1:]  # the first round warms up
    quotient = median(a / b for a, b in zip(mine, theirs, strict=True)) * sizes[depth] / mmacs
    return Compared(
        Step(recipe, None, mmacs, 1e3 * median(mine) / batch_size, _shares(steps["ours"])),
        Step("ResNet", depth, sizes[depth], 1e3 * median(theirs) / batch_size, _shares(steps["plain"])),
        quotient,
    )


def _setting(recipe: str, batch_size: int, overrides: Sequence[str]) -> LoopSetup:
    asked = [*COMMON, f"training.batch_size={batch_size}", *overrides]
    return LoopSetup(run_config.load(recipe, asked), CLASSES, STEPS)


def _macs(setting: LoopSetup) -> int:
    config = setting.config
    net = families.find(config.family.name).build(config.family, CLASSES).eval()
    return cost.measure(net, torch.zeros(1, 3, config.data.side_px, config.data.side_px)).macs


def _stepper(setting: LoopSetup) -> Callable[[], object]:
    """Does one training step at each call."""
    device, current = fresh(setting)
    task, meter, source = task_of(setting, current, device), Meter(), micros(batches(setting, device))
    return lambda: train_step(task, current, next(source), setting.batch_size, meter)


def _seconds(step: Callable[[], object]) -> float:
    """Of one step, in the mean of STEPS, since some steps hold more than others."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - start) / STEPS


def _shares(step: Callable[[], object]) -> dict[str, float]:
    """Share of the operators' own time by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED):
            step()
    spent = dict.fromkeys((*KINDS, OPTIMIZER, OTHER), 0.0)
    for event in found.events():
        if event.name.startswith("aten::"):
            spent[_kind(event)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: value / whole for kind, value in spent.items()}


def _kind(event: Any) -> str:
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return OPTIMIZER
        parent = parent.cpu_parent
    return next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), OTHER)
