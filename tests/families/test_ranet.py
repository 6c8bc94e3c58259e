"""Tests of RANet: the published sizes and costs, the literal threshold rule, and early exits that change no answer."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import pairwise
from math import floor, log

import pytest
import torch
from raised import fails
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import cost, ranks
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.exits.budget import expected, shares, solve, thresholds
from pipeline.exits.objective import exit_divergence, loss
from pipeline.exits.policies import Anytime, MacsBudget, batch_of, confidence, early_exit, measure
from pipeline.families.ranet.config import RanetConfig
from pipeline.families.ranet.inference import policies
from pipeline.families.ranet.model import Ranet, Walk, build
from pipeline.families.ranet.released import load_pretrained
from pipeline.family import Fitted, Prediction
from pipeline.weights import Loaded

IMAGENET = {"stem": "imagenet", "scales": [1, 2, 3, 4], "width_factors": [4, 2, 2, 1], "layers": 8, "depth": "even"}
PUBLISHED = {  # the fact file's ids: keys, classes, parameters, entries of the state, millions of operations by exit
    "C-any": (
        {"scales": [1, 2, 3, 3], "width_factors": [4, 2, 1, 1], "layers": 4, "depth": "even"},
        (10, 3_261_830, 1774),
        "15.81 31.28 44.66 50.36 60.65 63.65 90.17 94.90",
    ),
    "C-any-100": (
        {"scales": [1, 2, 3, 3], "width_factors": [4, 2, 1, 1], "layers": 4, "depth": "even"},
        (100, 3_354_710, 1774),
        "15.83 31.31 44.69 50.40 60.71 63.72 90.26 95.00",
    ),
    "C-b1": ({}, (10, 2_547_601, 1284), "8.36 21.77 32.84 41.52 53.23 58.92"),
    "C-b1-100": ({}, (100, 2_617_261, 1284), "8.37 21.79 32.88 41.57 53.28 58.99"),
    "C-b2": (
        {"scales": [1, 2, 2, 3], "width_factors": [4, 2, 2, 1]},
        (10, 5_094_107, 2728),
        "10.73 24.13 35.21 43.89 93.01 114.61 163.94 175.65",
    ),
    "C-b3": (
        {"scales": [1, 2, 3, 3], "width_factors": [4, 2, 1, 1]},
        (10, 3_967_697, 2734),
        "10.74 24.14 35.22 43.90 55.60 61.30 105.56 117.27",
    ),
    "C-def": ({"layers": 4, "depth": "even"}, (10, 2_451_158, 1020), "13.44 28.91 42.28 47.98 58.28 61.27"),
    "I-32": (
        {**IMAGENET, "channels": 32, "growth": 16},
        (1000, 131_123_991, 3317),
        "246.47 631.16 860.40 1041.14 1869.85 2160.38 2734.28 2828.31",
    ),
    "I-64": (
        {**IMAGENET, "channels": 64, "growth": 16},
        (1000, 149_144_186, 3317),
        "434.97 888.67 1153.36 1352.45 2279.91 2588.47 3235.52 3333.48",
    ),
    "I-16": (
        {**IMAGENET, "width_factors": [4, 2, 1, 1], "growth": 16},
        (1000, 87_972_617, 3317),
        "168.07 520.47 731.89 903.79 1052.25 1118.80 1589.01 1680.98",
    ),
}
RECIPES = {
    "C-any": ("cifar10_anytime",),
    "C-any-100": ("cifar100_anytime",),
    "C-b1": ("cifar10_b1",),
    "C-b2": ("cifar10_b2",),
    "C-b3": ("cifar10_b3",),
    "I-32": ("imagenet_32",),
    "I-64": ("imagenet_64",),
}
SMALL = {"channels": 4, "growth": 4, "budgets": [0.5, 0.8]}
CLASSES, SIDE_PX = 5, 16


def config_of(**keys: object) -> RanetConfig:
    return validate(RanetConfig, {"name": "ranet", **keys}, "family")


def images(count: int, seed: int = 5) -> Tensor:
    """Images of different brightness and contrast, so that confidences differ."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, 1, 1, 1, generator=generator) * 3
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    return scale * (torch.randn(count, 3, SIDE_PX, SIDE_PX, generator=generator) + colour)


