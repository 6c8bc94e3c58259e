"""Tests of the toy set: the same bytes for a seed, class folders as elsewhere, and something to learn."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raised import fails

from pipeline.data.check import check
from pipeline.data.config import DataConfig
from pipeline.data.index import open_splits
from pipeline.data.toy import SHAPES, class_names, draw, make
from pipeline.errors import ConfigError, DataError


def folder_bytes(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.jpg")}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    size = {"train": 30, "val": 20, "side_px": 24}
    one, same, other = (make(tmp_path / str(n), seed=seed, **size) for n, seed in enumerate((3, 3, 4)))
    assert folder_bytes(one) == folder_bytes(same)
    assert not set(folder_bytes(one).values()) & set(folder_bytes(other).values())
    assert len(set(folder_bytes(one).values())) == 50  # val repeats nothing of train


def test_the_set_consists_of_class_folders_of_equal_size(tmp_path: Path) -> None:
    splits = open_splits(DataConfig(root=make(tmp_path / "toy", train=40, val=20, side_px=32)), 0)
    assert splits.train.classes == tuple(class_names(10))
    assert np.bincount(splits.train.label).tolist() == [4] * 10
    assert np.bincount(splits.val.label).tolist() == [2] * 10
    assert set(np.minimum(splits.train.height, splits.train.width)) == {32}
    assert len(set(splits.train.width)) > 3
    assert check(tmp_path / "toy", workers=1).bad == ()


def test_an_existing_set_is_not_written_again_and_other_content_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "toy", train=10, val=10, side_px=16)
    times = [path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))]
    make(folder, train=10, val=10, side_px=16)
    assert [path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))] == times
    with fails(DataError, "folder", subject=folder):
        make(folder, train=11, val=10, side_px=16)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_classes", 1), ("val", 5), ("side_px", 8)],
)
def test_numbers_out_of_range_are_refused_by_name(tmp_path: Path, key: str, value: int) -> None:
    with fails(ConfigError, key, subject=value):
        make(tmp_path / "toy", **{key: value})
    assert not list(tmp_path.iterdir())


def _hues(encoded: bytes) -> np.ndarray:
    """A histogram of hue, weighted by saturation."""
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("HSV")).reshape(-1, 3).astype(float)
    return np.histogram(pixels[:, 0], 20, (0, 256), weights=pixels[:, 1] ** 2)[0] / (pixels[:, 1] ** 2).sum()


def test_colour_alone_predicts_the_class_better_than_chance() -> None:
    each, num_classes = 30, 10
    features = np.array(
        [
            [_hues(draw(label, num_classes, 32, np.random.Philox(key=[1, label * each + n]))) for n in range(each)]
            for label in range(num_classes)
        ]
    )
    centres = features[:, : each // 2].mean(axis=1)
    tested = features[:, each // 2 :]
    nearest = ((tested[:, :, None] - centres) ** 2).sum(axis=-1).argmin(axis=-1)
    right = (nearest == np.arange(num_classes)[:, None]).mean()
    assert 2 / num_classes < right < 0.7  # and it is not enough: shapes must be learned


def test_every_shape_is_inside_the_image() -> None:
    y, x = np.mgrid[-1:1:101j, -1:1:101j]
    for name, shape in SHAPES.items():
        inside = shape(x, y)
        assert 0.15 < inside.mean() < 0.8, name
        assert not inside[[0, -1]].any() and not inside[:, [0, -1]].any(), name
