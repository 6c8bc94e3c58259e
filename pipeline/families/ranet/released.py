"""Maps the weight names of the code released with arXiv 2003.07326 to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.exits.net import is_head
from pipeline.families.ranet.config import RanetConfig
from pipeline.weights import Loaded, load

GROUPS = {"scale_flows": "subnetworks", "FirstLayer.layers": "base", "classifier": "classifiers"}
PARTS = {
    "net": "",
    "conv_up": ".below",
    "conv_normal": ".own",
    "conv_last": ".merge",
    "trans": ".transition",
    "m": ".reduce",
    "linear": ".fc",
}


def load_pretrained(
    config: RanetConfig, net: nn.Module, tensors: Mapping[str, Tensor], new_head: bool = False
) -> Loaded:
    """Fills `net` from our weights or the released code's; uses every tensor, as `load` does."""
    ours = {our_name(name): value for name, value in tensors.items()}
    return load(net, ours, head=is_head, new_head=new_head)


def our_name(name: str) -> str:
    """Our name of a tensor of the released code; any other name is returned unchanged."""
    for theirs, ours in GROUPS.items():
        if name.startswith(f"{theirs}."):
            rest = name.removeprefix(theirs)
            return ours + re.sub(r"\.([a-z_]+)", lambda part: PARTS.get(part[1], part[0]), rest)
    return name
