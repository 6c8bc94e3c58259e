"""Tests of `data.in_memory`: the same batches with and without it, bad images included, and each decoded once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raised import fails

from pipeline.data import in_memory
from pipeline.data.config import AugmentConfig, DataConfig
from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.dali import Decoder, TrainBatch, TrainLoader
from pipeline.data.in_memory import Kept, NotKept, Pictures, Whole, chosen
from pipeline.data.index import ImageIndex, open_index
from pipeline.errors import ConfigError
from tests import images

CPU = torch.device("cpu")
CROPS = {
    "random-resized": AugmentConfig(),
    "random-pad": AugmentConfig(crop="random-pad", pad_px=4),
    "none": AugmentConfig(crop="none"),
}


def write(root: Path, encoded: Sequence[bytes]) -> ImageIndex:
    for number, each in enumerate(encoded):
        path = root / f"class-{number % 2}" / f"{number:02d}.png"  # or a JPEG
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(each)
    return open_index(root)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageIndex]:
    """`alike`: images of one size; `mixed`: of different sizes and forms, one of them turned."""
    root = tmp_path_factory.mktemp("sets")
    mixed = [images.jpeg(50 + 3 * number, 90 - number, number, subsampling=2) for number in range(12)]
    mixed += [images.png(20, 30), images.turned_jpeg(images.photo(), 6)]
    return {
        "alike": write(root / "alike", [images.png(32, 32, seed) for seed in range(14)]),
        "mixed": write(root / "mixed", mixed),
    }


def loader(index: ImageIndex, *, on_event: Any = None, make_decoder: Any = None, **data: Any) -> TrainLoader:
    config = DataConfig(root=index.root, **{"side_px": 32, "max_bad_share": 0.5, "lanes": 2, "window": 3} | data)
    keys = {"seed": 5, "batch_size": 5, "rank": 0, "world": 1, "device": CPU, "threads": 2}
    return TrainLoader(index, config, **keys, on_event=on_event, make_decoder=make_decoder)


def batches(index: ImageIndex, count: int, **keys: Any) -> list[TrainBatch]:
    with loader(index, **keys) as made:
        return list(islice(made, count))


def same(one: TrainBatch, other: TrainBatch) -> bool:
    arrays = np.array_equal(one.rows, other.rows) and np.array_equal(one.positions, other.positions)
    draws = all(torch.equal(one.draws[name], other.draws[name]) for name in one.draws)
    return arrays and draws and torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("name", "crop", "shuffle"),
    [(name, crop, "full") for name in ("alike", "mixed") for crop in CROPS] + [("mixed", "random-pad", "block")],
)
def test_batches_are_bitwise_those_that_are_decoded_each_time(
    sets: dict[str, ImageIndex], name: str, crop: str, shuffle: str
) -> None:
    keys = {"augment": CROPS[crop], "shuffle": shuffle, "side_px": 24, "side_schedule": ((2, 40),)}
    kept = batches(sets[name], 12, in_memory=True, **keys)
    assert kept[-1].epoch == 3 and kept[-1].images.shape[1] == 40
    decoded = batches(sets[name], 12, in_memory=False, **keys)
    assert all(same(*pair) for pair in zip(kept, decoded, strict=True))


def test_each_image_is_decoded_once(sets: dict[str, ImageIndex]) -> None:
    """Or twice, where it is shown again while the batch that shows it first is on its way."""
    decoded: list[int] = []

    class Counting(Decoder):
        def put(self, images: Any, geometry: Any) -> None:
            decoded.append(0 if isinstance(images, Kept) else sum(not isinstance(each, np.ndarray) for each in images))
            super().put(images, geometry)

    with loader(sets["mixed"], make_decoder=Counting, read_ahead=1) as made:
        first = list(islice(made, 12))
        made.close()
        rest = list(islice(made, 3))  # the thread starts again, the pictures stay
    assert sum(decoded[:3]) >= 14 and not any(decoded[9:]) and len(decoded) >= 15
    assert all(same(*pair) for pair in zip(first + rest, batches(sets["mixed"], 15, in_memory=False), strict=True))


@pytest.mark.parametrize("crop", ["random-resized", "random-pad"])
def test_bad_images_are_those_of_a_run_that_decodes_each_time(
    sets: dict[str, ImageIndex], tmp_path: Path, crop: str
) -> None:
    """Of images that were replaced by smaller ones after the index was made only the windows within them decode."""
    shutil.copytree(sets["mixed"].root, tmp_path / "copy")
    index = open_index(tmp_path / "copy")
    for row, encoded in ((1, images.jpeg(30, 30)), (4, images.TEXT), (6, images.jpeg(60, 70, 6))):
        Path(index.location(row)[0]).write_bytes(encoded)
    found = {}
    for kept in (True, False):
        events: list[str] = []
        with loader(
            index,
            in_memory=kept,
            augment=CROPS[crop],
            on_event=lambda kind, file, reason, pause_s, events=events: events.append(file),
        ) as made:
            found[kept] = (list(islice(made, 12)), sorted(events), [row for row, _ in made.bad.state()["rows"]])
    assert found[True][1:] == found[False][1:] and index.file(4) in found[True][1]
    assert all(same(*pair) for pair in zip(found[True][0], found[False][0], strict=True))


def test_auto_keeps_what_fits_this_ranks_share_of_the_memory(
    sets: dict[str, ImageIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = sets["alike"]
    assert chosen(index, "auto", gpu=False) is not None and chosen(index, False, gpu=False) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert in_memory.bound() == in_memory.node_bytes() // 4 // in_memory.SHARE
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(in_memory.node_bytes()))
    assert chosen(index, "auto", gpu=False) is None and chosen(index, True, gpu=False) is not None


def test_more_than_the_node_has_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, [images.png(32, 32)])
    index.__dict__["height"] = np.array([os.sysconf("SC_PHYS_PAGES")])  # as of a huge image
    index.__dict__["width"] = np.array([os.sysconf("SC_PAGE_SIZE")])
    with fails(ConfigError, "data.in_memory", subject=True):
        chosen(index, True, gpu=False)
    assert chosen(index, "auto", gpu=False) is None


def test_of_a_gpus_decoder_only_unresized_lossless_pictures_are_kept(sets: dict[str, ImageIndex]) -> None:
    index = sets["mixed"]
    pictures = chosen(index, "auto", gpu=True)
    assert pictures is not None and isinstance(pictures.item(0, images.png(32, 32)), Whole)
    with pytest.raises(NotKept):
        pictures.item(0, images.jpeg(32, 32))
    windows = np.array([[0, 0, 16, 16]], dtype=np.int32)
    sizes, origins = windows[:, 2:], np.zeros((1, 2), dtype=np.int32)
    pictures.check(CropGeometry(windows, sizes, origins, 16))
    with pytest.raises(NotKept):
        pictures.check(CropGeometry(windows, sizes + 1, origins, 17))
    Pictures(index).check(CropGeometry(windows, sizes + 1, origins, 17))
