"""Tests of the pixel operations: torchvision's pixels, whatever else is in the batch."""

from __future__ import annotations

import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from pipeline.data.augment.chain import PixelOp
from pipeline.data.pixel_ops import apply_chain
from tests import images as pictures

SAMPLE = Path(os.environ.get("ADAPTNET_DATA", "/none"), "imagenet-sample")
RANGES = {
    **dict.fromkeys((PixelOp.SHEAR_X, PixelOp.SHEAR_Y), (-0.99, 0.99)),
    **dict.fromkeys((PixelOp.TRANSLATE_X, PixelOp.TRANSLATE_Y), (-20, 21)),
    PixelOp.ROTATE: (-135, 135),
    **dict.fromkeys((PixelOp.BRIGHTNESS, PixelOp.COLOR, PixelOp.CONTRAST, PixelOp.SHARPNESS), (0, 2)),
    PixelOp.POSTERIZE: (0, 9),
    PixelOp.SOLARIZE: (0, 255),
    PixelOp.SOLARIZE_ADD: (0, 111),
    PixelOp.BLUR: (0.1, 2),
}
WHOLE = (PixelOp.TRANSLATE_X, PixelOp.TRANSLATE_Y, PixelOp.POSTERIZE, PixelOp.SOLARIZE_ADD)


def photos(count: int, side: int) -> Tensor:
    """Drawn pictures with noise, uint8 [count, side, side, 3]; the last is flat, the one before has a flat channel."""
    images = np.stack([np.asarray(pictures.photo(side, side, seed)) for seed in range(count)]).astype(np.float64)
    images += np.random.default_rng(0).normal(0, 8, images.shape)
    images[-1], images[-2, ..., 1] = 77, 200
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


def drawn(op: PixelOp, count: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng([seed, op]).uniform(*RANGES.get(op, (0, 1)), count)
    return np.trunc(values) if op in WHOLE else values


def chain(ops: np.ndarray, arguments: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([ops, arguments], axis=-1).astype(np.float64))


def expected(op: PixelOp, image: Tensor, argument: float) -> Tensor:
    """torchvision's pixels [S, S, 3]."""
    planes, degrees = image.permute(2, 0, 1).contiguous(), math.degrees(math.atan(argument))
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    made = {
        PixelOp.IDENTITY: lambda: planes,
        PixelOp.SHEAR_X: lambda: F.affine(planes, **still | {"shear": [degrees, 0.0]}, center=[0, 0]),
        PixelOp.SHEAR_Y: lambda: F.affine(planes, **still | {"shear": [0.0, degrees]}, center=[0, 0]),
        PixelOp.TRANSLATE_X: lambda: F.affine(planes, **still | {"translate": [int(argument), 0]}),
        PixelOp.TRANSLATE_Y: lambda: F.affine(planes, **still | {"translate": [0, int(argument)]}),
        PixelOp.ROTATE: lambda: F.rotate(planes, argument),
        PixelOp.BRIGHTNESS: lambda: F.adjust_brightness(planes, argument),
        PixelOp.COLOR: lambda: F.adjust_saturation(planes, argument),
        PixelOp.CONTRAST: lambda: F.adjust_contrast(planes, argument),
        PixelOp.SHARPNESS: lambda: F.adjust_sharpness(planes, argument),
        PixelOp.POSTERIZE: lambda: F.posterize(planes, int(argument)),
        PixelOp.SOLARIZE: lambda: F.solarize(planes, argument),
        PixelOp.SOLARIZE_ADD: lambda: torch.where(planes < 128, planes.int() + int(argument), planes).clamp(max=255),
        PixelOp.AUTO_CONTRAST: lambda: F.autocontrast(planes),
        PixelOp.EQUALIZE: lambda: F.equalize(planes),
        PixelOp.INVERT: lambda: F.invert(planes),
        PixelOp.BLUR: lambda: F.gaussian_blur(planes, [17, 17], [argument, argument]),
    }
    return made[op]().to(torch.uint8).permute(1, 2, 0)


def assert_torchvisions(op: PixelOp, images: Tensor, arguments: np.ndarray) -> None:
    """Equal; moves may differ where two pixels are equally near, and a blur by 1 where it is between two levels."""
    found = apply_chain(images, chain(np.full(len(images), op), arguments)[:, None])
    wanted = torch.stack([expected(op, *each) for each in zip(images, arguments.tolist(), strict=True)])
    differs = (found != wanted).float().mean().item()
    if op in (PixelOp.SHEAR_X, PixelOp.SHEAR_Y, PixelOp.ROTATE):
        assert differs <= 1e-4
    elif op == PixelOp.BLUR:
        assert differs <= 1e-4 and (found.int() - wanted.int()).abs().max() <= 1
    else:
        assert differs == 0


@pytest.mark.parametrize("op", PixelOp)
def test_pixels_are_torchvisions(op: PixelOp) -> None:
    assert_torchvisions(op, photos(12, 48), drawn(op, 12))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="ADAPTNET_DATA has no imagenet-sample")
def test_pixels_of_photographs_are_torchvisions() -> None:
    with tarfile.open(next(SAMPLE.glob("*.tar"))) as tar:
        members = [each for each in tar if each.name.lower().endswith((".jpg", ".jpeg"))][:3]
        files = [tar.extractfile(each) for each in members]
        encoded = [torch.frombuffer(bytearray(file.read()), dtype=torch.uint8) for file in files if file]
    decoded = (decode_image(each, ImageReadMode.RGB) for each in encoded)
    images = torch.stack([F.resize(each, [224, 224], antialias=True).permute(1, 2, 0) for each in decoded])
    for op in PixelOp:
        assert_torchvisions(op, images.contiguous(), drawn(op, 3, seed=1))


def test_an_image_does_not_depend_on_the_others_or_on_their_order_and_the_argument_is_left_as_it_was() -> None:
    images, before = photos(64, 24), photos(64, 24)
    ops = np.random.default_rng(5).permutation(np.repeat(np.arange(len(PixelOp)), 8))[:128].reshape(64, 2)
    arguments = np.array([[drawn(PixelOp(op), 1, seed)[0] for op in pair] for seed, pair in enumerate(ops)])
    links = chain(ops, arguments)
    whole = apply_chain(images, links, fill=(1, 2, 3))
    assert torch.equal(images, before) and not torch.equal(whole, before)
    for size in (1, 5, 33):
        parts = zip(images.split(size), links.split(size), strict=True)
        assert torch.equal(torch.cat([apply_chain(*part, fill=(1, 2, 3)) for part in parts]), whole)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_chain(images[order], links[order], fill=(1, 2, 3)), whole[order])


def test_moves_uncover_the_fill() -> None:
    images = torch.full((1, 8, 8, 3), 50, dtype=torch.uint8)
    moved = apply_chain(images, chain(np.array([[PixelOp.TRANSLATE_X]]), np.array([[3.0]])), fill=(9, 8, 7))
    assert moved[0, :, :3].unique(dim=0).unique(dim=1).tolist() == [[[9, 8, 7]]] and (moved[0, :, 3:] == 50).all()


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("op", PixelOp)
def test_the_smallest_images_are_changed_as_well(op: PixelOp, side: int) -> None:
    images = photos(2, 8)[:, :side, :side].contiguous()
    assert apply_chain(images, chain(np.full(2, op), drawn(op, 2))[:, None]).shape == images.shape
