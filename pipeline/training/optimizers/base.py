"""The base of all optimizers' settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypedDict

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from pipeline.config import Config, meant

MOST_LR = 100.0


class ParamGroup(TypedDict):
    """A parameter group of torch with three entries of ours.

    full_lr: the learning rate at factor 1. outside_ddp: whether DDP ignores these parameters. hidden: whether they are
    matrices within the net, which only an optimizer with `parts_matrices` has in groups of their own.
    """

    params: list[nn.Parameter]
    lr: float
    full_lr: float
    weight_decay: float
    outside_ddp: bool
    hidden: bool


def fused(groups: Sequence[ParamGroup]) -> bool | None:
    """torch's argument of this name: one kernel for many parameters on a GPU, torch's default elsewhere.

    Never for parameters outside DDP: fused optimizers do not raise the version of what they change, by which a net
    notices that it has another shape.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    apart = any(group["outside_ddp"] for group in groups)
    return True if all(p.is_cuda and p.is_floating_point() for p in parameters) and not apart else None


def moderate(lr: float) -> str | None:
    """A rule for `meant`: a learning rate that a training survives."""
    return None if lr <= MOST_LR else f"no training survives a learning rate above {MOST_LR:g}"


class OptimizerConfig(Config):
    """One optimizer; the learning rate belongs to the global batch and never changes with the number of workers.

    A subclass fixes `kind` with a Literal, adds its own keys and defines `build`.
    """

    kind: str
    lr: Annotated[float, Field(gt=0), meant(moderate)] = 0.1
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 1e-4

    @property
    def parts_matrices(self) -> bool:
        """Whether the matrices within the net are in groups of their own."""
        return False

    def lr_of(self, *, hidden: bool) -> float:
        """The learning rate of the matrices within the net, or of other parameters."""
        return self.lr

    def build(self, groups: Sequence[ParamGroup]) -> Optimizer:
        """The optimizer of torch over these groups, each with its own rate and weight decay."""
        raise NotImplementedError
