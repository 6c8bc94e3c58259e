"""Losses whose terms depend on the whole batch: neither ranks nor micro-batches change a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
import two_ranks
from torch import Tensor

from pipeline.training.losses.binary_cross_entropy import BinaryCrossEntropyConfig
from pipeline.training.losses.cross_entropy import CrossEntropyConfig
from pipeline.training.plan import TrainingPlan
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, split, train_step

WEIGHTS = (0.25, 1.0, 3.0)
LOSSES = {
    "ce": CrossEntropyConfig(class_weights=WEIGHTS),
    "bce": BinaryCrossEntropyConfig(class_weights=WEIGHTS, target_threshold=0.2),
}
CASES = [(loss, linear) for loss in LOSSES for linear in (True, False)]
SIZE = 8


def prepared(loss: str, linear: bool) -> tuple[TrainingPlan, TrainState]:
    """A plan in fp64 and its state; the micro-batches' loss is taken of all of them together unless `linear`."""
    training = tiny.training(loss=LOSSES[loss])
    current = tiny.fresh(training)
    current.net.double()
    family = dataclasses.replace(tiny.FAMILY, mean_over_images=lambda config: linear)
    plan = tiny.plan(current.net, training)
    return dataclasses.replace(plan, family=family, class_weights=torch.tensor(WEIGHTS)), current


def stepped(loss: str, linear: bool, rows: slice, parts: int) -> dict[str, Tensor]:
    """The weights after two steps of these rows, whose targets are mixed, over `parts` micro-batches."""
    plan, current = prepared(loss, linear)
    for number in range(2):
        images, labels = tiny.batch(number, SIZE)
        targets = F.one_hot(labels, tiny.CLASSES).double()
        targets = 0.7 * targets + 0.3 * targets.roll(1, 0)
        mine = [tensor[rows] for tensor in (images.double(), targets, labels)]
        some = split(len(mine[0]), parts)
        train_step(plan, current, [MicroBatch(*(tensor[part] for tensor in mine)) for part in some], Meter())
    return {name: value.clone() for name, value in current.net.state_dict().items()}


def _of_two(rank: int, folder: Path) -> None:
    rows = slice(0, 3) if rank == 0 else slice(3, SIZE)
    torch.save({case: stepped(*case, rows, 2) for case in CASES}, folder / f"{rank}.pt")


def same(found: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("loss", "linear"), CASES)
@pytest.mark.parametrize("parts", [2, 3])
def test_a_weighted_mean_does_not_depend_on_micro_batches(loss: str, linear: bool, parts: int) -> None:
    same(stepped(loss, linear, slice(None), parts), stepped(loss, True, slice(None), 1))


def test_a_weighted_mean_does_not_depend_on_ranks(tmp_path: Path) -> None:
    two_ranks.run(_of_two, tmp_path)
    for rank in (0, 1):
        for case, found in torch.load(tmp_path / f"{rank}.pt").items():
            same(found, stepped(*case, slice(None), 1))
