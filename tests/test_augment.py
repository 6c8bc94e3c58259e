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
from pipeline.data.augment.cutmix import box_of, cutmix
from pipeline.data.augment.flip import Flip, mirror
from pipeline.data.augment.low_pass import low_pass
from pipeline.data.augment.mixup import mixup
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


def test_an_operation_that_is_off_draws_nothing() -> None:
    assert augment.draw(AugmentConfig(flip=0.0), keys(5), side_px=32) == {}
    assert set(augment.draw(AugmentConfig(), keys(5), side_px=32)) == {"flip"}


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

    assert inert() == {"pad_px", "low_pass"}
    assert inert(crop="random-pad", low_pass_px=(8,)) == {"scale", "ratio"}
    assert inert(crop="none") == {"scale", "ratio", "pad_px", "low_pass"}
    assert set(DataConfig.inert({"shuffle": "full"})) == {"lanes", "window"}
    assert not DataConfig.inert({"shuffle": "block"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", [0.5, 0.1]),
        ("ratio", [0, 1]),
        ("low_pass_px", [8, 16]),
        ("crop", "centre"),
        ("pad_px", -1),
        ("blur", 1),
    ],
)
def test_a_wrong_value_or_key_is_refused_by_name(key: str, value: object) -> None:
    with fails(ConfigError, f"augment.{key}"):
        validate(DataConfig, {"root": "/x", "augment": {key: value}}, "here")


@pytest.mark.parametrize(
    "override",
    [
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

ERASING = """
import numpy as np
import torch
from typing import ClassVar, Literal
from pipeline.data.augment.operation import ImageOperation
from pipeline.data.philox import below


class RandomErasing(ImageOperation):
    name: ClassVar[str] = "erasing"
    purpose: ClassVar[int] = 6
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


OPERATION = RandomErasing
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
    (tmp_path / "pipeline" / "data" / "augment" / "random_erasing.py").write_text(ERASING)
    for number in range(12):
        path = tmp_path / "set" / f"class-{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures.jpeg(40 + number, 50, number))
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, tmp_path / "set"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "erased 8\n", done.stderr
