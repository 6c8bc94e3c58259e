"""Policies of a fixed net: the images as they come, smaller, or made smaller and large again (the papers' control)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import cost
from pipeline.blocks import per_image
from pipeline.families.baseline.model import BaselineConfig
from pipeline.family import Prediction


@dataclass(frozen=True)
class AtResolution:
    """The net on images resized to `side_px` (None: as they come), and back to their own side if `up_again`."""

    side_px: int | None = None
    up_again: bool = False
    prices: dict[tuple[int, ...], int] = field(default_factory=dict, compare=False)  # MACs by shape of one image

    @property
    def name(self) -> str:
        if self.side_px is None:
            return "native"
        return f"{'down-and-up' if self.up_again else 'native'}-{self.side_px}px"

    def calibrated(self, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> AtResolution:
        return self

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        images = self.sized(images)
        shape = tuple(images.shape[1:])
        if shape not in self.prices:
            self.prices[shape] = cost.measure(net, images[:1]).macs
        return Prediction(net(images).logits.float(), per_image(self.prices[shape], images))

    def sized(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] as the net gets them."""
        if self.side_px is None:
            return images
        smaller = _resized(images, (self.side_px, self.side_px))
        return _resized(smaller, (images.shape[-2], images.shape[-1])) if self.up_again else smaller


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def policies(config: BaselineConfig, net: nn.Module) -> Sequence[AtResolution]:
    """`native` first, then each of `resolutions_px` natively and down-and-up."""
    sides = config.resolutions_px
    return [AtResolution(), *(AtResolution(side, up) for side in sides for up in (False, True))]
