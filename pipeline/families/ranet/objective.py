"""Cross-entropy summed over the exits with weight 1 each; one group of parameters, one optimizer.

Source: the code released with arXiv 2003.07326; reproductions of the paper describe a weighted sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.families.ranet.config import RanetConfig
from pipeline.families.ranet.model import RanetOutput
from pipeline.family import Criterion, Loss, Params, cross_entropy, top1


def loss(config: RanetConfig, output: RanetOutput, targets: Tensor, criterion: Criterion = cross_entropy) -> Loss:
    """The sum over exits; parts: `ce` of the last exit, `ce/<exit>` and `top1/<exit>` of each.

    The class of a mixed image, for top-1, is the one with the largest share.
    """
    exits = torch.stack([criterion(logits, targets) for logits in output.exits.unbind(1)])
    by_exit = {f"ce/{number:02d}": value for number, value in enumerate(exits.detach(), 1)}
    truth = targets if targets.dim() == 1 else targets.argmax(1)
    each = [top1(logits, truth).mean() for logits in output.exits.detach().unbind(1)]
    hits = {f"top1/{number:02d}": value for number, value in enumerate(each, 1)}
    return Loss(exits.sum(), {"ce": exits[-1].detach(), **by_exit, **hits})


def groups(config: RanetConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    return {"main": [Params(list(net.parameters()))]}


def updates(config: RanetConfig, step: int) -> Sequence[str]:
    return ["main"]