@pytest.fixture(scope="module", params=["even", "growing", "repeated"])
def small(request: pytest.FixtureRequest) -> Ranet:
    shape = {"scales": [1, 2, 2, 3], "width_factors": [3, 2, 2, 1]} if request.param == "repeated" else {}
    torch.manual_seed(0)
    net = build(config_of(**SMALL, **shape, depth="even" if request.param == "even" else "growing"), CLASSES)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of the one batch that follows: activations stay near 1
    with torch.no_grad():
        net(images(64))
        for classifier in net.classifiers:
            classifier.fc.weight.mul_(8)  # type: ignore[union-attr]
    return net.eval()


def exits_of(net: Ranet, batch: Tensor) -> Tensor:
    with torch.no_grad():
        exits: Tensor = net(batch).exits
        return exits


def fitted(net: Ranet, log_q: float, count: int = 64) -> list[float | None]:
    found = thresholds(confidence(exits_of(net, images(count, seed=9))), shares(log_q, net.config.num_exits))
    return [*found, 0.0]


# ---- sizes and costs


@pytest.mark.parametrize(
    "published",
    [pytest.param(name, marks=[pytest.mark.long] if name in ("I-64", "I-32") else []) for name in PUBLISHED],
)
def test_parameters_exits_and_macs_are_the_published_ones(published: str) -> None:
    keys, (classes, params, entries), operations = PUBLISHED[published]
    config = config_of(**keys)
    side_px = 32 if config.stem == "cifar" else 224
    example = torch.zeros(1, 3, side_px, side_px)
    with torch.no_grad():  # one image takes less time than shapes alone in FakeTensorMode
        net = build(config, classes).eval()
        found = released_count(net, example)
        costs = measure(net, example).cumulative
        whole = cost.measure(net, example).macs
    assert sum(p.numel() for p in net.parameters()) == params
    assert len(net.state_dict()) == entries
    assert [f"{value / 1e6:.2f}" for value in found] == operations.split()
    assert costs == sorted(set(costs))
    assert costs[-1] == whole
    assert len(costs) == config.num_exits == config.first_blocks + config.more_blocks * (len(config.scales) - 1)
    assert all(0.001 < 1 - ours / theirs < 0.009 for ours, theirs in zip(costs, found, strict=True))


def released_count(net: Ranet, example: Tensor) -> list[int]:
    """Operations until each exit as the released counter has them: convolutions, ReLU, pooling, linear with bias."""
    spent, found = [0], []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            spent[0] += module.weight[0].numel() * output.numel()
        elif isinstance(module, nn.ReLU):
            spent[0] += inputs[0].numel()
        elif isinstance(module, nn.MaxPool2d):
            spent[0] += 9 * output.numel()
        elif isinstance(module, nn.Linear):
            spent[0] += 4 * module.in_features + module.weight.numel() + module.out_features  # a 2x2 mean before it
            found.append(spent[0])

    hooks = [module.register_forward_hook(count) for module in net.modules()]
    net(example)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("published", RECIPES)
def test_the_recipes_are_the_published_nets(published: str) -> None:
    from pipeline import run_config

    keys = PUBLISHED[published][0]
    for name in RECIPES[published]:
        recipe = run_config.load(f"ranet/{name}", ["data.root=somewhere"])
        assert recipe.data.held_out > 0
        assert recipe.family.model_copy(update={"budgets": ()}) == config_of(**keys)


def test_the_blocks_of_c_any_are_the_published_ones() -> None:
    plan = config_of(**PUBLISHED["C-any"][0]).plan
    outputs = [[block.outputs for block in blocks] for blocks in plan]
    assert outputs == [
        [160, 256],
        [100, 92, 140, 188],
        [50, 46, 87, 69, 93, 117],
        [50, 46, 87, 138, 101, 156, 180, 204],
    ]
    assert [[b + 1 for b, block in enumerate(blocks) if block.down] for blocks in plan] == [[], [2], [2, 4], [4, 6]]
    reduced = [[b + 1 for b, block in enumerate(blocks) if block.reduced] for blocks in plan]
    assert reduced == [[], [2], [2, 4], [2, 5]]


