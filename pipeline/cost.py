"""Multiply-accumulates of a net, counted by torch's flop counter during a real forward pass.

One definition everywhere: convolutions and matrix products count, with both products of an attention; biases, norms,
activations, pooling, resizing and additions of maps do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import ContractError


@dataclass(frozen=True)
class Cost:
    """macs of the whole forward; by_module: those of each module that has any, by its name in the net."""

    macs: int
    by_module: Mapping[str, int]


def measure(net: nn.Module, *inputs: Tensor) -> Cost:
    """The cost of `net(*inputs)` in eval mode, in MACs of all images; the net's mode and buffers are not changed.

    Raises ContractError if the forward has no operation that counts.
    """
    modes = {module: module.training for module in net.modules()}
    net.eval()
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton: a tenth of a second

    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), _unfused(), counter:
            net(*inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    total = counter.get_total_flops() // 2
    if total == 0:
        name = type(net).__name__
        raise ContractError(
            f"{name}: its forward has no convolution and no matrix product", key="forward", subject=name
        )
    root = type(net).__name__
    by_module = {
        name.removeprefix(root).removeprefix("."): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name != "Global"
    }
    return Cost(total, by_module)


@contextmanager
def _unfused() -> Iterator[None]:
    """Runs attentions as single operations: of the fused ones on a CPU torch's counter knows none.

    These are scaled_dot_product_attention's kernels and, in eval mode without gradients, nn.MultiheadAttention's.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
