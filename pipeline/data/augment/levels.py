"""Arguments of pixel operations by level, as torchvision's AutoAugment classes have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.chain import Floats, PixelOp
from pipeline.data.philox import Ints

NAMES: Mapping[str, PixelOp] = {
    "Identity": PixelOp.IDENTITY,
    "ShearX": PixelOp.SHEAR_X,
    "ShearY": PixelOp.SHEAR_Y,
    "TranslateX": PixelOp.TRANSLATE_X,
    "TranslateY": PixelOp.TRANSLATE_Y,
    "Rotate": PixelOp.ROTATE,
    "Brightness": PixelOp.BRIGHTNESS,
    "Color": PixelOp.COLOR,
    "Contrast": PixelOp.CONTRAST,
    "Sharpness": PixelOp.SHARPNESS,
    "Posterize": PixelOp.POSTERIZE,
    "Solarize": PixelOp.SOLARIZE,
    "AutoContrast": PixelOp.AUTO_CONTRAST,
    "Equalize": PixelOp.EQUALIZE,
    "Invert": PixelOp.INVERT,
}
MOVES = (PixelOp.SHEAR_X, PixelOp.SHEAR_Y, PixelOp.TRANSLATE_X, PixelOp.TRANSLATE_Y, PixelOp.ROTATE)
ENHANCES = (PixelOp.BRIGHTNESS, PixelOp.COLOR, PixelOp.CONTRAST, PixelOp.SHARPNESS)


@dataclass(frozen=True)
class Strongest:
    """What the highest level of a space means; the lowest changes nothing, but posterizes to 8 bits."""

    shear: float  # tangent
    translate_px: float
    rotate: float  # degrees
    enhance: float  # distance of the factor from 1
    posterize: int  # bits that are dropped


def arguments(strongest: Strongest, bins: int) -> Floats:
    """The argument of each PixelOp at each of `bins` levels, [ops, bins]; those of `ENHANCES` less 1."""
    import torch

    table = np.zeros((len(PixelOp), bins))
    highest = dict.fromkeys(ENHANCES, strongest.enhance) | {PixelOp.ROTATE: strongest.rotate}
    highest |= dict.fromkeys((PixelOp.SHEAR_X, PixelOp.SHEAR_Y), strongest.shear)
    highest |= dict.fromkeys((PixelOp.TRANSLATE_X, PixelOp.TRANSLATE_Y), strongest.translate_px)
    for op, value in highest.items():
        table[op] = torch.linspace(0.0, value, bins).tolist()  # torchvision's float32
    table[PixelOp.POSTERIZE] = (8 - torch.arange(bins) / ((bins - 1) / strongest.posterize)).round().tolist()
    table[PixelOp.SOLARIZE] = 255 * np.array(torch.linspace(1.0, 0.0, bins).tolist())
    return table


def signed(ops: Ints, values: Floats, negative: NDArray[np.bool_]) -> Floats:
    """Arguments [...] from those of the table: moves and enhancements go either way, translations by whole pixels."""
    either = np.isin(ops, (*MOVES, *ENHANCES))
    values = np.where(either & negative, -values, values)
    values = np.where(np.isin(ops, (PixelOp.TRANSLATE_X, PixelOp.TRANSLATE_Y)), np.trunc(values), values)
    return np.where(np.isin(ops, ENHANCES), 1 + values, values)
