"""Balanced sampling: the share of each class and each image, and the laws of the stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from raised import fails

from pipeline.config import validate
from pipeline.data.balance import BalancedOrder
from pipeline.data.config import DataConfig
from pipeline.data.index import ImageIndex, synthetic
from pipeline.data.stream import BatchPlan, Stream
from pipeline.errors import ConfigError

COUNTS = np.array([1, 0, 7, 40, 100])  # images of each class
LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(5), COUNTS)).astype(np.int32)
IMAGES, CLASSES = len(LABELS), 4
EPOCHS = 5


def stream(folder: Path, batch_size: int = 10) -> Stream:
    index = synthetic(IMAGES, len(COUNTS), folder)
    found = ImageIndex(index.folder, index.root, index.rows)
    found.__dict__["label"] = LABELS
    return Stream(found, DataConfig(root=Path("nowhere"), sampling="balanced"), seed=3, batch_size=batch_size)


def test_each_class_has_the_same_share_and_each_of_its_images_too() -> None:
    rows = np.concatenate([BalancedOrder(LABELS, 3).slots(epoch)[0] for epoch in range(EPOCHS)])
    by_class = np.bincount(LABELS[rows], minlength=len(COUNTS))
    assert by_class[1] == 0 and np.ptp(by_class[COUNTS > 0]) <= 1
    drawn = np.bincount(rows, minlength=IMAGES)
    for label in np.flatnonzero(COUNTS):
        times = drawn[label == LABELS]
        assert times.sum() == by_class[label] and np.ptp(times) <= 1


def test_an_image_is_drawn_once_a_lap_so_that_no_two_of_its_draws_are_augmented_alike() -> None:
    pairs = [np.stack(BalancedOrder(LABELS, 3).slots(epoch)) for epoch in range(EPOCHS)]
    whole = np.concatenate(pairs, axis=1)
    assert np.unique(whole, axis=1).shape == whole.shape


def test_laps_have_orders_of_their_own_and_another_seed_others() -> None:
    big = [BalancedOrder(LABELS, seed).slots(0)[0] for seed in (3, 4)]
    assert not np.array_equal(*big)
    seven = BalancedOrder(LABELS, 3).slots(0)[0]
    laps = seven[LABELS[seven] == 2][:14].reshape(2, 7)
    assert np.array_equal(*np.sort(laps, axis=1)) and not np.array_equal(*laps)


def arrays(plans: list[BatchPlan]) -> list[np.ndarray]:
    return [np.concatenate([getattr(plan, name) for plan in plans]) for name in ("rows", "epochs", "windows")]


def test_batches_are_the_same_for_every_world_and_at_any_time(tmp_path: Path) -> None:
    late = stream(tmp_path).plan(40, 0, 1)
    ordered = stream(tmp_path)
    alone = [ordered.plan(step, 0, 1) for step in range(41)]
    for world in (2, 3):
        split = [ordered.plan(40, rank, world) for rank in range(world)]
        for mine, whole, again in zip(arrays(split), arrays([alone[40]]), arrays([late]), strict=True):
            assert np.array_equal(mine, whole) and np.array_equal(again, whole)
    seen = np.concatenate([plan.rows for plan in alone])[: 2 * IMAGES]
    assert np.ptp(np.bincount(LABELS[seen], minlength=len(COUNTS))[COUNTS > 0]) <= 1


def test_balanced_sampling_needs_the_whole_set_at_once() -> None:
    with fails(ConfigError, "sampling"):
        validate(DataConfig, {"root": "x", "sampling": "balanced", "shuffle": "block"}, "data")
