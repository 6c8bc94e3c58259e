"""Shape Adaptor's config, the places of its adaptors, and the net that learns its shape.

Letters: B images, K classes, N adaptors.
Source: Liu et al., ECCV 2020 (arXiv 2008.00892): SA replaces every fixed resizing of a network by N adaptors, AutoSC
adds adaptors to the human-designed network so that it shrinks more, AutoTL replaces exactly the human-designed
resizings by adaptors to fine-tune a trained network. Our extensions, all off by default: `width` for VGG and ResNet-50,
AutoTL for VGG-16 and MobileNetV2, `keep_residual`, `doubled: false`, and the budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.errors import ConfigError, JsonValue
from pipeline.families.shape_adaptor.bodies import (
    MOBILENET,
    RESNET_STAGES,
    VGG_POOLED,
    VGG_WIDTHS,
    BodyLayout,
    Cells,
    Kind,
    Mode,
    build_body,
    mobilenet_strides,
)
from pipeline.families.shape_adaptor.body_costs import BodyCosts
from pipeline.families.shape_adaptor.shape import LARGER, SMALLER, Rule, Rules, Shape, ShapePlan, Size, initial_alpha
from pipeline.family import FamilyConfig

SMALL_PX = 64  # up to this side_px a net has the layout for small images
MODE_ALPHA = {
    "autosc": 2.19,
    "autotl": -2.19,
}  # initial; factors 0.9497 and 0.5503, neither is the human shape
Positive = Annotated[float, Field(gt=0, le=1e6)]
Side = Annotated[int, Field(ge=1, le=8192)]
Factor = Annotated[float, Field(gt=SMALLER, lt=LARGER)]


class ShapeConfig(FamilyConfig):
    """`mode: human` is the same network with its human-designed, fixed resizing, for comparison."""

    name: Literal["shape_adaptor"] = "shape_adaptor"
    net: Kind = "resnet50"
    mode: Mode = "sa"
    side_px: Annotated[int, Field(ge=4, le=8192)] = (
        224  # image side; sets layout, number of adaptors and initial alphas
    )
    width: Annotated[float, Field(gt=0, le=16)] = (
        1.0  # multiplies all channels, rounded to 8; the paper varies only MobileNetV2's
    )
    adaptors: Annotated[int, Field(ge=1, le=64)] | None = None  # null: as many as the paper uses at this side
    target_px: Side = 8  # sa: initial side after the last adaptor, before truncation
    factors: tuple[Factor, ...] | None = None  # initial factors of the adaptors; null: equal ones
    rule: Rule | None = None  # how sides become integers; null: global for autosc, else local
    limit_px: Side | None = None  # last side; the paper: 15 for ImageNet on 8 GPUs, 30 on one; none up to 64 px
    doubled: bool = True  # weights of a residual cell sum to 2, so that alpha = 0 gives the ordinary sum
    pool: Literal["floor", "ceil"] | None = None  # rounding of odd sides; null: ceil for autosc, else floor
    keep_residual: bool = False  # MobileNetV2: blocks with an adaptor add their input if shapes allow it
    alpha_every: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = (
        20  # steps between updates of the alphas (the paper: 20, ImageNet 1500)
    )
    # null: never, so that the net keeps its initial shape
    max_mvalues: Positive | None = None  # budget per image: Σ C·h·w over convolutions and adaptors, in millions
    max_gmacs: Positive | None = None  # budget per image in 1e9 MACs

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        mode, net = values["mode"], values["net"]
        keys: dict[str, str] = {}
        if net != "resnet50":
            keys["doubled"] = f"{net} has no adaptor that joins a shortcut"
        if net != "mobilenet_v2":
            keys["keep_residual"] = f"it is for mobilenet_v2, not for {net}"
        if mode != "sa" or values["factors"] is not None:
            keys["target_px"] = "factors gives the first sizes" if mode == "sa" else "it is for mode sa"
        if mode in ("human", "autotl"):
            keys["adaptors"] = f"mode {mode} fixes their number"
        if _pools_nothing(mode, net, values["side_px"]):
            keys["pool"] = f"{net} in mode {mode} has no 2x2 pooling"
        if mode == "human":
            of_adaptors = ("factors", "rule", "limit_px", "doubled", "keep_residual", "alpha_every")
            keys |= dict.fromkeys(of_adaptors, "mode human has no adaptors")
        return keys

    @model_validator(mode="after")
    def _rules(self) -> ShapeConfig:
        if self.mode == "sa" and self.target_px >= self.side_px:
            raise ValueError(f"target_px (={self.target_px}) must be below side_px (={self.side_px})")
        most = self.most_adaptors
        if self.mode in ("sa", "autosc") and self.num_adaptors > most:
            raise ValueError(
                f"adaptors (={self.num_adaptors}): {self.net} has {most} places for mode {self.mode} at side_px "
                f"(={self.side_px})"
            )
        if self.factors is not None and len(self.factors) != self.num_adaptors:
            raise ValueError(f"factors has {len(self.factors)} entries, the net {self.num_adaptors} adaptors")
        return self

    @property
    def small(self) -> bool:
        """Whether the net has the layout for small images."""
        return self.side_px <= SMALL_PX

    @property
    def num_adaptors(self) -> int:
        """N. Source: the released code, where sa uses floor(log2(side / 2)) of the input side."""
        if self.mode == "sa":
            return self.adaptors or math.floor(math.log2(self.side_px / 2))
        if self.mode == "autosc":
            few, below = (3, 64) if self.net == "mobilenet_v2" else (2, 65 if self.net == "resnet50" else 64)
            return self.adaptors or (few if self.side_px < below else 4)
        return len(places(self))

    @property
    def most_adaptors(self) -> int:
        """The number of places for adaptors; the last layer never has one."""
        if self.mode == "sa":
            return {"resnet50": sum(RESNET_STAGES), "mobilenet_v2": 1 + len(MOBILENET)}.get(self.net, 12)
        return len(_candidates(self))


def _pools_nothing(mode: JsonValue, net: JsonValue, side_px: JsonValue) -> bool:
    """Whether a net has neither adaptors between a map and its pooling nor fixed 2x2 poolings."""
    if net == "mobilenet_v2":
        return mode == "human"
    small = isinstance(side_px, int) and side_px <= SMALL_PX
    return net == "resnet50" and (mode in ("human", "autosc") or (mode == "autotl" and small))


@dataclass(frozen=True)
class ShapeAdaptorOutput:
    """logits [B, K]; alphas [N], detached; the plan used in this forward."""

    logits: Tensor
    alphas: Tensor
    plan: ShapePlan


def build(config: ShapeConfig, num_classes: int) -> ShapeNet:
    """The net on CPU, its weights drawn from torch's default generator."""
    return ShapeNet(config, num_classes)


