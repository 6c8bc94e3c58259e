"""The layers of a Laplacian residual and of the final stage: Fused-MBConv and MBConv, as in EfficientNetV2.

A residual's layers must map a constant image to a constant one, or skipping is not exact. Convolutions therefore
repeat the border instead of padding with zeros, and BatchNorm is the only normalisation.
Letters: B images, C channels, e expansion.
Source: Tan & Le, ICML 2021 (arXiv 2104.00298) for the blocks; arXiv 2412.06195 for the property.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.blocks import is_channels_last
from pipeline.compat.torch import has_forward_hooks

LAYERS = re.compile(r"([FM])([1-9]\d*)x([1-9]\d*)")  # kind, expansion, depth
Border = Literal["replicate", "zeros"]


class BorderConv(nn.Conv2d):
    """A convolution that repeats the border; on a GPU it keeps channels_last, which torch's own padding loses."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]."""
        if not (x.is_cuda and is_channels_last(x)):
            return super().forward(x)
        return F.conv2d(_bordered(x, self.kernel_size[0] // 2), self.weight, groups=self.groups)


def _bordered(x: Tensor, reach: int) -> Tensor:
    """x [B, C, H, W] with its border repeated `reach` times, in its memory format."""
    if not (x.is_cuda and is_channels_last(x)):
        return F.pad(x, (reach,) * 4, "replicate")
    volume = x.permute(0, 2, 3, 1).unsqueeze(1)  # [B, 1, H, W, C]
    return F.pad(volume, (0, 0, *(reach,) * 4), "replicate").squeeze(1).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm, whose training statistics are computed over the first `counted` rows only.

    The other rows are normalised by the running statistics. SyncBatchNorm counts all rows: every rank must contribute
    some, or the other ranks would wait forever. In inference the norm is folded into the convolution at each call if
    the output has at least as many values as there are weights: the output is then written once and not read again.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, border: Border, groups: int = 1) -> None:
        super().__init__()
        mode = border if kernel > 1 else "zeros"
        kind = nn.Conv2d if mode == "zeros" else BorderConv
        self.conv = kind(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False, padding_mode=mode)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, counted: int) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]; see the class for `counted`."""
        if self._folds(x):
            return self._folded(x)
        x = self.conv(x)
        if not self.training or counted == len(x) or isinstance(self.norm, nn.SyncBatchNorm):
            whole: Tensor = self.norm(x)
            return whole
        bn = self.norm
        rest = F.batch_norm(x[counted:], bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return torch.cat([bn(x[:counted]), rest]) if counted else rest

    def _folds(self, x: Tensor) -> bool:
        """False for an exported graph, which is for any number of images, and if a hook needs the layers themselves."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if has_forward_hooks(self.conv) or not isinstance(self.norm, nn.BatchNorm2d | nn.SyncBatchNorm):
            return False
        values = len(x) * self.conv.out_channels * x.shape[-2] * x.shape[-1]
        return values >= self.conv.weight.numel()

    def _folded(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        if conv.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, padding=conv.padding, groups=conv.groups)
        return F.conv2d(_bordered(x, conv.kernel_size[0] // 2), weight, bias, groups=conv.groups)


class Fused(nn.Module):
    """Fused-MBConv: a 3x3 convolution that expands and a 1x1 one back; expansion 1 is the 3x3 convolution alone."""

    def __init__(self, channels: int, expansion: int, border: Border, skip: bool) -> None:
        super().__init__()
        self.expand = ConvNorm(channels, expansion * channels, 3, border)
        self.reduce = ConvNorm(expansion * channels, channels, 1, border) if expansion > 1 else None
        self.skip = skip

    @property
    def last(self) -> ConvNorm:
        """The layer whose norm scales the block's output."""
        return self.expand if self.reduce is None else self.reduce

    def forward(self, x: Tensor, counted: int, scale: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] -> the same shape; `counted` as in ConvNorm, scale [B] of what is added to x, None for 1."""
        y = _silu(self.expand(x, counted))
        if self.reduce is not None:
            y = self.reduce(y, counted)
        return _sum(_scaled(y, scale), x) if self.skip else y


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

    def forward(self, x: Tensor, counted: int, scale: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] -> the same shape; `counted` and `scale` as in `Fused`."""
        y: Tensor = x if self.expand is None else _silu(self.expand(x, counted))
        y = _silu(self.depthwise(y, counted))
        pooled = y.mean(dim=(2, 3))  # [B, eC]
        gain = torch.sigmoid(_of_pixel(self.excite, F.silu(_of_pixel(self.squeeze, pooled))))[:, :, None, None]
        y = self.last(y * gain if torch.is_grad_enabled() else y.mul_(gain), counted)
        return _sum(_scaled(y, scale), x) if self.skip else y


def _scaled(y: Tensor, scale: Tensor | None) -> Tensor:
    return y if scale is None else y * scale.to(y.dtype)[:, None, None, None]


def _silu(fresh: Tensor) -> Tensor:
    """SiLU, in place if no gradient needs the argument; nothing else may hold it. This reuses memory in the cache."""
    return F.silu(fresh, inplace=not torch.is_grad_enabled())


def _sum(fresh: Tensor, x: Tensor) -> Tensor:
    return x + fresh if torch.is_grad_enabled() else fresh.add_(x)


def _of_pixel(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of one pixel, x [B, C], as a matrix product; takes 1/2 to 3/4 of the time on a CPU."""
    return F.linear(x, matrix_of(layer), layer.bias)


def matrix_of(layer: nn.Conv2d) -> Tensor:
    """The weight [C', C] of a 1x1 convolution; its gradient gets the strides of the weight in channels_last."""
    return layer.weight.permute(0, 2, 3, 1).flatten(1)


class Stack(nn.Module):
    """The blocks given by `layers`, e.g. "F4x2": two Fused-MBConv (M: MBConv) of expansion 4.

    first_skip: whether the first block adds its input; the later ones always do.
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

    @property
    def num_skips(self) -> int:
        """How many blocks add their input."""
        return sum(bool(block.skip) for block in self.blocks)

    def forward(self, x: Tensor, counted: int, scales: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] -> the same shape; `counted` as in ConvNorm.

        scales [B or more, blocks that add their input]: of what each block adds for each image; None for 1.
        """
        skips = iter(() if scales is None else scales[: len(x)].unbind(1))
        for block in self.blocks:
            x = block(x, counted, next(skips, None) if block.skip else None)
        return x
