"""Weights in autocast's type: cast by one kernel for many of them, not by one for each layer and one for its gradient.

For DDP the weights are cast in groups, each when its first layer runs, so that in the backward pass a group's gradients
are ready, and can be sent, before those of earlier layers are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.compat.torch import SeenOperations

GROUP = 4_000_000  # numbers of a group's weights, about half of what DDP sends at once
Owner = tuple[nn.Module, str]  # a module and the name of its parameter


class WeightCasts:
    """The weights of a net that autocast casts and that nothing else reads.

    The first forward within `used` finds them, by what it does with each parameter; the later ones cast them together.
    Values are those of autocast.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype, *, in_groups: bool) -> None:
        self._dtype, self._active, self._found = dtype, False, False
        self._room = GROUP if in_groups else math.inf
        self._owners: dict[int, list[Owner]] = {}
        self._set: list[Owner] = []
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append((module, name))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it, one forward of the net under autocast reads the cast weights."""
        if not self._found:
            uses = _Uses(self._owners, self._dtype)
            with SeenOperations(uses.see):
                yield
            self._group(uses)
            return
        self._active = True
        try:
            yield
        finally:
            self._active = False
            for module, name in self._set:
                module.__dict__.pop(name, None)
            self._set = []

    def _group(self, uses: _Uses) -> None:
        weights = [weight for key, weight in uses.cast.items() if key not in uses.other]
        groups: list[list[Tensor]] = []
        room = 0.0
        for weight in weights:
            room -= weight.numel()
            if room < 0:
                groups.append([])
                room = self._room - weight.numel()
            groups[-1].append(weight)
        for group in groups:
            owner, _ = self._owners[id(group[0])][0]
            owner.register_forward_pre_hook(self._caster(group))
        self._found = True

    def _caster(self, group: Sequence[Tensor]) -> Callable[[nn.Module, object], None]:
        def cast(module: nn.Module, inputs: object) -> None:
            if not self._active:
                return
            for weight, value in zip(group, _Cast.apply(self._dtype, *group), strict=True):
                for owner, name in self._owners[id(weight)]:
                    owner.__dict__[name] = value  # found before the parameter of this name
                    self._set.append((owner, name))

        return cast


class _Uses:
    """Notes the parameters that are cast to a type, in the order of that, and those that are used otherwise."""

    def __init__(self, owners: Mapping[int, object], dtype: torch.dtype) -> None:
        self._owners, self._dtype = owners, dtype
        self.cast: dict[int, Tensor] = {}
        self.other: set[int] = set()

    def see(self, operation: object, arguments: tuple[object, ...], options: Mapping[str, object]) -> None:
        is_cast = operation is torch.ops.aten._to_copy.default and options.get("dtype") is self._dtype
        for value in tree_leaves((arguments, options)):
            if id(value) in self._owners and is_cast:
                self.cast[id(value)] = value
            elif id(value) in self._owners:
                self.other.add(id(value))


class _Cast(torch.autograd.Function):
    """Casts tensors to a type, and their gradients back, each by one kernel for many."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return tuple(_copies(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        full = iter(_copies([each for each in gradients if each is not None], ctx.dtype))
        return (None, *(None if each is None else next(full) for each in gradients))


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies
