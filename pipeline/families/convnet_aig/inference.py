"""Policies of a gated net: hard gates, sampled gates, gates at a threshold. All really skip closed blocks.

Letters: B images, L blocks, n images whose gate is open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline import cost
from pipeline.families.convnet_aig.model import Aig, AigConfig, Block, logistic
from pipeline.family import Prediction

SAMPLED_SEED = 0


@dataclass(frozen=True)
class Prices:
    """MACs of one image: what it always pays, and the residual of each block, [L]."""

    fixed: int
    residuals: tuple[int, ...]


@dataclass(frozen=True)
class Gates:
    """Opens a block where its log-odds, plus logistic noise if `sampled`, exceed `odds`.

    Deterministic gates do not depend on the other images of the batch. Sampled ones draw their noise from a generator
    seeded anew at each call; the released code samples at test time too.
    """

    name: str
    odds: float = 0.0
    sampled: bool = False
    prices: dict[tuple[int, ...], Prices] = field(default_factory=dict, compare=False)  # by shape of one image

    def calibrated(self, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Gates:
        return self

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, Aig)
        prices = self._prices(net, images)
        x = net.stem(images)
        opened, noise = [], self._noise(net, images)
        for block in net.blocks:
            assert isinstance(block, Block)
            if block.gate is None:
                gate = torch.ones(len(x), dtype=torch.bool, device=x.device)
            else:
                gate = block.gate(x) + next(noise) > self.odds  # [B]
            x = block.skipping(x, gate.nonzero().flatten())
            opened.append(gate)
        gates = torch.stack(opened, dim=1)  # [B, L]
        macs = prices.fixed + gates.double() @ torch.tensor(prices.residuals, dtype=torch.float64, device=gates.device)
        facts = {"gates": gates, "layers": gates.sum(1)}
        return Prediction(net.fc(x.mean(dim=(2, 3))).float(), macs, facts)

    def _noise(self, net: Aig, images: Tensor) -> Iterator[Tensor | float]:
        if not self.sampled:
            return iter([0.0] * len(net.blocks))
        generator = torch.Generator().manual_seed(SAMPLED_SEED)
        uniform = torch.rand(len(images), len(net.gates()), generator=generator)
        return iter(logistic(uniform).to(images.device).unbind(1))

    def _prices(self, net: Aig, images: Tensor) -> Prices:
        shape = tuple(images.shape[1:])
        if shape not in self.prices:
            found = cost.measure(net, images[:1])
            residuals = tuple(found.by_module[f"blocks.{number}.residual"] for number in range(len(net.blocks)))
            self.prices[shape] = Prices(found.macs - sum(residuals), residuals)
        return self.prices[shape]


def policies(config: AigConfig, net: nn.Module) -> Sequence[Gates]:
    """`gates-hard` first: open where execution is the likelier; then sampled, then each threshold."""
    at = [Gates(f"gates-{p:g}", odds=math.log(p / (1 - p))) for p in config.thresholds]
    return [Gates("gates-hard"), Gates("gates-sampled", sampled=True), *at]
