"""Each exit as a module: all images exit there, and later blocks are not part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from pipeline.exits.net import ExitNet
from pipeline.exits.policies import Exit
from pipeline.family import Report


class AtExit(nn.Module):
    """What runs up to exit `number`, counted from 1, and its classifier only."""

    def __init__(self, net: ExitNet, number: int) -> None:
        super().__init__()
        self.net, self.number = net, number

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        walk = self.net.walk(images)
        for _ in range(self.number):
            x = walk.to_next_exit()
        logits: Tensor = self.net.classifiers[self.number - 1](x)
        return logits


def static(config: object, net: nn.Module, reports: Sequence[Report]) -> Mapping[str, Callable[[Tensor], nn.Module]]:
    """`exit-k` for each exit, the last first; budgets decide image by image and cannot be exported."""
    assert isinstance(net, ExitNet)
    last = len(net.classifiers)
    return {Exit(number).name: partial(_at, net, number) for number in (last, *range(1, last))}


def _at(net: ExitNet, number: int, images: Tensor) -> nn.Module:
    return AtExit(net, number)
