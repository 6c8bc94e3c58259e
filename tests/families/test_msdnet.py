"""Tests of MSDNet: its scales, its costs, and early exits that change no answer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from raised import fails

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.exits.policies import confidence, early_exit, measure
from pipeline.families.baseline.model import BaselineConfig
from pipeline.families.baseline.msdnet import Msdnet, MsdnetConfig, MultiScaleLayer, build

NETS = {
    "growing": {"channels": 4, "growth": 4},
    "even": {"exits": 4, "first_layers": 2, "layers": 2, "depth": "even", "channels": 4, "growth": 4},
    "whole": {"exits": 3, "width_factors": [1, 2], "reduction": 1.0, "channels": 4, "growth": 2},
    "one scale": {"exits": 3, "width_factors": [2], "channels": 4, "growth": 2},
}


def made(keys: dict[str, object], classes: int = 5, side_px: int = 32) -> tuple[Msdnet, torch.Tensor]:
    torch.manual_seed(3)
    net = build(MsdnetConfig(**keys), "cifar", classes).eval()  # type: ignore[arg-type]
    return net, torch.randn(9, 3, side_px, side_px)


def test_a_scale_is_dropped_after_every_third_of_the_layers_and_the_rest_reduced() -> None:
    layers = [layer for block in MsdnetConfig().plan for layer in block]
    assert [len(block) for block in MsdnetConfig().plan] == [1, 2, 3, 4, 5]
    assert [layer.first for layer in layers] == [0] * 5 + [1] * 5 + [2] * 5
    assert [number for number, layer in enumerate(layers, 1) if layer.reduced is not None] == [6, 11]
    assert [layer.width for layer in layers[:6]] == [16, 22, 28, 34, 40, 46] and layers[6].width == 26


def test_the_costs_of_the_net_for_cifar_are_those_of_its_convolutions_reckoned_by_hand() -> None:
    """Scale s has 1024 / 4^s positions; widths and growths are times 1, 2, 4; a bottleneck's inner width is its least
    of what goes in and of the factor times what comes out."""
    net, _ = made({}, 10)
    first = 1024 * 27 * 16 + 256 * 9 * 16 * 32 + 64 * 9 * 32 * 64
    finest = 1024 * (16 * 6 + 9 * 6 * 6)
    middle = 1024 * 16 * 6 + 256 * 9 * 6 * 6 + 256 * (32 * 12 + 9 * 12 * 6)
    coarsest = 256 * 32 * 24 + 64 * 9 * 24 * 12 + 64 * (64 * 48 + 9 * 48 * 12)
    classifier = 16 * 9 * 88 * 128 + 4 * 9 * 128 * 128 + 128 * 10
    assert measure(net, torch.zeros(1, 3, 32, 32)).cumulative[0] == first + finest + middle + coarsest + classifier


@pytest.mark.parametrize("keys", NETS.values(), ids=NETS)
def test_a_layer_keeps_what_it_reads_unless_a_reduction_follows(keys: dict[str, object]) -> None:
    net, images = made(keys)
    x = net.first(images)
    for block in net.blocks:
        for layer in block.layers:  # type: ignore[union-attr]
            assert isinstance(layer, MultiScaleLayer)
            before, x = x, layer(x)
            dropped = layer.plan.first - layer.plan.first_in
            assert len(x) == len(before) - dropped
            for old, new in zip(before[dropped:], x, strict=True):
                assert old.shape[2:] == new.shape[2:]
                assert layer.plan.reduced is not None or torch.equal(old, new[:, : old.shape[1]])


@pytest.mark.parametrize("keys", NETS.values(), ids=NETS)
@pytest.mark.parametrize("side_px", [32, 19])
def test_early_exits_answer_as_the_whole_net_and_cost_what_runs(keys: dict[str, object], side_px: int) -> None:
    net, images = made(keys, side_px=side_px)
    with torch.no_grad():
        exits = net(images).exits
        sure = confidence(exits)
        costs = measure(net, images)
        assert all(low < high for low, high in pairwise(costs.cumulative))
        ranked = sure.sort(0).values  # thresholds lie between two images, whose rounding differs in other batches
        until = [float(each) for each in (ranked[4] + ranked[5])[:-1] / 2] + [0.0]
        found = early_exit(net, images, until, costs)
    taken = (sure >= torch.tensor(until)).int().argmax(1)
    assert len(taken.unique()) > 1
    assert torch.equal(found.facts["exit"], taken + 1)
    torch.testing.assert_close(found.logits, exits[torch.arange(len(images)), taken])
    alone = torch.cat([early_exit(net, image[None], until, costs).macs for image in images])
    assert alone.tolist() == [costs.until(int(number) + 1) for number in taken]


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"net": "msdnet", "depth": 20}, "depth"),
        ({"net": "msdnet", "resolutions_px": [16]}, "resolutions_px"),
        ({"net": "resnet50", "msdnet": {"exits": 3}}, "msdnet"),
        ({"net": "msdnet", "msdnet": {"bottlenecks": [1]}}, "msdnet"),
        ({"net": "msdnet", "msdnet": {"exits": 1}}, "msdnet"),
        ({"net": "msdnet", "msdnet": {"channels": 1, "growth": 2, "reduction": 0.001}}, "msdnet"),
        ({"net": "msdnet", "msdnet": {"budgets": [0.5, 0.5]}}, "msdnet"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, object], key: str) -> None:
    with fails(ConfigError, key):
        validate(BaselineConfig, {"name": "baseline", **keys}, "family")
