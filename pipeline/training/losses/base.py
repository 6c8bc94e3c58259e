"""What every kind of loss has in common. Letters: B images, K classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.family import Criterion

ClassWeight = Annotated[float, Field(gt=0, le=1e6)]


class LossConfig(Config):
    """How logits are compared with targets; each family calls it as the `criterion` of its own loss.

    A subclass fixes `kind` with a Literal, adds its own keys and defines `per_image`.
    """

    kind: str
    # the weight of each class's images, in the order of the classes; inverse-frequency: images / (classes x its images)
    class_weights: Annotated[tuple[ClassWeight, ...], Field(min_length=2)] | Literal["inverse-frequency"] | None = None

    @property
    def binary_targets(self) -> bool:
        """Whether every target becomes 0 or 1, so that label smoothing changes nothing."""
        return False

    def per_image(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each image, [B] in fp32 or more: logits [B, K], targets [B] classes or [B, K] probabilities.

        The targets are mixed and smoothed already.
        """
        raise NotImplementedError

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean of `per_image`, []; without class weights."""
        return self.per_image(logits, targets).mean()

    def weights(self, counts: Sequence[int]) -> Tensor | None:
        """The weight of each class, [K] f32, from the number of its training images; None without class weights.

        A class without images has weight 1. Raises ConfigError if the recipe's list has another length.
        """
        if self.class_weights is None:
            return None
        if self.class_weights == "inverse-frequency":
            per_class = sum(counts) / sum(count > 0 for count in counts)
            return torch.tensor([per_class / count if count else 1.0 for count in counts])
        if len(self.class_weights) != len(counts):
            key, given = "training.loss.class_weights", len(self.class_weights)
            raise ConfigError(f"{key} has {given} weights, the data {len(counts)} classes", key=key, subject=given)
        return torch.tensor(self.class_weights)

    def weighted(self, weights: Tensor, mean_weight: Tensor) -> Criterion:
        """The criterion of some rows of a batch: their mean, each image multiplied by its weight / mean_weight.

        mean_weight [] is that of the whole batch, of all ranks, so that the batch's loss is a weighted mean however it
        is divided. For classes as targets, cross-entropy is then torch's with `weight`. For probabilities it is not:
        torch weights each class's term, we weight the image by its expected weight, for every loss alike.
        """

        def criterion(logits: Tensor, targets: Tensor) -> Tensor:
            terms = self.per_image(logits, targets)
            return (terms * weights_of(targets, weights)).mean() / mean_weight.to(terms.dtype)

        return criterion


def weights_of(targets: Tensor, weights: Tensor) -> Tensor:
    """The weight of each image, [B]: of its class, or the expected one under its class probabilities."""
    return weights[targets] if targets.dim() == 1 else targets.to(weights.dtype) @ weights