@pytest.mark.parametrize(("first", "more", "exits"), [(1, 2, 5), (3, 2, 7), (2, 1, 4)])
def test_other_numbers_of_blocks_work(first: int, more: int, exits: int) -> None:
    config = config_of(**SMALL, first_blocks=first, more_blocks=more)
    assert exits_of(build(config, 3), torch.rand(2, 3, 32, 24)).shape == (2, exits, 3)
    assert len(config.subnetwork_of_exit) == exits


def test_every_exit_is_at_the_lowest_resolution(small: Ranet) -> None:
    walk = Walk(small, images(1))
    assert {walk.to_next_exit().shape[-1] for _ in small.classifiers} == {SIDE_PX // 4}


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"scales": [1, 1, 2]}, "scales"),
        ({"scales": [1, 2, 4]}, "scales"),
        ({"scales": [2, 3, 4]}, "scales"),
        ({"scales": [1, 3, 2]}, "scales"),
        ({"scales": [1, 2]}, "scales"),
        ({"bottlenecks": [4, 2]}, "bottlenecks"),
        ({"layers": 1}, "layers"),
        ({"growth": 3}, "growth"),
        ({"reduction": 0.001, "channels": 2}, "reduction"),
        ({"scales": [], "width_factors": []}, "scales"),
        ({"budgets": [0.5, 0.5]}, "budgets"),
        ({"budgets": [0]}, "budgets.0"),
    ],
)
def test_an_invalid_net_is_refused(keys: dict[str, object], key: str) -> None:
    with fails(ConfigError, key):
        validate(RanetConfig, {"name": "ranet", **keys}, "family")


def test_too_small_images_are_refused(small: Ranet) -> None:
    exits_of(small, torch.rand(1, 3, 5, 5))
    with fails(ConfigError, "images", subject="4"):
        exits_of(small, torch.rand(1, 3, 4, 5))


# ---- the function


def test_resizing_and_order_are_those_of_the_paper(small: Ranet) -> None:
    """An independent, literal composition of the released layers, block by block, gives the same logits."""
    batch = images(3)
    with torch.no_grad():
        literal = literally(small, batch)
    torch.testing.assert_close(exits_of(small, batch), literal, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(literally(small, batch, align_corners=False)[:, 2:], literal[:, 2:], atol=1e-3)
    assert not torch.allclose(literally(small, batch, swapped=True)[:, 2:], literal[:, 2:], atol=1e-3)


@torch.no_grad()
def literally(net: Ranet, batch: Tensor, align_corners: bool = True, swapped: bool = False) -> Tensor:
    def sized(x: Tensor, like: Tensor) -> Tensor:
        return nn.functional.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=align_corners)

    found, below = [], []
    exits = iter(net.classifiers)
    for x, blocks in zip(net.base(batch), net.subnetworks, strict=True):
        here = []
        for number, block in enumerate(blocks):  # type: ignore[arg-type]
            tensors = [x]
            for place, layer in enumerate(block.layers):
                own = layer.own(x)
                parts = [x, own]
                if number < len(below):
                    parts = [sized(x, own), sized(layer.below(below[number][place]), own), own]
                    parts = [parts[1], parts[0], parts[2]] if swapped else parts
                x = torch.cat(parts, 1)
                tensors.append(x)
            if block.merge is not None:
                x = torch.cat([x, sized(block.merge(below[number][-1]), x)], 1)
            x = x if block.transition is None else block.transition(x)
            here.append(tensors)
            if number >= len(below):
                found.append(next(exits)(x))
        below = here
    return torch.stack(found, 1)


def test_features_stored_once_equal_features_stored_separately(small: Ranet) -> None:
    batch = images(3)
    with_gradients = small(batch).exits
    assert with_gradients.requires_grad
    torch.testing.assert_close(exits_of(small, batch), with_gradients.detach(), rtol=1e-6, atol=1e-6)


