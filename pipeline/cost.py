"""Multiply-accumulates of a net, counted by torch's own flop counter on a real forward; never re-derived.

One definition everywhere: convolutions and matrix products count, biases, norms, activations and pooling do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ContractError


@dataclass(frozen=True)
class Cost:
    """macs of the whole forward; by_module: of each module that spent any, by its name in the net."""

    macs: int
    by_module: Mapping[str, int]


def measure(net: nn.Module, *inputs: Tensor) -> Cost:
    """The cost of `net(*inputs)` in eval mode; the net's mode and buffers are as before. Units: MACs of all images.

    Raises ContractError where the forward does nothing that counts.
    """
    modes = {module: module.training for module in net.modules()}
    net.eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            net(*inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    total = counter.get_total_flops() // 2
    if total == 0:
        raise ContractError(f"{type(net).__name__}: its forward holds no convolution and no matrix product")
    root = type(net).__name__
    found = {
        name.removeprefix(root).removeprefix("."): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name != "Global"
    }
    return Cost(total, found)
