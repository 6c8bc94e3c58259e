"""Cross-entropy under Laplacian dropout; one group of parameters, one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.families.arrn.config import ArrnConfig
from pipeline.families.arrn.model import Arrn, ArrnOutput
from pipeline.family import Criterion, Loss, Params, Whole, cross_entropy


def loss(config: ArrnConfig, output: ArrnOutput, targets: Tensor, criterion: Criterion = cross_entropy) -> Loss:
    """Cross-entropy; the parts are `ce` and `dropped`, the mean number of residuals skipped."""
    ce = criterion(output.logits, targets)
    return Loss(ce, {"ce": ce.detach(), "dropped": output.levels.to(ce.dtype).mean()})


def groups(config: ArrnConfig, net: nn.Module) -> Mapping[str, Sequence[Params]]:
    return {"main": [Params(list(net.parameters()))]}


def updates(config: ArrnConfig, step: int) -> Sequence[str]:
    return ["main"]


def varying(config: ArrnConfig) -> str | None:
    """Dropout lets another number of images through each residual; what else is dropped is drawn on the host."""
    if config.drop_path or config.dropout:
        return "drop_path and dropout are drawn on the host"
    return "the number of images that a residual drops is random" if any(config.probabilities) else None


def warnings(config: ArrnConfig, side_px: int) -> Sequence[str]:
    """Reports the residuals that images of side_px would skip throughout training."""
    ladder = config.plan.ladder
    skipped = sum(rung >= side_px for rung in ladder[1:])
    if skipped == 0:
        return []
    number = f"{skipped} of {len(ladder) - 1} residuals"
    return [
        f"data.side_px (={side_px}): of the ladder {list(ladder)} such images skip the first {number}, whose weights "
        f"do not change; set data.side_px={ladder[0]}, or a shorter ladder and grow it later"
    ]


def whole(config: ArrnConfig) -> Whole | str:
    """No residual is dropped."""
    return _all_residuals if any(config.probabilities) else "no residual is ever dropped, so the net is whole already"


def _all_residuals(net: nn.Module, images: Tensor) -> Tensor:
    assert isinstance(net, Arrn)
    output: ArrnOutput = net(images)
    return output.logits
