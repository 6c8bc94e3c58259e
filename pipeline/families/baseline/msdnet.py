"""MSDNet: features at several scales at once, and exits at the coarsest one; the net that RANet is compared with.

Letters: B images, n of them still running, C channels, E exits, K classes, S scales.
Source: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018 (arXiv
1703.09844), with the settings of its PyTorch version, which RANet's code goes back to: each layer adds channels at
every scale, half of them from the next finer one; the finest scale is dropped after every S-th part of the layers, and
what is left is then reduced. Written anew. Difference: the pooling of the classifiers is adaptive, so that other sides
work (equal at 32 px with three scales).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.blocks import Stem, bottleneck, conv_bn_relu, he_fan_out, joined, take
from pipeline.config import Config
from pipeline.exits.budget import Budget, each_once
from pipeline.exits.net import ExitClassifier, ExitNet

Count = Annotated[int, Field(ge=1, le=64)]
Channels = Annotated[int, Field(ge=1, le=4096)]
CIFAR_CLASSIFIER = 128  # channels of a classifier's convolutions


class MsdnetConfig(Config):
    """The keys of an MSDNet. The defaults are the net for CIFAR under a budget."""

    exits: Count = 5  # each follows a block of layers
    first_layers: Count = 1  # layers of the first block
    layers: Count = 1  # layers of each other block; see `depth`
    depth: Literal["even", "growing"] = "growing"  # even: as many as `layers`; growing: block b has b x layers + 1
    channels: Channels = 16  # channels of the finest scale at the start, times its width factor
    growth: Annotated[int, Field(ge=2, le=4096)] = 6  # channels that a layer adds to a scale, times its width factor
    width_factors: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] = (1, 2, 4)  # of each scale, [S]
    bottlenecks: tuple[Count, ...] | None = None  # inner width of a layer over its outputs; null: the width factors
    reduction: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of the channels that is left where a scale is dropped
    budgets: tuple[Budget, ...] = ()  # one policy each; above 1: MACs per image, else a share

    @model_validator(mode="after")
    def _rules(self) -> MsdnetConfig:
        if len(self.inner_factors) != len(self.width_factors):
            raise ValueError(
                f"bottlenecks has {len(self.inner_factors)} entries, width_factors has {len(self.width_factors)}: one "
                "for each scale"
            )
        if sum(self.block_layers) < len(self.width_factors):
            raise ValueError(
                f"{sum(self.block_layers)} layers for {len(self.width_factors)} scales: each scale needs one; add "
                "exits or layers"
            )
        if any(layer.reduced == 0 for layers in self.plan for layer in layers):
            raise ValueError(f"reduction (={self.reduction:g}) leaves a scale without a channel")
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


def build(config: MsdnetConfig, stem: Stem, num_classes: int) -> Msdnet:
    """The net on CPU, its weights drawn from torch's default generator."""
    return Msdnet(config, stem, num_classes)


class MultiScaleLayer(nn.Module):
    """Adds channels at every scale, from the scale itself and by a strided convolution from the next finer one."""

    def __init__(self, config: MsdnetConfig, plan: LayerPlan) -> None:
        super().__init__()
        self.plan = plan
        factors, inner = config.width_factors, config.inner_factors
        self.own, self.finer = nn.ModuleList(), nn.ModuleList()
        for scale in range(plan.first, len(factors)):
            added = config.growth * factors[scale]
            if plan.reads_finer(scale):
                added //= 2
                width = plan.width * factors[scale - 1]
                self.finer.append(bottleneck(width, added, inner[scale - 1], 2))
            self.own.append(bottleneck(plan.width * factors[scale], added, inner[scale], 1))
        self.reduce = nn.ModuleList()
        if plan.reduced is not None:
            for factor in factors[plan.first :]:
                width = (plan.width + config.growth) * factor
                self.reduce.append(conv_bn_relu(width, plan.reduced * factor, 1))

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """The scales from `first_in` on, [B, C, H, W] each -> those from `first` on."""
        dropped = self.plan.first - self.plan.first_in
        found, without = [], len(self.own) - len(self.finer)  # the finest has no finer one, unless one is dropped
        for place, own in enumerate(self.own):
            here = x[place + dropped]
            parts = [here, own(here)]
            if place >= without:
                parts.insert(1, self.finer[place - without](x[place + dropped - 1]))
            found.append(joined(parts))
        return [layer(each) for layer, each in zip(self.reduce, found, strict=True)] if len(self.reduce) else found


class FirstScales(nn.Module):
    """The maps of all scales of an image: the finest, and each other one from the one before."""

    def __init__(self, config: MsdnetConfig, stem: Stem) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in config.width_factors]
        if stem == "cifar":
            finest = conv_bn_relu(3, widths[0], 3)
        else:
            finest = nn.Sequential(*conv_bn_relu(3, widths[0], 7, 2), nn.MaxPool2d(3, 2, 1))
        coarser = (conv_bn_relu(before, after, 3, 2) for before, after in pairwise(widths))
        self.scales = nn.ModuleList([finest, *coarser])

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] -> [S] of [B, C, h, w], the finest first."""
        found = [images]
        for scale in self.scales:
            found.append(scale(found[-1]))
        return found[1:]


class MsdnetBlock(nn.Module):
    """The layers before an exit."""

    def __init__(self, config: MsdnetConfig, plans: Sequence[LayerPlan]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MultiScaleLayer(config, plan) for plan in plans])

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """The scales that are left before -> those that are left after, [B, C, H, W] each."""
        for layer in self.layers:
            x = layer(x)
        return x


class Msdnet(ExitNet):
    """`first`, `blocks` (one per exit) and `classifiers` (one per exit, which read the coarsest scale)."""

    def __init__(self, config: MsdnetConfig, stem: Stem, num_classes: int) -> None:
        super().__init__()
        self.first = FirstScales(config, stem)
        self.blocks = nn.ModuleList([MsdnetBlock(config, plans) for plans in config.plan])
        coarsest = config.width_factors[-1]
        widths = []
        for plans in config.plan:
            last = plans[-1]
            width = last.width + config.growth if last.reduced is None else last.reduced
            widths.append(width * coarsest)
        self.classifiers = nn.ModuleList(
            [ExitClassifier(width, CIFAR_CLASSIFIER if stem == "cifar" else width, num_classes) for width in widths]
        )
        he_fan_out(self)
        for classifier in self.classifiers:
            assert isinstance(classifier, ExitClassifier)
            nn.init.zeros_(classifier.fc.bias)

    def walk(self, images: Tensor) -> MsdnetWalk:
        return MsdnetWalk(self, images)

    def ways(self) -> Sequence[Sequence[str]]:
        """The maps of all scales count towards the first exit."""
        return [["first", "blocks.0"], *([f"blocks.{number}"] for number in range(1, len(self.blocks)))]


class MsdnetWalk:
    """Runs a net from exit to exit; `rows` [n] are the images still running, rising, None for all."""

    def __init__(self, net: Msdnet, images: Tensor) -> None:
        self.rows: Tensor | None = None
        self._blocks = iter(net.blocks)
        self._x: list[Tensor] = net.first(images)

    def to_next_exit(self) -> Tensor:
        """Runs the next block; returns the coarsest scale, [n, C, h, w]."""
        self._x = next(self._blocks)(self._x)
        return self._x[-1]

    def keep(self, places: Tensor) -> None:
        """Keeps only the images at `places` (rising) among the present ones."""
        self.rows = places if self.rows is None else self.rows[places]
        self._x = [take(each, places) for each in self._x]
