"""Cross-entropy plus the target-rate loss over the global batch; gates may have their own learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline import ranks
from pipeline.blocks import constant
from pipeline.families.convnet_aig.model import Aig, AigConfig, AigOutput
from pipeline.family import Criterion, Loss, Params, Whole, cross_entropy


def rate_loss(gates: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Squared distance of each block's open rate from its target, over the global batch.

    gates [B, L] in {0, 1}; target [L], where 1 means always open and adds nothing. "mean" divides by L, which includes
    blocks without a gate; "sum" does not divide. Returns []. Collective: every rank calls it in every step.
    Source: Veit & Belongie, ECCV 2018 (arXiv 1711.11503), target rate loss. The released code takes the mean and
    gathers the batch of all its GPUs before the loss; we reduce over all ranks. As the rate is squared, a step of
    several micro-batches needs the gates of all of them at once: see `mean_over_images`.
    """
    gated = target < 1
    distance = ((target - ranks.rank_mean(gates)) * gated).square().sum()
    return distance / len(target) if reduction == "mean" else distance


def loss(config: AigConfig, output: AigOutput, targets: Tensor, criterion: Criterion = cross_entropy) -> Loss:
    """The criterion, by default cross-entropy, plus the weighted rate loss.

    The parts are both, the open rate, and the rate of each block.
    """
    ce = criterion(output.logits, targets)
    target = constant(config.targets, output.gates.dtype, output.gates.device)
    rate = rate_loss(output.gates, target, config.rate_reduction)
    by_block = {f"rate/{number:02d}": value for number, value in enumerate(output.gates.detach().mean(0))}
    parts = {"ce": ce.detach(), "rate_loss": rate.detach(), "open_rate": output.gates.detach().mean(), **by_block}
    return Loss(ce + config.rate_weight * rate, parts)


def mean_over_images(config: AigConfig) -> bool:
    """Whether the loss is the criterion alone: the rate loss has no weight, or no block has a gate."""
    return config.rate_weight == 0 or min(config.targets) == 1


def groups(config: AigConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    """The backbone, and the gates at `gate_lr_factor` of its learning rate."""
    assert isinstance(net, Aig)
    gates = [p for gate in net.gates() for p in gate.parameters()]
    chosen = {id(p) for p in gates}
    backbone = Params([p for p in net.parameters() if id(p) not in chosen])
    return {"main": [backbone, Params(gates, lr_factor=config.gate_lr_factor)] if gates else [backbone]}


def updates(config: AigConfig, step: int) -> Sequence[str]:
    return ["main"]


def whole(config: AigConfig) -> Whole | str:
    """All gates open."""
    return _all_open if min(config.targets) < 1 else "target_rate is 1 for each block, so the net is whole already"


def _all_open(net: nn.Module, images: Tensor) -> Tensor:
    assert isinstance(net, Aig)
    noise = torch.full((len(images), len(net.gates())), math.inf, device=images.device)
    output: AigOutput = net(images, noise)
    return output.logits
