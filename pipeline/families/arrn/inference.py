"""Policies of an adaptive-resolution net: at each resolution with residuals skipped, and with all of them run.

`112px` reduces the images to 112 pixels and runs the residuals that such images need. `full-112px` reduces them too,
enlarges them to the finest resolution and runs all residuals, as a net that cannot adapt must; this is the paper's
comparison. With the DCT and box filters both give the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline import cost
from pipeline.blocks import per_image
from pipeline.families.arrn.config import ArrnConfig
from pipeline.families.arrn.model import Arrn, ArrnOutput
from pipeline.family import FixedPolicy, Prediction, Settings


@dataclass(frozen=True)
class ArrnResolution(FixedPolicy):
    """The net on images whose shorter side is at most side_px, enlarged to its finest resolution if `full`.

    Larger images are reduced by the net's own filters, whose MACs count; smaller ones are not resized.
    """

    side_px: int
    full: bool = False

    @property
    def name(self) -> str:
        return f"{'full-' if self.full else ''}{self.side_px}px"

    @property
    def kind(self) -> str:
        return "resolution"

    @property
    def settings(self) -> Settings:
        return {"side_px": self.side_px, "full": self.full}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, Arrn)
        macs = self.once(images.shape[1:], lambda: cost.measure(_Under(self, net), images[:1]).macs)
        output = self.run(net, images)
        ran = len(net.residuals) - output.levels  # [B]
        return Prediction(output.logits.float(), per_image(macs, images), {"residuals": ran})

    def run(self, net: Arrn, images: Tensor) -> ArrnOutput:
        """The net's output for images [B, 3, H, W], resized first."""
        output: ArrnOutput = net(self.sized(net, images))
        return output

    def sized(self, net: Arrn, images: Tensor) -> Tensor:
        """images [B, 3, H, W] resized to what the net is given."""
        if min(images.shape[-2:]) > self.side_px:
            images = net.at_side(images, self.side_px)
        if self.full and net.level(images) > 0:
            images = net.at_side(images, net.ladder[0])
        return images


class _Under(nn.Module):
    """A net run under a policy, for counting MACs."""

    def __init__(self, policy: ArrnResolution, net: Arrn) -> None:
        super().__init__()
        self.policy, self.net = policy, net

    def forward(self, images: Tensor) -> Tensor:
        return self.policy.run(self.net, images).logits


def policies(config: ArrnConfig, net: nn.Module) -> Sequence[ArrnResolution]:
    """The finest resolution first, then each lower one with residuals skipped and with all residuals run."""
    lower = [ArrnResolution(side, full) for side in config.evaluated_px for full in (False, True)]
    return [ArrnResolution(config.plan.ladder[0]), *lower]


def describe(kind: str, settings: Settings) -> str:
    """What a policy does, in a few words."""
    side = settings["side_px"]
    if settings["full"]:
        return f"images reduced to {side} px and enlarged again; all residuals run"
    return f"images of at most {side} px; the residuals of finer resolutions are skipped"
