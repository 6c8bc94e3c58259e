"""What a claim costs: MACs of training, and hours on this machine from a measured step of each arm.

A training takes 3 · MACs of a forward pass · images of an epoch · epochs: the backward pass counts as two forward ones.
Evaluations and saves are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import torch

from pipeline import family as families
from pipeline.bench import plan as plans
from pipeline.data.index import open_splits
from pipeline.execution.launch import absolute
from pipeline.run_config import RunConfig
from pipeline.training import arithmetic
from pipeline.training.arithmetic import Length
from pipeline.training.loop import device_of
from pipeline.training.plan import use_bf16

MOST_ROWS = 64  # most images of a measured step
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ArmCost:
    """One arm: MACs of an image's forward pass, images that a run trains on, and images/s of a step here.

    runs: those that are not finished. precision: of the faster one of the measured steps.
    """

    macs: float
    images: float
    runs: int
    images_per_s: float
    precision: str

    @property
    def gmacs(self) -> float:
        """Of one run, in 1e9 MACs."""
        return 3 * self.macs * self.images / 1e9

    @property
    def hours(self) -> float:
        """Of one run."""
        return self.images / self.images_per_s / 3600


def of_arm(config: RunConfig, runs: int) -> ArmCost:
    """The cost of an arm of which `runs` runs are left.

    Measures a training step in fp32, and in bf16 where the run would time that too, without compiling the net. Raises
    DataError or ConfigError if the images cannot be read.
    """
    splits = open_splits(absolute(config).data, config.seed)
    num_classes, images = len(splits.train.classes), config.training.epochs * len(splits.train)
    net = families.find(config.family.name).build(config.family, num_classes)
    rows = config.training.batch_size
    sides = config.data.side_choices or (config.data.side_px,)
    lengths = [arithmetic.length_of(net, torch.zeros(1, 3, side, side), images=images, rows=rows) for side in sides]
    length = replace(lengths[0], macs=round(fmean(each.macs for each in lengths)))
    rates = {
        precision: plans.measure(
            _in(config, precision), num_classes, min(MOST_ROWS, length.timed_rows), train=None
        ).images_per_s
        or 0.0
        for precision in _precisions(config, length)
    }
    best = max(rates, key=lambda precision: rates[precision])
    return ArmCost(length.macs, images, runs, rates[best], best)


def _precisions(config: RunConfig, length: Length) -> list[Precision]:
    """The precisions in which the run may compute."""
    given, device = config.training.precision, device_of(config.compute.device)
    first: Precision = "bf16" if use_bf16(given, device) else "fp32"
    both = given == "auto" and length.work >= arithmetic.WORTH_TIMING and arithmetic.computes_bf16(device)
    return [first, "bf16"] if both and first == "fp32" else [first]


def _in(config: RunConfig, precision: Precision) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})