def test_logits_of_an_image_do_not_depend_on_the_other_images(small: Ranet) -> None:
    net, batch, order = copy.deepcopy(small).double(), images(8).double(), torch.randperm(8)
    whole = exits_of(net, batch)
    singles = torch.cat([exits_of(net, batch[n : n + 1]) for n in range(8)])
    torch.testing.assert_close(singles, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exits_of(net, batch[order]), whole[order], rtol=1e-9, atol=1e-9)


ONE_EXIT = {"scales": [1], "width_factors": [1], "first_blocks": 1}


def test_earlier_exits_learn_from_the_last_one_which_does_not_learn_from_them() -> None:
    torch.manual_seed(1)
    exits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    divergence = exit_divergence(exits, 2.0)
    last, earlier = (exits[:, -1] / 2).softmax(1), (exits[:, :-1] / 2).softmax(2)
    by_hand = 4 * (last[:, None] * (last[:, None] / earlier).log()).sum((1, 2)).mean()
    torch.testing.assert_close(divergence, by_hand)
    (gradient,) = torch.autograd.grad(divergence, exits)
    assert gradient[:, :-1].abs().min() > 0 and not gradient[:, -1].any()
    with fails(ConfigError, "exit_temperature"):
        validate(RanetConfig, {"exit_temperature": 2.0}, "family")
    with fails(ConfigError, "exit_distillation"):
        validate(RanetConfig, ONE_EXIT | {"exit_distillation": 1.0}, "family")


def test_the_loss_is_the_sum_over_exits() -> None:
    config = config_of(**SMALL)
    torch.manual_seed(1)
    found = loss(config, build(config, 10)(torch.randn(64, 3, 32, 32)), torch.arange(64) % 10)
    total = float(found.total.detach())
    assert sum(found.parts[f"ce/{k:02d}"] for k in range(1, 7)) == pytest.approx(total)
    assert found.parts["ce"] == found.parts["ce/06"]
    assert total == pytest.approx(6 * log(10), rel=0.2)


# ---- thresholds


def by_hand(confidences: list[list[float]], wanted: list[float]) -> list[float | None]:
    """The literal rule, image by image."""
    gone: set[int] = set()
    found: list[float | None] = []
    for k in range(len(wanted) - 1):
        want, seen, threshold = floor(len(confidences) * wanted[k] + 1e-6), 0, None
        for n in sorted(range(len(confidences)), key=lambda n: -confidences[n][k]):
            if n in gone:
                continue
            seen += 1
            if seen == want:
                threshold = confidences[n][k]
                break
        if threshold is not None:
            gone |= {n for n in range(len(confidences)) if confidences[n][k] >= threshold}
        found.append(threshold)
    return found


