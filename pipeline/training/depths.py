"""The layers of a net by depth, and what follows from it: learning rates that fall with it, and hidden matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import nn

from pipeline.family import Layers

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ALIKE = 3  # as many children of one class make a container a row of blocks
MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LayersOf: TypeAlias = Callable[[], Layers]


def by_structure(net: nn.Module) -> Layers:
    """The layers of a net whose modules are registered in the order in which they run, the head last.

    A layer is a block of a Sequential, ModuleList or ModuleDict, with all within it, or a module outside of these; a
    module without a matrix, such as a norm, belongs to the layer before it, or to the first one.
    """
    layers: list[list[nn.Module]] = [[]]
    for module in _blocks(net):
        if _has_matrix(module) and any(map(_has_matrix, layers[-1])):
            layers.append([])
        layers[-1].append(module)
    return layers


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _blocks(module: nn.Module, *, outermost: bool = True) -> Iterator[nn.Module]:
    children = list(module.children())
    outermost = outermost and not isinstance(module, CONTAINERS)
    if children and (outermost or isinstance(module, CONTAINERS) or any(map(_is_row, children))):
        for child in children:
            yield from _blocks(child, outermost=outermost and len(children) == 1)
    else:
        yield module


def _is_row(module: nn.Module) -> bool:
    """Whether a container holds three or more blocks of one class, such as the layers of a transformer."""
    children = list(module.children()) if isinstance(module, CONTAINERS) else []
    return len(children) >= ALIKE and len({type(child) for child in children}) == 1 and any(children[0].children())


def lr_factors(layers: Layers, decay: float) -> dict[int, float]:
    """By the id of each parameter: decay ** (layers above its own); the last layer has factor 1.

    Source: BEiT (arXiv 2106.08254) and timm, where the first layer is the stem and the last one the head.
    """
    factors: dict[int, float] = {}
    for depth, modules in enumerate(reversed(layers)):
        factors |= {id(parameter): decay**depth for module in modules for parameter in module.parameters()}
    return factors


def hidden_matrices(net: nn.Module, layers: Layers) -> set[int]:
    """Ids of the weights of linear layers and ungrouped convolutions between the first layer and the last."""
    ends = [*layers[:1], *layers[1:][-1:]]
    outer = {id(parameter) for modules in ends for module in modules for parameter in module.parameters()}
    maps = [module for module in net.modules() if isinstance(module, MAPS) and getattr(module, "groups", 1) == 1]
    return {id(module.weight) for module in maps} - outer
