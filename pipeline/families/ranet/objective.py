"""Cross-entropy summed over the exits with weight 1 each; one group of parameters, one optimizer.

Source: the code released with arXiv 2003.07326; reproductions of the paper describe a weighted sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import cast

from torch import Tensor, nn

from pipeline.exits import objective
from pipeline.exits.net import ExitOutput
from pipeline.families.ranet.config import RanetConfig
from pipeline.families.ranet.model import Ranet
from pipeline.family import Criterion, Layers, Loss, Params, Whole, cross_entropy


def loss(config: RanetConfig, output: ExitOutput, targets: Tensor, criterion: Criterion = cross_entropy) -> Loss:
    """The sum over exits, and what they learn from the last one; see `pipeline.exits.objective`."""
    distillation, temperature = config.exit_distillation, config.exit_temperature
    return objective.loss(output, targets, criterion, distillation=distillation, temperature=temperature)


def groups(config: RanetConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    return {"main": [Params(list(net.parameters()))]}


def layers(config: RanetConfig, net: nn.Module) -> Layers:
    """The base maps from the finest, the blocks of the same place in each sub-network, all classifiers."""
    assert isinstance(net, Ranet)
    subnetworks = [list(cast(nn.ModuleList, blocks)) for blocks in net.subnetworks]
    by_place = [[block for block in blocks if block is not None] for blocks in zip_longest(*subnetworks)]
    return [*([layer] for layer in net.base), *by_place, list(net.classifiers)]


def updates(config: RanetConfig, step: int) -> Sequence[str]:
    return ["main"]


def whole(config: RanetConfig) -> Whole | str:
    """Every forward runs all exits already."""
    return "family.exit_distillation teaches the earlier exits what the last one answers, in the same forward"
