"""The names in EfficientNet files that follow TensorFlow's blocks, such as `_blocks.3._expand_conv.weight`.

Such files are those of the PyTorch translations of EfficientNet-B0 to B8 and EfficientNet-Lite0 to Lite4. Their nets
pad as TensorFlow does, which of timm's nets only `tf_efficientnet_*` do. The names are paired one by one, never by
order or shape.
Source: Tan & Le, ICML 2019 (arXiv 1905.11946), and timm's EfficientNet for the names of its modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.errors import ConfigError

BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")
ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
EXPANDED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
EXPANDED |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}


def are(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have such names."""
    return "_conv_stem.weight" in tensors and "_fc.weight" in tensors


def renamed(net: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of the tensors by those that they have in timm's `net`; an unknown name is unchanged.

    name: of the net, as in `family.net`. Raises ConfigError if the net does not pad as TensorFlow does.
    """
    if not name.startswith("timm:tf_efficientnet_"):
        raise ConfigError(
            f"family.net (={name}): these weights are those of an EfficientNet that pads as TensorFlow does; take "
            "timm:tf_efficientnet_..., e.g. timm:tf_efficientnet_lite0",
            key="family.net",
            subject=name,
        )
    places = [key for key, _ in net.named_modules() if re.fullmatch(r"blocks\.\d+\.\d+", key)]  # in order
    expanded = {int(match[1]) for key in tensors if (match := BLOCK.fullmatch(key)) and match[2] == "_expand_conv"}
    return {_timms(key, places, expanded): key for key in tensors}


def _timms(key: str, places: list[str], expanded: set[int]) -> str:
    """timm's name of a tensor; places: of the blocks, in order; expanded: blocks that expand first."""
    match = BLOCK.fullmatch(key)
    if match is None:
        layer, _, rest = key.partition(".")
        return f"{ENDS.get(layer, layer)}.{rest}"
    number, layer, rest = int(match[1]), match[2], match[3]
    parts = (EXPANDED if number in expanded else PLAIN) | SQUEEZE
    return f"{places[number]}.{parts[layer]}.{rest}" if number < len(places) and layer in parts else key
