"""Files of weights from anywhere: each tensor is used, or left out by name, or the file is refused by name."""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from raised import fails
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config import validate
from pipeline.data import expectation
from pipeline.data.config import DataConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.baseline.model import TORCHVISION, BaselineConfig, build
from pipeline.families.baseline.plain import Plain
from pipeline.families.baseline.released import load_pretrained as load_baseline
from pipeline.family import find, load_pretrained
from pipeline.training import torchvision_weights, weights_file
from pipeline.weights import ImagesExpected, Loaded

SMALL: dict[str, dict[str, Any]] = {
    "arrn": {"ladder_px": [16, 8, 4], "widths": [6, 8, 10], "inner": ["F2x2", "M2x1"], "final": "M2x1"},
    "baseline": {"net": "resnet18", "stem": "cifar"},
    "convnet_aig": {"depth": 8},
    "ranet": {
        "scales": [1, 2],
        "width_factors": [2, 1],
        "channels": 4,
        "growth": 4,
        "first_blocks": 1,
        "more_blocks": 1,
    },
    "shape_adaptor": {"net": "vgg16_bn", "side_px": 16, "target_px": 5, "width": 0.125},
}


def drawn(family: str, classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = validate(find(family).config, {"name": family, **SMALL[family]}, "family")
    return find(family).build(config, classes)


def into(family: str, path: Path, *, new_head: bool = False, classes: int = 5) -> tuple[nn.Module, Loaded, int]:
    """A fresh net with the file's weights, what became of them, and how many tensors the file has."""
    net = drawn(family, classes, seed=1)
    config = validate(find(family).config, {"name": family, **SMALL[family]}, "family")
    found = weights_file.read(path)
    return net, load_pretrained(find(family), config, net, found.tensors, new_head=new_head), len(found.tensors)


WRAPPED = {
    "bare": lambda w: w,
    "DDP": lambda w: {f"module.{name}": value for name, value in w.items()},
    "compiled": lambda w: {f"_orig_mod.{name}": value for name, value in w.items()},
    "compiled DDP": lambda w: {f"module._orig_mod.{name}": value for name, value in w.items()},
    "DDP compiled": lambda w: {f"_orig_mod.module.{name}": value for name, value in w.items()},
    "one part compiled": lambda w: {name.replace(".0.", ".0._orig_mod.", 1): value for name, value in w.items()},
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "best_acc1": torch.tensor(0.5), "optimizer": {"state": {}}},
    "model": lambda w: {"model": w, "args": {"lr": 0.1}},
    "model_state": lambda w: {"model_state": w},
    "model_state_dict": lambda w: {"epoch": 1, "model_state_dict": w},
    "nested": lambda w: {"state_dict": {"model": w, "version": 2}},
    "Lightning": lambda w: {
        "state_dict": {f"model.{name}": value for name, value in w.items()},
        "hyper_parameters": {},
    },
    "EMA of timm": lambda w: {"state_dict": noise(w), "state_dict_ema": w, "arch": "x"},
    "EMA of torchvision": lambda w: {
        "model": noise(w),
        "model_ema": {"n_averaged": torch.tensor(9), **{f"module.{name}": value for name, value in w.items()}},
    },
    "EMA in a shadow": lambda w: {
        "ema": {"decay": 0.9, "num_updates": torch.tensor(3), "shadow": w},
        "model": noise(w),
    },
    "thop's counters": lambda w: {**w, "total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)},
    "no counters": lambda w: {name: value for name, value in w.items() if not name.endswith("num_batches_tracked")},
    "beside an epoch": lambda w: {**w, "epoch": 7, "name": "best"},
}


def noise(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(value, 3) for name, value in weights.items()}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("family", SMALL)
def test_a_net_is_loaded_whole_from_what_training_programs_save(family: str, wrapper: str, tmp_path: Path) -> None:
    weights = dict(drawn(family).state_dict())
    torch.save(WRAPPED[wrapper](weights), tmp_path / "net.pt")
    net, loaded, count = into(family, tmp_path / "net.pt")
    assert not loaded.initial
    assert all(name.rpartition(".")[2] in ("n_averaged", "total_ops", "total_params") for name in loaded.left_out)
    assert count - len(loaded.left_out) == len(weights) - (wrapper == "no counters") * counters(weights)
    for name, value in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, weights[name]), name


