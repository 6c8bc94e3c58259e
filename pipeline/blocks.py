"""Building blocks that several families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

Stem = Literal["imagenet", "cifar"]


@dataclass(frozen=True)
class Logits:
    """The output of a net that makes no choices: logits [B, K]."""

    logits: Tensor


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias that preserves the size at stride 1, and its BatchNorm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """`conv_bn` and a ReLU in place."""
    return nn.Sequential(*conv_bn(inputs, outputs, kernel, stride), nn.ReLU(inplace=True))


def bottleneck(inputs: int, outputs: int, factor: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution to at most `factor` times the outputs, and a 3x3 one, each with BatchNorm and ReLU."""
    inner = min(inputs, factor * outputs)
    return nn.Sequential(*conv_bn_relu(inputs, inner, 1), *conv_bn_relu(inner, outputs, 3, stride))


def he_fan_out(net: nn.Module) -> None:
    """Draws every convolution from N(0, 2 / (k² · C_out)); sets every BatchNorm2d to weight 1 and bias 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def per_image(macs: float, images: Tensor) -> Tensor:
    """The same MACs for each of the images [B, ...]: [B] f64."""
    return torch.full((len(images),), macs, dtype=torch.float64, device=images.device)


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on the device, [n], cached: each copy to a GPU makes the host wait."""
    with torch.inference_mode(False):  # it may be used in a later training step
        return torch.tensor(values, dtype=dtype, device=device)


def dropped(features: Tensor, noise: Tensor, rate: float) -> Tensor:
    """Features [B, F] of which those with noise [B, F] below `rate` are 0, and the others are divided by 1 - rate."""
    return features if rate == 0 else features * ((noise >= rate) / (1 - rate)).to(features.dtype)


def is_channels_last(x: Tensor) -> bool:
    """Whether the memory format of x [B, C, H, W] is channels_last and not also contiguous."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts [B, c, H, W] side by side along the channels, in the memory format of the first.

    The format of a part of one channel is ambiguous; torch takes it for contiguous, and then the whole is.
    """
    if not is_channels_last(parts[0]) or all(map(is_channels_last, parts)):  # torch keeps what all have
        return torch.cat(list(parts), dim=1)
    rows = (part.permute(0, 2, 3, 1) for part in parts)
    return torch.cat(list(rows), dim=3).permute(0, 3, 1, 2)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """The images `rows` [n] of x [B, C, H, W].

    On a GPU they keep x's memory format. On a CPU torch's own selection loses channels_last: runs of earlier versions
    resume to the same bits.
    """
    if not x.is_cuda:
        return x[rows]
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x [B, C, H, W] with the images `rows` [n] overwritten by `values` [n, C, H, W]."""
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_copy_(0, rows, values.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x.index_copy_(0, rows, values)
