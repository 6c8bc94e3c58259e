"""Adam's moments of many parameters at once, for optimizers that torch does not have."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Moments:
    """Parameters with gradients, by the same place: gradients and their first and second moments."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[int]  # updates of each parameter, with this one: some have no gradient in some steps


class GroupOptimizer(Optimizer):
    """An optimizer that moves the parameters of a group together."""

    def __init__(self, groups: Sequence[dict[str, object]], settings: dict[str, object]) -> None:
        super().__init__(groups, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            if parameters := with_gradients(group["params"]):
                self._move(group, parameters)

    @abstractmethod
    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Moves these parameters of a group, one or more, which have gradients."""


def with_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that have a gradient."""
    return [parameter for parameter in parameters if parameter.grad is not None]


def moved_moments(optimizer: Optimizer, parameters: Sequence[Tensor], betas: tuple[float, float]) -> Moments:
    """The moments of these parameters, one or more, after their gradients; kept in `optimizer.state` as by AdamW."""
    slots = [optimizer.state[parameter] for parameter in parameters]
    for parameter, slot in zip(parameters, slots, strict=True):
        if not slot:
            slot["step"] = torch.zeros(())
            slot["exp_avg"], slot["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    first, second = [slot["exp_avg"] for slot in slots], [slot["exp_avg_sq"] for slot in slots]
    torch._foreach_add_([slot["step"] for slot in slots], 1)
    torch._foreach_lerp_(first, gradients, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, gradients, gradients, 1 - betas[1])
    return Moments(list(parameters), gradients, first, second, [int(slot["step"].item()) for slot in slots])


def adam_updates(moments: Moments, betas: tuple[float, float], eps: float) -> list[Tensor]:
    """m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) of each parameter, in new tensors.

    Source: Kingma & Ba, ICLR 2015 (arXiv 1412.6980), algorithm 1.
    """
    denominators = torch._foreach_sqrt(moments.second)
    torch._foreach_div_(denominators, [math.sqrt(1 - betas[1] ** step) for step in moments.steps])
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(moments.first, [1 - betas[0] ** step for step in moments.steps])
    torch._foreach_div_(updates, denominators)
    return list(updates)
