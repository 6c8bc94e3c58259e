"""The only module that uses torch.distributed: shards of a batch, sums and means over all ranks.

Without a process group every function behaves as for one rank, so the same code runs on a laptop. Functions marked
"Collective" must be called by every rank, in the same order, and never under a condition on the rank.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_alone = threading.Event()  # set within `alone`, for the threads of the backward pass too


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes; 1 within `alone`."""
    return 1 if _alone.is_set() else _processes()


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shard(length: int, rank: int, world: int) -> slice:
    """The contiguous share of `length` items that belongs to `rank`; shares differ by one item at most."""
    return slice(length * rank // world, length * (rank + 1) // world)


def rank_sum(values: Tensor) -> Tensor:
    """Sum of `values` over all ranks, not differentiable; the argument is not changed. Collective."""
    if world() == 1:
        return values.detach().clone()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


class _AllReduceSum(torch.autograd.Function):
    """y = sum over ranks of x; every rank holds y, so x's gradient is the sum over ranks of y's gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return rank_sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return rank_sum(gradient)


def rank_mean(values: Tensor) -> Tensor:
    """Mean over the rows of all ranks, differentiable: values [b, ...] -> [...], where b may differ by rank.

    Collective, in the forward and in the backward pass. A loss that is not linear in the batch takes this mean before
    it squares or compares, so that the number of ranks changes nothing: with each rank's loss scaled by
    rows·world/total rows and DDP's averaging, the gradient is that of one rank with the whole batch.
    """
    if world() == 1:
        return values.mean(dim=0)
    rows = rank_sum(torch.full((), float(values.shape[0]), dtype=values.dtype, device=values.device))
    total: Tensor = _AllReduceSum.apply(values.sum(dim=0))
    return total / rows


def agree(value: T) -> T:
    """Rank 0's value on every rank; any picklable object. Collective."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank; any picklable object. Collective."""
    if world() == 1:
        return [value]
    box: list[T] = [value] * world()
    dist.all_gather_object(box, value)
    return box


def take_from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Fills the tensors, the same ones on every rank, with rank 0's values. Collective."""
    if world() == 1:
        return
    by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for some in by_type.values():
        together = torch.cat([tensor.detach().flatten() for tensor in some])  # one message, not one for each
        dist.broadcast(together, src=0)
        for tensor, part in zip(some, torch.split(together, [tensor.numel() for tensor in some]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this rank communicates with no other, so that it may fail without blocking them.

    `world` is 1 there and `rank` stays; every function behaves as for one rank.
    """
    assert not _alone.is_set(), "alone is not nested"
    _alone.set()
    try:
        yield
    finally:
        _alone.clear()


def barrier() -> None:
    """Waits until every rank has called it. Collective."""
    if world() > 1:
        dist.barrier()


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, unless there is a group already, for code that needs one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()
