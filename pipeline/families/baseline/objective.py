"""Cross-entropy, one group of parameters, one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.blocks import Logits
from pipeline.families.baseline.model import BaselineConfig
from pipeline.family import Criterion, Loss, Params, cross_entropy


def loss(config: BaselineConfig, output: Logits, targets: Tensor, criterion: Criterion = cross_entropy) -> Loss:
    """The criterion, by default cross-entropy; logged as `ce`."""
    ce = criterion(output.logits, targets)
    return Loss(ce, {"ce": ce.detach()})


def groups(config: BaselineConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    return {"main": [Params(list(net.parameters()))]}


def updates(config: BaselineConfig, step: int) -> Sequence[str]:
    return ["main"]
