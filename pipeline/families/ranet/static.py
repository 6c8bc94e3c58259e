"""Each exit as a module: all images exit there, and later blocks are not part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from pipeline.families.ranet.config import RanetConfig
from pipeline.families.ranet.inference import Exit, policies
from pipeline.families.ranet.model import Ranet, Walk
from pipeline.family import Report


class AtExit(nn.Module):
    """The blocks up to exit `number`, counted from 1, and its classifier only."""

    def __init__(self, net: Ranet, number: int) -> None:
        super().__init__()
        self.net, self.number = net, number

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        walk = Walk(self.net, images)
        for _ in range(self.number):
            x = walk.to_next_exit()
        logits: Tensor = self.net.classifiers[self.number - 1](x)
        return logits


def static(
    config: RanetConfig, net: nn.Module, reports: Sequence[Report]
) -> Mapping[str, Callable[[Tensor], nn.Module]]:
    """`exit-k` for each exit; budgets decide image by image and cannot be exported."""
    assert isinstance(net, Ranet)
    exits = (policy for policy in policies(config, net) if isinstance(policy, Exit))
    return {policy.name: partial(_at, net, policy.number) for policy in exits}


def _at(net: Ranet, number: int, images: Tensor) -> nn.Module:
    return AtExit(net, number)
