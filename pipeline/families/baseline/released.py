"""Maps the weight names of torchvision's files to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from pipeline.families.baseline.model import BaselineConfig, Plain
from pipeline.families.baseline.regularised import RegularisedResNet
from pipeline.weights import Loaded, load

DENSE = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # as in torchvision's own files
AUXILIARY = ("net.aux1.", "net.aux2.")  # GoogLeNet's classifiers for training, which `build` leaves out


def load_pretrained(
    config: BaselineConfig, net: nn.Module, tensors: Mapping[str, Tensor], new_head: bool = False
) -> Loaded:
    """Fills `net` from our weights or torchvision's; uses every tensor, as `load` does.

    Only GoogLeNet's auxiliary classifiers are left out. Its weights at torchvision are for images of mean and standard
    deviation 0.5: set data.mean and data.std so.
    """
    last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    named = {
        _our_name(name) if isinstance(net, Plain | RegularisedResNet) else name: value
        for name, value in tensors.items()
    }
    auxiliary = [name for name in named if config.net == "googlenet" and name.startswith(AUXILIARY)]
    rest = {name: value for name, value in named.items() if name not in auxiliary}
    loaded = load(net, rest, head=lambda name: name.startswith(f"{last}."), new_head=new_head)
    return replace(loaded, left_out=[*loaded.left_out, *auxiliary])


def _our_name(name: str) -> str:
    return DENSE.sub(r"\1\2", name if name.startswith("net.") else f"net.{name}")
