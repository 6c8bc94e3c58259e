"""Augmentation of training images. Each module of this package is one operation (see operation.py); to add another,
add a module: its keys then appear under `data.augment`.

`AugmentConfig` is composed of the operations' keys. The sample stream calls `windows` and `draw` on the host, and a
training step calls `apply_to_uint8`, `apply_to_normalised` and `mix` on the device. Everything is a pure function of
(seed, epoch, row) or, for mixing, of (seed, step, micro-batch).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import create_model, model_validator

from pipeline.config import Config, fault
from pipeline.data.augment.operation import Crop, ImageOperation, MixOperation, Operation
from pipeline.data.philox import Ints, Purpose, SampleKeys, key_words
from pipeline.errors import ContractError, JsonValue

T = TypeVar("T", bound=Operation)
RESERVED = (
    Purpose.ORDER,
    Purpose.SHARDS,
    Purpose.CROP,
    Purpose.MIX,
    Purpose.SIDE,
)  # purposes that no single operation may use


def registered() -> list[type[Operation]]:
    """The operations: `OPERATION` of each module of this package, in their order."""
    modules = (importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__))
    operations = [module.OPERATION for module in modules if hasattr(module, "OPERATION")]
    check(operations)
    return sorted(operations, key=lambda each: (each.order, each.name))


def check(operations: Sequence[type[Operation]]) -> None:
    """Raises ContractError where two operations share a name, a key or a purpose."""
    purposes = [int(each.purpose) for each in operations if issubclass(each, ImageOperation)]
    for what, values in (
        ("name", [each.name for each in operations]),
        ("key", ["crop", *(key for each in operations for key in each.model_fields)]),
        ("purpose", [str(int(purpose)) for purpose in (*RESERVED, *purposes)]),
    ):
        if shared := [value for value in values if values.count(value) > 1]:
            message = f"two modules of pipeline.data.augment have the {what} {shared[0]}; each needs its own"
            raise ContractError(message, key="data.augment", subject=shared[0])


OPERATIONS: Sequence[type[Operation]] = registered()
CROPS: Mapping[str, type[Crop]] = {each.name: each for each in OPERATIONS if issubclass(each, Crop)}


class _AugmentConfig(Config):
    """What the training stream does to an image, a pure function of (seed, epoch, row).

    The other keys are those of the operations.
    """

    crop: str = next(iter(CROPS))

    def operation(self, kind: type[T]) -> T:
        """One operation with its keys' values."""
        return kind(**{key: getattr(self, key) for key in kind.model_fields})

    def active(self) -> list[Operation]:
        """The operations that the keys enable, in their order."""
        return [operation for each in OPERATIONS if (operation := self.operation(each)).active]

    @model_validator(mode="after")
    def _may_be_together(self) -> _AugmentConfig:
        active = {each.name: each for each in self.active()}
        for each in active.values():
            for other, why in each.excludes.items():
                if other in active:
                    raise fault(next(iter(type(each).model_fields)), f"not together with {other}: {why}")
        return self

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason: of other crops, or by an operation."""
        crop, reasons = values["crop"], dict[str, str]()
        for each in OPERATIONS:
            if issubclass(each, Crop) and each.name != crop:
                reasons |= dict.fromkeys(each.model_fields, f"crop is {crop}; crop: {each.name} uses it")
            else:
                reasons |= each.inert(values)
        return reasons


if TYPE_CHECKING:
    import torch
    from torch import Tensor

    AugmentConfig = _AugmentConfig
else:
    _KEYS = {key: (field.annotation, field) for each in OPERATIONS for key, field in each.model_fields.items()}
    AugmentConfig = create_model(
        "AugmentConfig",
        __base__=_AugmentConfig,
        __module__=__name__,
        crop=(Literal[tuple(CROPS)], next(iter(CROPS))),
        **_KEYS,
    )


@lru_cache(maxsize=64)
def crop_of(augment: AugmentConfig) -> Crop:
    """The crop that `data.augment.crop` chooses."""
    return augment.operation(CROPS[augment.crop])


@lru_cache(maxsize=64)
def image_operations(augment: AugmentConfig) -> tuple[ImageOperation, ...]:
    """The active operations on single images, in their order."""
    return tuple(each for each in augment.active() if isinstance(each, ImageOperation))


@lru_cache(maxsize=64)
def mix_operations(augment: AugmentConfig) -> tuple[MixOperation, ...]:
    """The active operations that mix a micro-batch, in their order."""
    return tuple(each for each in augment.active() if isinstance(each, MixOperation))


def windows(augment: AugmentConfig, side_px: int, keys: SampleKeys, height: Ints, width: Ints) -> NDArray[np.int32]:
    """Windows [b, 4] = y, x, height, width in images of `height` x `width`; zeros for an image without a size."""
    chosen = crop_of(augment).windows(keys, side_px, height, width)
    chosen[(height == 0) | (width == 0)] = 0
    return chosen.astype(np.int32)


def draw(augment: AugmentConfig, keys: SampleKeys, side_px: int) -> dict[str, NDArray[np.generic]]:
    """What each active operation does to each image: {name of the operation: [b, ...]}."""
    return {each.name: each.draw(keys, side_px) for each in image_operations(augment)}


def placed(augment: AugmentConfig, draws: Mapping[str, NDArray[np.generic]], device: torch.device) -> dict[str, Tensor]:
    """The draws as tensors where `apply_to_uint8` and `apply_to_normalised` take them: on the device or on the host."""
    import torch

    found = {name: torch.from_numpy(drawn) for name, drawn in draws.items()}
    for each in image_operations(augment):
        if not each.on_host:
            found[each.name] = found[each.name].to(device, non_blocking=True)
    return found


def apply_to_uint8(augment: AugmentConfig, images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Images uint8 [B, S, S, 3] after the operations on bytes; draws {name: [B, ...]}."""
    return _apply(augment, "uint8", images, draws)


def apply_to_normalised(augment: AugmentConfig, images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Images f32 [B, 3, S, S] after the operations on normalised values; draws {name: [B, ...]}."""
    return _apply(augment, "normalised", images, draws)


def _apply(augment: AugmentConfig, stage: str, images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    for operation in image_operations(augment):
        if operation.stage == stage:
            images = operation.apply(images, draws[operation.name])
    return images


def mix(
    augment: AugmentConfig, images: Tensor, labels: Tensor, num_classes: int, *, seed: int, step: int, micro: int
) -> tuple[Tensor, Tensor]:
    """A micro-batch after one of the active mixing operations, each equally likely, with targets [B, K] f32.

    images [B, 3, S, S], labels [B] i64; both are returned as they are where no operation is active.
    """
    operations = mix_operations(augment)
    if not operations:
        return images, labels
    numbers = np.random.Generator(np.random.Philox(key=key_words(seed, step), counter=[0, micro, 0, Purpose.MIX]))
    chosen = operations[int(numbers.random() * len(operations))]
    return chosen.mix(images, labels, num_classes, numbers)


def keys() -> Iterator[str]:
    """Every key under `data.augment`."""
    return iter(AugmentConfig.model_fields)
