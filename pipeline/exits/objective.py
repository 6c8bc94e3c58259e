"""How nets with exits are trained: cross-entropy summed over the exits with weight 1 each, one optimizer.

Source: the code released with arXiv 2003.07326; reproductions of that paper describe a weighted sum.

Letters: B images, E exits, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.exits.net import ExitOutput
from pipeline.family import Criterion, Loss, Params, Whole, cross_entropy, top1


class ExitKeys(Protocol):
    """The keys of a family whose nets have exits."""

    @property
    def exit_distillation(self) -> float:
        """The weight of what earlier exits learn from the last one."""

    @property
    def exit_temperature(self) -> float:
        """The temperature of both answers in it."""


def loss(config: ExitKeys, output: ExitOutput, targets: Tensor, criterion: Criterion = cross_entropy) -> Loss:
    """The sum over exits, plus the weighted `exit_divergence`.

    The parts are `ce` of the last exit, `ce/<exit>` and `top1/<exit>` of each, and `distillation`. The class of a mixed
    image, for top-1, is the one with the largest share.
    """
    answers = output.exits.to(torch.promote_types(output.exits.dtype, torch.float32))  # [B, E, K]
    exits = torch.stack([criterion(logits, targets) for logits in answers.unbind(1)])
    by_exit = {f"ce/{number:02d}": value for number, value in enumerate(exits.detach(), 1)}
    truth = targets if targets.dim() == 1 else targets.argmax(1)
    parts = {"ce": exits[-1].detach(), **by_exit}
    total = exits.sum()
    if config.exit_distillation:
        distilled = exit_divergence(output.exits, config.exit_temperature)
        total, parts["distillation"] = total + config.exit_distillation * distilled, distilled.detach()
    each = top1(answers.detach(), truth[:, None].expand(answers.shape[:2])).mean(0)  # [E]
    hits = {f"top1/{number:02d}": value for number, value in enumerate(each.unbind(), 1)}
    return Loss(total, parts | hits)


def exit_divergence(exits: Tensor, temperature: float) -> Tensor:
    """T² · KL(last exit || exit) at temperature T, the sum over the other exits of the mean over images: [].

    exits [B, E, K]. The last exit gets no gradient from it. Source: Phuong & Lampert, ICCV 2019, whose target is the
    last exit too; T² keeps the gradient's size (Hinton et al., 2015, arXiv 1503.02531).
    """
    logits = exits.to(torch.promote_types(exits.dtype, torch.float32)) / temperature
    answers = logits.log_softmax(dim=2)
    target = answers[:, -1:].detach().expand_as(answers[:, :-1])
    divergence = F.kl_div(answers[:, :-1], target, reduction="sum", log_target=True)
    return temperature**2 * divergence / len(exits)


def groups(config: ExitKeys, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    """All parameters alike."""
    return {"main": [Params(list(net.parameters()))]}


def updates(config: ExitKeys, step: int) -> Sequence[str]:
    return ["main"]


def whole(config: ExitKeys) -> Whole | str:
    """Every forward runs all exits already."""
    return "family.exit_distillation teaches the earlier exits what the last one answers, in the same forward"