@pytest.mark.parametrize("levels", [3, 8, 10_000])
@pytest.mark.parametrize("seed", range(20))
def test_thresholds_are_those_of_the_literal_rule_with_ties(seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    confidences = (torch.randint(levels, (97, 5), generator=generator) + 1).float() / levels
    for q in (0.05, 0.5, 1.0, 1.95, 40.0):
        wanted = shares(log(q), 5)
        assert thresholds(confidences, wanted) == by_hand(confidences.tolist(), wanted)


def test_with_distinct_confidences_the_wanted_number_of_images_exits() -> None:
    confidences = torch.rand(1000, 4, generator=torch.Generator().manual_seed(3))
    wanted = shares(0.0, 4)
    found = [*thresholds(confidences, wanted), 0.0]
    assert simulated(confidences, found).bincount()[1:].tolist() == [250] * 4


def test_no_image_exits_if_the_share_is_below_one_image_or_above_the_remaining_ones() -> None:
    tied = torch.ones(10, 3)
    assert thresholds(tied, [0.05, 0.5, 0.45]) == [None, 1.0]
    assert thresholds(tied, [0.5, 0.3, 0.2]) == [1.0, None]
    assert thresholds(torch.rand(300, 3), [1 / 3] * 3)[0] is not None


def test_shares_are_geometric_and_the_cost_rises_with_q() -> None:
    costs = [8.0, 20.0, 30.0, 60.0]
    for q in (0.05, 1.0, 1.95):
        found = shares(log(q), 4)
        assert sum(found) == pytest.approx(1)
        assert all(b / a == pytest.approx(q) for a, b in pairwise(found))
    spent = [expected(log_q / 5, costs) for log_q in range(-40, 40)]
    assert spent == sorted(spent)
    for budget in (8.0, 8.001, 15.0, 29.5, 59.9, 60.0):
        assert expected(solve(budget, costs), costs) == pytest.approx(budget, rel=1e-9)
    for budget in (7.9, 60.1):
        with fails(ConfigError, "family.budgets", subject=f"{budget:g}"):
            solve(budget, costs)


# ---- leaving early


def simulated(confidences: Tensor, until: list[float | None]) -> Tensor:
    """The exit of each image, from 1, decided on all confidences [n, E] afterwards."""
    floors = torch.tensor([float("inf") if t is None else t for t in until])
    return (confidences >= floors).int().argmax(1) + 1


@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize("log_q", [-1.5, 0.0, 1.5])
def test_early_exit_equals_deciding_afterwards(small: Ranet, log_q: float, count: int) -> None:
    until, batch = fitted(small, log_q), images(count)
    exits = exits_of(small, batch)
    confidences = confidence(exits)
    with torch.no_grad():
        found = early_exit(small, batch, until, measure(small, batch))
    floors = torch.tensor([2.0 if t is None else t for t in until])
    near = ((confidences - floors).abs() < 1e-6).any(1)
    wanted = simulated(confidences, until)
    taken = found.facts["exit"]
    assert torch.equal(taken[~near], wanted[~near])
    torch.testing.assert_close(found.logits, exits[torch.arange(count), taken - 1], rtol=1e-5, atol=1e-5)
    assert count < 64 or len(taken.unique()) > 1


def test_facts_count_each_image_once(small: Ranet) -> None:
    with torch.no_grad():
        facts = early_exit(small, images(64), fitted(small, 0.0), measure(small, images(1))).facts
    assert torch.equal(facts["exits"].sum(1), torch.ones(64).long())
    assert torch.equal(facts["exits"].argmax(1) + 1, facts["exit"])
    owner = torch.tensor(small.config.subnetwork_of_exit)
    for number in range(len(small.subnetworks)):
        assert facts["subnetworks"][:, number].sum() == facts["exits"][:, owner == number].sum()


def rows_by_module(net: Ranet, until: list[float | None], batch: Tensor) -> tuple[Prediction, dict[str, int]]:
    seen: dict[str, int] = {}

    def record(name: str) -> object:
        return lambda module, inputs, output: seen.__setitem__(name, len(output))

    hooks = [
        module.register_forward_hook(record(name))  # type: ignore[arg-type]
        for name, module in net.named_modules()
        if (name.count(".") == 2 and name.startswith("sub")) or (name.count(".") == 1 and name.startswith("class"))
    ]
    costs = measure(net, batch)
    seen.clear()
    with torch.no_grad():
        found = early_exit(net, batch, until, costs)
    for hook in hooks:
        hook.remove()
    return found, seen


def test_extreme_thresholds_make_all_images_exit_first_or_last(small: Ranet) -> None:
    count = len(small.classifiers)
    first, seen = rows_by_module(small, [0.0] * count, images(6))
    assert set(seen) == {"subnetworks.0.0", "classifiers.0"}
    assert first.facts["exit"].tolist() == [1] * 6
    last, seen = rows_by_module(small, [None] * (count - 1) + [0.0], images(6))
    assert [name for name in seen if name.startswith("class")] == [f"classifiers.{count - 1}"]
    assert last.facts["exit"].tolist() == [count] * 6


def test_blocks_run_only_on_images_that_have_not_exited(small: Ranet) -> None:
    found, seen = rows_by_module(small, fitted(small, 0.0), images(64))
    taken = found.facts["exit"]
    exit_, place = 0, {}
    for s, plans in enumerate(small.config.plan):
        for number, plan in enumerate(plans):
            place[f"subnetworks.{s}.{number}"] = exit_
            exit_ += not plan.fused
    for name, after in place.items():
        under_way = int((taken > after).sum())
        assert under_way <= seen[name] <= (64 if after == 0 else batch_of(under_way)), name
    assert seen[f"subnetworks.{s}.{number}"] < 32


def test_batches_are_rounded_up_to_few_sizes() -> None:
    assert all(left <= batch_of(left) <= left * 4 / 3 + 1 for left in range(1, 2000))
    assert [batch_of(left) for left in (1, 2, 3)] == [1, 2, 3]
    assert all(batch_of(batch_of(left)) == batch_of(left) for left in range(1, 2000))


@pytest.mark.long
def test_i32_stores_a_third_of_the_memory_of_all_features() -> None:
    config = config_of(**PUBLISHED["I-32"][0])
    with FakeTensorMode():
        net = build(config, 2).eval()
        example = torch.empty(2, 3, 224, 224)
        held = most_held(net, example)
        stored = every_list(net, example)
    assert 3 * held <= stored


def most_held(net: Ranet, example: Tensor) -> int:
    """The most bytes held for later blocks at any exit."""
    with torch.no_grad():
        walk = Walk(net, example)
        most = 0
        for _ in net.classifiers:
            walk.to_next_exit()
            storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in walk.held()}
            most = max(most, sum(storages.values()))
    return most


