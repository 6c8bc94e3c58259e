"""The networks that carry adaptors: VGG-16, ResNet-50 and MobileNetV2, in torchvision's layout and with its names.

A body maps images and `Cells` to logits and does not depend on the alphas: the same body is used by the net that
learns its shape, by the frozen net, and on the meta device to count MACs. Letters: B images, K classes, C channels,
H×W pixels, N adaptors.
Source: Liu et al., ECCV 2020 (arXiv 2008.00892) for the places of adaptors and what they replace; Simonyan & Zisserman,
ICLR 2015; He et al., CVPR 2016; Sandler et al., CVPR 2018. Differences from the released code: a map that is one
pixel high or wide is not halved further in that direction (there the pooling fails); the layout for small images is
chosen by the same rule in every net (there one net follows two rules at exactly 64 px).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.blocks import conv_bn, he_fan_out
from pipeline.families.shape_adaptor.shape import Size

Kind = Literal["resnet50", "mobilenet_v2", "vgg16", "vgg16_bn"]
Mode = Literal["human", "sa", "autosc", "autotl"]
RESNET_STAGES = (3, 4, 6, 3)
VGG_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_POOLED = (1, 3, 6, 9, 12)  # convolutions followed by a pooling; the last only in the layout for large images
MOBILENET = (  # inverted residuals: expansion, channels, stride
    *[(1, 16, 1)],
    *[(6, 24, 2), (6, 24, 1)],
    *[(6, 32, 2), (6, 32, 1), (6, 32, 1)],
    *[(6, 64, 2), (6, 64, 1), (6, 64, 1), (6, 64, 1)],
    *[(6, 96, 1), (6, 96, 1), (6, 96, 1)],
    *[(6, 160, 2), (6, 160, 1), (6, 160, 1)],
    *[(6, 320, 1)],
)


@dataclass(frozen=True)
class Cells:
    """What adaptors need in a forward: sizes [N] as plain numbers, weights [N, 2] of the smaller and larger branch."""

    sizes: tuple[Size, ...]
    weights: Tensor


@dataclass(frozen=True)
class BodyLayout:
    """What a body is built from; `places` are the numbers of the layers with an adaptor (`model.places`)."""

    kind: Kind
    mode: Mode
    small: bool  # the layout for images up to 64 px
    places: tuple[int, ...]
    width: float
    ceil_pool: bool
    keep_residual: bool

    @property
    def strided(self) -> bool:
        """Whether the fixed layers shrink the maps as in the human-designed net."""
        return self.mode in ("human", "autosc")


@dataclass
class Route:
    """Records the adaptors and the fixed strides between them while a body is built in the order of its forward."""

    ceil_pool: bool
    fixed: list[float] = field(default_factory=list)
    residual: list[bool] = field(default_factory=list)
    pending: float = 1.0

    def shrink(self, stride: int) -> int:
        """Notes a fixed layer of this stride; returns the stride."""
        self.pending /= stride
        return stride

    def pooled(self) -> PooledAdaptor:
        """The next adaptor, between a map and its max pooling."""
        return PooledAdaptor(self._next(residual=False), self.ceil_pool)

    def joining(self) -> Adaptor:
        """The next adaptor, between a shortcut and its residual."""
        return Adaptor(self._next(residual=True))

    def _next(self, *, residual: bool) -> int:
        self.fixed.append(self.pending)
        self.residual.append(residual)
        self.pending = 1.0
        return len(self.fixed) - 1


Body: TypeAlias = "Vgg16 | ResNet50 | MobileNetV2"


def build_body(layout: BodyLayout, num_classes: int) -> tuple[Body, Route]:
    """The body with its initial weights, and the places of its adaptors."""
    route = Route(layout.ceil_pool)
    if layout.kind == "resnet50":
        return ResNet50(layout, num_classes, route), route
    if layout.kind == "mobilenet_v2":
        return MobileNetV2(layout, num_classes, route), route
    return Vgg16(layout, num_classes, route), route


def resized(x: Tensor, size: Size) -> Tensor:
    """x [B, C, h, w] -> [B, C, *size], bilinear with aligned corners; x itself if it has this size."""
    if (x.shape[2], x.shape[3]) == size:
        return x
    if x.is_meta:  # only the shape is needed; torch would evaluate the whole formula in Python
        return x.new_empty(*x.shape[:2], *size)
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def halved(x: Tensor, ceil: bool) -> Tensor:
    """2x2 max pooling; a side of one pixel is not halved."""
    kernel = (min(2, x.shape[2]), min(2, x.shape[3]))
    return F.max_pool2d(x, kernel, ceil_mode=ceil)


class Adaptor(nn.Module):
    """The learned resizing: both branches resized to this adaptor's size, weighted and summed."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, smaller: Tensor, larger: Tensor, cells: Cells) -> Tensor:
        """smaller [B, C, ~H/2, ~W/2], larger [B, C, H, W] -> [B, C, *size]."""
        size, (small, large) = cells.sizes[self.number], cells.weights[self.number].unbind()
        if torch.is_grad_enabled():
            return small * resized(smaller, size) + large * resized(larger, size)
        return resized(small * smaller, size).addcmul_(resized(larger, size), large)  # the same value in fewer passes


