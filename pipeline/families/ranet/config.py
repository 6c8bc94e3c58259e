"""The keys of a resolution-adaptive net under `family:`, their rules, and the plan of its blocks.

A net has S sub-networks, which run from the lowest resolution to the highest; each is a chain of blocks. The first
blocks of a sub-network are fused with those of the previous one; each of the others, the normal blocks, ends in an
exit. There are K exits in total. Source: Yang et al., CVPR 2020 (arXiv 2003.07326), and the code released with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.blocks import Stem
from pipeline.config import fault
from pipeline.errors import JsonValue
from pipeline.exits.budget import Budget, each_once
from pipeline.family import FamilyConfig

Count = Annotated[int, Field(ge=1, le=64)]
Channels = Annotated[int, Field(ge=1, le=4096)]
STEM_STRIDE = {"cifar": 1, "imagenet": 4}
MIN_COARSEST_PX = 2
MOST_LAYERS = 5000  # beyond the deepest published net by far


class RanetConfig(FamilyConfig):
    """The defaults are the paper's small net for CIFAR with a budget.

    Some values are refused because the released code fails for them or builds another net: scales that do not start
    with a single 1 or do not rise by 0 or 1, lists of unequal length, a fused block with one layer, and a fused layer
    without a channel from the previous sub-network.
    """

    name: Literal["ranet"] = "ranet"
    stem: Stem = "cifar"  # imagenet: reduces the side by 4, and classifiers are as wide as their input
    scales: tuple[Count, ...] = (1, 2, 3)  # scales of the base maps; each doubles the side of the previous one
    width_factors: tuple[Count, ...] = (4, 2, 1)  # per sub-network, of `channels` and of `growth`
    bottlenecks: tuple[Count, ...] | None = None  # inner width of a layer over its outputs; null: the width factors
    first_blocks: Count = 2  # blocks of sub-network 1
    more_blocks: Count = 2  # additional blocks of each sub-network over the previous one
    layers: Count = 2  # layers of a block; see `depth`
    depth: Literal["even", "growing"] = "growing"  # even: every block has `layers`; growing: block b has b times that
    channels: Channels = 16  # channels of the finest base map, times its width factor
    growth: Channels = 6  # channels that a layer adds, times its width factor
    from_below: Annotated[float, Field(gt=0, lt=1)] = 0.25  # share of a fused layer's channels from the previous one
    reduction: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of the channels that a transition keeps
    exit_distillation: Annotated[float, Field(ge=0, le=1000)] = 0.0  # weight of what exits learn from the last one
    exit_temperature: Annotated[float, Field(gt=0, le=1000)] = 3.0  # of both answers in exit_distillation
    budgets: tuple[Budget, ...] = ()  # one policy each; above 1: MACs per image, else a share

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        scales = values["scales"]
        inert = {"exit_temperature": "exit_distillation is 0"} if values["exit_distillation"] == 0 else {}
        if not isinstance(scales, list | tuple) or len(scales) != 1:
            return inert
        keys = ("more_blocks", "from_below", "reduction")
        why = "with one scale the net has one sub-network, without fused blocks or transitions"
        return inert | dict.fromkeys(keys, why)

    @model_validator(mode="after")
    def _rules(self) -> RanetConfig:
        lengths = {"width_factors": self.width_factors, "bottlenecks": self.inner_factors}
        for name, factors in lengths.items():
            if len(factors) != len(self.scales):
                raise ValueError(
                    f"{name} has {len(factors)} entries, scales has {len(self.scales)}: one for each sub-network"
                )
        if not self.scales:
            raise ValueError("scales: a net has at least one sub-network, e.g. [1, 2, 3]")
        steps = [b - a for a, b in zip(self.scales, self.scales[1:], strict=False)]
        if self.scales[0] != 1 or any(step not in (0, 1) for step in steps) or self.scales.count(1) > 1:
            raise ValueError(
                f"scales (={list(self.scales)}) must start with a single 1 and rise by 0 or 1, e.g. [1, 2, 3, 3]"
            )
        if len(self.scales) > 1 and self.layers < 2:
            raise ValueError(f"layers (={self.layers}): fused blocks have at least 2")
        for factor in self.width_factors[1:]:
            if floor(self.growth * factor * self.from_below) < 1:
                raise ValueError(
                    f"growth (={self.growth}) x width factor {factor} x from_below (={self.from_below:g}) is below 1: "
                    "a fused layer takes at least one channel from the previous sub-network"
                )
        if self._num_layers > MOST_LAYERS:
            raise ValueError(
                f"first_blocks, more_blocks and layers give {self._num_layers:,} layers; at most {MOST_LAYERS:,}"
            )
        for blocks in self.plan:
            for number, block in enumerate(blocks, 1):
                if block.outputs < 1:
                    raise ValueError(f"reduction (={self.reduction:g}) leaves block {number} without a channel")
        if self.exit_distillation and self.num_exits == 1:
            raise fault("exit_distillation", "the net has one exit, so there is none that could learn from it")
        each_once(self.budgets)
        return self

    @property
    def _num_layers(self) -> int:
        blocks = (count * (count + 1) // 2 if self.depth == "growing" else count for count in self.num_blocks)
        return self.layers * sum(blocks)

    @property
    def inner_factors(self) -> tuple[int, ...]:
        """The inner width of a layer over its outputs, per sub-network, [S]."""
        return self.width_factors if self.bottlenecks is None else self.bottlenecks

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """N_s, the blocks of each sub-network, [S]."""
        return tuple(self.first_blocks + self.more_blocks * s for s in range(len(self.scales)))

    @property
    def num_exits(self) -> int:
        """K."""
        return self.num_blocks[-1]

    @property
    def subnetwork_of_exit(self) -> tuple[int, ...]:
        """The sub-network, counted from 0, of each exit, [K]."""
        return tuple(s for s, blocks in enumerate(self.plan) for block in blocks if not block.fused)

    @property
    def min_side_px(self) -> int:
        """The shortest side of an image whose lowest resolution has a side of MIN_COARSEST_PX."""
        stride: int = STEM_STRIDE[self.stem] * 2 ** (self.scales[-1] - 1)
        return stride * (MIN_COARSEST_PX - 1) + 1

    @property
    def plan(self) -> tuple[tuple[BlockPlan, ...], ...]:
        """The blocks of each sub-network, [S][N_s]."""
        made: list[tuple[BlockPlan, ...]] = []
        for s in range(len(self.scales)):
            made.append(_subnetwork(self, s, made[-1] if made else ()))
        return tuple(made)


@dataclass(frozen=True)
class BlockPlan:
    """One block: `layers` layers, each of which adds `growth` channels to `inputs`.

    A fused block also reads the tensors of the block with the same number in the previous sub-network, which have
    `below` channels. Of a layer's channels, `from_below` are computed from them; `merged` channels are computed from
    the last of them at the end of the block.
    """

    inputs: int
    layers: int
    growth: int
    bottleneck: int
    bottleneck_below: int  # bottleneck of the convolutions on the previous sub-network
    below: tuple[int, ...]  # channels of its tensors, [layers + 1]; empty in a normal block
    from_below: int
    merged: int
    down: bool  # the last layer halves the side
    reduced: int | None  # channels after the transition, if there is one

    @property
    def fused(self) -> bool:
        """Whether the block reads the previous sub-network."""
        return bool(self.below)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before the first layer and after each, [layers + 1]."""
        return tuple(self.inputs + number * self.growth for number in range(self.layers + 1))

    @property
    def outputs(self) -> int:
        """Channels of the block's output."""
        return self.widths[-1] + self.merged if self.reduced is None else self.reduced


