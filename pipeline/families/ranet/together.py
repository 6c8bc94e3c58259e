"""In training the layers of a block run together: fewer and larger operations, values equal to within rounding.

Letters: B images, C channels, H×W pixels, L layers. Two means, neither of which changes parameters or their names:
convolutions of the same size on channels of one tensor are one convolution, whose weight is 0 where a layer does not
read; and layers append to one feature map in place, `Growing`, instead of copying it to one that is wider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    widths = [each[0].out_channels for each in bottlenecks]
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
    x = F.batch_norm(x, mean, var, weight, bias, True, cast(float, norms[0].momentum), norms[0].eps)
    torch._foreach_copy_(buffers, list(running.split([len(buffer) for buffer in buffers])))
    for norm in norms:
        cast(Tensor, norm.num_batches_tracked).add_(1)
    return x


class _Placed(torch.autograd.Function):
    """The weights [C', c, k, k] of convolutions one below the other, each from its column on, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, width: int, starts: tuple[int, ...], *weights: Tensor) -> Tensor:
        """-> [sum of C', width, k, k]"""
        shapes = tuple(tuple(_rows(weight).shape) for weight in weights)
        ctx.shapes, ctx.places = shapes, _places(width, starts, shapes, weights[0].device)
        side, values = weights[0].shape[-1], torch.cat([_rows(weight).flatten() for weight in weights])
        whole = values.new_zeros(sum(map(len, weights)), side, side, width)
        whole.view(-1)[ctx.places] = values
        return _channels(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values = _rows(gradient).flatten()[ctx.places]
        parts = values.split([math.prod(shape) for shape in ctx.shapes])
        return (None, None, *(_channels(part.view(shape)) for part, shape in zip(parts, ctx.shapes, strict=True)))


@cache
def _places(width: int, starts: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Where each number of weights [C', k, k, c] goes in [sum of C', k, k, width], flattened; cached, as its making
    takes time and its copy to a GPU makes the host wait."""
    count, side = sum(shape[0] for shape in shapes), shapes[0][1]
    rows = (
        torch.arange(count * side * side * width).view(count, side, side, width).split([shape[0] for shape in shapes])
    )
    parts = (row[..., start : start + shape[3]] for row, start, shape in zip(rows, starts, shapes, strict=True))
    with torch.inference_mode(False):
        return torch.cat([part.flatten() for part in parts]).to(device)


# ---- layers that append to one feature map


class Growing:
    """A feature map [B, H, W, C] that layers fill from its first channel on, and its gradient.

    A layer reads the channels before its own. The backward pass goes from the last channel to the first: the gradient
    of a layer's channels is complete when every later layer has added its share.
    """

    def __init__(self, x: Tensor, found: Tensor | None, layers: Sequence[nn.Sequential]) -> None:
        batch, self.inputs, height, width = x.shape
        self.layers, self.found = len(layers), 0 if found is None else found.shape[1] // len(layers)
        self.growth = self.found + cast(int, layers[0][-2].num_features)
        self.map = x.new_empty(batch, height, width, self.inputs + self.layers * self.growth)
        self.gradient: Tensor | None = None

    def summed(self) -> Tensor:
        """The gradient, to which shares are added; 0 before the first."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.map)
        return self.gradient

    def of_found(self, whole: Tensor) -> Tensor:
        """The channels [B, H, W, L, c] of whole, the map or its gradient, that each layer takes from below."""
        return whole[..., self.inputs :].unflatten(3, (self.layers, self.growth))[..., : self.found]


def grow(
    x: Tensor, found: Tensor | None, layers: Sequence[nn.Sequential], last: nn.Sequential | None
) -> tuple[Tensor, Tensor | None]:
    """x [B, C, H, W], to which each layer, a bottleneck that preserves the size, appends its outputs: [B, C', H, W].

    found [B, L*c, H, W]: c channels for each layer, which go before its own. last: a bottleneck of another size, which
    reads the result; its outputs are the second result.
    """
    growing = Growing(x, found, layers)
    order = _Begin.apply(growing, x, found)
    for layer in layers:
        y = _through(layer[1:-1], _product(growing, order, layer))
        order = _Append.apply(growing, order, y, layer[0].in_channels + growing.found)
    y = None if last is None else _through(last[1:], _product(growing, order, last))
    return cast(Tensor, _Finish.apply(growing, order)), y


def _product(growing: Growing, order: Tensor, layer: nn.Sequential) -> Tensor:
    weight = _rows(layer[0].weight.to(growing.map.dtype)).flatten(1)
    return cast(Tensor, _Product.apply(growing, order, weight))


def _through(modules: nn.Sequential, x: Tensor) -> Tensor:
    return cast(Tensor, modules(x))


# Each of these functions takes the empty tensor that the one before it returns, and so runs after it, and before it in
# the backward pass. The map and its gradient are in `Growing`, as autograd would copy them.


class _Begin(torch.autograd.Function):
    """Writes x and what is known of the layers' channels."""

    @staticmethod
    def forward(ctx: Any, growing: Growing, x: Tensor, found: Tensor | None) -> Tensor:
        ctx.growing = growing
        growing.map[..., : growing.inputs] = _rows(x)
        if found is not None:
            growing.of_found(growing.map).copy_(_rows(found).unflatten(3, (growing.layers, growing.found)))
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        growing = ctx.growing
        whole, growing.gradient = growing.gradient, None
        found = growing.of_found(whole).flatten(3) if growing.found else None
        return None, _channels(_dense(whole[..., : growing.inputs])), None if found is None else _channels(found)


class _Product(torch.autograd.Function):
    """A 1x1 convolution of the first channels: weight [C', c] -> [B, C', H, W]."""

    @staticmethod
    def forward(ctx: Any, growing: Growing, order: Tensor, weight: Tensor) -> Tensor:
        ctx.growing = growing
        ctx.save_for_backward(weight)
        return _channels(torch.matmul(growing.map[..., : weight.shape[1]], weight.t()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        rows = _rows(gradient).flatten(0, 2)
        inputs, by_inputs = (
            whole.flatten(0, 2)[:, : weight.shape[1]] for whole in (ctx.growing.map, ctx.growing.summed())
        )
        by_inputs.addmm_(rows, weight)
        return None, None, rows.t() @ inputs


class _Append(torch.autograd.Function):
    """Writes the ReLU of y [B, C', H, W] from channel `start` on."""

    @staticmethod
    def forward(ctx: Any, growing: Growing, order: Tensor, y: Tensor, start: int) -> Tensor:
        ctx.growing, ctx.channels = growing, slice(start, start + y.shape[1])
        place = growing.map[..., ctx.channels]
        if y.is_cuda:
            ctx.value = torch.clamp_min(_rows(y), 0, out=place)
        else:
            ctx.value = torch.clamp_min(_rows(y), 0)
            place.copy_(ctx.value)
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _dense(ctx.growing.gradient[..., ctx.channels])
        return None, None, _channels(torch.ops.aten.threshold_backward(gradient, ctx.value, 0)), None


class _Finish(torch.autograd.Function):
    """The whole map [B, C, H, W]."""

    @staticmethod
    def forward(ctx: Any, growing: Growing, order: Tensor) -> Tensor:
        ctx.growing = growing
        return _channels(growing.map)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.growing.summed().add_(_rows(gradient))
        return None, None


def _dense(part: Tensor) -> Tensor:
    """Some channels of a map, on a CPU as a copy: it is 10 times as slow in reading rows of a few numbers."""
    return part if part.is_cuda else part.contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _channels(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2)


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
        rows = _rows(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
        (height, width), (batch, h, w, channels) = ctx.side, rows.shape
        across, down = (_linear(*each, rows.dtype, rows.device) for each in ((width, w), (height, h)))
        rows = torch.bmm(across.expand(batch * h, width, w), rows.reshape(batch * h, w, channels))
        rows = torch.bmm(down.expand(batch, height, h), rows.view(batch, h, width * channels))
        return _channels(rows.view(batch, height, width, channels)).to(ctx.dtype), None


@cache
def _linear(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The transposed linear interpolation, with aligned ends, of `old` samples to `new`, [old, new]; as `_places`."""
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(old, dtype=torch.float64)[None]
        return F.interpolate(units, new, mode="linear", align_corners=True)[0].to(device, dtype)
