"""Tests of the sample stream: every position once, and the same batches for every world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raised import fails

from pipeline.data import augment
from pipeline.data.config import AugmentConfig, DataConfig
from pipeline.data.index import ImageIndex, synthetic
from pipeline.data.philox import Purpose, SampleKeys, philox
from pipeline.data.stream import BatchPlan, Lanes, Stream, permutation
from pipeline.errors import ConfigError

IMAGES = 1009  # a prime: no batch and no number of lanes divides it


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """As packed into 12 shards, with heights and widths of 250 to 600."""
    index = synthetic(IMAGES, 10, tmp_path_factory.mktemp("index"))
    replaced = ImageIndex(index.folder, index.root, index.rows)
    replaced.__dict__["shard"] = (np.arange(IMAGES) * 12 // IMAGES).astype(np.int32)
    return replaced


def stream(index: ImageIndex, shuffle: str = "full", batch_size: int = 48, seed: int = 3, **data: Any) -> Stream:
    config = DataConfig(root=Path("nowhere"), shuffle=shuffle, **{"lanes": 8, "window": 16} | data)
    return Stream(index, config, seed=seed, batch_size=batch_size)


def merged(plans: list[BatchPlan]) -> dict[str, np.ndarray]:
    """The arrays of several ranks' plans, in the order of their positions."""
    order = np.argsort(np.concatenate([plan.positions for plan in plans]))
    arrays = [array_fields(plan) for plan in plans]
    return {name: np.concatenate([each[name] for each in arrays])[order] for name in arrays[0]}


def array_fields(plan: BatchPlan) -> dict[str, np.ndarray]:
    """What a plan holds per image, the draws of augmentations included."""
    names = ("positions", "rows", "epochs", "windows")
    return {**{name: getattr(plan, name) for name in names}, **plan.draws}


def test_philox_gives_numpys_numbers() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, (50, 6), dtype=np.uint64)
    words[:, 0] |= np.uint64(1)  # numpy counts up before it draws: stay clear of the carry
    ours = np.stack(philox(words[:, :4].T, words[:, 4:].T), axis=-1)
    before = words[:, :4] - np.array([1, 0, 0, 0], dtype=np.uint64)
    theirs = [np.random.Philox(counter=c, key=k).random_raw(4) for c, k in zip(before, words[:, 4:], strict=True)]
    assert np.array_equal(ours, np.stack(theirs))


def test_a_permutation_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert permutation(10, 1, 0, Purpose.ORDER).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    keys = SampleKeys(7, np.arange(3), np.arange(3))
    windows = augment.windows(AugmentConfig(), 8, keys, np.full(3, 300), np.full(3, 400))
    assert windows.tolist() == [[142, 86, 148, 163], [109, 17, 102, 114], [59, 131, 184, 178]]


