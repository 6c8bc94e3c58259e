"""Cross-entropy under Laplacian dropout; one group of parameters, one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.families.arrn.config import ArrnConfig
from pipeline.families.arrn.model import Output
from pipeline.family import Loss, Params, cross_entropy


def loss(config: ArrnConfig, output: Output, targets: Tensor) -> Loss:
    ce = cross_entropy(output.logits, targets)
    return Loss(ce, {"ce": ce.detach(), "dropped": output.levels.to(ce.dtype).mean()})


def groups(config: ArrnConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    return {"main": [Params(list(net.parameters()))]}


def updates(config: ArrnConfig, step: int) -> Sequence[str]:
    return ["main"]
