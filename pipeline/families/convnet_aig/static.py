"""Exportable ways to run a gated net: fixed masks, the scaled net, and gates as branches of a graph.

Letters: B images, K classes, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.families.convnet_aig.inference import ExpectedRate, Gates, policies
from pipeline.families.convnet_aig.model import Aig, AigConfig, GatedBlock
from pipeline.family import Report

MASKS = (0.3, 0.5, 0.7)  # a fixed mask runs the blocks with at least this mean execution rate
Makers = Mapping[str, Callable[[Tensor], nn.Module]]


class Scaled(nn.Module):
    """y = ReLU(S(x) + scale · F(x)) for every image; a block with scale 0 has no F; no gate is computed."""

    def __init__(self, net: Aig, scales: Sequence[float]) -> None:
        super().__init__()
        self.stem, self.fc, self.scales = net.stem, net.fc, tuple(scales)
        blocks = [block for block in net.blocks if isinstance(block, GatedBlock)]
        self.shortcuts = nn.ModuleList(block.shortcut for block in blocks)
        pairs = zip(blocks, self.scales, strict=True)
        self.residuals = nn.ModuleList(block.residual if scale else nn.Identity() for block, scale in pairs)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        x = self.stem(images)
        for shortcut, residual, scale in zip(self.shortcuts, self.residuals, self.scales, strict=True):
            y = shortcut(x)
            if scale:
                y = y + (residual(x) if scale == 1 else scale * residual(x))
            x = torch.relu(y)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class Likely(nn.Module):
    """All blocks run; each residual is scaled by the image's own gate probability: the policy expected-prob."""

    def __init__(self, net: Aig) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        x = self.net.stem(images)
        for block in self.net.blocks:
            assert isinstance(block, GatedBlock)
            x = block(x, None if block.gate is None else block.gate(x).sigmoid())
        logits: Tensor = self.net.fc(x.mean(dim=(2, 3)))
        return logits


class Branching(nn.Module):
    """Runs one image at a time: each gated block is a `torch.cond` whose closed branch has no residual."""

    def __init__(self, net: Aig, odds: float) -> None:
        super().__init__()
        self.net, self.odds = net, odds

    def forward(self, images: Tensor) -> Tensor:
        """images [1, 3, H, W] -> logits [1, K]."""
        x = self.net.stem(images)
        for block in self.net.blocks:
            assert isinstance(block, GatedBlock)
            if block.gate is None:
                x = block(x, None)
            else:
                x = torch.cond(block.gate(x)[0] > self.odds, partial(_opened, block), partial(_closed, block), (x,))
        logits: Tensor = self.net.fc(x.mean(dim=(2, 3)))
        return logits


def _opened(block: GatedBlock, x: Tensor) -> Tensor:
    return torch.relu(block.shortcut(x) + block.residual(x))


def _closed(block: GatedBlock, x: Tensor) -> Tensor:
    return torch.relu(block.shortcut(x))


def static(config: AigConfig, net: nn.Module, reports: Sequence[Report]) -> Makers:
    """`all-open`; masks and `expected-rate` if the reports contain the rates; `expected-prob`; gates for one image.

    `mask-t` runs, for every image, the blocks that `gates-hard` ran for at least a share t of the evaluated images.
    """
    assert isinstance(net, Aig)
    by_policy = {report.policy: report for report in reports}
    scales = {"all-open": [1.0] * len(net.blocks)}
    hard = next((r for r in reports if r.kind == "gates" and r.settings.get("gates") == "hard"), None)
    if hard is not None and "gates" in hard.facts:
        scales |= {f"mask-{t:g}": [float(rate >= t) for rate in hard.facts["gates"]] for t in MASKS}
    for policy in policies(config, net):
        stored = by_policy.get(policy.name)
        if isinstance(policy, ExpectedRate) and stored is not None and stored.calibration:
            scales[policy.name] = list(policy.restored(stored.calibration).rates)
    made: dict[str, Callable[[Tensor], nn.Module]] = {
        name: partial(_scaled, net, tuple(values)) for name, values in scales.items()
    }
    if "prob" in config.scaled:
        made["expected-prob"] = lambda images: Likely(net)
    gates = (policy for policy in policies(config, net) if isinstance(policy, Gates) and not policy.sampled)
    return {**made, **{policy.name: partial(_branching, net, policy, tuple(made)) for policy in gates}}


def _scaled(net: Aig, scales: Sequence[float], images: Tensor) -> nn.Module:
    return Scaled(net, scales)


def _branching(net: Aig, policy: Gates, others: Sequence[str], images: Tensor) -> nn.Module:
    """Raises ConfigError for more than one image, because their gates may differ; names the policies for any batch."""
    if len(images) != 1:
        raise ConfigError(
            f"policy {policy.name}: its gates differ between images, but a graph takes one branch for the whole batch; "
            f"export it for one image (batch 1), or one of {', '.join(others)}, which run the same blocks for all",
            key="batch",
            subject=len(images),
        )
    return Branching(net, policy.odds)
