"""The layers inside a Laplacian residual and of the final stage: Fused-MBConv and MBConv, as in EfficientNetV2.

A residual's layers must turn a constant image into a constant one, or skipping is not exact: convolutions repeat the
border instead of padding with zeros, and only BatchNorm normalises. Letters: B images, C channels, e expansion.
Source: Tan & Le, ICML 2021 (arXiv 2104.00298) for the blocks; arXiv 2412.06195 for the property.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = re.compile(r"([FM])([1-9]\d*)x([1-9]\d*)")  # kind, expansion, depth
Border = Literal["replicate", "zeros"]


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm, whose training statistics are of the first `counted` rows alone.

    The other rows are normalised by the running statistics. SyncBatchNorm counts all rows: each of its ranks must
    have some, or the others' statistics would wait for ever.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, border: Border, groups: int = 1) -> None:
        super().__init__()
        mode = border if kernel > 1 else "zeros"
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False, padding_mode=mode
        )
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, counted: int) -> Tensor:
        x = self.conv(x)
        if not self.training or counted == len(x) or isinstance(self.norm, nn.SyncBatchNorm):
            whole: Tensor = self.norm(x)
            return whole
        bn = self.norm
        rest = F.batch_norm(x[counted:], bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return torch.cat([bn(x[:counted]), rest]) if counted else rest


class Fused(nn.Module):
    """Fused-MBConv: a 3x3 convolution that expands and a 1x1 one back; expansion 1 is the 3x3 convolution alone."""

    def __init__(self, channels: int, expansion: int, border: Border, skip: bool) -> None:
        super().__init__()
        self.expand = ConvNorm(channels, expansion * channels, 3, border)
        self.reduce = ConvNorm(expansion * channels, channels, 1, border) if expansion > 1 else None
        self.skip = skip

    @property
    def last(self) -> ConvNorm:
        return self.expand if self.reduce is None else self.reduce

    def forward(self, x: Tensor, counted: int) -> Tensor:
        y = F.silu(self.expand(x, counted))
        if self.reduce is not None:
            y = self.reduce(y, counted)
        return x + y if self.skip else y


class MBConv(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, squeeze-and-excitation with C/4 hidden units, 1x1 back."""

    def __init__(self, channels: int, expansion: int, border: Border, skip: bool) -> None:
        super().__init__()
        wide = expansion * channels
        self.expand = ConvNorm(channels, wide, 1, border) if expansion > 1 else None
        self.depthwise = ConvNorm(wide, wide, 3, border, groups=wide)
        self.squeeze = nn.Conv2d(wide, max(1, channels // 4), 1)
        self.excite = nn.Conv2d(max(1, channels // 4), wide, 1)
        self.last = ConvNorm(wide, channels, 1, border)
        self.skip = skip

    def forward(self, x: Tensor, counted: int) -> Tensor:
        y: Tensor = x if self.expand is None else F.silu(self.expand(x, counted))
        y = F.silu(self.depthwise(y, counted))
        pooled = y.mean(dim=(2, 3), keepdim=True)  # [B, eC, 1, 1]
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(pooled))))
        y = self.last(y, counted)
        return x + y if self.skip else y


class Stack(nn.Module):
    """The blocks that `layers` names, e.g. "F4x2": two Fused-MBConv (M: MBConv) of expansion 4.

    first_skip: whether the first block adds its input as well; the later ones do.
    """

    def __init__(self, layers: str, channels: int, border: Border, first_skip: bool) -> None:
        super().__init__()
        match = LAYERS.fullmatch(layers)
        assert match is not None
        kind = Fused if match[1] == "F" else MBConv
        depth = int(match[3])
        self.blocks = nn.ModuleList(kind(channels, int(match[2]), border, n > 0 or first_skip) for n in range(depth))

    @property
    def gains(self) -> list[nn.Parameter]:
        """The weight of the last norm of each block."""
        return [block.last.norm.weight for block in self.blocks if isinstance(block, Fused | MBConv)]

    def forward(self, x: Tensor, counted: int) -> Tensor:
        """x [B, C, H, W] -> the same shape; counted as in ConvNorm."""
        for block in self.blocks:
            x = block(x, counted)
        return x
