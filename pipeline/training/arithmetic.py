"""Chooses what a recipe leaves open: fp32 or bf16, and whether the net is compiled.

The choices are timed on the run's own device: the forward pass of random images, the loss and the backward pass. Short
runs are not timed: they compute in fp32 on a CPU, in bf16 on a GPU that has it, and uncompiled.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor, nn

from pipeline import cost, ranks
from pipeline.errors import JsonValue
from pipeline.family import AnyFamily, FamilyConfig, cross_entropy
from pipeline.training.config import TrainingConfig
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import use_bf16

FASTER = 0.9  # a choice is taken if its time is at most this share of a simpler one's
TIMED_MACS = 2e10  # of a timed pass; the backward pass counts as two forward passes
WARM, TIMED = 3, 7  # passes of each choice
WORTH_TIMING = 2e13  # MACs of one worker from which bf16 is timed on a CPU: about 5 minutes of 70 GMAC/s
# MACs of one worker, for each of the net's layers, from which a compiled net is timed. Compiling takes about half a
# second a layer, which is to be at most a twentieth of the run at a CPU's 70 GMAC/s or, assumed, a GPU's 20 TMAC/s.
WORTH_COMPILING: Mapping[str, float] = {"cpu": 7e11, "cuda": 2e14}


@dataclass(frozen=True)
class Arithmetic:
    """How a net computes: under bf16 autocast or not, compiled or not."""

    bf16: bool
    compiled: bool

    @property
    def name(self) -> str:
        """For people, e.g. "bf16, compiled"."""
        return ("bf16" if self.bf16 else "fp32") + ", compiled" * self.compiled


@dataclass(frozen=True)
class Chosen:
    """A choice with the seconds that each choice took; seconds is empty where nothing was timed.

    failed: the choices that do not work here, each with the reason.
    """

    arithmetic: Arithmetic
    seconds: Mapping[Arithmetic, float] = field(default_factory=dict)
    failed: Mapping[Arithmetic, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What was timed and chosen, as a sentence for people."""
        timed = "; ".join(f"{each.name} {1000 * seconds:.0f} ms" for each, seconds in self.seconds.items())
        failed = "; ".join(f"{each.name} does not work here ({why})" for each, why in self.failed.items())
        return f"the net computes in {self.arithmetic.name}: timed " + "; ".join(filter(None, (timed, failed)))


@dataclass(frozen=True)
class Timed:
    """What is timed: a net, its family, and images [b, 3, S, S] with targets [b], all on the device."""

    family: AnyFamily
    config: FamilyConfig
    net: nn.Module
    images: Tensor
    targets: Tensor

    @property
    def device(self) -> torch.device:
        return self.images.device

    def started(self) -> Timed:
        """The same with a copy of the net that has seen the images once, as its first forward may be collective."""
        net = deepcopy(self.net).train()
        with torch.no_grad():
            net(self.images)
        return replace(self, net=net)

    def pass_of(self, choice: Arithmetic) -> Callable[[], None]:
        """A forward and a backward pass of a copy of the net."""
        net: nn.Module = deepcopy(self.net).train()
        if choice.compiled:
            net = torch.compile(net)  # type: ignore[assignment]

        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=choice.bf16):
                output = net(self.images)
            loss = self.family.loss(self.config, output, self.targets, cross_entropy).total
            torch.autograd.backward(loss)
            net.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return run


@dataclass(frozen=True)
class Length:
    """How long a run is. macs: of one image's forward pass. images: of one worker, over the whole training.

    rows: images of one worker in memory at once. layers: the net's modules without parts.
    """

    macs: int
    images: float
    rows: int
    layers: int

    @property
    def work(self) -> float:
        """The MACs of one worker."""
        return 3 * self.macs * self.images

    @property
    def timed_rows(self) -> int:
        """The images of a timed pass, two at least."""
        return max(2, min(self.rows, int(TIMED_MACS / (3 * self.macs))))


def length_of(net: nn.Module, image: Tensor, *, images: float, rows: int) -> Length:
    """The length of a run of this net on images like `image` [1, 3, S, S]; the net is not changed."""
    layers = sum(not any(module.children()) for module in net.modules())
    return Length(cost.measure(deepcopy(net), image).macs, images, rows, layers)


