"""What each family asks of a GPU: kernels, waits, memory formats, devices; on a GPU that computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@dataclass(frozen=True)
class Bounds:
    """The most that a recipe may ask of the device, with 8 images.

    step: kernels of a training step, none of which waits. relaid: tensors that convolutions of a step copy into another
    memory format. waits: of the policy that waits most.
    """

    step: int
    relaid: int = 0
    waits: int = 0


BOUNDS = {
    "baseline/imagenet_resnet50": Bounds(650),
    "baseline/imagenet_resnet50,training.ema_decay=0.999": Bounds(650),
    "baseline/imagenet_resnet50,data.augment.auto_augment=trivial-wide,data.augment.random_erasing=0.5": Bounds(650),
    "baseline/imagenet_resnet50,data.augment.three_augment=true,data.augment.color_jitter=0.3": Bounds(650),
    "baseline/imagenet_resnet50,training.ema_decay=0.999,training.cuda_graphs=true": Bounds(31),
    "convnet_aig/imagenet_50,training.cuda_graphs=true": Bounds(51, waits=16),
    "ranet/imagenet_32,training.cuda_graphs=true": Bounds(200, waits=2),
    "convnet_aig/imagenet_50": Bounds(1006, waits=16),
    "shape_adaptor/imagenet_resnet50": Bounds(870),
    "arrn/imagenet:t": Bounds(1290),
    "ranet/imagenet_32": Bounds(4600, waits=2),
}
CHECKED = 32  # kernels of the check that all weights are finite
FLUSHED = 2  # kernels of a log point, which waits once
STORED = 32  # kernels that bring a policy's results to the host, which waits once


@pytest.fixture(scope="module")
def found(null_gpu: Run) -> Mapping[str, Any]:
    return null_gpu("measure", *BOUNDS)


@pytest.mark.parametrize("recipe", BOUNDS)
def test_recipes_stay_within_their_kernels_and_never_wait(found: Mapping[str, Any], recipe: str) -> None:
    measured, bounds = found[recipe], BOUNDS[recipe]
    assert "error" not in measured, measured["error"]
    for name in ("step 1", "step 2"):
        step = measured[name]
        assert step["launches"] <= bounds.step, name
        assert step["waits"] == 0, step["where"]
        assert sum(step["relaid"].values()) <= bounds.relaid, step["relaid"]
    assert measured["prepare 2"]["waits"] == 0, measured["prepare 2"]["where"]
    assert measured["finite"]["launches"] <= CHECKED and measured["finite"]["waits"] == 0
    assert measured["flush"]["launches"] <= FLUSHED and measured["flush"]["waits"] == 1
    for name, policy in measured.items():
        if name.startswith("predict "):
            assert policy["devices"] == ["cuda"], name
            assert policy["waits"] <= bounds.waits, (name, policy["where"])
            assert policy["stored"]["launches"] <= STORED and policy["stored"]["waits"] == 1, name


def test_no_thread_of_a_rank_makes_a_context_on_another_gpu(null_gpu: Run, tmp_path: Path) -> None:
    seen = null_gpu("contexts", str(tmp_path / "toy"), devices=8)
    assert seen == {"training batches": [3], "evaluation batches": [3]}


WITH_DDP = {"baseline/imagenet_resnet50": 821, "convnet_aig/imagenet_50": 1247}  # kernels of a step of two ranks


def test_two_ranks_communicate_on_the_device_and_without_a_warning(null_gpu: Run) -> None:
    found = null_gpu("ddp", *WITH_DDP, reads=True)
    for recipe, most in WITH_DDP.items():
        assert found[recipe]["step 2"]["launches"] <= most, recipe
        assert found[recipe]["said"] == [], recipe
        assert all(name.endswith("on cuda") for name in found[recipe]["collectives"]), recipe
