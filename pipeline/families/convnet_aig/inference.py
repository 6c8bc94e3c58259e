"""Policies of a gated net: gates that skip closed blocks, and the whole net with scaled blocks.

Letters: B images, L blocks, n images whose gate is open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from pipeline import cost, ranks
from pipeline.blocks import constant, per_image
from pipeline.errors import ContractError, JsonValue
from pipeline.families.convnet_aig.controls import FixedMask, ShuffledGates
from pipeline.families.convnet_aig.model import Aig, AigConfig, GatedBlock, logistic
from pipeline.family import FixedPolicy, MeasuresOnce, Policy, Prediction, Settings

SAMPLED_SEED = 0


@dataclass(frozen=True)
class GateCosts:
    """MACs of one image: those that it always takes, and those of the residual of each block, [L]."""

    fixed: int
    residuals: tuple[int, ...]


@dataclass(frozen=True)
class Gates(FixedPolicy):
    """Opens a block for an image if the gate's log-odds, plus logistic noise if `sampled`, exceed `odds`.

    Deterministic gates do not depend on the other images of the batch. Sampled gates draw their noise from a generator
    that is seeded at each call; the released code samples at test time too.
    """

    name: str
    odds: float = 0.0
    sampled: bool = False
    threshold: float | None = None  # the probability whose log-odds are `odds`, where the recipe names one

    @property
    def kind(self) -> str:
        return "gates"

    @property
    def settings(self) -> Settings:
        if self.threshold is not None:
            return {"gates": "threshold", "threshold": self.threshold}
        return {"gates": "sampled" if self.sampled else "hard"}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, Aig)
        costs = self.once(images.shape[1:], lambda: _gate_costs(net, images))
        x = net.stem(images)
        opened, noise = [], self._noise(net, images)
        for block in net.blocks:
            assert isinstance(block, GatedBlock)
            if block.gate is None:
                gate = torch.ones(len(x), dtype=torch.bool, device=x.device)
            else:
                gate = block.gate(x) + next(noise) > self.odds  # [B]
            x = block.skipping(x, gate.nonzero().flatten())
            opened.append(gate)
        gates = torch.stack(opened, dim=1)  # [B, L]
        macs = costs.fixed + gates.double() @ constant(costs.residuals, torch.float64, gates.device)
        facts = {"gates": gates, "layers": gates.sum(1)}
        return Prediction(net.fc(x.mean(dim=(2, 3))).float(), macs, facts)

    def _noise(self, net: Aig, images: Tensor) -> Iterator[Tensor | float]:
        if not self.sampled:
            return iter([0.0] * len(net.blocks))
        generator = torch.Generator().manual_seed(SAMPLED_SEED)
        uniform = torch.rand(len(images), len(net.gates()), generator=generator)
        return iter(logistic(uniform).to(images.device, non_blocking=True).unbind(1))


def _gate_costs(net: Aig, images: Tensor) -> GateCosts:
    whole = cost.measure(net, images[:1])
    residuals = tuple(whole.by_module[f"blocks.{number}.residual"] for number in range(len(net.blocks)))
    return GateCosts(whole.macs - sum(residuals), residuals)


@dataclass(frozen=True)
class ExpectedRate(MeasuresOnce):
    """All blocks run; each residual is scaled by the share of images that open it: y = ReLU(S(x) + rate · F(x)).

    The rates, [L], are means of the gates' probabilities over held-out training images, along sampled gates. No gate is
    computed, so each image takes the MACs of the plain ResNet.
    Source: AIG-110* of Table 1; the released code has no such evaluation. The text available to us does not say
    whether an image's own probability or the block's mean rate is meant: `ExpectedProb` is the other interpretation.
    """

    name: str = "expected-rate"
    rates: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        return "scaled"

    @property
    def settings(self) -> Settings:
        return {"by": "rate"}

    def check(self, net: nn.Module, images: Tensor) -> None:
        """Rates exist for images of any size."""

    def state(self) -> Mapping[str, JsonValue]:
        return {"rates": list(self.rates)} if self.rates else {}

    def restored(self, state: Mapping[str, JsonValue]) -> ExpectedRate:
        return replace(self, rates=tuple(cast(list[float], state["rates"])))

    def calibrated(self, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> ExpectedRate:
        assert isinstance(net, Aig)
        generator = torch.Generator().manual_seed(SAMPLED_SEED + ranks.rank())
        device = net.fc.weight.device
        # the sum of each block's probabilities, and the number of images
        total = torch.zeros(len(net.blocks) + 1, dtype=torch.float64, device=device)
        for images, _ in batches:
            uniform = torch.rand(len(images), len(net.gates()), generator=generator)
            found = likelihoods(net, images, logistic(uniform).to(device)).double()
            total += torch.cat([found.sum(0), found.new_tensor([len(images)])])
        *sums, count = ranks.rank_sum(total).tolist()
        return replace(self, rates=tuple(value / count for value in sums))

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, Aig)
        if not self.rates:
            raise ContractError(
                f"policy {self.name}: it must be calibrated before it predicts", key="calibration", subject=self.name
            )
        x = net.stem(images)
        for block, rate in zip(net.blocks, self.rates, strict=True):
            assert isinstance(block, GatedBlock)
            x = torch.relu(block.shortcut(x) + rate * block.residual(x))
        macs = self.once(images.shape[1:], lambda: _macs_without_gates(net, images))
        return Prediction(net.fc(x.mean(dim=(2, 3))).float(), per_image(macs, images), {})


def _macs_without_gates(net: Aig, images: Tensor) -> int:
    whole = cost.measure(net, images[:1])
    return whole.macs - sum(whole.by_module.get(f"blocks.{number}.gate", 0) for number in range(len(net.blocks)))


@dataclass(frozen=True)
class ExpectedProb(FixedPolicy):
    """All blocks run; each residual is scaled by the image's own gate probability: y = ReLU(S(x) + p(x) · F(x)).

    Facts: the probabilities [B, L]. Source: as for `ExpectedRate`.
    """

    name: str = "expected-prob"

    @property
    def kind(self) -> str:
        return "scaled"

    @property
    def settings(self) -> Settings:
        return {"by": "prob"}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, Aig)
        x, found = net.stem(images), []
        for block in net.blocks:
            assert isinstance(block, GatedBlock)
            probability = torch.ones(len(x), device=x.device) if block.gate is None else block.gate(x).sigmoid()  # [B]
            x = block(x, probability)
            found.append(probability)
        macs = per_image(self.once(images.shape[1:], lambda: cost.measure(net, images[:1]).macs), images)
        return Prediction(net.fc(x.mean(dim=(2, 3))).float(), macs, {"probabilities": torch.stack(found, dim=1)})


def likelihoods(net: Aig, images: Tensor, noise: Tensor) -> Tensor:
    """Each block's execution probability, [B, L], along the path drawn by `noise` [B, G]; 1 without gate."""
    x, found, drawn = net.stem(images), [], iter(noise.unbind(1))
    for block in net.blocks:
        assert isinstance(block, GatedBlock)
        odds = x.new_full((len(x),), math.inf) if block.gate is None else block.gate(x)
        opened = odds > 0 if block.gate is None else odds + next(drawn) > 0
        x = block.skipping(x, opened.nonzero().flatten())
        found.append(odds.sigmoid())
    return torch.stack(found, dim=1)


def policies(config: AigConfig, net: nn.Module) -> Sequence[Policy]:
    """`gates-hard` first (opens if execution is more likely than not), then sampled, thresholds, scaled, controls."""
    at = [Gates(f"gates-{p:g}", odds=math.log(p / (1 - p)), threshold=p) for p in config.thresholds]
    scaled = {"rate": ExpectedRate, "prob": ExpectedProb}
    controls = {"shuffled": ShuffledGates, "mask": FixedMask}
    others = (*(scaled[kind]() for kind in config.scaled), *(controls[kind]() for kind in config.controls))
    return [Gates("gates-hard"), Gates("gates-sampled", sampled=True), *at, *others]


def describe(kind: str, settings: Settings) -> str:
    """What a policy does, in a few words."""
    found = {
        "hard": "a block runs for an image if its gate says that it is more likely than not",
        "sampled": "a block runs for an image with the probability that its gate gives",
        "threshold": f"a block runs for an image if its gate's probability exceeds {settings.get('threshold')}",
        "rate": "all blocks run, each scaled by how often its gate opens",
        "prob": "all blocks run, each scaled by the image's own gate",
        "shuffled": "control: each image runs the blocks that another image's gates chose",
        "mask": "control: every image runs the same blocks, those whose gates open most often",
    }
    return found[str(settings.get("gates", settings.get("by")))]
