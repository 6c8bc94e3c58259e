"""Maps the weight names of the code released with arXiv 1711.11503, and of torchvision, to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.families.convnet_aig.model import Aig, AigConfig, GatedBlock
from pipeline.weights import Loaded, load

PARTS = {"conv1": "residual.0", "bn1": "residual.1", "conv2": "residual.3", "bn2": "residual.4"}
PARTS |= {"conv3": "residual.6", "bn3": "residual.7", "shortcut": "shortcut", "downsample": "shortcut"}
PARTS |= {"fc1": "gate.fc1", "fc1bn": "gate.fc1bn", "fc2": "gate.fc2"}
STEM = {"conv1": "stem.0", "bn1": "stem.1", "linear": "fc", "fc": "fc"}


def load_pretrained(config: AigConfig, net: nn.Module, tensors: Mapping[str, Tensor], new_head: bool = False) -> Loaded:
    """Fills `net` from our weights, from the released code's, or from torchvision's ResNet of that depth.

    With torchvision's weights the gates keep their initial values; otherwise every tensor is used. Raises ConfigError
    as `load` does, or naming the blocks that have a gate there but not here.
    """
    assert isinstance(net, Aig)
    if any(name.startswith("blocks.") for name in tensors):
        return load(net, tensors, head=is_head, new_head=new_head)
    first = _first_blocks(tensors)
    ours = {our_name(name, first): tensor for name, tensor in tensors.items()}
    gated = any(".gate." in name for name in ours)
    fixed = [
        str(number)
        for number, block in enumerate(net.blocks)
        if isinstance(block, GatedBlock) and block.gate is None and f"blocks.{number}.gate.fc2.weight" in ours
    ]
    if fixed:
        raise ConfigError(
            f"these weights have gates in blocks {', '.join(fixed)}, which have none here because their target rate is "
            "1; the released code samples them like any other: import with family.schedule=uniform and a "
            "family.target_rate below 1",
            key="family.target_rate",
            subject=", ".join(fixed),
        )
    return load(net, ours, lambda name: ".gate." in name and not gated, head=is_head, new_head=new_head)


def is_head(name: str) -> bool:
    """Whether the name is of the last layer."""
    return name.startswith("fc.")


def _first_blocks(tensors: Mapping[str, Tensor]) -> list[int]:
    """For each stage (torchvision's layerN), the number of its first block in the whole net."""
    found = [re.match(r"layer(\d+)\.(\d+)\.", name) for name in tensors]
    places = {(int(match[1]), int(match[2])) for match in found if match}
    layers = sorted({layer for layer, _ in places})
    return [sum(1 for layer, _ in places if layer < start) for start in layers]


def our_name(name: str, first: Sequence[int]) -> str:
    """Our name of an external tensor; any other name is returned unchanged. first: see `_first_blocks`."""
    match = re.fullmatch(r"layer(\d+)\.(\d+)\.(\w+)\.(.+)", name)
    if match is None:
        top, _, rest = name.partition(".")
        return f"{STEM.get(top, top)}.{rest}"
    layer, number, part, rest = match.groups()
    return f"blocks.{first[int(layer) - 1] + int(number)}.{PARTS.get(part, part)}.{rest}"
