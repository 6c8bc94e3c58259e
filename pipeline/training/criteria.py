"""The criterion of each micro-batch: the recipe's loss, with class weights normalised over the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.family import Criterion
from pipeline.training.losses.base import weights_of
from pipeline.training.plan import TrainingPlan


def criterion_of_step(plan: TrainingPlan, targets: Sequence[Tensor]) -> Criterion:
    """The recipe's loss for any rows of this step's batch; targets: this rank's, by micro-batch.

    Collective if there are class weights: their sum over the batch's images depends on the targets alone, so it is
    known before the first forward, and the loss stays a mean over images.
    """
    loss = plan.training.loss
    if plan.class_weights is None:
        return loss.criterion
    mine = [weights_of(each, plan.class_weights).double().sum() for each in targets]
    return loss.weighted(plan.class_weights, ranks.rank_sum(sum(mine[1:], mine[0])) / plan.batch_size)


def together(criteria: Sequence[Criterion], rows: Sequence[int]) -> Criterion:
    """The criterion of several micro-batches as one: the mean over all their images."""
    if all(each is criteria[0] for each in criteria):
        return criteria[0]

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        parts = zip(criteria, rows, torch.split(logits, list(rows)), torch.split(targets, list(rows)), strict=True)
        losses = [each(some, truth) * (count / len(logits)) for each, count, some, truth in parts]
        return sum(losses[1:], losses[0])

    return criterion
