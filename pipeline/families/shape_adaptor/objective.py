"""Cross-entropy; weights and alphas have separate optimizers; the alphas move every `alpha_every` steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.families.shape_adaptor.model import ShapeAdaptorOutput, ShapeConfig, ShapeNet, first_alphas
from pipeline.family import Criterion, Loss, Params, cross_entropy


def loss(
    config: ShapeConfig, output: ShapeAdaptorOutput, targets: Tensor, criterion: Criterion = cross_entropy
) -> Loss:
    """Cross-entropy; the other parts describe the shape: alpha and side of each adaptor, and the limit's penalty."""
    ce = criterion(output.logits, targets)
    return Loss(ce, {"ce": ce.detach(), **_curves(output)})


def _curves(output: ShapeAdaptorOutput) -> dict[str, Tensor]:
    """The shape as tensors that are filled on the device, so that nothing waits for a copy."""
    device = output.logits.device
    numbers = {f"side_px/{number:02d}": float(side) for number, side in enumerate(output.plan.sides_px)}
    if numbers:
        numbers["penalty"] = output.plan.penalty
    alphas = {f"alpha/{number:02d}": alpha for number, alpha in enumerate(output.alphas)}
    return alphas | {name: torch.full((), value, device=device) for name, value in numbers.items()}


def groups(config: ShapeConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    """The weights under "main"; the alphas, without weight decay, under "shape"."""
    assert isinstance(net, ShapeNet)
    alphas = net.shape.alphas
    weights = Params(list(net.body.parameters()))
    if alphas is None:
        return {"main": [weights]}
    return {"main": [weights], "shape": [Params([alphas], decay=False, outside_ddp=True)]}


def optimizers(config: ShapeConfig) -> Sequence[str]:
    return ["main", "shape"] if first_alphas(config) else ["main"]


def varying(config: ShapeConfig) -> str | None:
    """The alphas set the maps' sizes, and they move."""
    return "the alphas change the sizes of maps" if first_alphas(config) and config.alpha_every is not None else None


def updates(config: ShapeConfig, step: int) -> Sequence[str]:
    """Updates the alphas first, then the weights in the new shape, on the same batch.

    Source: the released code, which restarts the count of steps in each epoch, so that each epoch begins with an update
    of the alphas. We count over the whole run, because a family does not know the length of an epoch.
    """
    due = config.mode != "human" and config.alpha_every is not None and step % config.alpha_every == 0
    return ["shape", "main"] if due else ["main"]