class PooledAdaptor(nn.Module):
    """An adaptor whose branches are x and its 2x2 max pooling."""

    def __init__(self, number: int, ceil: bool) -> None:
        super().__init__()
        self.adaptor, self.ceil = Adaptor(number), ceil

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        """x [B, C, H, W] -> [B, C, *size]."""
        y: Tensor = self.adaptor(halved(x, self.ceil), x, cells)
        return y


def rounded(channels: float) -> int:
    """Rounds to a multiple of 8, at least 8 and at least 90 % of `channels`. Source: MobileNetV2's released code."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class Vgg16(nn.Module):
    """13 3x3 convolutions with ReLU, global average pooling, one linear layer. The last convolution has no adaptor."""

    def __init__(self, layout: BodyLayout, num_classes: int, route: Route) -> None:
        super().__init__()
        pooled = VGG_POOLED[:4] if layout.small else VGG_POOLED
        self.pools = frozenset(pooled if layout.strided else ())
        self.ceil = layout.ceil_pool
        self.convs, self.adaptors, inputs = nn.ModuleList(), nn.ModuleDict(), 3
        for number, width in enumerate(VGG_WIDTHS):
            outputs = rounded(width * layout.width)
            norm = [nn.BatchNorm2d(outputs)] if layout.kind == "vgg16_bn" else []
            self.convs.append(nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU(inplace=True)))
            if number in layout.places:
                self.adaptors[str(number)] = route.pooled()
            if number in self.pools:
                route.shrink(2)
            inputs = outputs
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.bias is not None
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers in the order of their numbers, which `places` refers to."""
        return list(self.convs)

    def forward(self, images: Tensor, cells: Cells) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        x = images
        for number, conv in enumerate(self.convs):
            x = conv(x)
            if str(number) in self.adaptors:
                x = self.adaptors[str(number)](x, cells)
            if number in self.pools:
                x = halved(x, self.ceil)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with BatchNorm, and a shortcut; if there is an adaptor, the shortcut is its smaller branch."""

    def __init__(self, inputs: int, width: int, stride: int, shortcut: int | None, adaptor: Adaptor | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, width, 1)
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride)
        self.conv3, self.bn3 = conv_bn(width, 4 * width, 1)
        self.downsample = None if shortcut is None else nn.Sequential(*conv_bn(inputs, 4 * width, 1, shortcut))
        self.adaptor = adaptor

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        """x [B, C, H, W] -> [B, 4 * width, h, w]."""
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        y = shortcut + residual if self.adaptor is None else self.adaptor(shortcut, residual, cells)
        return F.relu(y, inplace=True)


class ResNet50(nn.Module):
    """Stem, 16 bottlenecks in `layer1` to `layer4`, global average pooling, `fc`. Place 0 is the stem, then the blocks.

    The shortcut of a block with an adaptor is a 1x1 convolution with stride 2, even where the human-designed net has an
    identity there, so this net can have more weights than the human-designed one. In mode "autotl" both the stride of
    the stem's convolution and its pooling become adaptors.
    """

    def __init__(self, layout: BodyLayout, num_classes: int, route: Route) -> None:
        super().__init__()
        inputs, large = rounded(64 * layout.width), not layout.small
        stride = route.shrink(2) if large and layout.strided else 1
        self.conv1, self.bn1 = conv_bn(3, inputs, 7 if large else 3, stride)
        count = layout.places.count(0)  # two in the stem of "autotl"
        self.stem = nn.ModuleList(route.pooled() for _ in range(count))
        self.maxpool = nn.MaxPool2d(3, route.shrink(2), 1) if large and layout.strided else nn.Identity()
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.ModuleList() for _ in RESNET_STAGES)
        place = 0
        for stage, (layer, blocks) in enumerate(zip(self._layers(), RESNET_STAGES, strict=True)):
            width = rounded(64 * 2**stage * layout.width)
            for number in range(blocks):
                place += 1
                layer.append(_bottleneck(layout, route, inputs, width, place, stride=2 if stage and not number else 1))
                inputs = 4 * width
        self.fc = nn.Linear(inputs, num_classes)
        he_fan_out(self)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers in the order of their numbers, which `places` refers to."""
        return [self.conv1, *(block for layer in self._layers() for block in layer)]

    def _layers(self) -> tuple[nn.ModuleList, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, images: Tensor, cells: Cells) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        for adaptor in self.stem:
            x = adaptor(x, cells)
        x = self.maxpool(x)
        for layer in self._layers():
            for block in layer:
                x = block(x, cells)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def _bottleneck(layout: BodyLayout, route: Route, inputs: int, width: int, place: int, stride: int) -> Bottleneck:
    """Block number `place`, whose stride in the human-designed net is `stride`."""
    if place in layout.places:
        return Bottleneck(inputs, width, 1, 2, route.joining())
    kept = route.shrink(stride) if layout.strided else 1
    widens = inputs != 4 * width
    return Bottleneck(inputs, width, kept, kept if widens else None, None)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, 1x1 projection; `conv` has torchvision's name."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, residual: bool) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_conv_bn_relu6(inputs, hidden, 1)] if expansion != 1 else []
        depthwise = _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, *conv_bn(hidden, outputs, 1))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', h, w]."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residuals, a last 1x1 convolution, global average pooling, one linear layer without dropout.

    Place 0 is the stem, then the inverted residuals. One with an adaptor does not add its input, unless
    `keep_residual` is set.
    """

    def __init__(self, layout: BodyLayout, num_classes: int, route: Route) -> None:
        super().__init__()
        strides = mobilenet_strides(layout.small)
        inputs, last = rounded(32 * layout.width), rounded(1280 * max(1.0, layout.width))
        self.features, self.adaptors = nn.ModuleList(), nn.ModuleDict()
        for place, stride in enumerate(strides):
            kept = route.shrink(stride) if layout.strided else 1
            if place == 0:
                self.features.append(_conv_bn_relu6(3, inputs, 3, kept))
            else:
                expansion, channels, _ = MOBILENET[place - 1]
                outputs = rounded(channels * layout.width)
                adds = kept == 1 and inputs == outputs
                adds = adds and (place not in layout.places or layout.keep_residual)
                self.features.append(InvertedResidual(inputs, outputs, kept, expansion, adds))
                inputs = outputs
            if place in layout.places:
                self.adaptors[str(place)] = route.pooled()
        self.features.append(_conv_bn_relu6(inputs, last, 1))
        self.classifier = nn.Linear(last, num_classes)
        he_fan_out(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers in the order of their numbers, which `places` refers to, and the last convolution."""
        return list(self.features)

    def forward(self, images: Tensor, cells: Cells) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        x = images
        for place, feature in enumerate(self.features):
            x = feature(x)
            if str(place) in self.adaptors:
                x = self.adaptors[str(place)](x, cells)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def mobilenet_strides(small: bool) -> tuple[int, ...]:
    """Strides of the stem and the 17 inverted residuals; the first two of 2 are 1 in the layout for small images."""
    strides = [2, *(stride for _, _, stride in MOBILENET)]
    if small:
        strides[0] = strides[2] = 1
    return tuple(strides)
