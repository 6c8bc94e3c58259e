"""The keys of an MSDNet under `family:`, their rules, and the plan of its layers.

Each layer adds channels at every scale that is left, half of them from the next finer one. Of T layers and S scales,
the finest scale is dropped after every ceil(T / S) layers, and what is left is then reduced. Source: see `model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.blocks import Stem
from pipeline.config import fault
from pipeline.errors import JsonValue
from pipeline.exits.budget import Budget, each_once
from pipeline.family import FamilyConfig

MOST_LAYERS = 5000  # beyond the deepest published net by far
Count = Annotated[int, Field(ge=1, le=64)]
Channels = Annotated[int, Field(ge=1, le=4096)]


class MsdnetConfig(FamilyConfig):
    """The defaults are the net for CIFAR under a budget.

    Refused because a part of the net would be computed for nothing, or not fit: layers whose last one still has a finer
    scale, and scales whose channels cannot be halved.
    """

    name: Literal["msdnet"] = "msdnet"
    stem: Stem = "cifar"  # imagenet: reduces the side by 4, and classifiers are as wide as their input

    exits: Count = 5  # each follows a block of layers
    first_layers: Count = 1  # layers of the first block
    layers: Count = 1  # layers of each other block; see `depth`
    depth: Literal["even", "growing"] = "growing"  # even: as many as `layers`; growing: block b has b x layers + 1
    channels: Channels = 16  # channels of the finest scale at the start, times its width factor
    growth: Annotated[int, Field(ge=2, le=4096)] = 6  # channels that a layer adds to a scale, times its width factor
    width_factors: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] = (1, 2, 4)  # of each scale, [S]
    bottlenecks: tuple[Count, ...] | None = None  # inner width of a layer over its outputs; null: the width factors
    reduction: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of the channels that is left where a scale is dropped
    exit_distillation: Annotated[float, Field(ge=0, le=1000)] = 0.0  # weight of what exits learn from the last one
    exit_temperature: Annotated[float, Field(gt=0, le=1000)] = 3.0  # of both answers in exit_distillation
    budgets: tuple[Budget, ...] = ()  # one policy each; above 1: MACs per image, else a share

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        return {"exit_temperature": "exit_distillation is 0"} if values["exit_distillation"] == 0 else {}

    @model_validator(mode="after")
    def _rules(self) -> MsdnetConfig:
        factors, total = self.width_factors, sum(self.block_layers)
        if len(self.inner_factors) != len(factors):
            raise ValueError(
                f"bottlenecks has {len(self.inner_factors)} entries, width_factors has {len(factors)}: one for each "
                "scale"
            )
        for factor in factors[1:]:
            if self.growth * factor % 2:
                raise ValueError(
                    f"growth (={self.growth}) x width factor {factor} is odd: half of the channels come from the next "
                    "finer scale"
                )
        if total > MOST_LAYERS:
            raise ValueError(f"exits and layers give {total:,} layers; at most {MOST_LAYERS:,}")
        if (total - 1) // ceil(total / len(factors)) < len(factors) - 1:
            raise ValueError(
                f"{total} layers for {len(factors)} scales: the last layer would still compute finer scales, which "
                f"nothing reads; change exits, first_layers or layers so that they give e.g. "
                f"{ceil(total / len(factors)) * len(factors)} layers"
            )
        if any(layer.reduced == 0 for layers in self.plan for layer in layers):
            raise ValueError(f"reduction (={self.reduction:g}) leaves a scale without a channel")
        if self.exit_distillation and self.exits == 1:
            raise fault("exit_distillation", "the net has one exit, so there is none that could learn from it")
        each_once(self.budgets)
        return self

    @property
    def inner_factors(self) -> tuple[int, ...]:
        """The inner width of a layer over its outputs, by scale, [S]."""
        return self.width_factors if self.bottlenecks is None else self.bottlenecks

    @property
    def block_layers(self) -> tuple[int, ...]:
        """The layers of each block, [E]."""
        others = (self.layers if self.depth == "even" else self.layers * b + 1 for b in range(1, self.exits))
        return (self.first_layers, *others)

    @property
    def plan(self) -> tuple[tuple[LayerPlan, ...], ...]:
        """The layers of each block, [E] of [L]."""
        made, numbers = iter(_layers(self)), self.block_layers
        return tuple(tuple(next(made) for _ in range(number)) for number in numbers)


@dataclass(frozen=True)
class LayerPlan:
    """One layer; scales are counted from 0, the finest. All widths are multiplied by a scale's width factor.

    width: the channels before it. first_in, first: the finest scale that it reads, and that it leaves. reduced: the
    channels after the reduction that follows it, if one does.
    """

    width: int
    first_in: int
    first: int
    reduced: int | None

    def reads_finer(self, scale: int) -> bool:
        """Whether it reads the next finer scale, too."""
        return scale > self.first_in


def _layers(config: MsdnetConfig) -> Iterator[LayerPlan]:
    total, scales, width = sum(config.block_layers), len(config.width_factors), config.channels
    interval = ceil(total / scales)
    for number in range(1, total + 1):
        first_in, first = max(0, number - 2) // interval, (number - 1) // interval
        after = width + config.growth
        reduced = int(config.reduction * after) if first > first_in else None
        yield LayerPlan(width, first_in, first, reduced)
        width = after if reduced is None else reduced
