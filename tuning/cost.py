"""What a recipe's net costs before it is trained: MACs, parameters, memory of a training step, and its maps' sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import cost as costs
from pipeline import family as families
from pipeline.run_config import RunConfig
from tuning.config import Bounds


@dataclass(frozen=True)
class NetCost:
    """Of one image in the whole net: MACs and parameters."""

    macs: int
    parameters: int

    def refusal(self, bounds: Bounds) -> str | None:
        """Which bound it breaks, in words; None where it breaks none."""
        found = {"max_gmacs": self.macs / 1e9, "max_mparameters": self.parameters / 1e6}
        for key, amount in found.items():
            most = getattr(bounds, key)
            if most is not None and amount > most:
                return f"{key}: {amount:.4g} above {most:g}"
        return None


def of_recipe(config: RunConfig, num_classes: int) -> NetCost:
    """Measured on the net that the recipe builds."""
    net = build(config, num_classes)
    parameters = sum(p.numel() for p in net.parameters())
    return NetCost(costs.measure(net, _image(config)).macs, parameters)


def build(config: RunConfig, num_classes: int) -> nn.Module:
    return families.find(config.family.name).build(config.family, num_classes)


def policies(config: RunConfig, num_classes: int) -> list[str]:
    """Names of the net's policies; the first is the one that is evaluated while training."""
    family = families.find(config.family.name)
    return [policy.name for policy in family.policies(config.family, build(config, num_classes))]


def memory_mib(net: nn.Module, side_px: int) -> float:
    """MiB that a training step of `net` keeps of one image for its backward pass; weights do not count.

    Measured: what autograd saves in a forward of two images, each piece of memory once, halved.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net(torch.zeros(2, 3, side_px, side_px))
    del output
    for name, buffer in net.named_buffers():
        buffer.copy_(before[name])
    net.eval()
    return sum(kept.values()) / 2 / 2**20


def profile(net: nn.Module, side_px: int) -> list[int]:
    """The longer side in pixels of what each convolution gives, in the order in which they run."""
    sides: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        sides.append(max(output.shape[-2:]))

    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, side_px, side_px))
    finally:
        for hook in hooks:
            hook.remove()
    return sides


def _image(config: RunConfig) -> Tensor:
    return torch.zeros(1, 3, config.data.side_for_eval, config.data.side_for_eval)
