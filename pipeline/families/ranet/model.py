"""Resolution-adaptive nets: sub-networks from low to high resolution with exits; each reads the previous one.

Letters: B images, n of them still running, C channels, K classes, E exits, S sub-networks. Source: Yang et al., CVPR
2020 (arXiv 2003.07326), and the code released with it. Differences from that code: the pooling of the
classifiers is adaptive, so that other sides work (equal at the published sizes); the number of classes is an argument;
a resize to the same size is omitted; the tensors that the next sub-network reads are stored once, see `Features`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.blocks import bottleneck, constant, conv_bn_relu, he_fan_out, joined, take
from pipeline.errors import ConfigError
from pipeline.exits.net import ExitClassifier, ExitNet
from pipeline.families.ranet import together
from pipeline.families.ranet.config import BlockPlan, RanetConfig
from pipeline.families.ranet.growing import grow

CIFAR_CLASSIFIER = 128  # channels of a classifier's convolutions


def build(config: RanetConfig, num_classes: int) -> Ranet:
    """The net on CPU, its weights drawn from torch's default generator."""
    return Ranet(config, num_classes)


class Features:
    """The tensors x_0 .. x_L of a block, input first; `rows` are the images that they belong to, None for all.

    Each layer appends channels to its input, so every tensor is a channel prefix of the widest one of its resolution.
    Without gradients only the widest one is stored, and separately a last one of half the size. With gradients all are
    stored: autograd keeps them anyway, and the backward of a slice would fill tensors of zeros.
    """

    def __init__(self, x: Tensor, rows: Tensor | None) -> None:
        self.rows = rows
        self._widths = [x.shape[1]]
        self._held = [x]

    def append(self, x: Tensor) -> None:
        """Adds the output of the next layer."""
        self._widths.append(x.shape[1])
        if not torch.is_grad_enabled() and self._held[-1].shape[-2:] == x.shape[-2:]:
            self._held[-1] = x
        else:
            self._held.append(x)

    def grow(self, x: Tensor, layers: int) -> None:
        """Adds the outputs of several layers of one growth, of which x is the last."""
        growth = (x.shape[1] - self._widths[-1]) // layers
        self._widths += [self._widths[-1] + growth * n for n in range(1, layers + 1)]
        self._held = [x]

    def __getitem__(self, number: int) -> Tensor:
        width, last = self._widths[number], number == len(self._widths) - 1
        if last or len(self._held) == 1:
            return self._held[-1][:, :width]
        return self._held[min(number, len(self._held) - 2)][:, :width]

    @property
    def widest(self) -> Tensor:
        """The widest tensor of the first resolution, which contains all before it."""
        before, last = self._held[-2:][0], self._held[-1]
        return last if before.shape[-2:] == last.shape[-2:] else before

    @property
    def held(self) -> list[Tensor]:
        """The tensors that occupy memory."""
        return list(self._held)

    def take(self, rows: Tensor | None) -> None:
        """Keeps only the images `rows`, a rising subset of the present ones; None for all."""
        if rows is not self.rows:
            assert rows is not None
            where = rows if self.rows is None else torch.searchsorted(self.rows, rows)
            self._held = [take(tensor, where) for tensor in self._held]
            self.rows = rows


class FusedLayer(nn.Module):
    """Appends channels computed from the previous sub-network and from x: cat[x, below, own], all at own's size."""

    def __init__(self, plan: BlockPlan, number: int) -> None:
        super().__init__()
        down = plan.down and number == plan.layers - 1
        own = plan.growth - plan.from_below
        self.below = bottleneck(plan.below[number], plan.from_below, plan.bottleneck_below, 1)
        self.own = bottleneck(plan.widths[number], own, plan.bottleneck, 2 if down else 1)

    def forward(self, x: Tensor, found: Tensor) -> Tensor:
        """x [B, C, H, W] and what `below` computed from the previous sub-network -> [B, C + growth, h, w]."""
        return _fused(x, found, self.own(x))


def _fused(x: Tensor, found: Tensor, own: Tensor) -> Tensor:
    size = own.shape[-2:]
    return joined([resized(x, size), resized(found, size), own])


