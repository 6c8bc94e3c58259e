"""CUDA graphs: the forward and the backward of a net are recorded once; each is then a single launch for the host.

A graph repeats the same kernels on the same memory, so all steps must have the same shapes.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn


class Graphed(nn.Module):
    """A net in training mode on micro-batches of one shape; the first forward records the graphs.

    Recording runs the net a few times and changes neither its buffers nor the random numbers that follow. Only one
    micro-batch a step: gradients of the next one would be written over those of the first.
    """

    def __init__(self, net: nn.Module, *, autocast: bool) -> None:
        super().__init__()
        self.tensors = _Tensors(net, autocast)
        self.recorded = False

    def forward(self, images: Tensor) -> object:
        """The net's output for images [B, 3, H, W]; its tensors are not overwritten by the next forward."""
        if not self.recorded:
            self._record(images)
        return self.tensors.output_of([value.clone() for value in self.tensors(images)])

    def _record(self, images: Tensor) -> None:
        buffers = list(self.tensors.buffers())
        values, random = [buffer.clone() for buffer in buffers], torch.cuda.get_rng_state(images.device)
        with torch.autocast("cuda", enabled=False):
            torch.cuda.make_graphed_callables(self.tensors, (images.clone(),), capture_error_mode="thread_local")
        torch._foreach_copy_(buffers, values)
        torch.cuda.set_rng_state(random, images.device)
        self.recorded = True


class _Tensors(nn.Module):
    """A net whose output is given by its tensors alone, which is what can be recorded."""

    def __init__(self, net: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.net, self._autocast = net, autocast
        self._output: Any = None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the net's output, in the order of its fields."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self._autocast, cache_enabled=False):
            self._output = self.net(images)
        return tuple(getattr(self._output, name) for name in self._names())

    def output_of(self, tensors: list[Tensor]) -> object:
        """The output with these tensors; what else it holds is that of the recorded forward."""
        return replace(self._output, **dict(zip(self._names(), tensors, strict=True)))

    def _names(self) -> list[str]:
        return [each.name for each in fields(self._output) if isinstance(getattr(self._output, each.name), Tensor)]