class ShapeNet(nn.Module):
    """A body whose adaptors get their sizes and weights from `shape`."""

    def __init__(self, config: ShapeConfig, num_classes: int) -> None:
        super().__init__()
        layout = layout_of(config)
        self.body, route = build_body(layout, num_classes)
        residual = tuple(cell and config.doubled for cell in route.residual)
        rule = config.rule or ("global" if config.mode == "autosc" else "local")
        self.shape = Shape(first_alphas(config), Rules(tuple(route.fixed), residual, rule, config.limit_px))
        self.costs = BodyCosts(layout, num_classes)
        self.config = config

    def draw_noise(self, num_images: int) -> Tensor | None:
        return None

    def plan(self, size: Size) -> ShapePlan:
        """The plan for images of `size`. Raises ConfigError, before anything is computed, if it exceeds a budget."""
        found = self.shape.plan(size)
        costs = self.costs
        self._check("max_mvalues", lambda: costs.values(size, found.sizes) / 1e6, size, found)
        self._check("max_gmacs", lambda: costs.macs(size, found.sizes) / 1e9, size, found)
        return found

    def cells(self, plan: ShapePlan) -> Cells:
        """The sizes and the differentiable weights that a plan gives the adaptors."""
        return Cells(plan.sizes, self.shape.weights(plan.penalty))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> ShapeAdaptorOutput:
        """images [B, 3, H, W] of any size; waits for the device only in the first forward after the alphas changed."""
        plan = self.plan((images.shape[2], images.shape[3]))
        logits = self.body(images, self.cells(plan))
        alphas = self.shape.alphas
        return ShapeAdaptorOutput(logits, logits.new_empty(0) if alphas is None else alphas.detach(), plan)

    def _check(
        self, key: Literal["max_mvalues", "max_gmacs"], amount_of: Callable[[], float], size: Size, plan: ShapePlan
    ) -> None:
        budget: float | None = getattr(self.config, key)
        if budget is None or (amount := amount_of()) <= budget:
            return
        raise ConfigError(
            f"images of {size[0]}x{size[1]} px would cost {amount:.4g} each with sides {list(plan.sides_px)} px after "
            f"the adaptors, above family.{key} (={budget:g}); raise it, or bound the last side by family.limit_px "
            f"(={self.config.limit_px})",
            key=f"family.{key}",
            subject=f"{budget:g}",
        )