def counters(weights: dict[str, Tensor]) -> int:
    return sum(name.endswith("num_batches_tracked") for name in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_weights_of_any_precision_and_file_are_loaded_whole(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    weights = {n: v.to(dtype) if v.is_floating_point() else v for n, v in drawn("convnet_aig").state_dict().items()}
    path = tmp_path / f"net{suffix}"
    torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    net, loaded, _ = into("convnet_aig", path)
    assert loaded == Loaded([], [])
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name


def test_the_entry_and_what_is_beside_it_are_named(tmp_path: Path) -> None:
    weights = dict(drawn("baseline").state_dict())
    torch.save(
        {"state_dict": noise(weights), "epoch": 3, "ema": {"shadow": weights, "decay": 0.9}}, tmp_path / "net.pt"
    )
    found = weights_file.read(tmp_path / "net.pt")
    assert found.entry == "ema.shadow"
    assert set(found.others) == {"state_dict", "epoch", "decay"}


class Unknown:
    """Any class of a user's."""


REFUSED = {
    "a whole module": lambda w: nn.Linear(2, 2),
    "a module in an entry": lambda w: {"model": nn.Linear(2, 2), "epoch": 1},
    "arguments of a program": lambda w: {"model": w, "args": argparse.Namespace(lr=0.1)},
    "a class": lambda w: {"state_dict": w, "config": Unknown()},
    "a list": lambda w: list(w.values()),
    "a tensor": lambda w: torch.zeros(3),
    "arrays": lambda w: {name: np.zeros(2) for name in w},
    "numbers": lambda w: {"epoch": 3},
    "two nets": lambda w: {"generator": w, "critic": w},
    "tensors at two levels": lambda w: {**w, "optimizer": {"model": w}},
    "names that fall together": lambda w: {**w, **{f"module.{name}": value for name, value in w.items()}},
    "nothing": lambda w: {},
}


@pytest.mark.parametrize("content", REFUSED)
def test_a_file_that_is_not_named_tensors_is_refused_with_the_reason(content: str, tmp_path: Path) -> None:
    torch.save(REFUSED[content](dict(drawn("convnet_aig").state_dict())), tmp_path / "net.pt")
    with fails(CheckpointError, "weights", subject=tmp_path / "net.pt"):
        weights_file.read(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"12345678{broken", b"<html>", b"version https"]
)
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(content)
    with fails(CheckpointError, "weights"):
        weights_file.read(tmp_path / "net.pt")


def test_a_torchscript_file_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "net.pt")
    with fails(CheckpointError, "weights"):
        weights_file.read(tmp_path / "net.pt")


def first(weights: dict[str, Tensor], head: bool = False) -> str:
    """A layer's weight: not the head's, or the head's."""
    is_head = [name for name in weights if name.split(".")[-2] in ("fc", "classifier")]
    return is_head[0] if head else next(n for n, v in weights.items() if v.dim() == 4 and n not in is_head)


