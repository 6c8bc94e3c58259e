"""Cross-entropy, one optimizer; the speed-run net's BatchNorm biases learn at 64 times the rate, without decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.blocks import Logits
from pipeline.families.baseline.model import BaselineConfig
from pipeline.family import Criterion, Loss, Params, cross_entropy

BIAS_LR_FACTOR = 64.0  # Jordan, arXiv 2404.00498


def loss(config: BaselineConfig, output: Logits, targets: Tensor, criterion: Criterion = cross_entropy) -> Loss:
    """The criterion, by default cross-entropy; logged as `ce`."""
    ce = criterion(output.logits, targets)
    return Loss(ce, {"ce": ce.detach()})


def groups(config: BaselineConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    """All parameters alike; of the speed-run net the biases of BatchNorm apart."""
    if config.net != "speedrun":
        return {"main": [Params(list(net.parameters()))]}
    from pipeline.families.baseline.speedrun import SpeedrunNet

    assert isinstance(net, SpeedrunNet)
    biases = net.norm_biases()
    fast = {id(parameter) for parameter in biases}
    others = [p for p in net.parameters() if p.requires_grad and id(p) not in fast]
    return {"main": [Params(others), Params(biases, lr_factor=BIAS_LR_FACTOR, decay=False)]}


def updates(config: BaselineConfig, step: int) -> Sequence[str]:
    return ["main"]
