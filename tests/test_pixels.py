"""Pixels on the device are scaled and normalised as torchvision does it."""

from __future__ import annotations

import torch
from torchvision.transforms import v2

from pipeline.data import pixels
from pipeline.data.config import IMAGENET_MEAN, IMAGENET_STD


def test_normalise_is_torchvisions_and_leaves_its_argument_alone() -> None:
    images = torch.randint(0, 256, (5, 7, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    normalised = pixels.normalise(images, IMAGENET_MEAN, IMAGENET_STD)
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    assert torch.allclose(normalised, theirs(images.permute(0, 3, 1, 2)), atol=2e-6)
    assert normalised.shape == (5, 3, 7, 9) and normalised.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
