"""Tests of ranks: two processes agree with one, whatever their shares; without a group every function is one rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_ranks
from torch import Tensor

from pipeline import ranks

ROWS = 7
CUTS = {"equal": 3, "unequal": 1, "one rank has none": 0}  # rows of rank 0; rank 1 has the others


def values() -> Tensor:
    return torch.randn(ROWS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradient(rows: slice) -> tuple[Tensor, Tensor]:
    """The squared distance of a whole-batch mean from 0.3, and its gradient by a shared weight as DDP would give it."""
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    mine = values()[rows] * weight.sin()
    loss = (ranks.rank_mean(mine) - 0.3).square().sum()
    (loss * (len(mine) * ranks.world() / ROWS)).backward()
    assert weight.grad is not None
    return loss.detach(), ranks.rank_sum(weight.grad) / ranks.world()


def _rank(rank: int, folder: Path) -> None:
    kept = torch.tensor([1.0 + rank, 10.0])
    found: dict[str, Any] = {
        "rank": (ranks.rank(), ranks.world()),
        "sum": ranks.rank_sum(kept),
        "argument": kept,
        "agree": ranks.agree({"from": rank}),
        "gather": ranks.gather({"from": rank}),
    }
    for name, cut in CUTS.items():
        found[name] = gradient(slice(0, cut) if rank == 0 else slice(cut, ROWS))
    buffers = [torch.full((2,), 1.0 + rank), torch.tensor(5 + rank)]
    ranks.take_from_rank_0(buffers)
    found["buffers"] = [buffer.tolist() for buffer in buffers]
    ranks.barrier()
    with ranks.one_rank():  # there is a group already: it stays
        found["inner world"] = ranks.world()
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    two_ranks.run(_rank, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("length", [0, 1, 5, 64, 1001])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_are_contiguous_hold_each_item_once_and_differ_by_one_at_most(length: int, world: int) -> None:
    items = list(range(length))
    parts = [items[ranks.shard(length, rank, world)] for rank in range(world)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_without_a_group_there_is_one_rank() -> None:
    assert (ranks.rank(), ranks.world()) == (0, 1)
    x = values().requires_grad_()
    total = ranks.rank_sum(x)
    assert torch.equal(total, x) and not total.requires_grad and total.data_ptr() != x.data_ptr()
    assert torch.equal(ranks.rank_mean(x), x.mean(0)) and ranks.rank_mean(x).requires_grad
    assert ranks.agree("mine") == "mine" and ranks.gather("mine") == ["mine"]
    ranks.barrier()


def test_a_group_of_this_process_alone_begins_and_ends() -> None:
    with ranks.one_rank():
        assert dist.is_initialized() and ranks.world() == 1
        assert torch.equal(ranks.rank_sum(values()), values())
    assert not dist.is_initialized()


def test_every_rank_gets_the_same_sum_and_rank_0s_value(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        assert found["rank"] == (rank, 2) and found["inner world"] == 2
        assert found["sum"].tolist() == [3.0, 20.0]
        assert found["argument"].tolist() == [1.0 + rank, 10.0]  # left as it was
        assert found["agree"] == {"from": 0}
        assert found["buffers"] == [[1.0, 1.0], 5]
        assert found["gather"] == [{"from": 0}, {"from": 1}]


@pytest.mark.parametrize("shares", CUTS)
def test_a_loss_of_the_global_mean_has_the_value_and_gradient_of_one_rank(
    shares: str, two: list[dict[str, Any]]
) -> None:
    loss, whole = gradient(slice(None))
    assert whole.abs().min() > 1e-3
    for found in two:
        torch.testing.assert_close(found[shares][0], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found[shares][1], whole, rtol=1e-9, atol=1e-12)
