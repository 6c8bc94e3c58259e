"""Laws of the pixels on the device: torchvision's mathematics, and numbers that depend on (seed, step, micro) alone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from pipeline.data import pixels
from pipeline.data.config import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from pipeline.families.arrn.filters import FilterPair

CLASSES = 5


def batch(count: int = 6, height: int = 12, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, height, width, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % CLASSES


def test_normalise_is_torchvisions_and_mirrors_the_chosen_ones() -> None:
    images = torch.randint(0, 256, (5, 7, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before, flips = images.clone(), torch.tensor([True, False, True, False, False])
    found = pixels.normalise(images, IMAGENET_MEAN, IMAGENET_STD, flips)
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    expected = theirs(images.permute(0, 3, 1, 2))
    expected[flips] = v2.functional.horizontal_flip(expected[flips])
    assert torch.allclose(found, expected, atol=2e-6)
    assert found.shape == (5, 3, 7, 9) and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_a_low_pass_keeps_what_arrns_filter_keeps_of_the_lower_resolution() -> None:
    images, _ = batch()
    levels = torch.tensor([0, 1, 2, 0, 3, 1])
    sides = (9, 4, 20)  # the last is larger than the images: nothing to take away
    found, pair = pixels.low_pass(images, levels, sides), FilterPair("dct")
    assert found.is_contiguous(memory_format=torch.channels_last) and torch.equal(
        found[levels == 0], images[levels == 0]
    )
    for row, level in enumerate(levels.tolist()):
        px = min(sides[level - 1], 12) if level else 12
        expected = pair.resize(pair.resize(images[row : row + 1], (px, px)), (12, 12))
        assert torch.allclose(found[row : row + 1], expected, atol=2e-6)
    assert (found[1] - images[1]).abs().max() > 0.1


def test_mixup_is_torchvisions_for_the_same_share() -> None:
    images, labels = batch()
    theirs = v2.MixUp(num_classes=CLASSES)
    for share in (0.0, 0.3, 1.0):
        theirs.make_params = lambda flat, share=share: {"lam": share}
        found, expected = pixels.mixup(images, labels, CLASSES, share=share), theirs(images, labels)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_cutmix_is_torchvisions_for_the_same_share_and_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = batch(height=10, width=16)
    theirs = v2.CutMix(num_classes=CLASSES)
    for share, x, y in ((0.5, 8, 5), (0.1, 0, 9), (0.9, 15, 0), (1.0, 3, 3), (0.0, 2, 7)):
        theirs._dist.sample = lambda shape, share=share: torch.tensor([share], dtype=torch.float64)
        drawn = iter([torch.tensor([x]), torch.tensor([y])])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, drawn=drawn, **__: next(drawn))
            expected = theirs(images, labels)
        box = pixels.box_of(share, ((x + 0.5) / 16, (y + 0.5) / 10), (10, 16))
        found = pixels.cutmix(images, labels, CLASSES, box=box)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_without_alphas_nothing_is_touched() -> None:
    images, labels = batch()
    found = pixels.mix(images, labels, CLASSES, AugmentConfig(), 1, 2, 0)
    assert found[0] is images and found[1] is labels


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_numbers_depend_on_seed_step_and_micro_alone(alphas: tuple[float, float]) -> None:
    images, labels = batch()
    augment = AugmentConfig(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    first = pixels.mix(images, labels, CLASSES, augment, 1, 2, 0)
    torch.manual_seed(99), np.random.seed(99)
    again = pixels.mix(images, labels, CLASSES, augment, 1, 2, 0)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    others = [pixels.mix(images, labels, CLASSES, augment, *key) for key in ((2, 2, 0), (1, 3, 0), (1, 2, 1))]
    assert not any(torch.equal(a[0], b[0]) for a, b in combinations([first, *others], 2))
    assert torch.allclose(first[1].sum(dim=1), torch.ones(len(labels)))


def test_with_both_on_a_fair_draw_takes_one_and_shares_follow_beta() -> None:
    images, labels = batch(2)
    both = AugmentConfig(mixup_alpha=1.0, cutmix_alpha=1.0)
    mixed = [pixels.mix(images, labels, CLASSES, both, 0, step, 0)[0] for step in range(400)]
    cut = np.mean([bool(((m == images) | (m == images.roll(1, 0))).all()) for m in mixed])
    assert abs(cut - 0.5) < 0.08
    only = AugmentConfig(mixup_alpha=0.2)
    shares = np.array([pixels.mix(images, labels, CLASSES, only, 0, step, 0)[1][0, 0].item() for step in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.01
