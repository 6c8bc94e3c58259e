"""Stochastic depth by the linear rule and dropout before the head, of baselines and ARRN: what each draw does."""

from __future__ import annotations

import copy

import pytest
import torch
from raised import fails
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from pipeline import run_config
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.families.arrn.config import ArrnConfig
from pipeline.families.arrn.inner import Fused, MBConv
from pipeline.families.arrn.model import Arrn
from pipeline.families.arrn.model import build as build_arrn
from pipeline.families.baseline.model import BaselineConfig
from pipeline.families.baseline.model import build as build_baseline
from pipeline.families.baseline.regularised import RegularisedResNet

SIDE_PX, CLASSES, RATE = 16, 3, 0.4
LADDER = {"ladder_px": [16, 8, 4], "widths": [6, 8, 10], "inner": ["F2x3", "M2x2"], "final": "M2x2", "head_width": 12}


def arrn(**changes: object) -> Arrn:
    torch.manual_seed(3)
    config = validate(ArrnConfig, {"name": "arrn", **LADDER, "drop": 0, **changes}, "family")
    net = build_arrn(config, CLASSES).eval().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def resnet(drop_path: float, dropout: float) -> RegularisedResNet:
    torch.manual_seed(3)
    net = ResNet(BasicBlock, [1, 2, 1, 1], num_classes=CLASSES)
    return RegularisedResNet(net, "resnet18", drop_path, dropout).eval().double()


def norms_of(net: nn.Module) -> list[nn.BatchNorm2d]:
    """The last norm of each block that may be dropped, in the order of the blocks."""
    if isinstance(net, RegularisedResNet):
        return [module.bn2 for module in net.modules() if isinstance(module, BasicBlock)]
    blocks = [module for module in net.modules() if isinstance(module, Fused | MBConv)]
    return [block.last.norm for block in blocks if block.skip]


def images(count: int = 2) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(count, 3, SIDE_PX, SIDE_PX, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["arrn", "resnet"])
def test_a_block_that_is_kept_is_divided_by_its_survival_and_one_that_is_not_adds_nothing(kind: str) -> None:
    net = arrn(drop_path=RATE) if kind == "arrn" else resnet(RATE, 0.0)
    norms = norms_of(net)
    count = len(norms)
    assert count == {"arrn": 5, "resnet": 5}[kind]
    noise = net.draw_noise(2)
    assert noise is not None
    start = noise.shape[1] - count - (12 if kind == "arrn" else 512)
    for lost in (None, 0, 2, count - 1):
        noise[:] = 0.0
        other = copy.deepcopy(net)
        with torch.no_grad():
            for number, norm in enumerate(norms_of(other)):
                factor = 0.0 if number == lost else 1 / (1 - (number + 1) / count * RATE)
                norm.weight *= factor
                norm.bias *= factor
        if lost is not None:
            noise[0, start + lost] = 0.999
            kept = net(images(), noise).logits[1]
            torch.testing.assert_close(net(images(), noise * 0).logits[1], kept, rtol=1e-9, atol=1e-9)  # each its own
        torch.testing.assert_close(net(images(), noise).logits[0], other(images()).logits[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["arrn", "resnet"])
def test_the_head_sees_the_features_that_are_kept(kind: str) -> None:
    net = arrn(dropout=RATE) if kind == "arrn" else resnet(0.0, RATE)
    head = net.fc if isinstance(net, Arrn) else net.net.fc
    noise = net.draw_noise(1)
    assert noise is not None
    lost = noise[0, -head.in_features :] < RATE
    assert 0 < lost.sum() < head.in_features
    found = net(images(1), noise).logits
    with torch.no_grad():
        head.weight *= (~lost).double() / (1 - RATE)
    torch.testing.assert_close(found, net(images(1)).logits, rtol=1e-6, atol=1e-6)


def test_nothing_is_dropped_in_evaluation_and_weights_are_those_of_the_plain_net() -> None:
    plain, both = (build_of("resnet18", **drops) for drops in ({}, {"drop_path": 0.1, "dropout": 0.2}))
    theirs = dict(plain.state_dict())
    assert list(both.state_dict()) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in both.state_dict().items())
    few = images().float()
    assert torch.equal(both.eval()(few).logits, plain.eval()(few).logits)
    assert not torch.equal(both.train()(few).logits, plain.train()(few).logits)
    assert plain.draw_noise(2) is None
    calm, wild = arrn(), arrn(drop_path=0.1, dropout=0.2)
    assert all(torch.equal(value, calm.state_dict()[name]) for name, value in wild.state_dict().items())
    assert torch.equal(calm(images()).logits, wild(images()).logits)
    assert calm.draw_noise(2) is None


def build_of(net: str, **drops: float) -> nn.Module:
    torch.manual_seed(5)
    return build_baseline(BaselineConfig(net=net, **drops), CLASSES)


@pytest.mark.parametrize(
    ("net", "key"),
    [
        ("cifar_resnet", "drop_path"),
        ("vgg16_bn", "dropout"),
        ("mobilenet_v2", "drop_path"),
        ("efficientnet_v2_s", "dropout"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(net: str, key: str) -> None:
    size = ["family.depth=8"] if net == "cifar_resnet" else []
    with fails(ConfigError, f"family.{key}"):
        run_config.load("baseline/imagenet_resnet50", [f"family.net={net}", f"family.{key}=0.1", *size], data_home="/d")


def test_older_fingerprints_are_of_nets_that_drop_nothing() -> None:
    for recipe in ("baseline/imagenet_resnet50", "arrn/toy"):
        now = run_config.fingerprint(run_config.load(recipe, data_home="/d"), "images")
        new = {"family.drop_path", "family.dropout"}
        assert new <= set(now)
        assert run_config.translated({key: value for key, value in now.items() if key not in new}) == now
