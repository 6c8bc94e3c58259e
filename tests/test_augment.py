"""Tests of the augmentations: torchvision's mathematics and distributions, draws that depend on their keys alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from raised import fails
from torch import Tensor
from torchvision.transforms import v2

from pipeline import run_config
from pipeline.config import as_mapping, validate
from pipeline.data import augment
from pipeline.data.augment import AugmentConfig
from pipeline.data.augment.chain import PixelOp
from pipeline.data.augment.cutmix import box_of, cutmix
from pipeline.data.augment.flip import Flip, mirror
from pipeline.data.augment.levels import ENHANCES, MOVES, NAMES, Strongest, arguments
from pipeline.data.augment.low_pass import low_pass
from pipeline.data.augment.mixup import mixup
from pipeline.data.augment.policies import POLICIES, steps_of
from pipeline.data.augment.rand_augment import argument
from pipeline.data.augment.random_erasing import erased
from pipeline.data.config import DataConfig
from pipeline.data.philox import Ints, SampleKeys
from pipeline.errors import ConfigError, ContractError
from pipeline.families.arrn.filters import FilterPair
from tests import images as pictures

CLASSES = 5
ROOT = Path(__file__).parents[1]


def keys(count: int, epoch: int = 0, seed: int = 1) -> SampleKeys:
    return SampleKeys(seed, np.full(count, epoch), np.arange(count))


# --- draws


def drawn_windows(config: AugmentConfig, height: int, width: int, count: int = 20_000, side_px: int = 224) -> Ints:
    sizes = np.full(count, height), np.full(count, width)
    return augment.windows(config, side_px, keys(count, epoch=2, seed=5), *sizes).astype(np.int64)


def drawn(config: AugmentConfig, name: str, count: int, epoch: int = 0) -> np.ndarray:
    return augment.draw(config, keys(count, epoch), side_px=32)[name]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (60, 400)])
def test_random_resized_windows_are_distributed_as_torchvisions(height: int, width: int) -> None:
    config = AugmentConfig()
    ours = drawn_windows(config, height, width)
    transform = v2.RandomResizedCrop(224, scale=config.scale, ratio=config.ratio)
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    params = [transform.make_params([picture]) for _ in range(8000)]
    theirs = np.array([[each[name] for name in ("top", "left", "height", "width")] for each in params])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    for quantity in (lambda w: w[:, 0], lambda w: w[:, 1], lambda w: w[:, 2] * w[:, 3], lambda w: w[:, 3] / w[:, 2]):
        assert kolmogorov_smirnov(quantity(ours), quantity(theirs)) < 0.03


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    values = np.union1d(a, b)
    below = [np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (20, 40), (300, 400)])
def test_if_no_window_fits_the_middle_is_used_as_in_torchvision(height: int, width: int) -> None:
    config = AugmentConfig(scale=(1.0, 1.0), ratio=(0.76, 1.34))  # as large as the image: hardly a ratio fits
    transform = v2.RandomResizedCrop(224, scale=config.scale, ratio=config.ratio)
    params = [transform.make_params([torch.empty(3, height, width)]) for _ in range(20)]
    theirs = Counter(tuple(each[name] for name in ("top", "left", "height", "width")) for each in params)
    ours = Counter(map(tuple, drawn_windows(config, height, width, 50).tolist()))
    assert ours.most_common(1)[0][0] == theirs.most_common(1)[0][0]


def test_random_pad_is_uniform_and_none_is_the_middle() -> None:
    windows = drawn_windows(AugmentConfig(crop="random-pad", pad_px=4), 32, 32, side_px=32)
    assert (windows[:, 2:] == 32).all()
    for axis in (0, 1):
        places, counts = np.unique(windows[:, axis], return_counts=True)
        assert places.tolist() == list(range(-4, 5)) and np.abs(counts / len(windows) - 1 / 9).max() < 0.01
    assert drawn_windows(AugmentConfig(crop="random-pad", pad_px=1), 4, 9, 3, side_px=8)[:, 0].tolist() == [-2] * 3
    assert drawn_windows(AugmentConfig(crop="none"), 300, 500, 2).tolist() == [[0, 100, 300, 300]] * 2


def test_an_image_without_a_size_gets_an_empty_window() -> None:
    for crop in ("random-resized", "random-pad", "none"):
        assert drawn_windows(AugmentConfig(crop=crop), 0, 0, 4).tolist() == [[0, 0, 0, 0]] * 4


def test_low_passes_step_down_with_the_same_probability_each_time() -> None:
    config = AugmentConfig(low_pass_px=(24, 16, 8), low_pass=0.4)
    levels = drawn(config, "low_pass", 40_000)
    shares = [(levels >= level).mean() for level in (1, 2, 3)]
    assert shares == pytest.approx([0.4, 0.16, 0.064], abs=0.01) and levels.max() == 3
    assert (levels != drawn(config, "low_pass", 40_000, epoch=1)).mean() > 0.3
    assert (drawn(AugmentConfig(low_pass_px=(8,), low_pass=1.0), "low_pass", 40_000) == 1).all()


def test_flips_have_their_probability_and_differ_by_epoch() -> None:
    flips = [drawn(AugmentConfig(flip=0.3), "flip", 20_000, epoch) for epoch in (0, 1)]
    assert abs(flips[0].mean() - 0.3) < 0.02 and abs((flips[0] != flips[1]).mean() - 0.42) < 0.02
    assert drawn(AugmentConfig(flip=1.0), "flip", 20_000).all()


def test_alternating_flips_show_both_sides_in_every_two_epochs() -> None:
    config = AugmentConfig(flip_alternates=True)
    first, second, third = (drawn(config, "flip", 2000, epoch) for epoch in (0, 1, 2))
    assert (first != second).all() and (first == third).all()
    assert (first == drawn(AugmentConfig(), "flip", 2000)).all()


def test_an_operation_that_is_off_draws_nothing() -> None:
    assert augment.draw(AugmentConfig(flip=0.0), keys(5), side_px=32) == {}
    assert set(augment.draw(AugmentConfig(), keys(5), side_px=32)) == {"flip"}


# --- chains of operations

EVERYTHING = AugmentConfig(
    auto_augment="rand",
    rand_std=0.5,
    rand_increasing=True,
    color_jitter=0.3,
    grayscale=0.2,
    gaussian_blur=0.2,
    low_pass_px=(8,),
    random_erasing=0.5,
)


@pytest.mark.parametrize(
    "config",
    [
        EVERYTHING,
        *(AugmentConfig(auto_augment=m) for m in ("trivial-wide", "cifar10")),
        AugmentConfig(three_augment=True),
    ],
    ids=lambda config: config.auto_augment or "three",
)
def test_draws_depend_on_the_seed_the_epoch_and_the_image_alone(config: AugmentConfig) -> None:
    whole, some = keys(500), np.array([3, 499, 7])
    draws = augment.draw(config, whole, side_px=32)
    for name, part in augment.draw(config, whole.only(some), side_px=32).items():
        assert np.array_equal(part, draws[name][some])
    for other in (keys(500, epoch=1), keys(500, seed=2)):
        again = augment.draw(config, other, side_px=32)
        assert all(not np.array_equal(again[name], draws[name]) for name in draws)


def shares(ops: np.ndarray) -> dict[PixelOp, float]:
    return {PixelOp(op): count / ops.size for op, count in zip(*np.unique(ops, return_counts=True), strict=True)}


@pytest.mark.parametrize(
    ("transform", "bins", "strongest"),
    [
        (v2.TrivialAugmentWide(), 31, Strongest(0.99, 32.0, rotate=135.0, enhance=0.99, posterize=6)),
        (v2.AutoAugment(), 10, Strongest(0.3, 150 / 331 * 64, rotate=30.0, enhance=0.9, posterize=4)),
    ],
)
def test_levels_mean_what_they_mean_in_torchvision(transform: v2.Transform, bins: int, strongest: Strongest) -> None:
    table = arguments(strongest, bins)
    for name, (levels, is_signed) in transform._AUGMENTATION_SPACE.items():
        theirs = levels(bins, 64, 64)
        assert is_signed == (NAMES[name] in (*MOVES, *ENHANCES))
        scale = 255 if name == "Solarize" else 1
        assert table[NAMES[name]].tolist() == ([0] * bins if theirs is None else [scale * x for x in theirs.tolist()])


def test_trivial_augment_draws_each_operation_level_and_direction_alike() -> None:
    chains = drawn(AugmentConfig(auto_augment="trivial-wide"), "auto_augment", 40_000)
    assert chains.shape == (40_000, 1, 2)
    found = shares(chains[..., 0])
    assert set(found) == {*NAMES.values()} - {PixelOp.INVERT}
    assert list(found.values()) == pytest.approx([1 / 14] * 14, abs=0.006)
    angles, counts = np.unique(chains[chains[..., 0] == PixelOp.ROTATE][:, 1], return_counts=True)
    assert (
        angles == pytest.approx(4.5 * np.arange(-30, 31), abs=1e-4)
        and abs(counts[:30].sum() / counts.sum() - 0.49) < 0.03
    )
    moved = chains[chains[..., 0] == PixelOp.TRANSLATE_X][:, 1]
    assert (moved == np.trunc(moved)).all() and (moved.min(), moved.max()) == (-32, 32)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_torchvisions(name: str) -> None:
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy(name))._policies
    ours = [[(PixelOp(int(op)), p, int(level)) for op, p, level in pair] for pair in steps_of(name)]
    assert ours == [[(NAMES[op], p, level or 0) for op, p, level in pair] for pair in theirs]


def test_operations_of_a_policy_are_applied_with_their_probability() -> None:
    chains = drawn(AugmentConfig(auto_augment="imagenet"), "auto_augment", 40_000)
    pairs = steps_of("imagenet")
    for op in (PixelOp.EQUALIZE, PixelOp.POSTERIZE, PixelOp.ROTATE):
        expected = (pairs[..., 1] * (pairs[..., 0] == op)).sum(0) / len(pairs)
        assert (chains[..., 0] == op).mean(0) == pytest.approx(expected, abs=0.01)
    turns = chains[chains[..., 0] == PixelOp.ROTATE][:, 1]
    assert abs((turns > 0).mean() - 0.5) < 0.03 and np.abs(turns).max() == 30


LEVEL_9 = {  # timm's arguments at m9 of 10, for images of 100 px: with inc1, and without
    PixelOp.POSTERIZE: (1, 3),
    PixelOp.SOLARIZE: (26, 230),
    PixelOp.SOLARIZE_ADD: (99, 99),
    PixelOp.SHEAR_X: (0.27, 0.27),
    PixelOp.TRANSLATE_Y: (40, 40),
    PixelOp.ROTATE: (27, 27),
    PixelOp.CONTRAST: (1.81, 1.72),
    PixelOp.EQUALIZE: (0, 0),
}


@pytest.mark.parametrize("op", LEVEL_9)
def test_levels_of_rand_augment_are_timms(op: PixelOp) -> None:
    for increasing, expected in zip((True, False), LEVEL_9[op], strict=True):
        found = argument(np.full(2, op), np.full(2, 0.9), np.array([False, True]), 100, increasing=increasing)
        other = {PixelOp.CONTRAST: 0.19 if increasing else 1.72}.get(op, -expected if op in MOVES else expected)
        assert found.tolist() == pytest.approx([expected, other])


def test_rand_augment_applies_half_of_its_operations_at_levels_around_its_own() -> None:
    config = AugmentConfig(auto_augment="rand", rand_ops=3, rand_magnitude=6.0, rand_std=0.5, rand_increasing=True)
    chains = drawn(config, "auto_augment", 20_000)
    found = shares(chains[..., 0])
    assert chains.shape == (20_000, 3, 2) and abs(found.pop(PixelOp.IDENTITY) - 0.5) < 0.01
    assert list(found.values()) == pytest.approx([1 / 30] * 15, abs=0.004)
    levels = np.abs(chains[chains[..., 0] == PixelOp.ROTATE][:, 1]) / 3
    assert (levels.mean(), levels.std()) == pytest.approx((6, 0.5), abs=0.05)
    config = AugmentConfig(auto_augment="rand", rand_magnitude=10.0, rand_std=3.0)
    turns = np.abs(drawn(config, "auto_augment", 5000)[..., 1])[
        drawn(config, "auto_augment", 5000)[..., 0] == PixelOp.ROTATE
    ]
    assert turns.max() == 30


def test_three_augment_draws_one_of_three_and_jitter_each_order_and_factor_alike() -> None:
    chains = drawn(AugmentConfig(three_augment=True), "three_augment", 30_000)
    assert shares(chains[..., 0]) == pytest.approx(dict.fromkeys((7, 11, 16), 1 / 3), abs=0.01)
    blurs = chains[chains[..., 0] == PixelOp.BLUR][:, 1]
    assert kolmogorov_smirnov(blurs, np.linspace(0.1, 2, 1000)) < 0.02
    chains = drawn(AugmentConfig(color_jitter=0.4), "color_jitter", 30_000)
    orders = Counter(map(tuple, chains[..., 0].astype(int).tolist()))
    assert len(orders) == 6 and max(orders.values()) - min(orders.values()) < 500
    assert all(kolmogorov_smirnov(chains[:, at, 1], np.linspace(0.6, 1.4, 1000)) < 0.02 for at in range(3))


@pytest.mark.parametrize(("name", "op"), [("grayscale", PixelOp.COLOR), ("gaussian_blur", PixelOp.BLUR)])
def test_grey_and_blur_have_their_probability(name: str, op: PixelOp) -> None:
    chains = drawn(AugmentConfig(**{name: 0.2}), name, 20_000)
    assert shares(chains[..., 0]) == pytest.approx({PixelOp.IDENTITY: 0.8, op: 0.2}, abs=0.01)


def test_erased_rectangles_are_distributed_as_torchvisions() -> None:
    ours = drawn(AugmentConfig(random_erasing=0.4), "random_erasing", 30_000)
    assert abs((ours[:, 2] > 0).mean() - 0.4) < 0.01 and (ours[:, :2] + ours[:, 2:] <= 32).all()
    transform, picture = v2.RandomErasing(p=1.0), torch.empty(3, 32, 32)
    torch.manual_seed(0)
    params = [transform.make_params([picture]) for _ in range(6000)]
    theirs = np.array([[each[name] for name in "ijhw"] for each in params])
    for at in range(4):
        assert kolmogorov_smirnov(ours[ours[:, 2] > 0][:, at], theirs[:, at]) < 0.03


# --- on the device


def batch(count: int = 6, height: int = 12, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, height, width, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % CLASSES


def mixed(
    config: AugmentConfig, images: Tensor, labels: Tensor, seed: int, step: int, micro: int
) -> tuple[Tensor, Tensor]:
    return augment.mix(config, images, labels, CLASSES, seed=seed, step=step, micro=micro)


def test_the_drawn_images_are_mirrored_and_the_argument_is_not_changed() -> None:
    images = torch.randint(0, 256, (5, 7, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before, flips = images.clone(), torch.tensor([True, False, True, False, False])
    mirrored = augment.apply_to_uint8(AugmentConfig(), images, {"flip": flips})
    expected = images.clone()
    expected[flips] = expected[flips].flip(2)
    assert torch.equal(mirrored, expected) and torch.equal(mirrored, mirror(images, flips))
    assert torch.equal(images, before)


def test_a_low_pass_is_arrns_filter_down_and_up_again() -> None:
    images, _ = batch()
    levels = torch.tensor([0, 1, 2, 0, 3, 1])
    sides = (9, 4, 20)  # the last is larger than the images: nothing to take away
    found, pair = low_pass(images, levels, sides), FilterPair("dct")
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
        found, expected = mixup(images, labels, CLASSES, share=share), theirs(images, labels)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_mixup_keeps_the_memory_format() -> None:
    images, labels = batch()
    for layout in (torch.contiguous_format, torch.channels_last):
        mixed, _ = mixup(images.contiguous(memory_format=layout), labels, CLASSES, share=0.3)
        assert mixed.is_contiguous(memory_format=layout)


def test_cutmix_is_torchvisions_for_the_same_share_and_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = batch(height=10, width=16)
    theirs = v2.CutMix(num_classes=CLASSES)
    for share, x, y in ((0.5, 8, 5), (0.1, 0, 9), (0.9, 15, 0), (1.0, 3, 3), (0.0, 2, 7)):
        theirs._dist.sample = lambda shape, share=share: torch.tensor([share], dtype=torch.float64)
        drawn = iter([torch.tensor([x]), torch.tensor([y])])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, drawn=drawn, **__: next(drawn))
            expected = theirs(images, labels)
        box = box_of(share, ((x + 0.5) / 16, (y + 0.5) / 10), (10, 16))
        found = cutmix(images, labels, CLASSES, box=box)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_rectangles_are_erased_as_in_torchvision() -> None:
    images, _ = batch()
    rectangles = torch.tensor([[0, 0, 0, 0], [2, 3, 5, 4], [0, 11, 12, 1], [4, 4, 8, 8], [11, 0, 1, 11], [0, 0, 0, 0]])
    before, found = images.clone(), erased(images, rectangles)
    places = zip(images, rectangles.tolist(), strict=True)
    wanted = [v2.functional.erase(image, *place, torch.zeros(1)) for image, place in places]
    assert torch.equal(found, torch.stack(wanted)) and torch.equal(images, before)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_pixels_do_not_depend_on_how_a_batch_is_split_into_micro_batches() -> None:
    images = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    drawn_here = augment.draw(EVERYTHING, keys(12), side_px=16)
    draws = augment.placed(EVERYTHING, drawn_here, torch.device("cpu"))

    def changed(rows: slice) -> Tensor:
        mine = {name: each[rows] for name, each in draws.items()}
        pictures = augment.apply_to_uint8(EVERYTHING, images[rows], mine).permute(0, 3, 1, 2).float()
        return augment.apply_to_normalised(EVERYTHING, pictures, mine)

    whole = changed(slice(0, 12))
    assert torch.equal(torch.cat([changed(slice(0, 5)), changed(slice(5, 6)), changed(slice(6, 12))]), whole)


def test_without_alphas_nothing_is_changed() -> None:
    images, labels = batch()
    found = mixed(AugmentConfig(), images, labels, 1, 2, 0)
    assert found[0] is images and found[1] is labels


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixing_depends_only_on_seed_step_and_micro_batch(alphas: tuple[float, float]) -> None:
    images, labels = batch()
    config = AugmentConfig(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    first = mixed(config, images, labels, 1, 2, 0)
    torch.manual_seed(99), np.random.seed(99)
    again = mixed(config, images, labels, 1, 2, 0)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    others = [mixed(config, images, labels, *key) for key in ((2, 2, 0), (1, 3, 0), (1, 2, 1))]
    assert not any(torch.equal(a[0], b[0]) for a, b in combinations([first, *others], 2))
    assert torch.allclose(first[1].sum(dim=1), torch.ones(len(labels)))


def test_with_both_on_each_is_equally_likely_and_shares_follow_beta() -> None:
    images, labels = batch(2)
    both = AugmentConfig(mixup_alpha=1.0, cutmix_alpha=1.0)
    found = [mixed(both, images, labels, 0, step, 0)[0] for step in range(400)]
    cut = np.mean([bool(((m == images) | (m == images.roll(1, 0))).all()) for m in found])
    assert abs(cut - 0.5) < 0.08
    only = AugmentConfig(mixup_alpha=0.2)
    shares = np.array([mixed(only, images, labels, 0, step, 0)[1][0, 0].item() for step in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.01


# --- keys


def test_keys_that_change_nothing_are_named_with_the_reason() -> None:
    def inert(**keys: object) -> set[str]:
        return set(AugmentConfig.inert(AugmentConfig(**keys).model_dump(mode="json")))

    rand = {"rand_ops", "rand_magnitude", "rand_std", "rand_increasing"}
    assert inert() == {"pad_px", "low_pass", "fill", *rand}
    assert inert(crop="random-pad", low_pass_px=(8,), auto_augment="rand") == {"scale", "ratio"}
    assert inert(crop="none", auto_augment="svhn") == {"scale", "ratio", "pad_px", "low_pass", *rand}
    assert set(DataConfig.inert({"shuffle": "full"})) == {"lanes", "window"}
    assert not DataConfig.inert({"shuffle": "block"})
    assert set(DataConfig.inert({"shuffle": "block", "side_choices": [32, 48]})) == {"side_schedule"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", [0.5, 0.1]),
        ("ratio", [0, 1]),
        ("low_pass_px", [8, 16]),
        ("crop", "centre"),
        ("pad_px", -1),
        ("blur", 1),
        ("auto_augment", "augmix"),
        ("random_erasing", 2),
    ],
)
def test_a_wrong_value_or_key_is_refused_by_name(key: str, value: object) -> None:
    with fails(ConfigError, f"augment.{key}"):
        validate(DataConfig, {"root": "/x", "augment": {key: value}}, "here")


def test_two_augmentations_that_replace_each_other_are_refused() -> None:
    with fails(ConfigError, "augment.three_augment"):
        validate(DataConfig, {"root": "/x", "augment": {"three_augment": True, "auto_augment": "rand"}}, "here")


@pytest.mark.parametrize(
    "override",
    [
        "data.augment.rand_ops=2",
        "data.augment.pad_px=4",  # its default: what is typed must do something, whatever the value
        "data.augment.low_pass=0.5",
        "data.lanes=64",
    ],
)
def test_a_typed_key_that_changes_nothing_is_refused(override: str) -> None:
    with fails(ConfigError, override.partition("=")[0]):
        run_config.load("baseline/toy", [override])


def test_a_crop_that_is_overridden_drops_the_inherited_keys_of_the_other() -> None:
    config = run_config.load("baseline/toy", ["data.augment.crop=random-pad", "data.augment.pad_px=2"])
    assert as_mapping(config)["data"]["augment"].keys().isdisjoint({"scale", "ratio", "low_pass"})
    with fails(ConfigError, "data.augment.scale"):
        run_config.load("baseline/toy", ["data.augment.crop=random-pad", "data.augment.scale=[0.5, 1.0]"])


def test_recipes_and_fingerprints_that_hold_all_keys_are_read() -> None:
    config = run_config.load("baseline/toy")
    stored, inert = as_mapping(config), {"pad_px": 12, "low_pass": 0.5}
    stored["data"] |= {"lanes": 64, "window": 2048, "augment": {**stored["data"]["augment"], **inert}}
    assert as_mapping(run_config.from_stored(stored, "stored")) == as_mapping(config)
    fingerprint = run_config.fingerprint(config, "identity")
    older = {**fingerprint, **{f"data.augment.{key}": value for key, value in inert.items()}}
    assert run_config.translated(older) == fingerprint


def test_a_full_dump_is_read_back() -> None:
    config = DataConfig(root=Path("/x"), augment=AugmentConfig(crop="random-pad", low_pass_px=(8,), mixup_alpha=0.2))
    assert validate(DataConfig, as_mapping(config), "here") == config


def test_two_operations_with_one_name_are_refused() -> None:
    class Another(Flip):
        name = "another"

    with fails(ContractError, "data.augment", subject="flip"):
        augment.check([*augment.OPERATIONS, Another])


# --- a new operation is one module

PATCH = """
import numpy as np
import torch
from typing import ClassVar, Literal
from pipeline.data.augment.operation import ImageOperation
from pipeline.data.philox import below


