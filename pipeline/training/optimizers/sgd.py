"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch.optim import Optimizer

from pipeline.config import BelowOne
from pipeline.errors import JsonValue
from pipeline.training.optimizers.base import OptimizerConfig, ParamGroup, fused


class SgdConfig(OptimizerConfig):
    """torch.optim.SGD."""

    kind: Literal["sgd"] = "sgd"
    momentum: BelowOne = 0.9
    nesterov: bool = False

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason."""
        return {"nesterov": "momentum is 0"} if values["momentum"] == 0 else {}

    def build(self, groups: Sequence[ParamGroup]) -> Optimizer:
        nesterov = self.nesterov and self.momentum > 0
        return torch.optim.SGD(
            [{**group} for group in groups],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=nesterov,
            fused=fused(groups),
        )
