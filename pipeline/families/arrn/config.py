"""The keys of ARRN under `family:`, and the named sizes.

Letters: N residuals, so N+1 resolutions R_0 > ... > R_N; residual n runs at R_n and its output is at R_{n+1}.
Source: Demeule et al., arXiv 2412.06195. The paper's widths, depths and dropout probabilities are not public, so the
sizes are ours. The small ones are within its range of 5-20 M parameters. Those for ImageNet are comparable to
EfficientNetV2-S (S, S-steep), to ResNet-50 (M) and smaller (T). S-steep spends most of its MACs at the high
resolutions, where skipping saves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.errors import JsonValue
from pipeline.families.arrn.filters import Filter
from pipeline.family import FamilyConfig

Side = Annotated[int, Field(ge=2, le=8192)]
Width = Annotated[
    int, Field(ge=3, le=8192)
]  # at least the 3 colour channels, or growing could not preserve the function
Layers = Annotated[str, Field(pattern=r"^[FM][1-9]\d?x[1-9]\d?$")]  # "F2x3": 3 Fused-MBConv (M: MBConv), expansion 2
Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


@dataclass(frozen=True)
class LadderPlan:
    """What a net is built from: ladder, widths [N+1]; inner [N], layers of each residual; final, of the last stage."""

    ladder: tuple[int, ...]
    widths: tuple[int, ...]
    inner: tuple[str, ...]
    final: str


_224 = (224, 112, 56, 28, 14, 7)
_LIKE_EFFICIENTNET = ("F2x1", "F2x2", "F3x3", "M4x6", "M4x9")
_SMALL = ("F4x2", "F4x2", "M4x4", "M4x4")
SIZES = {
    "T": LadderPlan(_224, (12, 24, 48, 96, 160, 320), ("F1x1", "F2x2", "M4x3", "M4x4", "M4x6"), "M4x3"),
    "S": LadderPlan(_224, (16, 32, 64, 128, 256, 448), _LIKE_EFFICIENTNET, "M4x5"),
    "S-steep": LadderPlan(_224, (32, 64, 112, 160, 288, 512), ("F2x1", "F2x1", "F2x1", "M4x3", "M4x4"), "M4x5"),
    "M": LadderPlan(_224, (24, 48, 80, 160, 288, 480), _LIKE_EFFICIENTNET, "M4x5"),
    "cifar": LadderPlan((32, 16, 8, 4), (48, 96, 192, 384), ("F4x2", "F4x3", "M4x4"), "M4x3"),
    "tiny-imagenet": LadderPlan((64, 32, 16, 8, 4), (32, 64, 128, 256, 384), _SMALL, "M4x3"),
    "stl10": LadderPlan((96, 48, 24, 12, 6), (32, 64, 128, 256, 384), _SMALL, "M4x3"),
}


class ArrnConfig(FamilyConfig):
    """A named size, or a custom ladder: then ladder_px, widths, inner and final must all be given.

    Images of any size are accepted. Their shorter side counts: an image enters at the lowest resolution of the ladder
    that is not below it.
    """

    name: Literal["arrn"] = "arrn"
    size: Literal["T", "S", "S-steep", "M", "cifar", "tiny-imagenet", "stl10"] = "cifar"
    ladder_px: tuple[Side, ...] = ()  # R_0 > ... > R_N; empty: that of `size`; so for the next three
    widths: tuple[Width, ...] = ()  # channels at each resolution
    inner: tuple[Layers, ...] = ()  # layers of each residual, e.g. F2x1
    final: Layers | None = None
    head_width: Annotated[int, Field(ge=1, le=65_536)] = 1280
    finest_px: int | None = None  # omits the residuals above this resolution: the sub-network to grow from
    filters: Filter | tuple[Filter, ...] = (
        "dct"  # the paper's is kaiser, whose skipping is less exact; a list: by residual
    )
    residual_gain: Weight = 0.1  # initial weight of the last norm of each block inside a residual
    drop: Probability | tuple[Probability, ...] | None = None  # p_n: of dropping residual n if all above it are dropped
    level_weights: tuple[Weight, ...] = ()  # instead of `drop`: shares of images that enter at R_0, R_1, ...
    drop_path: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # probability that the last block adds nothing for an image; falls linearly towards the first block
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the pooled features that the head does not see
    resolutions_px: tuple[Side, ...] = ()  # evaluated in addition to the finest; empty: the ladder's

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        given, finest = values["ladder_px"], values["finest_px"]
        keys = {"size": "ladder_px gives the ladder"} if given else {}
        size = SIZES.get(str(values["size"]))
        ladder = given if isinstance(given, list) and given else list(size.ladder) if size else []
        if len(ladder) == 1 or (ladder and finest == ladder[-1]):
            keys |= dict.fromkeys(("residual_gain", "drop", "level_weights"), "the net has no residual")
        return keys

    @model_validator(mode="after")
    def _rules(self) -> ArrnConfig:
        for check in (self._own_ladder, self._descends, self._finest, self._filters, self._dropout, self._resolutions):
            check()
        return self

    def _own_ladder(self) -> None:
        given = {"ladder_px": self.ladder_px, "widths": self.widths, "inner": self.inner}
        missing = [key for key, value in {**given, "final": self.final}.items() if not value]
        if self.ladder_px and missing:
            raise ValueError(f"a custom ladder needs {', '.join(missing)} as well")
        if not self.ladder_px:
            self._fits("widths", self.widths, len(SIZES[self.size].widths))
            self._fits("inner", self.inner, len(SIZES[self.size].inner))
        else:
            self._fits("widths", self.widths, len(self.ladder_px))
            if len(self.inner) != len(self.ladder_px) - 1:
                raise ValueError(
                    f"inner has {len(self.inner)} entries, a ladder of {len(self.ladder_px)} resolutions has "
                    f"{len(self.ladder_px) - 1} residuals"
                )

    def _fits(self, key: str, given: Sequence[object], count: int) -> None:
        if given and len(given) != count:
            raise ValueError(f"{key} has {len(given)} entries, this ladder needs {count}")

    def _descends(self) -> None:
        ladder = self._whole.ladder
        if any(fine <= coarse for fine, coarse in pairwise(ladder)):
            raise ValueError(f"ladder_px (={list(ladder)}) must descend, e.g. [32, 16, 8, 4]")

    def _finest(self) -> None:
        if self.finest_px is not None and self.finest_px not in self._whole.ladder:
            raise ValueError(f"finest_px (={self.finest_px}) is not on the ladder {list(self._whole.ladder)}")

    def _filters(self) -> None:
        if isinstance(self.filters, tuple):
            self._fits("filters", self.filters or (None,), max(1, len(self._whole.inner)))

    def _dropout(self) -> None:
        count = len(self.plan.inner)
        if self.drop is not None and self.level_weights:
            raise ValueError(
                "drop and level_weights both set the dropout: give one of them (level_weights: [] clears the other)"
            )
        if isinstance(self.drop, tuple) and len(self.drop) != count:
            raise ValueError(f"drop has {len(self.drop)} entries, the net has {count} residuals")
        if len(self.level_weights) > count + 1:
            raise ValueError(f"level_weights has {len(self.level_weights)} entries, the net {count + 1} resolutions")
        if self.level_weights and not sum(self.level_weights):
            raise ValueError("level_weights are all 0: at least one must be positive")

    def _resolutions(self) -> None:
        ladder = self.plan.ladder
        wrong = [side for side in self.resolutions_px if not ladder[-1] <= side < ladder[0]]
        if wrong or len(set(self.resolutions_px)) < len(self.resolutions_px):
            raise ValueError(
                f"resolutions_px (={list(self.resolutions_px)}): each once, below the finest ({ladder[0]} px) and "
                f"not below the coarsest ({ladder[-1]} px)"
            )

    @property
    def _whole(self) -> LadderPlan:
        size = SIZES[self.size]
        return LadderPlan(
            self.ladder_px or size.ladder,
            self.widths or size.widths,
            self.inner or size.inner,
            self.final or size.final,
        )

    @property
    def _left_out(self) -> int:
        return 0 if self.finest_px is None else self._whole.ladder.index(self.finest_px)

    @property
    def plan(self) -> LadderPlan:
        """What is built: the whole ladder, or its part from finest_px downwards."""
        whole, start = self._whole, self._left_out
        return LadderPlan(whole.ladder[start:], whole.widths[start:], whole.inner[start:], whole.final)

    @property
    def kinds(self) -> tuple[Filter, ...]:
        """The filter of each residual that is built, [N]; a single one, for resizing images, if N is 0."""
        if isinstance(self.filters, tuple):
            return self.filters[self._left_out :] or self.filters[-1:]
        return (self.filters,) * max(1, len(self.plan.inner))

    @property
    def probabilities(self) -> tuple[float, ...]:
        """p_n, [N]: the probability that residual n is dropped, given that all residuals above it are dropped.

        From the shares pi_n of images that enter at R_n: p_n = 1 - pi_n / sum of pi_m over m >= n. By default half of
        the images enter at R_0 and the others evenly at the resolutions of the other residuals. The paper's p_n are
        not public.
        """
        count = len(self.plan.inner)
        if self.drop is not None:
            return self.drop if isinstance(self.drop, tuple) else (self.drop,) * count
        weights = self.level_weights or ((max(count - 1, 1),) + (1,) * max(count - 1, 1))[: count + 1]
        below = [sum(weights[n:]) for n in range(count)]
        return tuple(1 - weights[n] / below[n] if n < len(weights) and below[n] else 0.0 for n in range(count))

    @property
    def evaluated_px(self) -> tuple[int, ...]:
        """Resolutions below the finest that have policies."""
        ladder = self.plan.ladder
        return self.resolutions_px or ladder[1:-1] or ladder[1:]
