"""The cost of a recipe's net, measured before it is trained: MACs, parameters, and memory of a training step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline import cost
from pipeline import family as families
from pipeline.run_config import RunConfig
from tuning.events import NetCost


def of_recipe(config: RunConfig, num_classes: int) -> NetCost:
    """The cost of the net that the recipe builds, on one image of the evaluated size."""
    net = build(config, num_classes)
    side = config.data.side_for_eval
    parameters = sum(p.numel() for p in net.parameters())
    return NetCost(cost.measure(net, torch.zeros(1, 3, side, side)).macs, parameters)


def build(config: RunConfig, num_classes: int) -> nn.Module:
    """The recipe's net, untrained, on the CPU."""
    return families.find(config.family.name).build(config.family, num_classes)


def policies(config: RunConfig, num_classes: int) -> list[str]:
    """The names of the net's policies; the first is the one that is evaluated during training."""
    family = families.find(config.family.name)
    return [policy.name for policy in family.policies(config.family, build(config, num_classes))]


def memory_mib(net: nn.Module, side_px: int) -> float:
    """The memory in MiB that a training step of `net` holds for the backward pass of one image, without weights.

    Measured: what autograd saves in a forward of two images, each storage counted once, halved.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(torch.zeros(2, 3, side_px, side_px))
    del output
    for name, buffer in net.named_buffers():
        buffer.copy_(before[name])
    net.eval()
    return sum(saved.values()) / 2 / 2**20
