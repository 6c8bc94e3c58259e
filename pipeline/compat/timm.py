"""timm's nets: building one by name, its head, the images that its weights expect, and its converters of files.

All is timm's public interface but the converters, which are functions of the modules that define the nets.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import timm
import timm.layers
import timm.models
from torch import Tensor, nn

from pipeline.compat import require
from pipeline.errors import ConfigError

TRIED = "1.0.31"
CONVERTER = "checkpoint_filter_fn"
require("timm", timm, ("create_model", "is_model", "list_models"), tried=TRIED)
require("timm", timm.layers, ("DropPath",), tried=TRIED)
require("timm", timm.models, (f"convnext.{CONVERTER}", f"swin_transformer.{CONVERTER}"), tried=TRIED)

DropPath: type[nn.Module] = timm.layers.DropPath


def create(name: str, num_classes: int) -> nn.Module:
    """timm's net without its weights. Raises ConfigError if timm has no net, or no weights, of that name."""
    try:
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
    except RuntimeError as error:  # an unknown net or an unknown tag behind it
        if timm.is_model(name) and "tag" not in str(error):
            raise
        close = get_close_matches(name, timm.list_models(), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        message = f"family.net (=timm:{name}): timm {timm.__version__} has no such net ({error}){hint}"
        raise ConfigError(message, key="family.net", subject=name) from None
    return net


def head_of(net: nn.Module) -> tuple[str, ...]:
    """The names in the net of the layers whose outputs are the classes; two in a distilled transformer."""
    found: Any = net.get_classifier()  # type: ignore[operator]
    heads = {id(each) for each in (found if isinstance(found, tuple | list) else [found])}
    return tuple(name for name, module in net.named_modules() if id(module) in heads)


@dataclass(frozen=True)
class Statement:
    """What timm states about the images of a net's weights. side_px: after the crop, from resize_px."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    side_px: int
    resize_px: int
    interpolation: str


def stated(net: nn.Module) -> Statement:
    """timm's statement about the weights of the net's name."""
    config: Any = net.pretrained_cfg
    side = int(config["input_size"][-1])
    resize = int(side / config["crop_pct"])
    return Statement(tuple(config["mean"]), tuple(config["std"]), side, resize, str(config["interpolation"]))


def drop_path_rate(module: nn.Module) -> float:
    """The share of images whose path a `DropPath` drops."""
    return float(module.drop_prob)  # type: ignore[arg-type]


def drop_path_scales(module: nn.Module) -> bool:
    """Whether a `DropPath` divides what it keeps by the share that it keeps."""
    return bool(module.scale_by_keep)


def converted(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors as timm renames and reshapes those of other files of this net; None if it has no converter for it."""
    converter = getattr(sys.modules[type(net).__module__], CONVERTER, None)
    return None if converter is None else dict(converter(dict(tensors), net))