class Patch(ImageOperation):
    name: ClassVar[str] = "patch"
    purpose: ClassVar[int] = 13
    stage: ClassVar[Literal["uint8", "normalised"]] = "normalised"

    erase_px: int = 0

    @property
    def active(self):
        return self.erase_px > 0

    def draw(self, keys, side_px):
        limit = np.full(len(keys), side_px - self.erase_px + 1)
        return np.stack([below(words, limit) for words in keys.words(self.purpose)[:2]], axis=-1)

    def apply(self, images, drawn):
        images = images.clone()
        for image, (y, x) in zip(images, drawn.tolist()):
            image[:, y : y + self.erase_px, x : x + self.erase_px] = 0
        return images


OPERATION = Patch
"""

TRAINING = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from pipeline import run_config
from pipeline.data.dali import TrainLoader
from pipeline.data.index import open_index
from pipeline.training import step

def micro_batches(world, erase_px):
    overrides = [f"data.augment.erase_px={erase_px}", "data.side_px=16", "name=erased", f"data.root={sys.argv[1]}"]
    config = run_config.load("baseline/toy", overrides, data_home="/x")
    task = SimpleNamespace(channels_last=True, num_classes=3, seed=1, training=config.training)
    shares = []
    for rank in range(world):
        with TrainLoader(open_index(Path(sys.argv[1])), config.data, seed=1, batch_size=8, rank=rank, world=world,
                         device=torch.device("cpu"), threads=1) as loader:
            shares += [step.micro_batches(task, config.data, next(loader), 1)[0].images]
    return torch.cat(shares)

one, two, without = micro_batches(1, 5), micro_batches(2, 5), micro_batches(1, 0)
erased = (one == 0).all(1)
assert torch.equal(one, two)
assert (erased.flatten(1).sum(1) >= 25).all() and torch.equal(one[~erased[:, None].expand_as(one)],
                                                              without[~erased[:, None].expand_as(one)])
print("erased", len(one))
"""


def test_one_module_adds_an_operation_with_its_keys_draws_and_pixels(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pipeline" / "data" / "augment" / "patch.py").write_text(PATCH)
    for number in range(12):
        path = tmp_path / "set" / f"class-{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures.jpeg(40 + number, 50, number))
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, tmp_path / "set"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "erased 8\n", done.stderr