class NormalLayer(nn.Module):
    """Appends channels computed from x only."""

    def __init__(self, plan: BlockPlan, number: int) -> None:
        super().__init__()
        self.own = bottleneck(plan.widths[number], plan.growth, plan.bottleneck, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C + growth, H, W]."""
        return joined([x, self.own(x)])


class RanetBlock(nn.Module):
    """A chain of layers; a fused block also reads the tensors of the same block in the previous sub-network."""

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        layer = FusedLayer if plan.fused else NormalLayer
        self.layers = nn.ModuleList([layer(plan, number) for number in range(plan.layers)])
        self.down = plan.fused and plan.down
        self.merge = conv_bn_relu(plan.below[-1], plan.merged, 1) if plan.fused else None
        width = plan.widths[-1] + plan.merged
        self.transition = None if plan.reduced is None else conv_bn_relu(width, plan.reduced, 1)

    def forward(self, features: Features, below: Features | None) -> Tensor:
        """The block's output; features: those of x [B, C, H, W], to which the layers' outputs are added."""
        x = self._together(features, below) if self._runs_together(below) else self._one_by_one(features, below)
        if self.merge is not None:
            assert below is not None
            x = joined([x, resized(self.merge(below[len(self.layers)]), x.shape[-2:])])
        return x if self.transition is None else self.transition(x)

    def _runs_together(self, below: Features | None) -> bool:
        return together.trains(self) and (below is None or together.are_joinable(self._bottlenecks("below")))

    def _one_by_one(self, features: Features, below: Features | None) -> Tensor:
        x = features[0]
        for number, layer in enumerate(self.layers):
            x = layer(x) if below is None else layer(x, cast(FusedLayer, layer).below(below[number]))
            features.append(x)
        return x

    def _together(self, features: Features, below: Features | None) -> Tensor:
        """All layers of the input's size at once; then the one that halves it, if there is one."""
        x = features[0]
        found, last = None, x
        own = self._bottlenecks("own")
        if below is not None:
            found = together.joined_bottlenecks(self._bottlenecks("below"), below.widest)
            if self.down:
                each = found.shape[1] // len(own)
                found, last = torch.split(found, [found.shape[1] - each, each], dim=1)
            found = resized(found, x.shape[-2:])
        halving = own.pop() if self.down else None
        x, smaller = grow(x, found, own, halving)
        features.grow(x, len(own))
        if smaller is not None:
            x = _fused(x, last, smaller)
            features.append(x)
        return x

    def _bottlenecks(self, name: Literal["own", "below"]) -> list[nn.Sequential]:
        return [getattr(layer, name) for layer in self.layers]


class Base(nn.ModuleList):
    """The base maps of all sub-networks, computed from the full image, from the finest to the coarsest."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Coarsest first, [S] of [B, C, H, W]."""
        maps = [images]
        for layer in self:
            maps.append(layer(maps[-1]))
        return maps[:0:-1]


class Ranet(ExitNet):
    """Submodules in the released order: `subnetworks` (lists of blocks), `classifiers` (one per exit), `base`."""

    def __init__(self, config: RanetConfig, num_classes: int) -> None:
        super().__init__()
        exits = [block.outputs for blocks in config.plan for block in blocks if not block.fused]
        self.subnetworks = nn.ModuleList([nn.ModuleList(map(RanetBlock, blocks)) for blocks in config.plan])
        self.classifiers = nn.ModuleList(
            [ExitClassifier(c, CIFAR_CLASSIFIER if config.stem == "cifar" else c, num_classes) for c in exits]
        )
        self.base = Base(_base(config))
        self.config = config
        he_fan_out(self.subnetworks)
        he_fan_out(self.classifiers)  # the base keeps torch's defaults, as in the released code
        for classifier in self.classifiers:
            assert isinstance(classifier, ExitClassifier)
            nn.init.zeros_(classifier.fc.bias)

    def walk(self, images: Tensor) -> Walk:
        """Raises ConfigError for images smaller than `RanetConfig.min_side_px`."""
        return Walk(self, images)

    def ways(self) -> Sequence[Sequence[str]]:
        """The base maps count towards the first exit."""
        found, names = [], ["base"]
        for s, plans in enumerate(self.config.plan):
            for number, plan in enumerate(plans):
                names.append(f"subnetworks.{s}.{number}")
                if not plan.fused:
                    found.append(names)
                    names = []
        return found

    def facts(self, taken: Tensor) -> dict[str, Tensor]:
        """`subnetworks` [B, S], 1 for the sub-network in which an image exits."""
        owner = constant(self.config.subnetwork_of_exit, torch.long, taken.device)
        return {"subnetworks": F.one_hot(owner[taken - 1], len(self.subnetworks))}


