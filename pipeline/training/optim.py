"""Optimizers from a family's groups, and learning rates as closed forms of the epoch, so that they need no state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from pipeline.errors import ConfigError, ContractError
from pipeline.family import Params
from pipeline.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


def lr_factor(schedule: ScheduleConfig, epoch: float, epochs: float) -> float:
    """What the learning rate is multiplied by at `epoch` (a fraction counts) of `epochs`.

    Warm-up rises linearly from the first step's share; cosine falls from 1 at its end to `final_lr` at `epochs`.
    """
    if epoch < schedule.warmup_epochs:
        return max(epoch / schedule.warmup_epochs, 1e-3)
    if schedule.kind == "steps":
        return float(schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones))
    if schedule.kind == "constant":
        return 1.0
    done = min(1.0, (epoch - schedule.warmup_epochs) / max(epochs - schedule.warmup_epochs, 1e-9))
    return schedule.final_lr + (1 - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def build(groups: Mapping[str, Sequence[Params]], net: nn.Module, training: TrainingConfig) -> dict[str, Optimizer]:
    """One optimizer per name in `groups`; "main" takes `training.optimizer`, others `training.other_optimizers`.

    Raises ContractError if the groups do not partition the net's trainable parameters, ConfigError if an optimizer
    that the family asks for has no settings.
    """
    _assert_partition(groups, net)
    plain = {id(p) for p in norms_and_biases(net)} if not training.decay_norms_and_biases else set()
    return {name: _optimizer(_settings(name, training), list(params), plain) for name, params in groups.items()}


def _settings(name: str, training: TrainingConfig) -> OptimizerConfig:
    if name == "main":
        return training.optimizer
    if name not in training.other_optimizers:
        known = ", ".join(training.other_optimizers) or "none"
        raise ConfigError(f"training.other_optimizers.{name}: this family needs it; given: {known}")
    return training.other_optimizers[name]


def _optimizer(settings: OptimizerConfig, params: Sequence[Params], plain: set[int]) -> Optimizer:
    groups = list(_torch_groups(settings, params, plain))
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    nesterov = settings.nesterov and settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)


def _torch_groups(settings: OptimizerConfig, params: Sequence[Params], plain: set[int]) -> Iterator[dict[str, object]]:
    """Each Params as up to two torch groups: with and without weight decay. `full_lr` is the rate at factor 1."""
    for group in params:
        decayed = [p for p in group.parameters if group.decay and id(p) not in plain]
        chosen = {id(p) for p in decayed}
        bare = [p for p in group.parameters if id(p) not in chosen]
        full = settings.lr * group.lr_factor
        for members, decay in ((decayed, settings.weight_decay), (bare, 0.0)):
            if members:
                yield {
                    "params": members,
                    "lr": full,
                    "full_lr": full,
                    "weight_decay": decay,
                    "apart": group.outside_ddp,
                }


def is_apart(optimizer: Optimizer) -> bool:
    """Whether its parameters stay out of DDP; `build` lets an optimizer hold one kind alone."""
    return bool(optimizer.param_groups[0]["apart"])


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameters_apart(optimizers: Mapping[str, Optimizer]) -> list[nn.Parameter]:
    """Of all optimizers, the parameters that stay out of DDP."""
    return [p for optimizer in optimizers.values() if is_apart(optimizer) for p in parameters_of(optimizer)]


def norms_and_biases(net: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of normalisation layers and every bias vector, found by the modules that own them."""
    for module in net.modules():
        if isinstance(module, NORMS):
            yield from module.parameters(recurse=False)
        elif isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            yield bias


def _assert_partition(groups: Mapping[str, Sequence[Params]], net: nn.Module) -> None:
    mixed = [name for name, params in groups.items() if len({group.outside_ddp for group in params}) > 1]
    if mixed:
        raise ContractError(f"optimizer {mixed[0]}: parameters apart need an optimizer to themselves")
    grouped = [id(p) for params in groups.values() for group in params for p in group.parameters]
    trainable = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
    missing = [name for key, name in trainable.items() if key not in set(grouped)]
    if missing or len(grouped) != len(set(grouped)) or set(grouped) - set(trainable):
        raise ContractError(
            f"the family's groups must hold each trainable parameter once: {len(grouped)} entries for "
            f"{len(trainable)} parameters; missing: {', '.join(missing[:5]) or 'none'}"
        )


def set_lr(optimizers: Mapping[str, Optimizer], factor: float) -> float:
    """Sets every group's rate to its full rate times `factor`; returns the first group's."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
    first = next(iter(optimizers.values())).param_groups[0]["lr"]
    return float(first)
