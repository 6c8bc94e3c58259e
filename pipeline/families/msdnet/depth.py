"""The layers of the net by depth, for rates that fall towards the images."""

from __future__ import annotations

from torch import nn

from pipeline.families.msdnet.config import MsdnetConfig
from pipeline.families.msdnet.model import Msdnet, MsdnetBlock
from pipeline.family import Layers


def layers(config: MsdnetConfig, net: nn.Module) -> Layers:
    """The first maps from the finest, the layers of all blocks, all classifiers."""
    assert isinstance(net, Msdnet)
    blocks = [block for block in net.blocks if isinstance(block, MsdnetBlock)]
    each = [[layer] for block in blocks for layer in block.layers]
    return [*([scale] for scale in net.first.scales), *each, list(net.classifiers)]
