"""Policies: the net in the shape that the alphas give, and its frozen form, whose sizes and weights are constants.

Letters: B images, K classes, N adaptors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline import cost
from pipeline.blocks import per_image
from pipeline.errors import ConfigError
from pipeline.families.shape_adaptor.bodies import Cells
from pipeline.families.shape_adaptor.model import ShapeConfig, ShapeNet
from pipeline.families.shape_adaptor.shape import ShapePlan, Size
from pipeline.family import FixedPolicy, Prediction, Settings


class Frozen(nn.Module):
    """A net whose shape is constant, for images of one size; it has no alphas and gives the same logits bit for bit.

    It can be exported, compiled as one graph and captured. Raises ConfigError for images of another size.
    """

    def __init__(self, net: ShapeNet, size: Size) -> None:
        super().__init__()
        self.body, self.size, self.plan = net.body, size, net.plan(size)
        self.register_buffer("weights", net.shape.weights(self.plan.penalty).detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, *size] -> logits [B, K]."""
        size = (images.shape[2], images.shape[3])
        if size != self.size:
            raise ConfigError(
                f"this net's shape is frozen for images of {self.size[0]}x{self.size[1]} px, not {size[0]}x{size[1]}; "
                "freeze it again for these",
                key="images",
                subject=f"{size[0]}x{size[1]}",
            )
        logits: Tensor = self.body(images, Cells(self.plan.sizes, self.get_buffer("weights")))
        return logits


def freeze(net: nn.Module, size: Size) -> Frozen:
    """The net in its present shape for images of `size`, in eval mode, as a deep copy."""
    assert isinstance(net, ShapeNet)
    return copy.deepcopy(Frozen(net, size)).eval()


@dataclass(frozen=True)
class Live(FixedPolicy):
    """The net in the shape that its alphas give now."""

    name: str = "live"

    @property
    def kind(self) -> str:
        return "shape"

    @property
    def settings(self) -> Settings:
        return {"frozen": False}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, ShapeNet)
        plan = net.plan((images.shape[2], images.shape[3]))
        logits = net.body(images, net.cells(plan))
        return Prediction(logits.float(), _macs(self, net, plan, images), _facts(net, plan, images))


@dataclass(frozen=True)
class AtShape(FixedPolicy):
    """The frozen form, created at the first batch of each size; later changes of the alphas do not affect it."""

    name: str = "frozen"

    @property
    def kind(self) -> str:
        return "shape"

    @property
    def settings(self) -> Settings:
        return {"frozen": True}

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        assert isinstance(net, ShapeNet)
        frozen = self.frozen(net, (images.shape[2], images.shape[3]))
        macs = _macs(self, frozen, frozen.plan, images)
        return Prediction(frozen(images).float(), macs, _facts(net, frozen.plan, images))

    def frozen(self, net: ShapeNet, size: Size) -> Frozen:
        """The frozen form of `net` for images of `size`."""
        return self.once((net, size), lambda: Frozen(net, size).eval())


def _macs(policy: FixedPolicy, net: nn.Module, plan: ShapePlan, images: Tensor) -> Tensor:
    """The MACs of each image, [B] f64: constant, measured once for each shape that the net takes."""
    macs = policy.once((images.shape[1:], plan.sizes), lambda: cost.measure(net, images[:1]).macs)
    return per_image(macs, images)


def _facts(net: ShapeNet, plan: ShapePlan, images: Tensor) -> dict[str, Tensor]:
    """The longer side after each adaptor in pixels, and the alphas, both [B, N]; none for a net of fixed shape."""
    alphas = net.shape.alphas
    if alphas is None:
        return {}
    sides = [torch.full((len(images),), float(side), device=images.device) for side in plan.sides_px]
    return {"side_px": torch.stack(sides, dim=1), "alphas": alphas.detach().expand(len(images), -1)}


def policies(config: ShapeConfig, net: nn.Module) -> Sequence[Live | AtShape]:
    """`live` first, then `frozen`."""
    return [Live(), AtShape()]


def describe(kind: str, settings: Settings) -> str:
    """What a policy does, in a few words."""
    return "the learned shape, frozen" if settings["frozen"] else "the learned shape"
