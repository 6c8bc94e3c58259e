"""A block's feature map in training: layers append their channels to it in place, instead of copying it each time.

Letters: B images, C channels, H×W pixels, L layers. A layer's first convolution, 1x1, is a matrix product with the
channels before its own, and its gradient by them is added to the map's by the product itself. Values are those of the
layers one by one, to within rounding; on a GPU in fp32 products follow torch.backends.cuda.matmul.allow_tf32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.families.ranet.together import by_channel, to_channels, to_rows


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

    def add(self, share: Tensor) -> None:
        """Adds a share [B, H, W, C] of the gradient."""
        if self.gradient is None:
            self.gradient = share.clone(memory_format=torch.contiguous_format)
        else:
            self.gradient.add_(share)

    def add_product(self, by_outputs: Tensor, weight: Tensor) -> None:
        """Adds by_outputs [BHW, C'] times weight [C', c], a share of the gradient of the first c channels."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.map)
        self.gradient.flatten(0, 2)[:, : weight.shape[1]].addmm_(by_outputs, weight)

    def of_found(self, whole: Tensor) -> Tensor:
        """The channels [B, H, W, L, c] of whole, the map or its gradient, that each layer takes from below."""
        layers = whole[..., self.inputs :].view(*whole.shape[:3], self.layers, self.growth)
        return layers[..., : self.found]


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
        order = _Append.apply(growing, order, y, cast(nn.Conv2d, layer[0]).in_channels + growing.found)
    smaller = None if last is None else _through(last[1:], _product(growing, order, last))
    return cast(Tensor, _Finish.apply(growing, order)), smaller


def _product(growing: Growing, order: Tensor, layer: nn.Sequential) -> Tensor:
    weight = to_rows(cast(nn.Conv2d, layer[0]).weight.to(growing.map.dtype)).flatten(1)
    return cast(Tensor, _Product.apply(growing, order, weight))


def _through(modules: nn.Sequential, x: Tensor) -> Tensor:
    for module in modules:
        x = by_channel(module, x) if isinstance(module, nn.BatchNorm2d) else module(x)
    return x


# Each function takes the empty tensor `order` that the one before it returned: in the backward pass autograd therefore
# runs it first. The map and its gradient are not among its arguments, because autograd would copy them.


class _Begin(torch.autograd.Function):
    """Writes x and what is known of the layers' channels."""

    @staticmethod
    def forward(ctx: Any, growing: Growing, x: Tensor, found: Tensor | None) -> Tensor:
        ctx.growing = growing
        growing.map[..., : growing.inputs] = to_rows(x)
        if found is not None:
            place = growing.of_found(growing.map)
            place.copy_(to_rows(found).reshape(place.shape))
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        growing = ctx.growing
        whole, growing.gradient = growing.gradient, None
        found = growing.of_found(whole).flatten(3) if growing.found else None
        return None, to_channels(_dense(whole[..., : growing.inputs])), None if found is None else to_channels(found)


class _Product(torch.autograd.Function):
    """A 1x1 convolution of the first channels: weight [C', c] -> [B, C', H, W]."""

    @staticmethod
    def forward(ctx: Any, growing: Growing, order: Tensor, weight: Tensor) -> Tensor:
        ctx.growing = growing
        ctx.save_for_backward(weight)
        return to_channels(torch.matmul(growing.map[..., : weight.shape[1]], weight.t()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        by_outputs = to_rows(gradient).flatten(0, 2)
        ctx.growing.add_product(by_outputs, weight)
        inputs = ctx.growing.map.flatten(0, 2)[:, : weight.shape[1]]
        return None, None, by_outputs.t() @ inputs


class _Append(torch.autograd.Function):
    """Writes the ReLU of y [B, C', H, W] from channel `start` on."""

    @staticmethod
    def forward(ctx: Any, growing: Growing, order: Tensor, y: Tensor, start: int) -> Tensor:
        ctx.growing, ctx.channels = growing, slice(start, start + y.shape[1])
        place = growing.map[..., ctx.channels]
        if y.is_cuda:
            ctx.value = torch.clamp_min(to_rows(y), 0, out=place)
        else:
            ctx.value = torch.clamp_min(to_rows(y), 0)
            place.copy_(ctx.value)
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _dense(ctx.growing.gradient[..., ctx.channels])
        return None, None, to_channels(torch.ops.aten.threshold_backward(gradient, ctx.value, 0)), None


class _Finish(torch.autograd.Function):
    """The whole map [B, C, H, W]."""

    @staticmethod
    def forward(ctx: Any, growing: Growing, order: Tensor) -> Tensor:
        ctx.growing = growing
        return to_channels(growing.map)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.growing.add(to_rows(gradient))
        return None, None


def _dense(part: Tensor) -> Tensor:
    """Some channels of a map, on a CPU as a copy: it is 10 times as slow in reading rows of a few numbers."""
    return part if part.is_cuda else part.contiguous()
