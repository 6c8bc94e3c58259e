"""MSDNet: features at several scales at once, and exits at the coarsest one; the net that RANet is compared with.

Letters: B images, n of them still running, C channels, E exits, K classes, S scales.
Source: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018 (arXiv
1703.09844), and its PyTorch version, from which RANet's code comes. Written anew. Differences from that version: the
convolutions are drawn as in the paper's own code and the biases of the heads are 0, where PyTorch's defaults stay
there; the pooling of the classifiers is adaptive, so that other sides work (equal at the published ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pipeline.blocks import bottleneck, conv_bn_relu, he_fan_out, joined, take
from pipeline.exits.net import ExitClassifier, ExitNet
from pipeline.families.msdnet.config import LayerPlan, MsdnetConfig

CIFAR_CLASSIFIER = 128  # channels of a classifier's convolutions


def build(config: MsdnetConfig, num_classes: int) -> Msdnet:
    """The net on CPU, its weights drawn from torch's default generator."""
    return Msdnet(config, num_classes)


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

    def __init__(self, config: MsdnetConfig) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in config.width_factors]
        if config.stem == "cifar":
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

    def __init__(self, config: MsdnetConfig, num_classes: int) -> None:
        super().__init__()
        self.first = FirstScales(config)
        self.blocks = nn.ModuleList([MsdnetBlock(config, plans) for plans in config.plan])
        coarsest = config.width_factors[-1]
        widths = []
        for plans in config.plan:
            last = plans[-1]
            width = last.width + config.growth if last.reduced is None else last.reduced
            widths.append(width * coarsest)
        self.classifiers = nn.ModuleList(
            [
                ExitClassifier(width, CIFAR_CLASSIFIER if config.stem == "cifar" else width, num_classes)
                for width in widths
            ]
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