def every_list(net: Ranet, example: Tensor) -> int:
    """The most bytes of the list tensors of one sub-network, all stored, that the next one reads."""
    most = 0
    for blocks, base in zip(net.config.plan[:-1], net.base(example), strict=False):
        side, total = base.shape[-1], 0
        for block in blocks:
            for number, width in enumerate(block.widths):
                side = -(-side // 2) if block.down and number == block.layers else side
                total += width * side * side * 4 * len(example)
        most = max(most, total)
    return most


# ---- policies


class Counted:
    """Held-out batches that count how often they were iterated."""

    def __init__(self, *batches: Tensor) -> None:
        self.batches, self.walks = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.walks += 1
        return iter([(batch, torch.zeros(len(batch)).long()) for batch in self.batches])


def test_the_first_policy_is_the_last_exit_and_needs_no_calibration(small: Ranet) -> None:
    found = policies(small.config, small)
    count = len(small.classifiers)
    exits = [f"exit-{count}", *(f"exit-{k}" for k in range(1, count))]
    assert [policy.name for policy in found] == [*exits, "anytime", "budget-0.5", "budget-0.8"]
    every = exits_of(small, images(3))
    for policy in found[: count + 1]:
        with torch.no_grad():
            prediction = policy.predict(small, images(3))
        number = int(prediction.facts["exit"][0])
        torch.testing.assert_close(prediction.logits, every[:, number - 1])
    assert not isinstance(found[0], Fitted)


def test_anytime_reports_the_macs_of_each_answer(small: Ranet) -> None:
    with torch.no_grad():
        found = Anytime().predict(small, images(3))
    costs = measure(small, images(1)).cumulative
    assert found.facts["exit_macs"].tolist() == [costs] * 3
    assert found.macs.tolist() == [costs[-1]] * 3
    assert found.facts["exit_agrees"][:, -1].all()


@pytest.mark.long
def test_budgets_share_one_pass_over_held_out_images_and_are_met(small: Ranet) -> None:
    held_out = Counted(images(100, seed=7), images(60, seed=8))
    budgets = policies(small.config, small)[-2:]
    done = [policy.calibrated(small, held_out) for policy in budgets]
    assert held_out.walks == 1
    full = measure(small, images(1)).cumulative[-1]
    for policy in done:
        assert isinstance(policy, MacsBudget)
        assert policy.state()["num_images"] == 160
        with torch.no_grad():
            spent = torch.cat([policy.predict(small, batch).macs for batch in held_out.batches])
        # a threshold is an image's own confidence, which may come out a rounding below it in another batch
        assert float(spent.mean()) == pytest.approx(policy.state()["expected_macs"], abs=2 * full / 160)
        assert 0.95 < float(spent.mean()) / full / policy.budget <= 1
    with torch.no_grad():
        small.classifiers[0].fc.bias.add_(0.0)  # type: ignore[union-attr]
    budgets[0].calibrated(small, held_out)
    assert held_out.walks == 2, "other weights, other confidences"


def test_thresholds_survive_json(small: Ranet) -> None:
    policy = policies(small.config, small)[-1]
    assert isinstance(policy, Fitted)
    assert policy.state() == {}
    done = policy.calibrated(small, Counted(images(64)))
    assert isinstance(done, Fitted)
    state = json.loads(json.dumps(done.state()))
    again = policy.restored(state)
    assert again == done
    assert isinstance(again, Fitted)
    assert again.state() == done.state()
    with fails(ConfigError, "calibration", subject=policy.name):
        policy.restored({"thresholds": [0.5, 0.5]})


def test_a_budget_without_thresholds_or_images_is_refused(small: Ranet) -> None:
    policy = policies(small.config, small)[-1]
    with fails(ConfigError, "data.held_out"):
        policy.predict(small, images(1))
    with fails(ConfigError, "data.held_out"):
        policy.calibrated(small, Counted())
    with fails(ConfigError, "family.budgets", subject="1000"):
        MacsBudget(1000.0, small.config.num_exits).calibrated(small, Counted(images(4)))


@pytest.mark.long
def test_thresholds_are_fitted_on_confidences_of_all_ranks(small: Ranet, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies(small.config, small)[-1]
    whole = policy.calibrated(small, Counted(images(40), images(24, seed=6)))
    theirs = (confidence(exits_of(small, images(24, seed=6))).numpy(), [24], (3, SIDE_PX, SIDE_PX))
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, theirs, (None, [], None)])
    assert policies(small.config, small)[-1].calibrated(small, Counted(images(40))) == whole


