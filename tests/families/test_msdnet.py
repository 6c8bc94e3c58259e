"""Tests of MSDNet: its scales, its costs, and early exits that change no answer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from raised import fails

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.exits.policies import confidence, early_exit, measure
from pipeline.families.msdnet.config import MsdnetConfig
from pipeline.families.msdnet.depth import layers
from pipeline.families.msdnet.inference import load_pretrained
from pipeline.families.msdnet.model import Msdnet, MultiScaleLayer, build

NETS = {
    "growing": {"channels": 4, "growth": 4},
    "even": {"exits": 4, "first_layers": 2, "layers": 2, "depth": "even", "channels": 4, "growth": 4},
    "whole": {"exits": 3, "width_factors": [1, 2], "reduction": 1.0, "channels": 4, "growth": 2},
    "one scale": {"exits": 3, "width_factors": [2], "channels": 4, "growth": 2},
}


def made(keys: dict[str, object], classes: int = 5, side_px: int = 32) -> tuple[Msdnet, torch.Tensor]:
    torch.manual_seed(3)
    net = build(MsdnetConfig(**keys), classes).eval()  # type: ignore[arg-type]
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


def test_the_whole_net_has_the_costs_of_its_plan_and_a_bottleneck_of_two_convolutions() -> None:
    """Every layer and reduction, from the plan; the two scales that are dropped cost nothing afterwards."""
    config = MsdnetConfig()
    net, _ = made({}, 10)
    total = 1024 * 27 * 16 + 256 * 9 * 16 * 32 + 64 * 9 * 32 * 64
    for plans in config.plan:
        for plan in plans:
            for scale in range(plan.first, 3):
                factor, area = 2**scale, 1024 // 4**scale
                added = config.growth * factor // (2 if plan.reads_finer(scale) else 1)
                total += area * _bottleneck(plan.width * factor, factor * added, added)
                if plan.reads_finer(scale):
                    inputs, inner = plan.width * factor // 2, min(plan.width * factor // 2, factor // 2 * added)
                    total += 4 * area * inputs * inner + area * 9 * inner * added
                if plan.reduced is not None:
                    total += area * (plan.width + config.growth) * factor * plan.reduced * factor
    classifiers = sum(16 * 9 * width * 4 * 128 + 4 * 9 * 128 * 128 + 1280 for width in (22, 34, 26, 50, 52))
    assert measure(net, torch.zeros(1, 3, 32, 32)).cumulative[-1] == total + classifiers


def _bottleneck(inputs: int, inner: int, outputs: int) -> int:
    inner = min(inputs, inner)
    return inputs * inner + 9 * inner * outputs


def test_blocks_grow_by_their_number_or_not() -> None:
    assert MsdnetConfig(layers=2, exits=4).block_layers == (1, 3, 5, 7)
    assert MsdnetConfig(layers=2, first_layers=4, exits=4, depth="even").block_layers == (4, 2, 2, 2)


def test_the_stem_for_imagenet_reduces_by_four_and_its_classifiers_are_as_wide_as_their_input() -> None:
    net = build(MsdnetConfig(stem="imagenet", channels=4, growth=4, exits=3), 5).eval()
    assert [each.shape[-1] for each in net.first(torch.zeros(1, 3, 64, 64))] == [16, 8, 4]
    assert {each.reduce[0][0].out_channels for each in net.classifiers} == {32, 48}  # type: ignore[index,union-attr]


def test_weights_are_drawn_as_in_the_paper_and_heads_begin_without_a_bias() -> None:
    net = build(MsdnetConfig(), 10)
    weight = net.blocks[2].layers[1].own[0][3].weight  # type: ignore[index,union-attr]
    assert weight.shape[2:] == (3, 3)
    assert float(weight.std()) == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.2)
    assert not any(classifier.fc.bias.any() for classifier in net.classifiers)  # type: ignore[union-attr,operator]


def test_all_heads_are_the_last_layer_and_are_replaced_for_other_classes() -> None:
    config = MsdnetConfig(exits=3, channels=4, growth=4)
    net, other = build(config, 10), build(config, 5)
    last = layers(config, net)[-1]
    assert last == list(net.classifiers) and len(layers(config, net)) == 3 + 6 + 1
    before = {name: value.clone() for name, value in other.state_dict().items()}
    load_pretrained(config, other, net.state_dict(), new_head=True)
    for name, value in other.state_dict().items():
        same = before if ".fc." in name else net.state_dict()
        assert torch.equal(value, same[name]), name


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"bottlenecks": [1]}, "bottlenecks"),
        ({"exits": 1}, "exits"),
        ({"exits": 4, "depth": "even"}, "exits"),  # the last layer would have two scales
        ({"growth": 5, "width_factors": [1, 3]}, "growth"),
        ({"exits": 64, "layers": 64}, "exits"),
        ({"channels": 1, "growth": 2, "reduction": 0.001}, "reduction"),
        ({"budgets": [0.5, 0.5]}, "budgets"),
        ({"exit_temperature": 2.0}, "exit_temperature"),
        ({"exits": 1, "first_layers": 3, "exit_distillation": 1.0}, "exit_distillation"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, object], key: str) -> None:
    with fails(ConfigError, key):
        validate(MsdnetConfig, {"name": "msdnet", **keys}, "family")
