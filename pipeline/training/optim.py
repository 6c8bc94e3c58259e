"""Builds optimizers from a family's groups and sets their learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.optim import Optimizer

from pipeline.errors import ConfigError, ContractError
from pipeline.family import Params
from pipeline.training.config import TrainingConfig
from pipeline.training.depths import LayersOf, by_structure, hidden_matrices, lr_factors
from pipeline.training.optimizers.base import OptimizerConfig, ParamGroup

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm),
)


def build(
    groups: Mapping[str, Sequence[Params]], net: nn.Module, training: TrainingConfig, layers: LayersOf | None = None
) -> dict[str, Optimizer]:
    """One optimizer per name in `groups`; "main" takes `training.optimizer`, others `training.other_optimizers`.

    layers: the net's, by depth; by default those of its structure. Raises ContractError if the groups do not partition
    the net's trainable parameters, ConfigError if the recipe has no settings for one of the family's optimizers.
    """
    _assert_partition(groups, net)
    plain = {id(p) for p in norms_and_biases(net)} if not training.decay_norms_and_biases else set()
    found = layers or partial(by_structure, net)
    decay = training.layer_decay
    factors = lr_factors(found(), decay) if decay is not None else {}
    optimizers: dict[str, Optimizer] = {}
    for name, params in groups.items():
        settings = _settings(name, training)
        hidden = hidden_matrices(net, found()) if settings.parts_matrices else set()
        traits = _Traits(plain, hidden, {} if any(group.outside_ddp for group in params) else factors)
        optimizers[name] = settings.build(list(_torch_groups(settings, params, traits)))
        if settings.parts_matrices and not any(group["hidden"] for group in optimizers[name].param_groups):
            raise _without_matrices(name, settings.kind)
    return optimizers


@dataclass(frozen=True)
class _Traits:
    """Ids of parameters without weight decay, of hidden matrices, and the factors of learning rates, 1 if missing."""

    plain: Set[int]
    hidden: Set[int]
    lr_factors: Mapping[int, float]

    def of(self, parameter: nn.Parameter, *, decay: bool) -> tuple[bool, bool, float]:
        key = id(parameter)
        return not (decay and key not in self.plain), key not in self.hidden, self.lr_factors.get(key, 1.0)


def _without_matrices(name: str, kind: str) -> ConfigError:
    section = "optimizer" if name == "main" else f"other_optimizers.{name}"
    key = f"training.{section}.kind"
    return ConfigError(
        f"{key} (={kind}): there is no linear layer or convolution between the first and the last layer of what it "
        "moves; take adamw",
        key=key,
        subject=kind,
    )


def _settings(name: str, training: TrainingConfig) -> OptimizerConfig:
    if name == "main":
        return training.optimizer
    if name not in training.other_optimizers:
        known = ", ".join(training.other_optimizers) or "none"
        key = f"training.other_optimizers.{name}"
        raise ConfigError(f"{key}: this family needs it; given: {known}", key=key, subject=known)
    return training.other_optimizers[name]


def _torch_groups(settings: OptimizerConfig, params: Sequence[Params], traits: _Traits) -> Iterator[ParamGroup]:
    """Each Params as torch groups of equal traits, those with weight decay first."""
    for group in params:
        alike: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
        for parameter in group.parameters:
            alike.setdefault(traits.of(parameter, decay=group.decay), []).append(parameter)
        for (bare, shallow, factor), members in sorted(alike.items(), key=lambda item: item[0]):
            full = settings.lr_of(hidden=not shallow) * group.lr_factor * factor
            yield ParamGroup(
                params=members,
                lr=full,
                full_lr=full,
                weight_decay=0.0 if bare else settings.weight_decay,
                outside_ddp=group.outside_ddp,
                hidden=not shallow,
            )


def is_outside_ddp(optimizer: Optimizer) -> bool:
    """Whether DDP ignores its parameters; `build` lets an optimizer hold only parameters of one kind."""
    return bool(optimizer.param_groups[0]["outside_ddp"])


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameters_outside_ddp(optimizers: Mapping[str, Optimizer]) -> list[nn.Parameter]:
    """The parameters of all optimizers that DDP ignores."""
    return [p for optimizer in optimizers.values() if is_outside_ddp(optimizer) for p in parameters_of(optimizer)]


def norms_and_biases(net: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of normalisation layers and every bias vector, by the modules that own them."""
    for module in net.modules():
        if isinstance(module, NORMS):
            yield from module.parameters(recurse=False)
        elif isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            yield bias


def _assert_partition(groups: Mapping[str, Sequence[Params]], net: nn.Module) -> None:
    mixed = [name for name, params in groups.items() if len({group.outside_ddp for group in params}) > 1]
    if mixed:
        message = f"optimizer {mixed[0]}: parameters outside DDP need an optimizer of their own"
        raise ContractError(message, key="groups", subject=mixed[0])
    grouped = [id(p) for params in groups.values() for group in params for p in group.parameters]
    trainable = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
    missing = [name for key, name in trainable.items() if key not in set(grouped)]
    if missing or len(grouped) != len(set(grouped)) or set(grouped) - set(trainable):
        raise ContractError(
            f"the family's groups must hold each trainable parameter once: {len(grouped)} entries for "
            f"{len(trainable)} parameters; missing: {', '.join(missing[:5]) or 'none'}",
            key="groups",
            subject=", ".join(missing[:5]),
        )


def set_lr(optimizers: Mapping[str, Optimizer], factor: float) -> float:
    """Sets every group's rate to its full rate times `factor`; returns the first group's."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
    first = next(iter(optimizers.values())).param_groups[0]["lr"]
    return float(first)