def _subnetwork(config: RanetConfig, s: int, before: tuple[BlockPlan, ...]) -> tuple[BlockPlan, ...]:
    """The blocks of sub-network s, counted from 0; `before` are the blocks of the previous one.

    If scales repeat, transitions and halvings do not coincide, as in the published nets.
    """
    scale, factor, total = config.scales[s], config.width_factors[s], config.num_blocks[s]
    halving = config.num_blocks[s - scale + 1 : s]  # the last scale-1 of the borders N_1 .. N_{s-1}
    transitions = [j * total // scale for j in range(1, scale)]
    growth, inputs = config.growth * factor, config.channels * factor
    made: list[BlockPlan] = []
    for number in range(1, total + 1):
        below = before[number - 1].widths if number <= len(before) else ()
        layers = config.layers * (number if config.depth == "growing" else 1)
        widest = inputs + layers * growth
        merged = floor(widest * config.from_below) if below else 0
        block = BlockPlan(
            inputs=inputs,
            layers=layers,
            growth=growth,
            bottleneck=config.inner_factors[s],
            bottleneck_below=config.inner_factors[s - 1] if below else 0,
            below=below,
            from_below=floor(growth * config.from_below) if below else 0,
            merged=merged,
            down=bool(below) and number in halving,
            reduced=floor(config.reduction * (widest + merged)) if number in transitions else None,
        )
        made.append(block)
        inputs = block.outputs
    return tuple(made)