FAULTS = {
    "missing": lambda w: w.pop(first(w)),
    "unknown": lambda w: w.update({"extra.weight": torch.zeros(2)}),
    "another shape": lambda w: w.update({first(w): torch.zeros(7)}),
    "of integers": lambda w: w.update({first(w): w[first(w)].to(torch.int8)}),
    "quantised": lambda w: w.update({first(w): torch.quantize_per_tensor(w[first(w)], 0.1, 0, torch.qint8)}),
    "complex": lambda w: w.update({first(w): w[first(w)].to(torch.complex64)}),
    "sparse": lambda w: w.update({first(w): w[first(w)].to_sparse()}),
    "not a number": lambda w: w.update({first(w): torch.full_like(w[first(w)], torch.nan)}),
    "infinite": lambda w: w.update({first(w): torch.full_like(w[first(w)], torch.inf)}),
    "an odd head": lambda w: w.update({first(w, head=True): w[first(w, head=True)][:, :1]}),
    "half a head": lambda w: w.pop(first(w, head=True)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", SMALL)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(family: str, fault: str, new_head: bool) -> None:
    weights = dict(drawn(family).state_dict())
    FAULTS[fault](weights)
    net = drawn(family, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    config = validate(find(family).config, {"name": family, **SMALL[family]}, "family")
    with fails(ConfigError, "weights"):
        load_pretrained(find(family), config, net, weights, new_head=new_head)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("family", SMALL)
def test_a_head_for_other_classes_is_left_out_on_request_only(family: str, tmp_path: Path) -> None:
    weights = dict(drawn(family, classes=9).state_dict())
    torch.save(weights, tmp_path / "net.pt")
    with fails(ConfigError, "--new-head"):
        into(family, tmp_path / "net.pt")
    net, loaded, count = into(family, tmp_path / "net.pt", new_head=True)
    assert set(loaded.initial) == set(loaded.left_out) and len(loaded.left_out) >= 2
    fresh = drawn(family, seed=1).state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, fresh[name] if name in loaded.initial else weights[name]), name
    assert count == len(weights)
    with fails(ConfigError, "training.new_head"):  # it fits
        into(family, tmp_path / "net.pt", new_head=True, classes=9)


# ---- torchvision's published weights


def published(folder: Path, name: str = "net", stated: str | None = None) -> tuple[str, bytes]:
    """The URL of a file that states its hash, or another, in its name, and the file's content."""
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()[:8] if stated is None else stated
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-{digest}.pth"
    file.write_bytes(content)
    return file.as_uri(), content


def test_published_weights_are_fetched_once_and_checked(tmp_path: Path) -> None:
    url, content = published(tmp_path / "there")
    file = torchvision_weights.fetched(url, tmp_path / "here")
    assert file.read_bytes() == content and file.parent == tmp_path / "here"
    (tmp_path / "there" / file.name).unlink()
    assert torchvision_weights.fetched(url, tmp_path / "here") == file  # which is there
    file.write_bytes(b"damaged")
    with fails(CheckpointError, "weights", subject=url):
        torchvision_weights.fetched(url, tmp_path / "here")


def test_weights_that_are_gone_or_have_another_hash_or_state_none_are_refused(tmp_path: Path) -> None:
    other = published(tmp_path / "there", stated="0123abcd")[0]
    unstated = published(tmp_path / "there", name="net-top1", stated="best")[0]
    for url in (other, unstated, f"{tmp_path.as_uri()}/gone-0123abcd.pth"):
        with fails(CheckpointError, "weights", subject=url):
            torchvision_weights.fetched(url, tmp_path / "here")
    assert not [*(tmp_path / "here").glob("*")]


def test_unknown_names_of_weights_are_refused() -> None:
    for name in ("torchvision:resnet50/V9", "torchvision:resnet51/DEFAULTS", "torchvision:resnet50"):
        with fails(ConfigError, "training.start_from", subject=name):
            weights_file.locate(Path(name))


def test_every_file_of_torchvisions_states_its_hash_and_the_images_that_it_expects() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            assert torchvision_weights.HASH.search(weights.url), weights.url
    found = torchvision_weights.expected(Path("/somewhere/resnet50-11ad3fa6.pth"))
    preset = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    assert found is not None and found.source == "torchvision:resnet50/IMAGENET1K_V2"
    assert (found.side_px, found.resize_px) == (preset.crop_size[0], preset.resize_size[0])
    assert (found.mean, found.std, found.interpolation) == (tuple(preset.mean), tuple(preset.std), "bilinear")
    assert torchvision_weights.expected(Path("mine.pth")) is None
    for name in ("googlenet-1378be20.pth", "inception_v3_google-0cc3c7bd.pth"):  # their nets here take images as given
        half = torchvision_weights.expected(Path(name))
        assert half is not None and half.mean == half.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, {"data.mean", "data.std", "data.interpolation", "data.eval_side_px", "data.eval_resize_px"}),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.4999, 0.5, 0.5), "side_px": 224, "interpolation": "bicubic"}, set()),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "side_px": 224}, {"data.interpolation"}),
    ],
)
def test_what_the_recipe_has_otherwise_than_the_weights_expect_is_listed(keys: dict[str, Any], named: set[str]) -> None:
    expected = ImagesExpected("theirs", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224, 256, "bicubic")
    data = DataConfig(root=Path("none"), **{"side_px": 192, **keys})
    text = expectation.remark(expected, data, sides=True) or ""
    assert set(re.findall(r"data\.\w+(?==)", text)) == named
    assert expectation.remark(None, data, sides=True) is None


# ---- torchvision's files

LARGE = (
    "vgg16",
    "vgg16_bn",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "wide_resnet101_2",
    "wide_resnet50_2",
    "resnet101",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LARGE else []) for name in TORCHVISION]
)
def test_torchvisions_files_of_every_baseline_are_used_whole(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, **options).state_dict()
    config = BaselineConfig(net=name)
    net = build(config, 1000)
    loaded = load_baseline(config, net, as_at_torchvision(theirs))
    assert not loaded.initial
    assert all(each.startswith(("aux1.", "aux2.")) for each in loaded.left_out)
    assert bool(loaded.left_out) == (name == "googlenet")
    assert isinstance(net, Plain)
    for each, value in net.net.state_dict().items():
        assert torch.equal(value, theirs[each]), each
    other = build(config, 3)
    with fails(ConfigError, "--new-head"):
        load_baseline(config, other, theirs)
    loaded = load_baseline(config, other, theirs, new_head=True)
    assert len(loaded.initial) == 2


def as_at_torchvision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With DenseNet's names as in torchvision's files, which its loader rewrites."""
    for one, two in (("norm1", "norm.1"), ("norm2", "norm.2"), ("conv1", "conv.1"), ("conv2", "conv.2")):
        weights = {
            name.replace(f".{one}.", f".{two}.") if "denselayer" in name else name: value
            for name, value in weights.items()
        }
    return weights
