"""LAMB: Adam whose step on each parameter tensor is proportional to that tensor's norm, for large batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from pipeline.config import BelowOne, meant
from pipeline.training.optimizers.base import OptimizerConfig, ParamGroup, moderate
from pipeline.training.optimizers.moments import GroupOptimizer, adam_updates, moved_moments


class LambConfig(OptimizerConfig):
    """Source: You et al., ICLR 2020 (arXiv 1904.00962), algorithm 2, with its bias correction and phi(x) = x.

    Tensors without weight decay, by default norms and biases, take Adam's step: so does timm's Lamb, by which "ResNet
    strikes back" (arXiv 2110.00476) trained; the paper scales every tensor's. timm also clips the gradient's norm to
    1, which here is `training.clip_norm: 1.0`. RSB A3: lr 8e-3 at batch 2048, weight decay 0.02.
    """

    kind: Literal["lamb"] = "lamb"
    lr: Annotated[float, Field(gt=0), meant(moderate)] = 5e-3
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.02
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    trust_clip: bool = False  # no tensor's step is larger than Adam's: the ratio of norms is at most 1

    def build(self, groups: Sequence[ParamGroup]) -> Optimizer:
        settings = {"betas": self.betas, "eps": self.eps, "trust_clip": self.trust_clip}
        return Lamb([{**group} for group in groups], settings)


class Lamb(GroupOptimizer):
    """w <- w - lr · |w| / |u| · u with u = Adam's update + weight_decay · w; the ratio is 1 where a norm is 0.

    A few kernels for all tensors of a group, and no wait for the device.
    """

    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        moments = moved_moments(self, parameters, group["betas"])
        updates = adam_updates(moments, group["betas"], group["eps"])
        if group["weight_decay"]:
            torch._foreach_add_(updates, moments.parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, trust_ratios(moments.parameters, updates, clip=group["trust_clip"]))
        torch._foreach_add_(moments.parameters, updates, alpha=-group["lr"])


def trust_ratios(weights: Sequence[Tensor], updates: Sequence[Tensor], *, clip: bool) -> list[Tensor]:
    """|w| / |u| of each tensor, []; 1 where either norm is 0; at most 1 if `clip`."""
    of_weights, of_updates = (torch.stack(torch._foreach_norm(list(each))) for each in (weights, updates))
    ratios = torch.where((of_weights > 0) & (of_updates > 0), of_weights / of_updates, 1.0)
    return list((ratios.clamp(max=1.0) if clip else ratios).unbind())