def first_alphas(config: ShapeConfig) -> tuple[float, ...]:
    """The initial alphas, [N]: those of the given factors, else the same value for all."""
    count = config.num_adaptors
    if config.factors is not None:
        return tuple(math.log((s - SMALLER) / (LARGER - s)) for s in config.factors)
    if config.mode == "sa":
        return (initial_alpha(config.side_px, config.target_px, count),) * count
    return (MODE_ALPHA[config.mode],) * count if count else ()


def layout_of(config: ShapeConfig) -> BodyLayout:
    """What the body of this net is built from."""
    ceil = config.pool == "ceil" if config.pool else config.mode == "autosc"
    return BodyLayout(
        kind=config.net,
        mode=config.mode,
        small=config.small,
        places=places(config),
        width=config.width,
        ceil_pool=ceil,
        keep_residual=config.keep_residual,
    )


def places(config: ShapeConfig) -> tuple[int, ...]:
    """The numbers of the layers with an adaptor: a VGG's convolutions, or 0 for a stem and 1, 2, ... for blocks.

    Source: the floor formulas of the released code for i in 0...N-1. SA: convolution i·12/N, block i·16/N, block
    i·18/N. AutoSC spreads the adaptors over the layers that do not shrink; for ResNet-50 it divides by one more than
    their number.
    """
    if config.mode == "human":
        return ()
    if config.mode == "autotl":
        return _human_resizings(config)
    count = config.num_adaptors
    if config.mode == "sa":
        spread = config.most_adaptors
        return tuple(number * spread // count for number in range(count))
    candidates = _candidates(config)
    spread = len(candidates) + (config.net == "resnet50")
    return tuple(candidates[number * spread // count] for number in range(count))


def _candidates(config: ShapeConfig) -> list[int]:
    """The layers where AutoSC may put an adaptor: those that do not shrink, without the last one."""
    if config.net == "resnet50":
        first = _first_blocks()
        return [place for place in range(1, sum(RESNET_STAGES)) if place not in first]
    if config.net == "mobilenet_v2":
        strides = mobilenet_strides(config.small)
        return [place for place in range(2, len(strides)) if strides[place] == 1]
    return [number for number in range(len(VGG_WIDTHS) - 1) if number not in VGG_POOLED]


def _human_resizings(config: ShapeConfig) -> tuple[int, ...]:
    """The layers that shrink in the human-designed net; a ResNet's stem shrinks twice."""
    if config.net == "resnet50":
        return (*(() if config.small else (0, 0)), *_first_blocks()[1:])
    if config.net == "mobilenet_v2":
        return tuple(place for place, stride in enumerate(mobilenet_strides(config.small)) if stride == 2)
    return VGG_POOLED[:4] if config.small else VGG_POOLED


def _first_blocks() -> list[int]:
    return [1 + sum(RESNET_STAGES[:stage]) for stage in range(len(RESNET_STAGES))]
