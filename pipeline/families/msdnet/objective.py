"""Cross-entropy summed over the exits with weight 1 each; one group of parameters, one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.exits import objective
from pipeline.exits.net import ExitOutput
from pipeline.families.msdnet.config import MsdnetConfig
from pipeline.families.msdnet.model import Msdnet, MsdnetBlock
from pipeline.family import Criterion, Layers, Loss, Params, Whole, cross_entropy


def loss(config: MsdnetConfig, output: ExitOutput, targets: Tensor, criterion: Criterion = cross_entropy) -> Loss:
    """The sum over exits, and what they learn from the last one; see `pipeline.exits.objective`."""
    distillation, temperature = config.exit_distillation, config.exit_temperature
    return objective.loss(output, targets, criterion, distillation=distillation, temperature=temperature)


def groups(config: MsdnetConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    return {"main": [Params(list(net.parameters()))]}


def layers(config: MsdnetConfig, net: nn.Module) -> Layers:
    """The first maps from the finest, the layers of all blocks, all classifiers."""
    assert isinstance(net, Msdnet)
    blocks = [block for block in net.blocks if isinstance(block, MsdnetBlock)]
    each = [[layer] for block in blocks for layer in block.layers]
    return [*([scale] for scale in net.first.scales), *each, list(net.classifiers)]


def updates(config: MsdnetConfig, step: int) -> Sequence[str]:
    return ["main"]


def whole(config: MsdnetConfig) -> Whole | str:
    """Every forward runs all exits already."""
    return "family.exit_distillation teaches the earlier exits what the last one answers, in the same forward"
