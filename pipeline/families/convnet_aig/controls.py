"""Policies that a gated net is compared with: the same blocks run as often, but not for the images that chose them.

Each is fitted on the gates that `gates-hard` opens for held-out training images. No gate is computed, so an image takes
the MACs of the plain ResNet's blocks that run for it. The papers have no such controls. Letters: B images, L blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from pipeline import cost, ranks
from pipeline.blocks import constant
from pipeline.errors import ContractError, JsonValue
from pipeline.families.convnet_aig.model import Aig, GatedBlock
from pipeline.family import MeasuresOnce, Prediction, Settings

SCATTER = 1009.0  # spreads sums of pixels over many whole numbers


@dataclass(frozen=True)
class GateControl(MeasuresOnce):
    """Base class: runs the blocks that `_drawn` gives. patterns {gates of an image as 0 and 1: how many had them}."""

    by: ClassVar[str] = ""
    patterns: tuple[tuple[str, int], ...] = ()

    @property
    def kind(self) -> str:
        return "gates-control"

    @property
    def settings(self) -> Settings:
        return {"by": self.by}

    @property
    def rates(self) -> list[float]:
        """The share of the held-out images that ran each block, [L]."""
        counts = torch.tensor([count for _, count in self.patterns], dtype=torch.float64)
        rates: list[float] = ((counts[:, None] * self._table()).sum(0) / counts.sum()).tolist()
        return rates

    def check(self, net: nn.Module, images: Tensor) -> None:
        """Gates can be recorded for images of any size."""

    def state(self) -> Mapping[str, JsonValue]:
        return {"patterns": dict(self.patterns)} if self.patterns else {}

    def restored(self, state: Mapping[str, JsonValue]) -> Self:
        return replace(self, patterns=tuple(sorted(cast(dict[str, int], state["patterns"]).items())))

    def calibrated(self, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """The policy with the gates of these images. Collective."""
        assert isinstance(net, Aig)
        own = Counter(chain.from_iterable(_texts(net(images).gates) for images, _ in batches))
        found = sum((Counter(each) for each in ranks.gather(dict(own))), Counter[str]())
        return replace(self, patterns=tuple(sorted(found.items())))

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, Aig)
        if not self.patterns:
            raise ContractError(f"policy {self.by}: it must be calibrated before it predicts", key="calibration")
        gates = self._drawn(images).to(images.device)  # [B, L]
        x = net.stem(images)
        for block, opened in zip(net.blocks, gates.unbind(1), strict=True):
            assert isinstance(block, GatedBlock)
            x = block.skipping(x, opened.nonzero().flatten())
        fixed, residuals = self.once(images.shape[1:], lambda: _costs(net, images))
        macs = fixed + gates.double() @ constant(residuals, torch.float64, gates.device)
        return Prediction(net.fc(x.mean(dim=(2, 3))).float(), macs, {"gates": gates, "layers": gates.sum(1)})

    def _table(self) -> Tensor:
        """The patterns as a table [n, L] bool."""
        return torch.tensor([[bit == "1" for bit in gates] for gates, _ in self.patterns])

    def _drawn(self, images: Tensor) -> Tensor:
        """The blocks that run for each of the images, [B, L] bool."""
        raise NotImplementedError


@dataclass(frozen=True)
class ShuffledGates(GateControl):
    """Each image runs the blocks of a held-out training image drawn at random: the same rates, but no decision.

    Images of one batch are not exchanged, for they may be of one class. The draw is a function of the image's pixels:
    it does not depend on the batch.
    """

    by: ClassVar[str] = "shuffled"
    name: str = "gates-shuffled"

    def _drawn(self, images: Tensor) -> Tensor:
        numbers = (images.flatten(1).double().sum(1) * SCATTER).remainder(1).cpu()  # [B], evenly in 0..1
        counts = torch.tensor([float(number) for _, number in self.patterns], dtype=torch.float64)
        chosen = torch.searchsorted(counts.cumsum(0) / counts.sum(), numbers, right=True)
        return self._table()[chosen.clamp_max(len(counts) - 1)]


@dataclass(frozen=True)
class FixedMask(GateControl):
    """Every image runs the blocks that most images run, as many as an image runs on average, rounded up."""

    by: ClassVar[str] = "mask"
    name: str = "gates-mask"

    def _drawn(self, images: Tensor) -> Tensor:
        rates = torch.tensor(self.rates)
        number = int(torch.ceil(rates.double().sum() - 1e-6))
        mask = torch.zeros(len(rates), dtype=torch.bool)
        mask[rates.argsort(descending=True, stable=True)[:number]] = True
        return mask.expand(len(images), -1)


def _texts(gates: Tensor) -> list[str]:
    """The gates [B, L] of each image as a text of 0 and 1."""
    return ["".join(str(int(bit)) for bit in row) for row in gates.int().tolist()]


def _costs(net: Aig, images: Tensor) -> tuple[int, tuple[int, ...]]:
    """MACs of one image without gates: of stem, shortcuts and head, and of each block's residual, [L]."""
    whole = cost.measure(net, images[:1])
    numbers = range(len(net.blocks))
    residuals = tuple(whole.by_module[f"blocks.{number}.residual"] for number in numbers)
    gates = sum(whole.by_module.get(f"blocks.{number}.gate", 0) for number in numbers)
    return whole.macs - gates - sum(residuals), residuals