def test_confidence_is_fp32_under_autocast() -> None:
    logits = torch.randn(2000, 10) * 4
    with torch.autocast("cpu", torch.bfloat16):
        found = confidence(logits.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, logits.bfloat16().float().softmax(1).amax(1))
    assert len(found.unique()) > 1500


# ---- released weights


def released_names(net: Ranet) -> list[str]:
    """The names that the released code gives to the tensors of such a net, in its order."""
    there = {"subnetworks": "scale_flows", "classifiers": "classifier", "base": "FirstLayer.layers"}
    parts = {"below": "conv_up.net", "own": "conv_normal.net", "merge": "conv_last.net", "transition": "trans.net"}
    found = []
    for name in net.state_dict():
        top, *rest = name.split(".")
        words = [parts.get(word, word) for word in rest]
        if top == "classifiers":
            at = [w if w != "reduce" else "m" for w in words]
            words = [*at[:3], "net", *at[3:]] if at[1] == "m" else [at[0], "linear", *at[2:]]
        elif top == "base" and not (net.config.stem == "imagenet" and words[0] == "0"):
            words = [words[0], "net", *words[1:]]
        found.append(".".join([there[top], *words]))
    return found


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_released_weights_load_by_name_and_completely(stem: str) -> None:
    config = config_of(**SMALL, stem=stem)
    source, net = build(config, 3), build(config, 3)
    theirs = dict(zip(released_names(source), source.state_dict().values(), strict=True))
    assert "scale_flows.1.0.layers.0.conv_up.net.0.weight" in theirs
    assert "classifier.5.m.1.net.1.running_var" in theirs
    first = "0.0.bias" if stem == "imagenet" else "0.net.0.weight"
    assert f"FirstLayer.layers.{first}" in theirs
    assert load_pretrained(config, net, theirs) == Loaded([], [])
    loaded = net.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in source.state_dict().items())
    assert load_pretrained(config, net, source.state_dict()) == Loaded([], [])
    with fails(ConfigError, "weights", subject="odd.weight"):
        load_pretrained(config, net, {**theirs, "odd.weight": torch.zeros(1)})
    del theirs["classifier.0.linear.bias"]
    with fails(ConfigError, "weights", subject="classifiers.0.fc.bias"):
        load_pretrained(config, net, theirs)


def test_a_small_net_memorises_images_at_every_exit() -> None:
    torch.manual_seed(0)
    net = build(config_of(channels=4, growth=4, layers=2, depth="even"), 10)
    batch, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        output = net(batch)
        total = loss(net.config, output, labels).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert float(total.detach()) < 0.3
    assert (output.exits.argmax(2) == labels[:, None]).all()
