"""Operations of a training step that are fewer or faster than torch's, with equal values to within rounding.

Letters: B images, C channels, H×W pixels. None changes a parameter, a buffer or their names. Convolutions of one size
that read channels of one tensor run as one, whose weight is 0 where a layer does not read: of these narrow layers that
takes less time than the layers one by one, although there are more products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 12  # channels; with fewer, torch's norm on a CPU is slower in channels_last than channel by channel


def trains(net: nn.Module) -> bool:
    """Whether a module runs in a training step, uncompiled: a compiler joins operations itself."""
    return net.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


# ---- convolutions of several layers as one


def are_joinable(bottlenecks: Sequence[nn.Sequential]) -> bool:
    """Whether their norms use the statistics of the batch, of this process alone, with a fixed momentum."""
    norms = (norm for each in bottlenecks for norm in (each[1], each[4]))
    return all(type(norm) is nn.BatchNorm2d and norm.training and norm.momentum is not None for norm in norms)


def joined_bottlenecks(bottlenecks: Sequence[nn.Sequential], x: Tensor) -> Tensor:
    """The outputs of bottlenecks (1x1, 3x3, each with norm and ReLU) side by side: [B, sum of C', H, W].

    Each reads the first channels of x [B, C, H, W], as many as its own weights have.
    """
    widths = [cast(nn.Conv2d, each[0]).out_channels for each in bottlenecks]
    x = _joined([each[:3] for each in bottlenecks], x, [0] * len(widths))
    return _joined([each[3:] for each in bottlenecks], x, [0, *accumulate(widths)][:-1])


def _joined(parts: Sequence[nn.Sequential], x: Tensor, starts: Sequence[int]) -> Tensor:
    """Convolution, norm and ReLU of each of `parts` on the channels of x from its start on, side by side."""
    convolutions = [cast(nn.Conv2d, part[0]) for part in parts]
    weight = _Placed.apply(x.shape[1], tuple(starts), *(each.weight.to(x.dtype) for each in convolutions))
    x = F.conv2d(x, weight, padding=convolutions[0].padding)
    return _normed([cast(nn.BatchNorm2d, part[1]) for part in parts], x).relu_()


def _normed(norms: Sequence[nn.BatchNorm2d], x: Tensor) -> Tensor:
    """Norms in training, each of its share of the channels of x [B, C, H, W], as one."""
    weight, bias = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
    buffers = [norm.get_buffer(name) for name in ("running_mean", "running_var") for norm in norms]
    running = torch.cat(buffers)
    mean, var = running.chunk(2)
    momentum, eps = cast(float, norms[0].momentum), norms[0].eps
    x = by_channel(lambda x: F.batch_norm(x, mean, var, weight, bias, True, momentum, eps), x)
    torch._foreach_copy_(buffers, torch.split(running, [len(buffer) for buffer in buffers]))
    for norm in norms:
        cast(Tensor, norm.num_batches_tracked).add_(1)
    return x


class _Placed(torch.autograd.Function):
    """The weights [C', c, k, k] of convolutions one below the other, each from its column on, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, width: int, starts: tuple[int, ...], *weights: Tensor) -> Tensor:
        """-> [sum of C', width, k, k]"""
        shapes = tuple(tuple(to_rows(weight).shape) for weight in weights)
        ctx.shapes, ctx.places = shapes, _places(width, starts, shapes, weights[0].device)
        side, values = weights[0].shape[-1], torch.cat([to_rows(weight).flatten() for weight in weights])
        whole = values.new_zeros(sum(map(len, weights)), side, side, width)
        whole.view(-1)[ctx.places] = values
        return to_channels(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values = to_rows(gradient).flatten()[ctx.places]
        parts = torch.split(values, [math.prod(shape) for shape in ctx.shapes])
        return (None, None, *(to_channels(part.view(shape)) for part, shape in zip(parts, ctx.shapes, strict=True)))


@cache
def _places(width: int, starts: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Where each number of weights [C', k, k, c] goes in [sum of C', k, k, width], both flattened.

    Cached: its making takes time, and its copy to a GPU makes the host wait.
    """
    count, side = sum(shape[0] for shape in shapes), shapes[0][1]
    everywhere = torch.arange(count * side * side * width).view(count, side, side, width)
    rows = torch.split(everywhere, [shape[0] for shape in shapes])
    parts = (row[..., start : start + shape[3]] for row, start, shape in zip(rows, starts, shapes, strict=True))
    with torch.inference_mode(False):
        return torch.cat([part.flatten() for part in parts]).to(device)


# ---- norms of few channels


def by_channel(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """norm(x), x [B, C, H, W] in channels_last; on a CPU channel by channel if they are few: takes half the time."""
    if x.is_cuda or x.shape[1] >= FEW:
        return norm(x)
    by_channel = cast(Tensor, _ByChannel.apply(x))
    y = norm(by_channel.view(1, len(by_channel), -1, 1)).view(by_channel.shape)
    return cast(Tensor, _ByPixel.apply(y))


class _ByChannel(torch.autograd.Function):
    """[B, C, H, W] in channels_last -> [C, B, H, W] contiguous, and the gradient back.

    Transposed by torch alone, the gradient would reach the norm of [1, C, BHW, 1] in channels_last, and torch 2.14 on a
    CPU then reads it as if it were contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.transpose(0, 1).contiguous(memory_format=torch.channels_last)


class _ByPixel(torch.autograd.Function):
    """The inverse of `_ByChannel`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.transpose(0, 1).contiguous()


# ---- resizing


def reduced(x: Tensor, size: Sequence[int]) -> Tensor:
    """x [B, C, H, W] at a smaller height and width: bilinear with aligned corners, also under autocast in fp32."""
    return cast(Tensor, _Reduced.apply(x, tuple(size)))


class _Reduced(torch.autograd.Function):
    """Torch's interpolation; its backward pass as a product along each axis.

    Torch's own backward pass loses the memory format on a CPU, and adds in a random order on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.dtype, ctx.side = x.dtype, x.shape[-2:]
        return F.interpolate(x, size, mode="bilinear", align_corners=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = to_rows(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
        (height, width), (batch, h, w, channels) = ctx.side, rows.shape
        across, down = (_linear(*each, rows.dtype, rows.device) for each in ((width, w), (height, h)))
        rows = torch.bmm(across.expand(batch * h, width, w), rows.reshape(batch * h, w, channels))
        rows = torch.bmm(down.expand(batch, height, h), rows.view(batch, h, width * channels))
        return to_channels(rows.view(batch, height, width, channels)).to(ctx.dtype), None


@cache
def _linear(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The transposed linear interpolation, with aligned ends, of `old` samples to `new`, [old, new]; as `_places`."""
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(old, dtype=torch.float64)[None]
        return F.interpolate(units, new, mode="linear", align_corners=True)[0].to(device, dtype)


def to_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C], in the same memory."""
    return x.permute(0, 2, 3, 1)


def to_channels(x: Tensor) -> Tensor:
    """[B, H, W, C] as [B, C, H, W], in the same memory."""
    return x.permute(0, 3, 1, 2)