def choose(training: TrainingConfig, length: Length, timed: Timed, *, fixed_sizes: bool) -> Chosen:
    """How a new run computes: of what all ranks can do, as rank 0 has timed it. Collective.

    timed: the net of the run, with `length.timed_rows` images.

    fixed_sizes: all steps have maps of the same sizes, without which each new size would be compiled.
    """
    possible = ranks.gather(_choices(training, length, timed.device, fixed_sizes=fixed_sizes))
    choices = [each for each in possible[0] if all(each in of_rank for of_rank in possible)] or [possible[0][0]]
    if len(choices) == 1:
        return Chosen(choices[0])
    seconds, failed = _time(choices, timed)
    return ranks.agree(Chosen(_fastest(seconds), seconds, failed))


def of_checkpoint(training: TrainingConfig, saved: Mapping[str, JsonValue], device: torch.device) -> Arithmetic:
    """How a resumed run computes: as before. saved: the section `training` of the checkpoint's recipe."""
    precision = training.precision if training.precision != "auto" else str(saved.get("precision", "auto"))
    compiled = saved.get("compile") is True if training.compile == "auto" else training.compile
    return Arithmetic(use_bf16(precision, device), compiled)


def settled(training: TrainingConfig, chosen: Arithmetic, device: torch.device) -> TrainingConfig:
    """The settings with what was chosen; a precision that means the same stays as it is."""
    same = use_bf16(training.precision, device) == chosen.bf16
    precision = training.precision if same else "bf16"
    return training.model_copy(update={"precision": precision, "compile": chosen.compiled})


def _choices(
    training: TrainingConfig, length: Length, device: torch.device, *, fixed_sizes: bool
) -> Sequence[Arithmetic]:
    """All that the recipe leaves open and that this device can do, from the simplest."""
    precisions, compiled = [use_bf16(training.precision, device)], [training.compile is True]
    if training.precision == "auto" and computes_bf16(device) and length.work >= WORTH_TIMING:
        precisions.append(True)
    long_enough = length.work >= WORTH_COMPILING[device.type] * length.layers
    possible = training.compile == "auto" and fixed_sizes and not training.cuda_graphs
    if possible and long_enough and why_uncompiled(device) is None:
        compiled.append(True)
    return [Arithmetic(bf16, each) for each, bf16 in product(compiled, precisions)]


def computes_bf16(device: torch.device) -> bool:
    """Whether this device is a CPU with instructions for products of bf16."""
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _time(choices: Sequence[Arithmetic], timed: Timed) -> tuple[dict[Arithmetic, float], dict[Arithmetic, str]]:
    """The least seconds of a pass of each choice, in turn, since other programs only add; and why a choice fails.

    Errors of the first choice are raised.
    """
    if timed.device.type == "cpu":
        keep_freed_memory()
    timed = timed.started()
    passes, failed = {choices[0]: timed.pass_of(choices[0])}, dict[Arithmetic, str]()
    _warm_up(passes[choices[0]])
    for choice in choices[1:]:
        try:
            passes[choice] = timed.pass_of(choice)
            _warm_up(passes[choice])
        except Exception as error:  # torch's back ends raise errors of any class
            del passes[choice]
            failed[choice] = _first_line(error)
    laps = [{choice: _seconds(each) for choice, each in passes.items()} for _ in range(TIMED)]
    torch.compiler.reset()
    return {choice: min(lap[choice] for lap in laps) for choice in passes}, failed


def _warm_up(once: Callable[[], None]) -> None:
    for _ in range(WARM):
        once()


def _seconds(once: Callable[[], None]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def _fastest(seconds: Mapping[Arithmetic, float]) -> Arithmetic:
    """The choice that each simpler one is clearly slower than."""
    best, *others = seconds
    for choice in others:
        if seconds[choice] <= FASTER * seconds[best]:
            best = choice
    return best


def why_uncompiled(device: torch.device) -> str | None:
    """Why torch.compile does not work here, found out by compiling a small function; None if it works."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return "no C++ compiler (g++ or clang++) here"
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no CUDA
    try:
        torch.compile(_probe)(torch.ones(4, device=device))
    except Exception as error:  # torch's back ends raise errors of any class
        return f"it does not work here ({_first_line(error)})"
    return None


def _probe(x: Tensor) -> Tensor:
    return (x * 2 + 1).sin()


def _first_line(error: Exception) -> str:
    """The class and the first line of an error of torch's, of at most 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
