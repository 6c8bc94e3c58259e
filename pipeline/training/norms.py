"""BatchNorm's counters of batches: one addition for all of a net, not one for each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
NAME = "num_batches_tracked"


class _Counter:
    """Stands for the counter of a BatchNorm during a forward and takes its additions."""

    def __init__(self) -> None:
        self.batches = 0

    def add_(self, number: int) -> None:
        self.batches += number


def with_counter(net: nn.Module) -> tuple[BatchNorm, ...]:
    """The norms that count batches and do nothing else with the count; without momentum it weights their statistics."""
    norms = (module for module in net.modules() if isinstance(module, BatchNorm))
    return tuple(norm for norm in norms if norm.momentum is not None and norm.num_batches_tracked is not None)


@contextmanager
def count_batches_together(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Within it, forwards of these norms add nothing to their counters; at the end all is added at once."""
    counters = [_Counter() for _ in norms]
    for norm, counter in zip(norms, counters, strict=True):
        norm.__dict__[NAME] = counter  # found before the buffer of this name
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__[NAME]
    for number in {counter.batches for counter in counters} - {0}:
        ran = (norm for norm, counter in zip(norms, counters, strict=True) if counter.batches == number)
        torch._foreach_add_([norm.get_buffer(NAME) for norm in ran], number)
