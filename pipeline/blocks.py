"""What two families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Stem = Literal["imagenet", "cifar"]


@dataclass(frozen=True)
class Logits:
    """What a net without choices returns: logits [B, K]."""

    logits: Tensor


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A bias-free convolution that keeps the size at stride 1, and its BatchNorm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def he_fan_out(net: nn.Module) -> None:
    """Every convolution drawn from N(0, 2 / (k² · C_out)), every BatchNorm2d at weight 1 and bias 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def per_image(macs: float, images: Tensor) -> Tensor:
    """The same price for each image: [B] f64."""
    return torch.full((len(images),), macs, dtype=torch.float64, device=images.device)
