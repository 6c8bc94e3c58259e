"""Chains of operations that were chosen by a method: TrivialAugment, RandAugment, AutoAugment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.data.augment.chain import ChainOperation, Floats
from pipeline.data.augment.policies import policy_chains
from pipeline.data.augment.rand_augment import rand_chains
from pipeline.data.augment.trivial_wide import trivial_wide
from pipeline.data.philox import Purpose, SampleKeys
from pipeline.errors import JsonValue

Level = Annotated[int, Field(ge=0, le=255)]
OF_RAND = ("rand_ops", "rand_magnitude", "rand_std", "rand_increasing")


class AutoAugment(ChainOperation):
    """One method at a time: `auto_augment` names it."""

    name: ClassVar[str] = "auto_augment"
    order: ClassVar[int] = 12
    purpose: ClassVar[int] = Purpose.AUTO_AUGMENT

    auto_augment: Literal["trivial-wide", "rand", "imagenet", "cifar10", "svhn"] | None = (
        None  # TrivialAugmentWide, RandAugment, or AutoAugment's policy of a data set
    )
    rand_ops: Annotated[int, Field(ge=1, le=10)] = 2  # rand: operations for each image
    rand_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0  # rand: level of the operations, as timm's m
    rand_std: Annotated[float, Field(ge=0, le=10)] = 0.0  # rand: standard deviation of the level, as timm's mstd
    rand_increasing: bool = False  # rand: a higher level changes more with every operation, as timm's inc1
    fill: tuple[Level, Level, Level] = (0, 0, 0)  # colour of what auto_augment's shears, moves and rotations uncover

    @property
    def active(self) -> bool:
        """Whether `auto_augment` names a method."""
        return self.auto_augment is not None

    @property
    def uncovered(self) -> Sequence[int]:
        return self.fill

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """RandAugment's keys change nothing in another method, and `fill` nothing without a method."""
        method = values["auto_augment"]
        reasons = {} if method == "rand" else dict.fromkeys(OF_RAND, "auto_augment is not rand")
        return reasons if method is not None else {**reasons, "fill": "auto_augment is null"}

    def draw(self, keys: SampleKeys, side_px: int) -> Floats:
        """Chains [b, n, 2]."""
        if self.auto_augment == "trivial-wide":
            return trivial_wide(keys, self.purpose)
        if self.auto_augment == "rand":
            return rand_chains(
                keys,
                self.purpose,
                side_px,
                num_ops=self.rand_ops,
                level=self.rand_magnitude,
                deviation=self.rand_std,
                increasing=self.rand_increasing,
            )
        assert self.auto_augment is not None
        return policy_chains(self.auto_augment, keys, self.purpose, side_px)


OPERATION = AutoAugment
