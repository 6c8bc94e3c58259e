"""The layers of the net by depth, for rates that fall towards the images."""

from __future__ import annotations

from itertools import zip_longest
from typing import cast

from torch import nn

from pipeline.families.ranet.config import RanetConfig
from pipeline.families.ranet.model import Ranet
from pipeline.family import Layers


def layers(config: RanetConfig, net: nn.Module) -> Layers:
    """The base maps from the finest, the blocks of the same place in each sub-network, all classifiers."""
    assert isinstance(net, Ranet)
    subnetworks = [list(cast(nn.ModuleList, blocks)) for blocks in net.subnetworks]
    by_place = [[block for block in blocks if block is not None] for blocks in zip_longest(*subnetworks)]
    return [*([layer] for layer in net.base), *by_place, list(net.classifiers)]
