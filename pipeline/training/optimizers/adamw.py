"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.optim import Optimizer

from pipeline.config import BelowOne
from pipeline.training.optimizers.base import OptimizerConfig, ParamGroup, fused


class AdamWConfig(OptimizerConfig):
    """torch.optim.AdamW. Source: Loshchilov & Hutter, ICLR 2019 (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)

    def build(self, groups: Sequence[ParamGroup]) -> Optimizer:
        return torch.optim.AdamW([{**group} for group in groups], lr=self.lr, betas=self.betas, fused=fused(groups))