class Walk:
    """Runs a net from exit to exit; at each exit, images that have their answer can be removed.

    `rows` [n] are the images still running, rising, None for all. What later blocks read (base maps, features of the
    previous sub-network) is reduced to these images lazily, once, when it is read, and freed when no block needs it.
    """

    def __init__(self, net: Ranet, images: Tensor) -> None:
        side, least = min(images.shape[-2:]), net.config.min_side_px
        if side < least:
            raise ConfigError(
                f"images of {images.shape[-2]}x{images.shape[-1]} px are too small: with {net.config.stem} stem and "
                f"scales up to {net.config.scales[-1]} the shorter side must be at least {least} px; use larger images "
                "or fewer scales",
                key="images",
                subject=side,
            )
        self.rows: Tensor | None = None
        self._x = images
        self._subnetworks = deque(net.subnetworks)
        self._bases = deque(Features(base, None) for base in net.base(images))
        self._blocks: deque[nn.Module] = deque()
        self._below: deque[Features] = deque()
        self._here: deque[Features] = deque()

    def to_next_exit(self) -> Tensor:
        """Runs the blocks up to the next exit; returns the input of its classifier, [n, C, h, w]."""
        if not self._blocks:
            self._next_subnetwork()
        while self._below:  # fused blocks have no exit
            self._next_block()
        self._next_block()
        return self._x

    def keep(self, places: Tensor) -> None:
        """Keeps only the images at `places` (rising) among the present ones."""
        self.rows = places if self.rows is None else self.rows[places]
        if self._blocks:
            self._x = take(self._x, places)

    def held(self) -> list[Tensor]:
        """The tensors stored for later blocks."""
        parts = (*self._bases, *self._below, *self._here)
        return [self._x, *(tensor for features in parts for tensor in features.held)]

    def _next_subnetwork(self) -> None:
        self._below, self._here = self._here, deque()
        subnetwork = self._subnetworks.popleft()
        assert isinstance(subnetwork, nn.ModuleList)
        self._blocks = deque(subnetwork)
        base = self._bases.popleft()
        base.take(self.rows)
        self._x = base[0]

    def _next_block(self) -> None:
        below = self._below.popleft() if self._below else None
        if below is not None:
            below.take(self.rows)
        features = Features(self._x, self.rows)
        self._x = self._blocks.popleft()(features, below)
        if self._subnetworks:  # nothing reads the features of the last one
            self._here.append(features)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """x at the height and width `size`, bilinear with aligned corners and no antialias, as the released code.

    Autocast computes it in fp32; the result has x's type again, as what reads it is a convolution.
    """
    if x.shape[-2:] == size:
        return x
    if x.requires_grad and size[0] < x.shape[2] and not torch.compiler.is_compiling():
        return together.reduced(x, size)
    return F.interpolate(x, list(size), mode="bilinear", align_corners=True).to(x.dtype)


def _base(config: RanetConfig) -> list[nn.Module]:
    """One layer per sub-network, finest first, with stride 2 where the scale falls."""
    widths = [config.channels * factor for factor in config.width_factors][::-1]
    scales = config.scales[::-1]
    if config.stem == "cifar":
        made = [conv_bn_relu(3, widths[0], 3)]
    else:
        convolution = nn.Conv2d(3, widths[0], 7, 2, 3)  # with a bias, alone among the convolutions
        pool = nn.MaxPool2d(3, 2, 1)
        made = [nn.Sequential(convolution, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True), pool)]
    for number in range(1, len(widths)):
        stride = 1 if scales[number] == scales[number - 1] else 2
        made.append(conv_bn_relu(widths[number - 1], widths[number], 3, stride))
    return list(made)
