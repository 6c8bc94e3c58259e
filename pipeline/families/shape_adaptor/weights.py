"""Maps external weight names to ours: torchvision's, and those of the code released with arXiv 2008.00892.

A released net has the layers of ours, of each kind in the same order, and its alphas have "alpha" in their names. So
layers that have other names than ours are paired by their order, and must have the same shapes. Letters: N adaptors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.families.shape_adaptor.bodies import RESNET_STAGES, VGG_POOLED, VGG_WIDTHS, Kind
from pipeline.families.shape_adaptor.model import ShapeConfig, places
from pipeline.weights import Loaded, load

ALPHAS = "shape.alphas"
KINDS = {4: "convolution", 1: "norm", 2: "linear"}  # by the dimensions of a layer's weight
OURS = ("body.", "shape.")


def load_pretrained(
    config: ShapeConfig, net: nn.Module, tensors: Mapping[str, Tensor], new_head: bool = False
) -> Loaded:
    """Fills `net` from our weights, from torchvision's, or from a net of the released code; uses every tensor.

    Where the weights have no alphas, ours keep their initial values. torchvision's VGG has another kind of head, which
    `new_head` leaves out. Raises ConfigError as `load` does, or if the alphas are not those of the net's adaptors.
    """
    ours = any(name.startswith(OURS) for name in tensors)
    named = dict(tensors) if ours else _renamed(config, net, tensors)
    return load(net, named, lambda name: not ours and name == ALPHAS, head=is_head, new_head=new_head)


def is_head(name: str) -> bool:
    """Whether the name is of the linear layers behind the maps."""
    return name.startswith(("body.fc.", "body.classifier."))


def _renamed(config: ShapeConfig, net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """External tensors under our names; those of layers that have no counterpart under their own, after `body.`."""
    learned = sorted((name for name in tensors if "alpha" in name), key=_in_order)
    rest = {name: value for name, value in tensors.items() if name not in learned}
    ours = {name.removeprefix("body."): value for name, value in net.state_dict().items() if name.startswith("body.")}
    pairs = _pairs(_layers(rest), _layers(ours), dict(_vgg_names(config.net)) if "vgg" in config.net else {})
    named = {f"body.{pairs.get(layer, layer)}.{kind}": value for layer, kind, value in _parts(rest)}
    return named | ({ALPHAS: _alphas(config, tensors, learned)} if learned else {})


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        yield layer, kind, value


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the layers of each kind, in the order in which they run."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS.values()}
    for layer, kind, value in _parts(tensors):
        if kind == "weight" and value.dim() in KINDS:
            found[KINDS[value.dim()]].append(layer)
    return {kind: sorted(layers, key=_in_order) for kind, layers in found.items()}


def _pairs(
    theirs: Mapping[str, Sequence[str]], ours: Mapping[str, Sequence[str]], renamed: Mapping[str, str]
) -> dict[str, str]:
    """Our layer for each of theirs: by name if all names are known, else by order if the counts are equal."""
    pairs: dict[str, str] = {}
    for kind, layers in theirs.items():
        named = [renamed.get(layer, layer) for layer in layers]
        by_name = set(named) == set(ours[kind]) or len(named) != len(ours[kind])
        pairs |= zip(layers, named if by_name else ours[kind], strict=True)
    return pairs


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Sorts names as their layers run: numbers by value; in a block, its own convolutions and norms come first."""
    parts = name.split(".")
    return [(not re.match(r"(conv|bn)\d", part), int(part) if part.isdigit() else -1, part) for part in parts]


def _alphas(config: ShapeConfig, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The alphas [N]. Raises ConfigError if their number or their places are not those of the net's adaptors."""
    names = sorted(names, key=lambda name: ("." in name, _in_order(name)))  # those of a stem stand at the top
    found = torch.cat([tensors[name].flatten() for name in names])
    there, here = [_place(config, name) for name in names], places(config)
    if len(found) == len(here) and (None in there or len(there) < len(here) or tuple(there) == here):
        return found
    where = f" at layers {there}" if len(there) == len(found) and None not in there else ""
    raise ConfigError(
        f"these weights have {len(found)} adaptors{where}, {config.net} in mode {config.mode} has {len(here)} at "
        f"layers {list(here)}; set family.mode, family.side_px and family.adaptors as they were trained",
        key="family.mode",
        subject=len(found),
    )


def _place(config: ShapeConfig, name: str) -> int | None:
    """The number of the layer that an alpha's name belongs to, as `places` counts them; None if it does not say."""
    if "." not in name:
        return None if "vgg" in config.net else 0
    block, feature = re.match(r"layer(\d)\.(\d+)\.", name), re.match(r"features\.(\d+)\.", name)
    if block is not None:
        return 1 + sum(RESNET_STAGES[: int(block[1]) - 1]) + int(block[2])
    return int(feature[1]) if feature is not None and config.net == "mobilenet_v2" else None


def _vgg_names(kind: Kind) -> Iterator[tuple[str, str]]:
    """Pairs of torchvision's `features.<layer>` and our `convs.<number>.<part>`; it numbers ReLUs and poolings too."""
    layer, parts = 0, 2 if kind == "vgg16_bn" else 1
    for number in range(len(VGG_WIDTHS)):
        for part in range(parts):
            yield f"features.{layer + part}", f"convs.{number}.{part}"
        layer += parts + 1 + (number in VGG_POOLED)
