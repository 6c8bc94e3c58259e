"""The keys of the fixed nets, and ResNet-110 and Pre-ResNet-110 for CIFAR.

Letters: B images, K classes, H×W pixels, L residual blocks.
Source: He et al., CVPR 2016 and ECCV 2016 (CIFAR ResNets, projection-free option A is replaced by option B, as in
ConvNet-AIG's released backbone); Huang et al., ECCV 2016 (stochastic depth with the linear decay law).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.blocks import Logits, Stem, conv_bn, dropped, he_fan_out
from pipeline.config import each_once, meant
from pipeline.errors import ConfigError, JsonValue
from pipeline.families.baseline import foreign
from pipeline.family import FamilyConfig

TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "googlenet",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_v2_s",
    "efficientnet_v2_m",
    "efficientnet_v2_l",
    "vgg16",
    "vgg16_bn",
)
OF_OURS = ("stem", "depth", "stochastic_depth", "drop_path", "dropout")  # keys that foreign nets do not have
RESNETS = ("resnet", "wide_resnet")
MIN_SIDE_PX = {
    "googlenet": 15,
    "densenet121": 29,
    "vgg16": 32,
    "vgg16_bn": 32,
    "speedrun": 16,
}  # smaller: an empty map; others: 8


class BaselineConfig(FamilyConfig):
    """`net` is one of TORCHVISION, or cifar_resnet or cifar_preresnet of depth 6n+2, or speedrun, or a foreign net.

    `torchvision:NAME` is any net of torchvision's that classifies images, `timm:NAME` any of timm's (the extra `timm`);
    `foreign` says how they are built.

    The default `batchnorm_momentum` of MobileNetV3 is 0.01: its running statistics need about 500 steps until the net
    in eval mode agrees with the net in training mode. Use 0.1 for runs of a few hundred steps.
    """

    name: Literal["baseline"] = "baseline"
    net: str = "resnet50"
    stem: Stem = "imagenet"  # cifar: a 3x3 convolution with stride 1 and no pooling
    depth: Annotated[int, Field(ge=8, le=2000)] = 110  # depth of the CIFAR ResNets
    stochastic_depth: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # probability that the last block is dropped; CIFAR ResNets only
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # probability that the last block is dropped for an image, which falls linearly towards the first; ResNets
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the pooled features that the head does not see
    batchnorm_momentum: Annotated[float, Field(gt=0, le=1)] | None = None  # null: the net's default; see the docstring
    resolutions_px: Annotated[
        tuple[Annotated[int, Field(ge=8, le=8192)], ...], meant(each_once)
    ] = ()  # also evaluated at these, natively and down-and-up
    multi_crop: bool = False  # a policy that averages the answers to six views of an image

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        net = values["net"]
        if foreign.is_foreign(str(net)):
            return dict.fromkeys(OF_OURS, f"{net} is built as its library builds it")
        if str(net).startswith("cifar"):
            return {"stem": f"{net} has a stem of its own", "drop_path": f"stochastic_depth drops the blocks of {net}"}
        of_cifar = dict.fromkeys(("depth", "stochastic_depth"), f"it is for the CIFAR ResNets, not for {net}")
        if not str(net).startswith(RESNETS):
            of_cifar |= dict.fromkeys(
                ("drop_path", "dropout"), f"it is for ResNets; {net} regularises as its authors do"
            )
        if net == "speedrun":
            of_cifar["stem"] = "speedrun has a stem of its own"
        return of_cifar | ({"batchnorm_momentum": "vgg16 has no BatchNorm"} if net == "vgg16" else {})

    @model_validator(mode="after")
    def _rules(self) -> BaselineConfig:
        known = (*TORCHVISION, "cifar_resnet", "cifar_preresnet", "speedrun", "torchvision:NAME", "timm:NAME")
        if foreign.is_foreign(self.net):
            reason = foreign.why_unknown(self.net)
            if reason:
                raise ValueError(f"net (={self.net}): {reason}")
            return self
        if self.net not in known[:-2]:
            raise ValueError(f"net (={self.net}): no such net; known: {', '.join(known)}")
        if self.net.startswith("cifar") and (self.depth - 2) % 6:
            raise ValueError(f"depth (={self.depth}) of a CIFAR ResNet must be 6n+2, e.g. 20, 56, 110")
        least = MIN_SIDE_PX.get(self.net, 8)
        if any(side < least for side in self.resolutions_px):
            raise ValueError(f"resolutions_px (={list(self.resolutions_px)}): {self.net} needs at least {least} px")
        if self.stem == "cifar" and not self.net.startswith(("resnet", "wide_resnet", "cifar", "mobilenet")):
            raise ValueError(f"stem: cifar is for ResNets and MobileNets, not for {self.net}")
        return self


def build(config: BaselineConfig, num_classes: int) -> nn.Module:
    """The net on CPU, its weights drawn from torch's default generator as its authors do.

    Raises ConfigError if timm has no such net, or the net has no BatchNorm for `batchnorm_momentum`; ResourceError if
    timm is not installed.
    """
    net = _build(config, num_classes)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    if config.batchnorm_momentum is not None and not norms:
        key = "family.batchnorm_momentum"
        raise ConfigError(f"{key}: {config.net} has no BatchNorm; omit it", key=key, subject=config.net)
    for module in norms:
        module.momentum = module.momentum if config.batchnorm_momentum is None else config.batchnorm_momentum
    return net


def _build(config: BaselineConfig, num_classes: int) -> nn.Module:
    if foreign.is_foreign(config.net):
        return foreign.build(config.net, num_classes)
    if config.net.startswith("cifar"):
        return CifarResNet(config, num_classes)
    if config.net == "speedrun":
        from pipeline.families.baseline import speedrun  # it imports torch's compiler, which takes as long as torch

        return speedrun.SpeedrunNet(num_classes)
    from pipeline.families.baseline import plain  # torchvision takes as long to import as torch

    return plain.build(config, num_classes)


class CifarResNet(nn.Module):
    """3 stages of n basic blocks with widths 16, 32, 64; `pre` puts BatchNorm and ReLU before each convolution."""

    def __init__(self, config: BaselineConfig, num_classes: int) -> None:
        super().__init__()
        pre, stochastic_depth, self.dropout = config.net == "cifar_preresnet", config.stochastic_depth, config.dropout
        blocks, inputs = (config.depth - 2) // 6, 16
        self.stem = nn.Sequential(*(conv_bn(3, 16, 3)[:1] if pre else [*conv_bn(3, 16, 3), nn.ReLU()]))
        kind = PreBlock if pre else BasicBlock
        layers = []
        for stage, width in enumerate((16, 32, 64)):
            for number in range(blocks):
                layers.append(kind(inputs, width, 2 if stage and number == 0 else 1))
                inputs = width
        self.layers = nn.ModuleList(layers)
        self.tail = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()) if pre else nn.Identity()
        self.fc = nn.Linear(64, num_classes)
        rates = torch.linspace(0, 1, len(layers) + 1)[1:] * stochastic_depth
        self.register_buffer("survival", 1 - rates, persistent=False)  # [L], linear decay law
        self.stochastic = stochastic_depth > 0
        he_fan_out(self)

    def draw_noise(self, num_images: int) -> Tensor | None:
        """Uniform numbers [B, L], with dropout [B, L + F] for the F features; None if nothing is dropped.

        A block is dropped for an image whose number is not below the block's survival.
        """
        if not self.stochastic and not self.dropout:
            return None
        columns = len(self.layers) + (self.fc.in_features if self.dropout else 0)
        return torch.rand(num_images, columns, device=self.fc.weight.device)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Logits:
        """images [B, 3, H, W] -> logits [B, K]; noise as from `draw_noise`."""
        survival = self.get_buffer("survival")
        if noise is None and self.training:
            noise = self.draw_noise(len(images))
        x = self.stem(images)  # [B, 16, H, W]
        for number, layer in enumerate(self.layers):
            scale = survival[number] if noise is None else (noise[:, number] < survival[number]).to(x.dtype)
            x = layer(x, scale.view(-1, 1, 1, 1) if self.stochastic else None)
        x = self.tail(x).mean(dim=(2, 3))  # [B, 64]
        return Logits(self.fc(x if noise is None else dropped(x, noise[:, len(self.layers) :], self.dropout)))


class BasicBlock(nn.Module):
    """ReLU(shortcut(x) + scale · residual(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *conv_bn(outputs, outputs, 3))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """x [B, C, H, W]; scale [B, 1, 1, 1] or [1, 1, 1, 1], None for 1."""
        residual = self.residual(x)
        return torch.relu(self.shortcut(x) + (residual if scale is None else scale * residual))


class PreBlock(nn.Module):
    """shortcut(a) + scale · residual(a) with a = ReLU(BN(x)); an identity shortcut passes x itself."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        head = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        tail = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.residual = nn.Sequential(head, nn.BatchNorm2d(outputs), nn.ReLU(), tail)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """x [B, C, H, W]; scale [B, 1, 1, 1] or [1, 1, 1, 1], None for 1."""
        a = self.first(x)
        residual = self.residual(a)
        shortcut = x if self.shortcut is None else self.shortcut(a)
        total: Tensor = shortcut + (residual if scale is None else scale * residual)
        return total
