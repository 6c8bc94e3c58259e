"""Policies of a fixed net: images unchanged, reduced, or reduced and enlarged again (the papers' control)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import cost
from pipeline.blocks import per_image
from pipeline.families.baseline.model import BaselineConfig
from pipeline.family import FixedPolicy, Policy, Prediction, Settings


@dataclass(frozen=True)
class BaselineResolution(FixedPolicy):
    """The net on images resized to `side_px` (None: unchanged), and back to their own size if `up_again`."""

    side_px: int | None = None
    up_again: bool = False

    @property
    def name(self) -> str:
        if self.side_px is None:
            return "native"
        return f"{'down-and-up' if self.up_again else 'native'}-{self.side_px}px"

    @property
    def kind(self) -> str:
        return "resolution"

    @property
    def settings(self) -> Settings:
        return {} if self.side_px is None else {"side_px": self.side_px, "up_again": self.up_again}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        images = self.sized(images)
        macs = self.once(images.shape[1:], lambda: cost.measure(net, images[:1]).macs)
        return Prediction(net(images).logits.float(), per_image(macs, images))

    def sized(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] resized to what the net is given."""
        if self.side_px is None:
            return images
        smaller = _resized(images, (self.side_px, self.side_px))
        return _resized(smaller, (images.shape[-2], images.shape[-1])) if self.up_again else smaller


@dataclass(frozen=True)
class MultiCrop(FixedPolicy):
    """The mean of the logits of six views: the image and two shifts of it by a pixel along the diagonal, all mirrored.

    The image and its mirror image have half of the weight. Source: Jordan, arXiv 2404.00498, its evaluation.
    """

    name: str = "multi-crop"

    @property
    def kind(self) -> str:
        return "views"

    @property
    def settings(self) -> Settings:
        return {"views": 6}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        height, width = images.shape[-2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[..., y : y + height, x : x + width] for y, x in ((0, 0), (2, 2))]
        weights = (0.5, 0.25, 0.25)
        logits = sum(
            weight * (net(view).logits.float() + net(view.flip(-1)).logits.float()) / 2
            for weight, view in zip(weights, (images, *shifted), strict=True)
        )
        assert isinstance(logits, Tensor)
        macs = self.once(images.shape[1:], lambda: cost.measure(net, images[:1]).macs)
        return Prediction(logits, per_image(6 * macs, images))


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def resolutions(config: BaselineConfig) -> Sequence[BaselineResolution]:
    """`native` first, then each of `resolutions_px` natively and down-and-up."""
    sides = config.resolutions_px
    return [BaselineResolution(), *(BaselineResolution(side, up) for side in sides for up in (False, True))]


def policies(config: BaselineConfig, net: nn.Module) -> Sequence[Policy]:
    """`native` first, then the other resolutions, then `multi-crop` if the recipe asks for it."""
    return [*resolutions(config), *([MultiCrop()] if config.multi_crop else [])]


def describe(kind: str, settings: Settings) -> str:
    """What a policy does, in a few words."""
    if kind == "views":
        return f"the mean answer to {settings['views']} views of each image"
    if not settings:
        return "the net on the images as they are"
    side = settings["side_px"]
    return f"images reduced to {side} px and enlarged again" if settings["up_again"] else f"images resized to {side} px"
