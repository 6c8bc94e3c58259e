"""TrainState: everything that changes while a net is trained, but no generators: each step seeds its own."""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import ContractError
from pipeline.family import AnyFamily, FamilyConfig
from pipeline.training import optim
from pipeline.training.config import EmaWarmup, TrainingConfig

if TYPE_CHECKING:
    from pipeline.data.bad import BadState


EMA_WARMUPS: Mapping[EmaWarmup, Callable[[int], float]] = {
    "ramp": lambda step: (1 + step) / (10 + step),
    "power": lambda step: 1 - (1 + step) ** (-2 / 3),
    "none": lambda step: 1.0,
}


class SavedState(TypedDict):
    """A TrainState as tensors and plain values; optimizers by name, as their state_dict; bad: as `BadImages.state`."""

    net: dict[str, Tensor]
    ema: NotRequired[dict[str, Tensor]]
    optimizers: dict[str, dict[str, object]]
    step: int
    images_seen: int
    bad: NotRequired[BadState]


@dataclass
class TrainState:
    """The net itself (never a DDP or compiled wrapper), its moving average if any, the optimizers and the progress."""

    net: nn.Module
    ema: nn.Module | None
    optimizers: dict[str, Optimizer]
    step: int = 0  # optimizer steps taken; the next batch is the batch of this number
    images_seen: int = 0

    @property
    def best_net(self) -> nn.Module:
        """The net to evaluate and publish: the moving average where there is one."""
        return self.net if self.ema is None else self.ema


def fresh(
    family: AnyFamily,
    config: FamilyConfig,
    training: TrainingConfig,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    channels_last: bool = False,
    prepare: Callable[[nn.Module], object] = lambda net: None,
) -> TrainState:
    """The state before the first step; its weights depend only on `seed`, so they are equal on every rank and device.

    `prepare` gets the net on the CPU, e.g. to load other weights into it.
    """
    torch.manual_seed(seed_of(seed, "weights"))
    net = family.build(config, num_classes)
    prepare(net)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(device).to(memory_format=layout)
    groups = family.groups(config, net)
    if set(groups) != set(family.optimizers(config)):
        raise ContractError(
            f"the family's optimizers are {', '.join(family.optimizers(config))}, its groups {', '.join(groups)}",
            key="optimizers",
        )
    layers = None if family.layers is None else partial(family.layers, config, net)
    optimizers = optim.build(groups, net, training, layers)
    return TrainState(net=net, ema=_copy(net) if training.ema_decay else None, optimizers=optimizers)


def _copy(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float, step: int, warmup: EmaWarmup = "ramp") -> None:
    """Moves `ema` towards `net` by 1 - the decay of this step, which grows to `decay` and so discounts the first steps.

    warmup: ramp, min(decay, (1 + step)/(10 + step)); power, min(decay, 1 - (1 + step)^(-2/3)), which forgets more
    slowly, from timm's ModelEmaV3; none, `decay` from the first step.
    """
    weight = 1 - min(decay, EMA_WARMUPS[warmup](step))
    theirs = dict(_tensors(net))
    pairs = [(mine, theirs[name].to(mine.dtype)) for name, mine in _tensors(ema)]
    averaged = [pair for pair in pairs if pair[0].is_floating_point()]
    copied = [pair for pair in pairs if not pair[0].is_floating_point()]
    torch._foreach_lerp_([mine for mine, _ in averaged], [other for _, other in averaged], weight)
    if copied:
        torch._foreach_copy_([mine for mine, _ in copied], [other for _, other in copied])


def _tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    return [*net.named_parameters(), *net.named_buffers()]


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`, for a generator with one owner and one purpose."""
    packed = b"".join(struct.pack("<q", p) if isinstance(p, int) else p.encode() + b"\0" for p in parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def to_mapping(state: TrainState) -> SavedState:
    """`state` as tensors and plain values, sharing memory with it: {net, ema?, optimizers, step, images_seen}."""
    mapping: SavedState = {
        "net": state.net.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()},
        "step": state.step,
        "images_seen": state.images_seen,
    }
    if state.ema is not None:
        mapping["ema"] = state.ema.state_dict()
    return mapping


def _laid_out(value: object, parameter: Tensor) -> object:
    """An optimizer's moment in the memory format of its parameter, which makes steps faster; other values unchanged."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _with_settings_of(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state_dict with the settings of `optimizer`, by which torch decides where its counts of steps go."""
    ours = ({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
    groups = zip(saved["param_groups"], ours, strict=True)
    return {**saved, "param_groups": [{**theirs, **settings} for theirs, settings in groups]}


def restore(state: TrainState, mapping: SavedState) -> None:
    """Loads the mapping of `to_mapping` into `state`, in place and strictly.

    Optimizers get their moments back but keep their settings, which the recipe may have been allowed to change.
    """
    state.net.load_state_dict(mapping["net"])
    if state.ema is not None:
        state.ema.load_state_dict(mapping.get("ema", mapping["net"]))
    for name, optimizer in state.optimizers.items():
        optimizer.load_state_dict(_with_settings_of(optimizer, mapping["optimizers"][name]))
        for parameter, moments in optimizer.state.items():
            optimizer.state[parameter] = {key: _laid_out(value, parameter) for key, value in moments.items()}
    state.step, state.images_seen = mapping["step"], mapping["images_seen"]
