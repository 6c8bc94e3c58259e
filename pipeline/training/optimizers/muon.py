"""Muon for the matrices within a net and AdamW for the rest, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from pipeline.config import BelowOne, meant
from pipeline.training.optimizers.base import OptimizerConfig, ParamGroup, moderate
from pipeline.training.optimizers.moments import GroupOptimizer, adam_updates, moved_moments

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the quintic a·X + b·XXᵀX + c·(XXᵀ)²X
LEAST_NORM = 1e-7


class MuonConfig(OptimizerConfig):
    """Momentum whose matrix is made orthogonal: every direction of a layer's input and output moves by as much.

    By Muon move the weights of linear layers and of convolutions, as [C', C·k·k], but those that see the images, those
    that give the logits, and convolutions in groups, whose rows do not act on the same input. By AdamW move all others:
    lr · adamw_lr_factor, betas, and the same weight decay. torch's own Muon takes 2-D parameters only, one at a time,
    and its iteration is private; ours has its formulas, and iterates on all matrices of one shape at once. It computes
    in bf16 on a GPU, as torch does, and in the weights' type on a CPU, most of which multiply bf16 slowly.
    Source: Jordan et al., 2024 (kellerjordan.github.io/posts/muon); Liu et al., 2025 (arXiv 2502.16982) for
    match_rms_adamw.
    """

    kind: Literal["muon"] = "muon"
    lr: Annotated[float, Field(gt=0), meant(moderate)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    momentum: BelowOne = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Field(ge=1, le=20)] = 5  # of Newton-Schulz
    # a matrix [r, c] moves by lr times: 0.2·sqrt(max(r, c)), which suits AdamW's rates, or sqrt(max(1, r/c)), Jordan's
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)  # AdamW's, for the other parameters
    adamw_lr_factor: Annotated[float, Field(gt=0, le=1e4)] = 1.0  # AdamW's rate over lr

    @property
    def parts_matrices(self) -> bool:
        """Whether the hidden matrices are in groups of their own."""
        return True

    def lr_of(self, *, hidden: bool) -> float:
        """The learning rate of hidden matrices, or of other parameters."""
        return self.lr if hidden else self.lr * self.adamw_lr_factor

    def build(self, groups: Sequence[ParamGroup]) -> Optimizer:
        keys = ("momentum", "nesterov", "iterations", "scale", "betas")
        return Muon([{**group} for group in groups], {key: getattr(self, key) for key in keys})


class Muon(GroupOptimizer):
    """Groups with `hidden` move by Muon, the others by AdamW."""

    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        (self._by_muon if group["hidden"] else self._by_adamw)(group, parameters)

    def _by_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        updates = adam_updates(moved_moments(self, parameters, group["betas"]), group["betas"], 1e-8)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _by_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        slots = [self.state[parameter] for parameter in parameters]
        for parameter, slot in zip(parameters, slots, strict=True):
            if not slot:
                slot["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [slot["momentum_buffer"] for slot in slots]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        pairs = sorted(zip(parameters, updates, strict=True), key=lambda pair: tuple(pair[0].shape))
        for shape, same in groupby(pairs, key=lambda pair: tuple(pair[0].shape)):
            weights, matrices = zip(*same, strict=True)
            moves = orthogonal(torch.stack([matrix.flatten(1) for matrix in matrices]), group["iterations"])
            rate = group["lr"] * scale_of(shape[0], math.prod(shape[1:]), group["scale"])
            torch._foreach_add_(list(weights), [move.view(shape).to(weights[0].dtype) for move in moves], alpha=-rate)


def scale_of(rows: int, columns: int, rule: str) -> float:
    """What a matrix [rows, columns] moves by, for a learning rate of 1; see `MuonConfig.scale`."""
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


def orthogonal(matrices: Tensor, iterations: int) -> Tensor:
    """matrices [n, r, c] with singular values brought near 1, in 0.7 to 1.2, by Newton and Schulz's iteration."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