def test_permutations_differ_by_seed_epoch_and_purpose_and_keep_groups_in_place() -> None:
    drawn = [permutation(500, *key) for key in ((1, 0, Purpose.ORDER), (2, 0, Purpose.ORDER), (1, 1, Purpose.ORDER))]
    drawn.append(permutation(500, 1, 0, Purpose.SHARDS))
    assert all(np.array_equal(np.sort(each), np.arange(500)) for each in drawn)
    assert len({each.tobytes() for each in drawn}) == len(drawn)
    group = np.arange(500) // 7
    assert np.array_equal(permutation(500, 1, 0, Purpose.ORDER, group) // 7, group)


@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize("batch_size", [48, 10, 2000])
def test_every_image_is_seen_once_an_epoch_and_batches_are_the_same_for_every_world(
    index: ImageIndex, shuffle: str, batch_size: int
) -> None:
    steps = range(max(3, 2 * IMAGES // batch_size))
    alone = [merged([stream(index, shuffle, batch_size).plan(step, 0, 1)]) for step in steps]
    for world in (2, 3, 4):
        ranks = [stream(index, shuffle, batch_size) for _ in range(world)]
        for step in steps:
            shared = merged([each.plan(step, rank, world) for rank, each in enumerate(ranks)])
            assert all(np.array_equal(shared[name], alone[step][name]) for name in shared)
    rows = np.concatenate([batch["rows"] for batch in alone])
    assert np.array_equal(np.concatenate([batch["positions"] for batch in alone]), np.arange(len(rows)))
    for epoch in range(len(rows) // IMAGES):
        assert np.array_equal(np.sort(rows[epoch * IMAGES : (epoch + 1) * IMAGES]), np.arange(IMAGES))


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_a_plan_is_the_same_alone_and_in_a_walk_over_all_steps(index: ImageIndex, shuffle: str) -> None:
    walk = stream(index, shuffle)
    plans = [walk.plan(step, 1, 2) for step in range(70)]
    for step in (69, 21, 0, 42):
        alone, walked = stream(index, shuffle).plan(step, 1, 2), plans[step]
        assert (alone.step, alone.epoch, alone.side_px) == (walked.step, walked.epoch, walked.side_px)
        assert all(np.array_equal(array_fields(alone)[name], value) for name, value in array_fields(walked).items())


def test_draws_depend_on_the_epoch_of_a_sample_and_the_side_on_that_of_the_first(index: ImageIndex) -> None:
    whole = stream(index, side_px=32, side_schedule=((1, 64),))
    step = IMAGES // 48
    plan = whole.plan(step, 0, 1)
    assert set(plan.epochs) == {0, 1} and (plan.epoch, plan.side_px, whole.epoch_of(step)) == (0, 32, 0)
    assert whole.plan(step + 1, 0, 1).side_px == 64
    for epoch in (0, 1):
        here = plan.epochs == epoch
        again = whole.windows(plan.epochs[here], plan.rows[here], plan.rows[here], plan.side_px)
        assert np.array_equal(again, plan.windows[here])
    other = whole.windows(1 - plan.epochs, plan.rows, plan.rows, plan.side_px)
    assert (other != plan.windows).any(axis=1).mean() > 0.9


# --- repeated augmentation and mixed sides

ALL = {"auto_augment": "rand", "color_jitter": 0.3, "random_erasing": 0.5, "three_augment": False}


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_repeats_are_copies_in_one_batch_with_draws_of_their_own(index: ImageIndex, shuffle: str) -> None:
    steps = range(5 * IMAGES // 48 + 1)
    whole = stream(index, shuffle, aug_repeats=3, augment=ALL)
    plans = [whole.plan(step, 0, 1) for step in steps]
    shown = [plan.rows.reshape(3, 16) for plan in plans]  # first one copy of each image, then the next
    assert all((rows == rows[0]).all() for rows in shown)
    seen = np.concatenate([rows[0] for rows in shown])
    assert np.array_equal(np.sort(seen[:IMAGES]), np.arange(IMAGES))
    in_epoch = {row for plan in plans[: IMAGES // 48] for row in plan.rows.tolist()}
    assert len(in_epoch) == IMAGES // 48 * 16
    drawn = {(int(row), int(epoch)) for plan in plans for row, epoch in zip(plan.rows, plan.epochs, strict=True)}
    assert len(drawn) == 48 * len(plans)  # no two copies share their random numbers
    for name, values in array_fields(plans[3]).items():
        if name not in ("rows", "positions"):
            copies = values.reshape(3, 16, *values.shape[1:])
            assert not np.array_equal(copies[0], copies[1]), name


@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_repeats_sides_and_draws_are_the_same_for_every_world_and_after_a_restart(
    index: ImageIndex, shuffle: str, world: int
) -> None:
    keys = {"aug_repeats": 2, "side_choices": (24, 32, 48), "augment": ALL, "lanes": 8}
    whole = stream(index, shuffle, **keys)
    ranks = [stream(index, shuffle, **keys) for _ in range(world)]
    for step in (0, 1, 42, 41, 2 * IMAGES // 24):
        alone, shares = whole.plan(step, 0, 1), [each.plan(step, rank, world) for rank, each in enumerate(ranks)]
        assert {share.side_px for share in shares} == {alone.side_px}
        mine, all_of_it = merged(shares), merged([alone])
        assert all(np.array_equal(mine[name], all_of_it[name]) for name in all_of_it)
        fewest, most = whole.row_bounds(world)
        assert all(fewest <= len(share.rows) <= most for share in shares)


def test_a_lane_fetches_the_image_of_a_repeated_batch_once(index: ImageIndex) -> None:
    plain, repeated = stream(index, "block", 8), stream(index, "block", 24, aug_repeats=3)
    for step in (0, 50, IMAGES // 8):
        assert np.array_equal(repeated.ahead(repeated.plan(step, 0, 1)), plain.ahead(plain.plan(step, 0, 1)))


def test_each_batch_draws_its_side_from_the_seed_and_the_step(index: ImageIndex) -> None:
    sides = (24, 32, 48, 64)
    drawn = {
        seed: [stream(index, seed=seed, side_choices=sides).side_of(step) for step in range(400)] for seed in (3, 4)
    }
    assert drawn[3] != drawn[4]
    for side in sides:
        assert abs(drawn[3].count(side) / 400 - 0.25) < 0.08
    plan = stream(index, side_choices=sides).plan(7, 0, 1)
    assert plan.side_px == drawn[3][7] and stream(index, side_choices=sides).config.largest_side_px == 64
    same = stream(index, side_px=plan.side_px).plan(7, 0, 1)
    assert np.array_equal(plan.rows, same.rows) and np.array_equal(plan.windows, same.windows)


def test_a_batch_that_its_repeats_do_not_divide_is_refused(index: ImageIndex) -> None:
    with fails(ConfigError, "data.aug_repeats", subject=5):
        stream(index, aug_repeats=5)


# --- block shuffle


def test_lanes_share_a_batch_evenly_among_ranks_and_every_rank_gets_an_image(index: ImageIndex) -> None:
    for world, batch_size, lanes in ((4, 48, 8), (4, 10, 64), (3, 16, 64), (8, 8, 8), (2, 1500, 64)):
        shares = np.array(
            [
                [len(each.plan(step, rank, world).rows) for step in range(60)]
                for rank in range(world)
                for each in [stream(index, "block", batch_size, lanes=lanes)]
            ]
        )
        assert (shares.sum(axis=0) == batch_size).all()
        assert shares.min() >= 1 and shares.max() <= -(-batch_size // world) + 2
        bounds = [stream(index, "block", batch_size, lanes=lanes).most_rows(rank, world) for rank in range(world)]
        assert (shares.max(axis=1) <= bounds).all()
        if batch_size % lanes == 0:
            assert (shares == batch_size // world).all()


def test_a_shard_is_read_by_one_rank_unless_a_share_ends_inside_it(index: ImageIndex) -> None:
    each = stream(index, "block", batch_size=40)
    steps = range(IMAGES // 40)
    readers: dict[int, set[int]] = {}
    for rank in range(4):
        for step in steps:
            for shard in index.shard[each.plan(step, rank, 4).rows]:
                readers.setdefault(int(shard), set()).add(rank)
    assert len(readers) == 12 and sum(map(len, readers.values())) <= 12 + 3


def test_a_lane_shuffles_within_its_window_and_fetches_one_window_ahead(index: ImageIndex) -> None:
    each = stream(index, "block", batch_size=8)  # a step is one image of each lane
    lanes = each.lanes
    assert lanes is not None
    stored: list[list[int]] = [[] for _ in range(lanes.count)]
    for order in (each.order(epoch) for epoch in range(3)):
        assert order.stored is not None and order.starts is not None
        for lane, walk in enumerate(stored):
            walk += order.stored[order.starts[lane] : order.starts[lane + 1]].tolist()
    read: list[list[int]] = [[] for _ in range(lanes.count)]
    for step in range(2 * IMAGES // 8):
        plan = each.plan(step, 0, 1)
        assert sorted(each.ahead(plan)) == sorted(walk[step + 16] for walk in stored)
        for lane, row in zip(lanes.at(plan.positions), plan.rows, strict=True):
            read[lane].append(int(row))
    for lane in range(lanes.count):
        for at in range(0, IMAGES // 8 - 16, 16):
            window = read[lane][at : at + 16]
            assert sorted(window) == sorted(stored[lane][at : at + 16]) and window != stored[lane][at : at + 16]


def test_more_workers_than_lanes_or_images_are_refused(index: ImageIndex) -> None:
    with fails(ConfigError, "data.lanes", subject=8):
        [stream(index, "block").most_rows(rank, 9) for rank in range(9)]
    with fails(ConfigError, "training.batch_size", subject=48):
        stream(index).most_rows(0, 49)


def test_loose_files_are_read_in_runs(tmp_path: Path) -> None:
    lanes = Lanes(np.array([0, 64, 128, 150]), 1, 10, seed=0)
    order = lanes.order(0)
    assert order.stored is not None
    assert np.array_equal(np.sort(order.rows), np.arange(150))
    assert (np.diff(order.stored) != 1).sum() <= 2


@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize(("batch_size", "world"), [(48, 3), (50, 4), (9, 2)])
def test_row_bounds_hold_for_every_rank_and_step(index: ImageIndex, shuffle: str, batch_size: int, world: int) -> None:
    made = stream(index, shuffle, batch_size)
    counts = [len(made.plan(step, rank, world).rows) for step in range(60) for rank in range(world)]
    fewest, most = made.row_bounds(world)
    assert fewest <= min(counts) and max(counts) <= most
    assert shuffle == "block" or (fewest, most) == (min(counts), max(counts))
