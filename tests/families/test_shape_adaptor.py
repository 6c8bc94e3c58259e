"""Tests of Shape Adaptor: published sizes, the plan as a pure function of alphas, their gradient, the frozen form."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from raised import fails
from torch import Tensor, nn
from torch.export import Dim, export
from torchvision.models.vgg import cfgs, make_layers

from pipeline import cost, recipes, run_config
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.families.shape_adaptor import FAMILY
from pipeline.families.shape_adaptor.bodies import (
    RESNET_STAGES,
    Adaptor,
    Bottleneck,
    Cells,
    InvertedResidual,
    PooledAdaptor,
    Route,
    halved,
    rounded,
)
from pipeline.families.shape_adaptor.inference import AtShape, Live, freeze
from pipeline.families.shape_adaptor.model import ShapeConfig, ShapeNet, build, first_alphas, places
from pipeline.families.shape_adaptor.objective import groups, loss, updates
from pipeline.families.shape_adaptor.shape import Rules, Shape, ShapePlan, Size, factor, initial_alpha, plan, weights
from pipeline.families.shape_adaptor.weights import load_pretrained
from pipeline.family import cross_entropy
from pipeline.training import optim, state, weights_file
from pipeline.training.config import TrainingConfig
from pipeline.training.optimizers.adamw import AdamWConfig
from pipeline.training.optimizers.sgd import SgdConfig
from pipeline.training.plan import TrainingPlan
from pipeline.training.step import Meter, MicroBatch, train_step
from pipeline.weights import Loaded

SIDE, CLASSES = 16, 5
NETS = ("vgg16", "vgg16_bn", "resnet50", "mobilenet_v2")
MODES = ("human", "sa", "autosc", "autotl")
ADAPTIVE = [(net, mode) for net in NETS[1:] for mode in MODES[1:]]
SOME = [("vgg16_bn", "sa"), ("resnet50", "autosc"), ("resnet50", "autotl"), ("mobilenet_v2", "sa")]


def small(net: str = "vgg16_bn", mode: str = "sa", **keys: Any) -> ShapeConfig:
    """A config of thin nets for images of 16 px."""
    target = {"target_px": 5} if mode == "sa" else {}
    return ShapeConfig(net=net, mode=mode, side_px=SIDE, width=0.125, **target, **keys)  # type: ignore[arg-type]


def opened(config: ShapeConfig, seed: int = 0) -> ShapeNet:
    torch.manual_seed(seed)
    return build(config, CLASSES)


def images(count: int = 4, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(5))


def alphas(net: ShapeNet) -> nn.Parameter:
    assert net.shape.alphas is not None
    return net.shape.alphas


def move(net: ShapeNet, *values: float) -> None:
    with torch.no_grad():
        alphas(net).copy_(torch.tensor(values))


def num_params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def warmed(net: ShapeNet) -> ShapeNet:
    """In eval mode, with running statistics that are not the initial ones."""
    with torch.no_grad():
        net.train()(images(16))
    return net.eval()


def for_factor(s: float) -> float:
    """The alpha of a factor s in (1/2, 1)."""
    return math.log((s - 0.5) / (1 - s))


# ---- factors, sides, limit: the paper's formulas and worked examples


def local(count: int, limit_px: int | None = None) -> Rules:
    return Rules((1.0,) * count, (False,) * count, "local", limit_px)


def test_the_factor_rises_from_a_half_to_one() -> None:
    found = [factor(x / 10) for x in range(-400, 401)]
    assert all(low <= high for low, high in pairwise(found))
    assert all(low < high for low, high in pairwise(found[100:700]))
    assert (factor(-1000), factor(0), factor(1000)) == (0.5, 0.75, 1.0)
    assert factor(2.19) == pytest.approx(0.9497, abs=5e-5)
    assert factor(-2.19) == pytest.approx(0.5503, abs=5e-5)


@pytest.mark.parametrize(
    ("side_px", "target_px", "count", "alpha", "s"),
    [
        (32, 8, 4, -0.34643, 0.70712),
        (224, 8, 6, -1.75200, 0.57390),
        (224, 15, 6, -0.97168, 0.63727),
        (224, 30, 6, -0.27940, 0.71530),
        (32, 2, 4, math.log(1e-4), 0.50005),  # halving everywhere leads exactly there
        (256, 2, 4, math.log(1e-4), 0.50005),  # and here it does not lead far enough down
    ],
)
def test_initial_alphas_are_the_published_ones(
    side_px: int, target_px: int, count: int, alpha: float, s: float
) -> None:
    found = initial_alpha(side_px, target_px, count)
    assert found == pytest.approx(alpha, abs=1e-5)
    assert factor(found) == pytest.approx(s, abs=1e-5)
    if side_px < target_px * 2**count:
        assert side_px * factor(found) ** count == pytest.approx(target_px, rel=1e-3)


@pytest.mark.parametrize(
    ("side_px", "target_px", "count", "rule", "sides"),
    [
        (32, 8, 4, "local", [22, 15, 10, 7]),
        (32, 8, 4, "global", [23, 16, 11, 8]),
        (224, 8, 6, "local", [128, 73, 41, 23, 13, 7]),
        (224, 15, 6, "local", [142, 90, 57, 36, 22, 14]),
        (224, 30, 6, "local", [160, 114, 81, 57, 40, 28]),
    ],
)
def test_sides_at_the_start_are_the_published_ones(
    side_px: int, target_px: int, count: int, rule: Any, sides: list[int]
) -> None:
    rules = Rules((1.0,) * count, (False,) * count, rule)
    found = plan([initial_alpha(side_px, target_px, count)] * count, (side_px, side_px), rules)
    assert list(found.sides_px) == sides


def test_rule_local_loses_a_pixel_at_each_adaptor_and_global_may_not() -> None:
    assert plan([15.0] * 4, (32, 32), local(4)).sides_px == (31, 30, 29, 28)
    assert plan([15.0] * 4, (32, 32), Rules((1.0,) * 4, (False,) * 4, "global")).sides_px == (32, 32, 32, 32)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        drawn = (torch.randn(6, generator=generator) * 3).tolist()
        sides = [64, *plan(drawn, (64, 64), local(6)).sides_px]
        assert all(after < before or after == before == 1 for before, after in pairwise(sides))
    assert plan([-50.0] * 9, (4, 4), local(9)).sides_px == (2, 1, 1, 1, 1, 1, 1, 1, 1)


def test_fixed_layers_shrink_the_running_length_and_global_rounds_half_to_even() -> None:
    rules = Rules((0.5, 0.25), (False, False), "global")
    assert plan([1000.0, 1000.0], (32, 32), rules).sides_px == (16, 4)
    rules = Rules((1.0, 1.0), (False, False), "global")
    assert plan([1000.0, -1000.0], (5, 5), rules).sides_px == (5, 2)  # 2.5
    assert plan([1000.0, -1000.0], (7, 7), rules).sides_px == (7, 4)  # 3.5


def test_a_nan_alpha_gives_the_smallest_shape_and_a_nan_loss() -> None:
    net = opened(small())
    move(net, math.nan, 0, 0)
    assert net.plan((SIDE, SIDE)).sides_px[0] == SIDE // 2
    assert net(images()).logits.isnan().all()


@pytest.mark.parametrize("s", [0.55, 0.65, 0.75, 0.85, 0.95])
@pytest.mark.parametrize("limit_px", [1, 3, 9, 15, 30, 100])
def test_the_limit_acts_only_if_the_last_side_exceeds_it(s: float, limit_px: int) -> None:
    drawn = [for_factor(s)] * 6
    free, bounded = plan(drawn, (224, 224), local(6)), plan(drawn, (224, 224), local(6, limit_px))
    if 224 * s**6 < limit_px:
        assert bounded == free
        assert bounded.penalty == 1
    else:
        assert 224 * (bounded.penalty * s) ** 6 == pytest.approx(limit_px, rel=1e-9)
        assert bounded.sides_px[-1] <= limit_px


def test_the_limit_does_not_bound_earlier_sides() -> None:
    half, whole = for_factor(0.5 + 1e-12), for_factor(1 - 1e-12)
    front, back = [whole] * 5 + [half], [half] + [whole] * 5
    assert plan([for_factor(0.8)] * 6, (224, 224), local(6, 15)).sides_px == (142, 90, 57, 36, 22, 14)
    assert plan(front, (224, 224), local(6, 15)).sides_px == (160, 114, 81, 57, 40, 14)
    assert plan(back, (224, 224), local(6, 15)).sides_px == (80, 57, 40, 28, 20, 14)
    assert plan([for_factor(0.91)] * 4, (32, 32), local(4)).sides_px == (29, 26, 23, 20)
    assert plan([for_factor(0.91)] * 4, (32, 32), local(4, 9)).sides_px == (23, 16, 11, 8)


def test_the_penalty_is_continuous_where_the_limit_begins_to_act() -> None:
    edge = (15 / 224) ** (1 / 6)
    for step in (1e-6, 1e-9):
        below, above = (plan([for_factor(edge + d)] * 6, (224, 224), local(6, 15)).penalty for d in (-step, step))
        assert below == 1
        assert 1 - 2 * step / edge < above < 1


@pytest.mark.parametrize(("s", "b"), [(0.5, -0.285), (0.6, -0.142)])
def test_weights_sum_to_one_or_two_and_may_be_negative_under_a_limit(s: float, b: float) -> None:
    drawn = torch.tensor([for_factor(s + 1e-12)] * 2, dtype=torch.float64)
    found = weights(drawn, 0.715, torch.tensor([1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(found[0], torch.tensor([1 - b, b], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found[1], 2 * found[0])
    torch.testing.assert_close(0.5 + 0.5 * found[0, 1].item(), 0.715 * s, atol=1e-9, rtol=0)


# ---- the adaptor


def interpolation(length: int, wanted: int) -> Tensor:
    """The matrix [wanted, length] of linear interpolation between corner pixels, written out."""
    matrix = torch.zeros(wanted, length, dtype=torch.float64)
    for row in range(wanted):
        at = 0.0 if wanted == 1 else row * (length - 1) / (wanted - 1)
        left = min(int(at), length - 1)
        right = min(left + 1, length - 1)
        matrix[row, left] += 1 - (at - left)
        matrix[row, right] += at - left
    return matrix


def resize(x: Tensor, size: Size) -> Tensor:
    return interpolation(x.shape[2], size[0]) @ x @ interpolation(x.shape[3], size[1]).T


@pytest.mark.parametrize("height,width", [(16, 16), (7, 15), (9, 5), (1, 6), (1, 1)])
@pytest.mark.parametrize("rule", ["local", "global"])
@pytest.mark.parametrize("limit_px", [None, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_an_adaptor_computes_the_papers_formula(
    height: int, width: int, rule: Any, limit_px: int | None, residual: bool
) -> None:
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    smaller = torch.randn(2, 4, -(-height // 2), -(-width // 2), dtype=torch.float64)
    for alpha in (-3.0, -0.4, 0.0, 1.7):
        shape = Shape([alpha], Rules((1.0,), (residual,), rule, limit_px)).double()
        s = 0.5 + 0.5 / (1 + math.exp(-alpha))
        limited = limit_px is not None and max(height, width) * s >= limit_px
        p = (limit_px or 0) / (max(height, width) * s) if limited else 1.0
        drawn = shape.plan((height, width))
        sides = [max(1, int(c * p * s) if rule == "local" else round(c * p * s)) for c in (height, width)]
        if not limited:  # there the side is the limit to the last bit, which truncation takes for either number
            assert drawn.sizes == (tuple(sides),)
        b = p / (1 + math.exp(-alpha)) + (p - 1)
        total = 2 if residual else 1
        small, large = resize(smaller, drawn.sizes[0]), resize(x, drawn.sizes[0])
        found = Adaptor(0)(smaller, x, Cells(drawn.sizes, shape.weights(drawn.penalty)))
        expected = total * (1 - b) * small + total * b * large
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # alpha is held in fp32


def test_at_alpha_0_a_residual_cell_is_the_sum_and_a_plain_one_the_mean_of_its_branches() -> None:
    smaller, larger = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    for residual in (True, False):
        shape = Shape([0.0], Rules((1.0,), (residual,)))
        drawn = shape.plan((16, 16))
        found = Adaptor(0)(smaller, larger, Cells(drawn.sizes, shape.weights(1.0)))
        both = resize(smaller.double(), (12, 12)) + resize(larger.double(), (12, 12))
        torch.testing.assert_close(found.double(), both if residual else both / 2, rtol=1e-6, atol=1e-6)


def test_one_branch_remains_at_either_extreme_of_alpha() -> None:
    smaller, larger = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 8, 8)
    for alpha, left in ((-200.0, resize(smaller.double(), (5, 5))), (200.0, resize(larger.double(), (5, 5)))):
        found = Adaptor(0)(smaller, larger, Cells(((5, 5),), weights(torch.tensor([alpha]), 1.0, torch.ones(1))))
        torch.testing.assert_close(found.double(), left, rtol=1e-6, atol=1e-6)


def test_resizing_to_the_same_size_is_the_identity_and_to_one_pixel_takes_the_corner() -> None:
    x = torch.rand(1, 2, 6, 6)
    one = Cells(((6, 6),), torch.tensor([[0.0, 1.0]]))
    assert torch.equal(Adaptor(0)(x, x, one), x)
    corner = Adaptor(0)(x, x, Cells(((1, 1),), torch.tensor([[0.0, 1.0]])))
    assert torch.equal(corner, x[:, :, :1, :1])


@pytest.mark.parametrize(("ceil", "sides"), [(False, (3, 7)), (True, (4, 8))])
def test_pooling_rounds_odd_sides_down_or_up_and_keeps_single_pixels(ceil: bool, sides: Size) -> None:
    assert halved(torch.rand(1, 1, 7, 15), ceil).shape[2:] == sides
    assert halved(torch.rand(1, 1, 1, 15), ceil).shape[2:] == (1, sides[1])
    x = torch.rand(2, 3, 1, 1)
    assert torch.equal(halved(x, ceil), x)


def test_a_pooled_adaptor_of_a_single_pixel_is_the_identity() -> None:
    x = torch.rand(2, 3, 1, 1)
    shape = Shape([0.3], Rules((1.0,), (False,)))
    drawn = shape.plan((1, 1))
    torch.testing.assert_close(PooledAdaptor(0, False)(x, Cells(drawn.sizes, shape.weights(1.0))), x)


def test_gradients_of_an_adaptor_pass_gradcheck() -> None:
    smaller = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    larger = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(1, dtype=torch.float64, requires_grad=True)
    total = torch.full((1,), 2.0, dtype=torch.float64)
    cell = Adaptor(0)
    assert torch.autograd.gradcheck(
        lambda *x: cell(x[0], x[1], Cells(((5, 5),), weights(x[2], 0.9, total))), (smaller, larger, alpha)
    )


@pytest.mark.parametrize("limit_px", [None, 1])
@pytest.mark.parametrize(("net", "mode"), ADAPTIVE)
def test_the_gradient_of_alpha_is_the_closed_form(net: str, mode: str, limit_px: int | None) -> None:
    model = opened(small(net, mode, limit_px=limit_px)).double().train()
    seen: dict[int, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, Tensor, Cells], y: Tensor) -> None:
        assert isinstance(module, Adaptor)
        smaller, larger, cells = inputs
        size = cells.sizes[module.number]
        difference = (resize(larger, size) - resize(smaller, size)).detach()
        y.register_hook(lambda gradient: seen.update({module.number: (gradient * difference).sum()}))

    for module in model.modules():
        if isinstance(module, Adaptor):
            module.register_forward_hook(watch)
    output = model(images(8).double())
    assert (output.plan.penalty < 1) == (limit_px is not None)
    cross_entropy(output.logits.double(), torch.arange(8) % CLASSES).backward()
    sigmoid = alphas(model).detach().sigmoid()
    total = model.shape.get_buffer("total")
    inner = torch.stack([seen[number] for number in range(len(sigmoid))])
    expected = total * output.plan.penalty * sigmoid * (1 - sigmoid) * inner
    assert expected.abs().min() > 0
    torch.testing.assert_close(alphas(model).grad, expected, rtol=1e-6, atol=1e-10)  # logits' loss is in fp32


def test_alpha_has_no_gradient_if_both_branches_are_equal() -> None:
    shape = Shape([0.2], Rules((1.0,), (True,)))
    same = torch.ones(1, 2, 8, 8)
    Adaptor(0)(same[:, :, :4, :4], same, Cells(((6, 6),), shape.weights(1.0))).square().sum().backward()
    assert shape.alphas is not None and shape.alphas.grad is not None
    assert shape.alphas.grad.abs().max() < 1e-5


# ---- where adaptors are placed


@pytest.mark.parametrize(
    ("net", "mode", "side_px", "at"),
    [
        ("vgg16_bn", "sa", 32, (0, 3, 6, 9)),
        ("vgg16_bn", "sa", 224, (0, 2, 4, 6, 8, 10)),
        ("vgg16_bn", "autosc", 32, (0, 7)),
        ("vgg16_bn", "autosc", 224, (0, 4, 7, 10)),
        ("resnet50", "sa", 32, (0, 4, 8, 12)),  # stem, layer2.0, layer3.0, layer3.4
        ("resnet50", "sa", 224, (0, 2, 5, 8, 10, 13)),  # stem, 1.1, 2.1, 3.0, 3.2, 3.5
        ("resnet50", "autosc", 32, (2, 10)),  # layer1.1, layer3.2
        ("resnet50", "autosc", 224, (2, 6, 10, 13)),  # 1.1, 2.2, 3.2, 3.5
        ("resnet50", "autotl", 224, (0, 0, 4, 8, 14)),  # stem twice, 2.0, 3.0, 4.0
        ("mobilenet_v2", "sa", 32, (0, 4, 9, 13)),
        ("mobilenet_v2", "sa", 224, (0, 3, 6, 9, 12, 15)),
        ("mobilenet_v2", "autosc", 32, (2, 8, 12)),
        ("mobilenet_v2", "autosc", 224, (3, 8, 11, 15)),
        ("mobilenet_v2", "autotl", 224, (0, 2, 4, 7, 14)),
        ("vgg16", "autotl", 224, (1, 3, 6, 9, 12)),
    ],
)
def test_adaptors_have_the_places_of_the_paper(net: Any, mode: Any, side_px: int, at: tuple[int, ...]) -> None:
    assert places(ShapeConfig(net=net, mode=mode, side_px=side_px)) == at


@pytest.mark.parametrize(("side_px", "count"), [(32, 4), (64, 5), (224, 6), (256, 7), (16, 3)])
def test_the_number_of_adaptors_follows_the_input_side(side_px: int, count: int) -> None:
    assert ShapeConfig(side_px=side_px).num_adaptors == count
    assert ShapeConfig(side_px=side_px, target_px=9).num_adaptors == count


@pytest.mark.parametrize(("net", "mode"), list(product(NETS, ("sa", "autosc"))))
def test_adaptors_have_distinct_places_and_none_is_the_last_layer(net: Any, mode: Any) -> None:
    last = {"resnet50": 16, "mobilenet_v2": 18}.get(net, 12)
    most = ShapeConfig(net=net, mode=mode).most_adaptors
    for count in range(1, most + 1):
        found = places(ShapeConfig(net=net, mode=mode, adaptors=count))
        assert len(set(found)) == count
        assert sorted(found) == list(found)
        assert found[-1] < last
    with fails(ConfigError, "adaptors"):
        validate(ShapeConfig, {"name": "shape_adaptor", "net": net, "mode": mode, "adaptors": most + 1}, "family")


def test_first_alphas_are_those_of_the_mode() -> None:
    assert first_alphas(ShapeConfig(mode="autosc")) == (2.19,) * 4
    assert first_alphas(ShapeConfig(mode="autotl")) == (-2.19,) * 5
    assert first_alphas(ShapeConfig(mode="human")) == ()
    assert first_alphas(ShapeConfig(side_px=32)) == (initial_alpha(32, 8, 4),) * 4


def test_a_net_may_have_given_initial_factors_and_keep_them() -> None:
    factors = (0.55, 0.7, 0.9, 0.98)
    config = ShapeConfig(net="vgg16_bn", side_px=32, width=0.125, factors=factors, alpha_every=None)
    assert [factor(alpha) for alpha in first_alphas(config)] == pytest.approx(list(factors))
    assert opened(config).plan((32, 32)).sides_px == (17, 11, 9, 8)  # 17.6, 11.9, 9.9, 8.82, each truncated
    assert {tuple(updates(config, step)) for step in range(50)} == {("main",)}


# ---- published sizes: Liu et al., ECCV 2020, and the code released with it


def on_meta(config: ShapeConfig, num_classes: int) -> ShapeNet:
    """The net without its numbers: shapes only."""
    with torch.device("meta"):
        return build(config, num_classes)


def measured(net: ShapeNet, side_px: int) -> tuple[float, float]:
    """MACs of an image in millions: of convolutions and linear layers, and as thop 0.1.1 counts, with 4 operations
    for each value that a BatchNorm gives."""
    normed: list[int] = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, y: normed.append(y.numel()))
    with torch.device("meta"):
        macs = cost.measure(net, torch.empty(1, 3, side_px, side_px)).macs
    return macs / 1e6, (macs + 4 * sum(normed)) / 1e6


TABLE = [  # net, side, mode, parameters, alphas, thop's MMACs, MMACs, sides, MiB of an image saved for backward
    ("vgg16_bn", 32, "human", 14_774_436, 0, "314.4", "313.2", (), 2.5),
    ("vgg16_bn", 32, "sa", 14_774_440, 4, "1398", "1395", (22, 15, 10, 7), 6.5),
    ("vgg16_bn", 32, "autosc", 14_774_438, 2, "302.9", "301.8", (30, 4), 3.2),
    ("vgg16_bn", 224, "human", 15_236_136, 0, "15400", "15350", (), 121.4),
    ("vgg16_bn", 224, "sa", 15_236_142, 6, "9180", "9140", (128, 73, 41, 23, 13, 7), 118.7),
    ("vgg16_bn", 224, "autosc", 15_236_140, 4, "12700", "12650", (213, 51, 24, 11), 163.0),
    ("resnet50", 32, "human", 23_705_252, 0, "1312", "1298", (), 24.4),
    ("resnet50", 32, "sa", 24_755_880, 4, "1955", "1941", (22, 15, 10, 7), 25.8),
    ("resnet50", 32, "autosc", 24_821_926, 2, "1233", "1220", (30, 7), 24.8),
    ("resnet50", 224, "human", 25_557_032, 0, "4134", "4089", (), 82.0),
    ("resnet50", 224, "sa", 27_987_502, 6, "12990", "12810", (128, 73, 41, 23, 13, 7), 313.0),
    ("resnet50", 224, "autosc", 27_987_500, 4, "3677", "3635", (53, 25, 12, 11), 85.2),
    ("resnet50", 224, "autotl", 25_557_037, 5, "9838", "9743", (123, 67, 36, 19, 10), 191.7),
    ("mobilenet_v2", 32, "human", 2_351_972, 0, "94.65", "88.09", (), 18.3),
    ("mobilenet_v2", 32, "sa", 2_351_976, 4, "171.1", "163.1", (22, 15, 10, 7), 22.4),
    ("mobilenet_v2", 32, "autosc", 2_351_975, 3, "84.40", "78.55", (30, 7, 7), 16.7),
    ("mobilenet_v2", 224, "human", 3_504_872, 0, "327.5", "300.8", (), 74.7),
    ("mobilenet_v2", 224, "sa", 3_504_878, 6, "1053", "960.0", (128, 73, 41, 23, 13, 7), 272.7),
    ("mobilenet_v2", 224, "autosc", 3_504_876, 4, "281.9", "257.0", (53, 13, 12, 6), 71.0),
]


def as_printed(value: float, printed: str) -> bool:
    """Whether `value` is `printed` to the table's digits: four, or three before zeros of whole thousands."""
    digits = len(printed.replace(".", "").rstrip("0")) if "." not in printed else len(printed.replace(".", ""))
    return float(f"{value:.{digits}g}") == float(printed) or float(f"{value:.4g}") == float(printed)


@pytest.mark.parametrize(
    ("net", "side_px", "mode", "params", "count", "thop", "macs", "sides"), [row[:-1] for row in TABLE]
)
def test_parameters_macs_and_sides_are_the_published_ones(
    net: Any, side_px: int, mode: Any, params: int, count: int, thop: str, macs: str, sides: tuple[int, ...]
) -> None:
    model = on_meta(ShapeConfig(net=net, mode=mode, side_px=side_px), 100 if side_px == 32 else 1000)
    assert num_params(model) == params
    assert model.shape.alphas is None if count == 0 else len(alphas(model)) == count
    assert model.plan((side_px, side_px)).sides_px == sides
    found = measured(model, side_px)
    assert as_printed(found[0], macs), found
    assert as_printed(found[1], thop), found


@pytest.mark.long
@pytest.mark.parametrize(("net", "side_px", "mode", "mib"), [(*row[:3], row[-1]) for row in TABLE])
def test_what_training_saves_for_the_backward_pass_is_what_the_released_code_saves(
    net: Any, side_px: int, mode: Any, mib: float
) -> None:
    model = on_meta(ShapeConfig(net=net, mode=mode, side_px=side_px), 100 if side_px == 32 else 1000).train()
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    kept = []  # alive, so that no address comes twice

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.append(tensor)
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(torch.empty(2, 3, side_px, side_px, device="meta"))
    assert sum(saved.values()) / 2 / 2**20 == pytest.approx(mib, abs=0.06)


@pytest.mark.parametrize(
    ("net", "target_px", "thop", "macs"),
    [
        ("vgg16_bn", 15, "17580", None),
        ("vgg16_bn", 30, "39240", None),
        ("resnet50", 15, "23700", "23400"),
        ("resnet50", 30, "51900", "51400"),
        ("mobilenet_v2", 15, "2000", "1850"),
        ("mobilenet_v2", 30, "4600", "4330"),
    ],
)
def test_macs_of_larger_targets_are_the_published_ones(net: Any, target_px: int, thop: str, macs: str | None) -> None:
    found = measured(on_meta(ShapeConfig(net=net, target_px=target_px), 1000), 224)
    assert found[1] == pytest.approx(float(thop), rel=3e-3)
    assert macs is None or found[0] == pytest.approx(float(macs), rel=3e-3)


@pytest.mark.parametrize(
    ("width", "params", "human", "autosc"),
    [
        (0.75, 2.636, ("232.5", "209.1"), ("204.6", "182.6")),
        (0.85, 2.970, ("280.0", "254.2"), ("245.3", "221.1")),
        (1.1, 4.074, ("365.4", "337.9"), ("311.7", "286.2")),
    ],
)
def test_mobilenets_of_other_widths_are_the_published_ones(
    width: float, params: float, human: tuple[str, str], autosc: tuple[str, str]
) -> None:
    for mode, (thop, macs) in (("human", human), ("autosc", autosc)):
        net = on_meta(ShapeConfig(net="mobilenet_v2", mode=mode, width=width), 1000)
        assert num_params(net) / 1e6 == pytest.approx(params, abs=6e-4)
        found = measured(net, 224)
        assert as_printed(found[0], macs), found
        assert as_printed(found[1], thop), found


def runs(*pairs: tuple[int, int]) -> list[int]:
    return [side for side, count in pairs for _ in range(count)]


BLOCK_SIDES = [
    ("vgg16_bn", 32, "human", runs((32, 2), (16, 2), (8, 3), (4, 3), (2, 3))),
    ("vgg16_bn", 32, "sa", runs((32, 1), (22, 3), (15, 3), (10, 3), (7, 3))),
    ("vgg16_bn", 32, "autosc", [32, 30, 15, 15, 8, 8, 8, 4, 4, 4, 2, 2, 2]),
    ("vgg16_bn", 224, "human", runs((224, 2), (112, 2), (56, 3), (28, 3), (14, 3), (7, 1))),
    ("vgg16_bn", 224, "sa", runs((224, 1), (128, 2), (73, 2), (41, 2), (23, 2), (13, 2), (7, 3))),
    ("vgg16_bn", 224, "autosc", [224, 213, 107, 107, 54, 51, 51, 26, 24, 24, 12, 11, 11, 6]),
    ("resnet50", 32, "human", runs((32, 5), (16, 4), (8, 6), (4, 2))),
    ("resnet50", 32, "sa", runs((32, 1), (22, 4), (15, 4), (10, 4), (7, 4))),
    ("resnet50", 32, "autosc", runs((32, 3), (30, 2), (15, 4), (8, 2), (7, 4), (4, 2))),
    ("resnet50", 224, "human", runs((224, 1), (112, 1), (56, 4), (28, 4), (14, 6), (7, 2))),
    ("resnet50", 224, "sa", runs((224, 1), (128, 2), (73, 3), (41, 3), (23, 2), (13, 3), (7, 3))),
    ("resnet50", 224, "autosc", [224, 112, 56, 56, 53, 53, 27, 27, 25, 25, 13, 13, 12, 12, 12, 11, 6, 6]),
    ("resnet50", 224, "autotl", runs((224, 1), (123, 1), (67, 4), (36, 4), (19, 6), (10, 2))),
    ("mobilenet_v2", 32, "human", runs((32, 5), (16, 3), (8, 7), (4, 4))),
    ("mobilenet_v2", 32, "sa", runs((32, 1), (22, 4), (15, 5), (10, 4), (7, 5))),
    ("mobilenet_v2", 32, "autosc", runs((32, 3), (30, 2), (15, 3), (8, 1), (7, 6), (4, 4))),
    ("mobilenet_v2", 224, "human", runs((224, 1), (112, 2), (56, 2), (28, 3), (14, 7), (7, 4))),
    ("mobilenet_v2", 224, "sa", runs((224, 1), (128, 3), (73, 3), (41, 3), (23, 3), (13, 3), (7, 3))),
    (
        "mobilenet_v2",
        224,
        "autosc",
        runs((224, 1), (112, 2), (56, 1), (53, 1), (27, 3), (14, 1), (13, 3), (12, 3), (6, 4)),
    ),
]


@pytest.mark.parametrize(("net", "side_px", "mode", "sides"), BLOCK_SIDES)
def test_the_side_before_each_block_is_the_published_one(net: Any, side_px: int, mode: Any, sides: list[int]) -> None:
    model = on_meta(ShapeConfig(net=net, mode=mode, side_px=side_px), 10)
    found: list[int] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0].shape[-1])

    for module in blocks(model):
        module.register_forward_pre_hook(note)
    means: list[int] = []
    if net == "vgg16_bn" and side_px == 224:  # there the list ends with the side before the average
        model.body.classifier.register_forward_pre_hook(lambda *_: means.append(0))
    with torch.device("meta"):
        output = model.eval()(torch.empty(1, 3, side_px, side_px))
    assert output.logits.shape == (1, 10)
    assert found == sides[: len(found)]
    assert len(sides) - len(found) == len(means)


def blocks(net: ShapeNet) -> Iterator[nn.Module]:
    body = net.body
    if hasattr(body, "convs"):
        yield from body.convs
    elif hasattr(body, "features"):
        yield from body.features
    else:
        yield body.conv1
        yield from list(body.stem)[1:]
        if isinstance(body.maxpool, nn.MaxPool2d):
            yield body.maxpool
        yield from (module for module in body.modules() if isinstance(module, Bottleneck))


@pytest.mark.parametrize(
    ("net", "side_px", "classes", "gmacs"),
    [
        ("vgg16_bn", 32, 100, {0.57: 0.41, 0.65: 0.91, 0.75: 2.20, 0.8: 3.28, 0.85: 4.41, 0.9: 6.54, 0.999: 12.09}),
        ("resnet50", 32, 100, {0.8: 4.61, 0.9: 9.69, 0.999: 18.8}),
        ("mobilenet_v2", 32, 100, {0.8: 0.406, 0.999: 1.76}),
        ("resnet50", 224, 1000, {0.574: 12.8, 0.64: 24.2, 0.8: 131}),
        ("mobilenet_v2", 224, 1000, {0.574: 0.96, 0.9: 36.2}),
        ("vgg16_bn", 224, 1000, {0.574: 9.1, 0.64: 18.2, 0.715: 39.2}),
    ],
)
def test_macs_of_uniform_factors_are_the_published_ones(
    net: Any, side_px: int, classes: int, gmacs: dict[float, float]
) -> None:
    model = on_meta(ShapeConfig(net=net, side_px=side_px), classes)
    count = len(alphas(model))
    for s, expected in gmacs.items():
        drawn = plan([for_factor(s)] * count, (side_px, side_px), local(count))
        assert model.costs.macs((side_px, side_px), drawn.sizes) / 1e9 == pytest.approx(expected, rel=6e-3), s


def test_lost_residuals_are_the_published_ones() -> None:
    def lost(mode: Any, side_px: int, **keys: Any) -> list[int]:
        widths = on_meta(ShapeConfig(net="mobilenet_v2", mode="human", side_px=side_px), 10).body.features
        kept = on_meta(ShapeConfig(net="mobilenet_v2", mode=mode, side_px=side_px, **keys), 10).body.features
        pairs = zip(widths, kept, strict=True)
        return [
            number
            for number, (human, ours) in enumerate(pairs)
            if isinstance(human, InvertedResidual) and human.residual and not ours.residual
        ]

    assert lost("sa", 32) == [9, 13]
    assert lost("sa", 224) == [3, 6, 9, 12, 15]
    assert lost("autosc", 32) == [8, 12]
    assert lost("autosc", 224) == [3, 8, 15]
    assert lost("sa", 224, keep_residual=True) == []


def test_channels_are_rounded_to_multiples_of_eight() -> None:
    assert [rounded(c) for c in (1, 8, 11.9, 12, 18, 24, 64, 1408)] == [8, 8, 16, 16, 24, 24, 64, 1408]


# ---- the plan of a net: once per update of its alphas, and its own


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor whose values Python reads from now on."""
    found: list[Tensor] = []
    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, real=real, **k: (found.append(self), real(self, *a, **k))[1])
    return found


@pytest.mark.parametrize(("net", "mode"), SOME)
def test_a_forward_reads_the_alphas_only_after_they_changed(
    net: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = opened(small(net, mode)), small(net, mode)
    found = reads(monkeypatch)

    def step() -> int:
        found.clear()
        loss(config, model(images()), torch.arange(4)).total.backward()
        return len(found)

    assert [step(), step()] == [0, 0]  # the initial ones are known
    with torch.no_grad():
        alphas(model).add_(0.1)
    assert [step(), step(), step()] == [1, 0, 0]
    with torch.no_grad():
        model.eval()(images(4, 12, 20))
    assert found == []  # another size needs no other reading
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert [step(), step()] == [1, 0]


def test_forward_and_loss_read_no_tensor() -> None:
    for net, mode in SOME:
        config = small(net, mode, limit_px=4)
        model = on_meta(config, CLASSES)
        with torch.device("meta"):
            found = loss(config, model(torch.empty(4, 3, SIDE, SIDE)), torch.zeros(4, dtype=torch.long))
        found.total.backward()
        assert alphas(model).grad is not None


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_plan_follows_each_step_of_the_pipelines_optimizers(kind: Any) -> None:
    config = small(adaptors=2)
    net = opened(config)
    settings = TrainingConfig(other_optimizers={"shape": {"sgd": SgdConfig, "adamw": AdamWConfig}[kind](lr=0.4)})
    optimizer = optim.build(groups(config, net), net, settings)["shape"]
    plans = {net.plan((SIDE, SIDE))}
    for _ in range(4):
        alphas(net).grad = torch.tensor([-2.0, 2.0])
        optimizer.step()
        plans.add(net.plan((SIDE, SIDE)))
        assert net.plan((SIDE, SIDE)) == plan(alphas(net).tolist(), (SIDE, SIDE), net.shape.rules)
    assert len(plans) > 2


def test_the_plan_follows_a_state_that_is_loaded_a_copy_and_an_average() -> None:
    net, other = opened(small()), opened(small())
    move(other, 2.0, -2.0, 1.0)
    expected = plan(alphas(other).tolist(), (SIDE, SIDE), other.shape.rules)
    net.load_state_dict(other.state_dict())
    assert net.plan((SIDE, SIDE)) == expected
    net.load_state_dict(opened(small()).state_dict(), assign=True)
    assert net.plan((SIDE, SIDE)) == opened(small()).plan((SIDE, SIDE)) != expected
    state.update_ema(net, other, 0.0, 0)
    assert net.plan((SIDE, SIDE)) == expected
    fresh = opened(small())
    fresh.shape.alphas = nn.Parameter(alphas(other).detach().clone())  # another tensor, of the same version
    assert fresh.plan((SIDE, SIDE)) == expected


def test_a_copy_is_independent() -> None:
    net = opened(small())
    for _ in range(3):  # versions that a copy, which counts from 0 again, reaches later
        move(net, 0.0, 0.0, 0.0)
    first = net.plan((SIDE, SIDE))
    for times in range(6):
        twin = copy.deepcopy(net)
        for _ in range(times):
            move(twin, 3.0, 3.0, 3.0)
        assert (twin.plan((SIDE, SIDE)) == first) == (times == 0)
        assert net.plan((SIDE, SIDE)) == first
    assert torch.equal(twin(images()).alphas, torch.full((3,), 3.0))


def test_the_alphas_of_a_net_made_in_inference_mode_are_read_at_each_forward() -> None:
    with torch.inference_mode():
        net = opened(small()).eval()
        first = net.plan((SIDE, SIDE))
        alphas(net).add_(3.0)
        assert net.plan((SIDE, SIDE)) != first


def test_nets_in_one_process_do_not_affect_each_other() -> None:
    makers = [small(), small(rule="global"), small(limit_px=3), small("resnet50", "autosc"), small("mobilenet_v2")]
    with torch.no_grad():
        alone = [warmed(opened(config))(images()) for config in makers]
        nets = [warmed(opened(config)) for config in makers]
        for _ in range(2):
            for net, expected in zip(nets, alone, strict=True):
                found = net(images())
                assert found.plan == expected.plan
                assert torch.equal(found.logits, expected.logits)
    assert len({output.plan for output in alone[:3]}) == 3


# ---- sizes of images


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", MODES)
def test_images_of_one_pixel_odd_sides_and_any_aspect_run(net: str, mode: str) -> None:
    model = opened(small(net, mode)).eval()
    with torch.no_grad():
        for height, width in ((1, 1), (1, 5), (7, 15), (15, 7), (24, 16)):
            found = model(images(2, height, width))
            assert found.logits.isfinite().all()
            if mode != "human":
                turned = model.plan((width, height))
                assert tuple(size[::-1] for size in found.plan.sizes) == turned.sizes


@pytest.mark.parametrize("adaptors", [5, 6, 8, 12])
def test_more_halvings_than_the_image_has_pixels_run(adaptors: int) -> None:
    net = opened(small(adaptors=adaptors))
    with torch.no_grad():
        alphas(net).fill_(-20.0)
        found = net.eval()(images())
    assert found.logits.isfinite().all()
    assert found.plan.sides_px[4:] == (1,) * (adaptors - 4)


def test_the_aspect_of_an_image_is_kept() -> None:
    net = opened(ShapeConfig(net="vgg16_bn", side_px=32, width=0.125))
    assert net.plan((32, 32)).sizes == ((22, 22), (15, 15), (10, 10), (7, 7))
    assert net.plan((64, 32)).sizes == ((45, 22), (31, 15), (21, 10), (14, 7))
    assert net.plan((16, 16)).sizes == ((11, 11), (7, 7), (4, 4), (2, 2))  # not enlarged to the declared side


# ---- precision and layout


@pytest.mark.parametrize("net", NETS[1:])
def test_alphas_and_blend_keep_fp32(net: str) -> None:
    model = warmed(opened(small(net, limit_px=4)))
    move(model, 0.1234567, -0.7654321, 1.1111111)
    whole = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images())
        assert model.cells(mixed.plan).weights.dtype == torch.float32
        loss(small(net), mixed, torch.arange(4)).total.backward()
    assert mixed.plan == whole.plan
    assert alphas(model).grad is not None and alphas(model).grad.dtype == torch.float32
    torch.testing.assert_close(mixed.logits.float(), whole.logits, rtol=0.1, atol=0.1)
    before = alphas(model).detach().clone()
    for cast in (model.bfloat16(), model.half(), model.to(torch.bfloat16)):
        assert alphas(cast).dtype == torch.float32
        assert torch.equal(alphas(cast).detach(), before)
        assert cast.body.classifier.weight.dtype != torch.float32 if net != "resnet50" else True
        assert cast.plan((SIDE, SIDE)) == whole.plan
    assert model.bfloat16()(images().bfloat16()).logits.dtype == torch.bfloat16
    assert alphas(model.double()).dtype == torch.float64


@pytest.mark.parametrize("net", NETS[1:])
def test_channels_last_is_preserved(net: str) -> None:
    model = warmed(opened(small(net))).to(memory_format=torch.channels_last)
    found: list[bool] = []
    for module in model.modules():
        if isinstance(module, Adaptor):
            module.register_forward_hook(
                lambda _, __, y: found.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.no_grad():
        mine = model(images().to(memory_format=torch.channels_last)).logits
    assert found == [True] * len(alphas(model))
    torch.testing.assert_close(mine, warmed(opened(small(net)))(images()).logits, rtol=1e-4, atol=1e-4)


# ---- the budget


@pytest.mark.parametrize(("net", "mode"), [*SOME, ("vgg16_bn", "autosc"), ("resnet50", "human")])
def test_predicted_costs_equal_those_counted_on_the_forward(net: str, mode: str) -> None:
    model = opened(small(net, mode)).eval()
    values: list[int] = []
    for module in model.body.modules():
        if isinstance(module, nn.Conv2d | Adaptor):
            module.register_forward_hook(lambda _, __, y: values.append(y.numel()))
    for shift, size in ((0.0, (SIDE, SIDE)), (1.5, (20, 12)), (-3.0, (9, 9))):
        if model.shape.alphas is not None:
            with torch.no_grad():
                alphas(model).add_(shift)
        values.clear()
        found = cost.measure(model, images(1, *size))
        asked = (size, model.plan(size).sizes)
        assert model.costs.values(*asked) == model.costs.values(*asked) == sum(values)
        assert model.costs.macs(*asked) == found.macs


def test_measuring_a_cost_is_not_counted_by_a_mac_counter() -> None:
    expected = cost.measure(opened(small()), images(1))
    assert cost.measure(opened(small(max_mvalues=1e3, max_gmacs=1e3)), images(1)) == expected


@pytest.mark.parametrize("key", ["max_mvalues", "max_gmacs"])
def test_a_plan_above_its_budget_is_refused_before_anything_runs(key: str) -> None:
    free = opened(small())
    asked = ((SIDE, SIDE), free.plan((SIDE, SIDE)).sizes)
    costs = free.costs
    amount = costs.values(*asked) / 1e6 if key == "max_mvalues" else costs.macs(*asked) / 1e9
    with torch.no_grad():
        opened(small(**{key: amount}))(images())
        net = opened(small(**{key: amount}))
        ran: list[nn.Module] = []
        for module in net.body.modules():
            module.register_forward_pre_hook(lambda module, _: ran.append(module))
        alphas(net).add_(2.0)
        with fails(ConfigError, f"family.{key}", subject=f"{amount:g}"):
            net(images())
        assert ran == []
        alphas(net).sub_(2.0)
        net(images())
    with fails(ConfigError, f"family.{key}"):
        opened(small(**{key: amount * 0.999}))(images())


# ---- training


@pytest.mark.parametrize(("every", "steps"), [(1, 5), (3, 10), (20, 41), (1500, 10)])
def test_alphas_move_first_and_every_alpha_every_steps(every: int, steps: int) -> None:
    config = small(alpha_every=every)
    found = [tuple(updates(config, step)) for step in range(steps)]
    assert set(found) <= {("shape", "main"), ("main",)}
    assert found.count(("shape", "main")) == math.ceil(steps / every)
    assert found[0] == ("shape", "main")
    assert updates(small(mode="human"), 0) == ["main"]


def test_alphas_are_outside_ddp_and_without_weight_decay() -> None:
    config = small()
    net = opened(config)
    (params,) = groups(config, net)["shape"]
    assert params.outside_ddp
    assert not params.decay
    assert params.parameters == [alphas(net)]
    settings = SgdConfig(weight_decay=0.5)
    built = optim.build(groups(config, net), net, TrainingConfig(other_optimizers={"shape": settings}))
    assert [group["weight_decay"] for group in built["shape"].param_groups] == [0.0]
    human = small(mode="human")
    assert set(groups(human, opened(human))) == {"main"}


def test_each_optimizer_moves_only_its_parameters() -> None:
    config = small(alpha_every=2)
    rates = {"shape": SgdConfig(lr=5.0, weight_decay=0.0)}
    settings = TrainingConfig(batch_size=8, epochs=4, optimizer=SgdConfig(lr=0.05), other_optimizers=rates)
    cpu = torch.device("cpu")
    current = state.fresh(FAMILY, config, settings, num_classes=CLASSES, seed=1, device=cpu)
    net = current.net
    task = TrainingPlan(FAMILY, config, settings, 1, CLASSES, cpu, net, 8, 0.1)
    moved: list[tuple[str, set[str]]] = []
    plans: list[ShapePlan] = []

    def watched(name: str, step: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = {key: value.clone() for key, value in net.named_parameters()}
            result = step(*args, **kwargs)
            now = dict(net.named_parameters())
            moved.append((name, {key for key in before if not torch.equal(before[key], now[key])}))
            return result

        return run

    for name, optimizer in current.optimizers.items():
        optimizer.step = watched(name, optimizer.step)  # type: ignore[method-assign]
    net.register_forward_hook(lambda _, __, output: plans.append(output.plan))
    batch = MicroBatch(images(8), torch.arange(8) % CLASSES, torch.arange(8) % CLASSES)
    for _ in range(3):
        train_step(task, current, [batch], Meter())
    assert [name for name, _ in moved] == ["shape", "main", "main", "shape", "main"]
    for name, names in moved:
        assert names == {"shape.alphas"} if name == "shape" else "shape.alphas" not in names and len(names) > 30
    assert plans[0] != plans[1]  # the weights learn in the new shape
    assert plans[1] == plans[2]


def test_the_loss_is_cross_entropy_and_logs_the_shape() -> None:
    config = small(limit_px=3)
    net = opened(config)
    output = net(images())
    found = loss(config, output, torch.arange(4))
    torch.testing.assert_close(found.total, cross_entropy(output.logits, torch.arange(4)))
    assert set(found.parts) == {"ce", "penalty", *(f"{name}/0{n}" for name in ("alpha", "side_px") for n in range(3))}
    assert [found.parts[f"alpha/0{n}"].item() for n in range(3)] == alphas(net).tolist()
    assert tuple(found.parts[f"side_px/0{n}"].item() for n in range(3)) == output.plan.sides_px
    assert found.parts["penalty"].item() == pytest.approx(output.plan.penalty)
    assert all(not part.requires_grad for part in found.parts.values())
    human = small(mode="human")
    assert set(loss(human, opened(human)(images()), torch.arange(4)).parts) == {"ce"}


# ---- inference


@pytest.mark.parametrize(("net", "mode"), [*ADAPTIVE, ("vgg16", "sa"), ("resnet50", "human")])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (9, 20)])
def test_the_frozen_net_is_the_live_one_bit_for_bit(net: str, mode: str, size: Size) -> None:
    model = warmed(opened(small(net, mode, limit_px=4)))
    x = images(3, *size)
    frozen = freeze(model, size)
    with torch.no_grad():
        expected = model(x).logits
        assert torch.equal(frozen(x), expected)
        for policy in (Live(), AtShape()):
            assert torch.equal(policy.predict(model, x).logits, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(frozen(x), model(x).logits)
    assert not [name for name, _ in frozen.named_parameters() if "alpha" in name]
    assert "shape.alphas" not in frozen.state_dict()


@pytest.mark.long
@pytest.mark.parametrize("net", ["vgg16_bn", "resnet50"])
def test_the_frozen_net_exports_for_any_number_of_images(net: str) -> None:
    model = warmed(opened(small(net)))
    frozen = freeze(model, (SIDE, SIDE))
    shapes = {"images": {0: Dim("images", min=1, max=64)}}
    with torch.no_grad():
        program = export(frozen, (images(2),), dynamic_shapes=shapes)
        for count in (1, 5):
            assert torch.equal(program.module()(images(count)), model(images(count)).logits)
    assert not [name for name in program.state_dict if "alpha" in name]
    explained = torch._dynamo.explain(frozen)(images(2))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_frozen_net_does_not_change_and_refuses_other_sizes() -> None:
    model = warmed(opened(small()))
    policy, live = AtShape(), Live()
    frozen = freeze(model, (SIDE, SIDE))
    with torch.no_grad():
        before = policy.predict(model, images())
        alphas(model).add_(2.0)
        after, moved = policy.predict(model, images()), live.predict(model, images())
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(frozen(images()), before.logits)
        assert torch.equal(after.facts["side_px"], before.facts["side_px"])
        assert (moved.facts["side_px"] > before.facts["side_px"]).all()
        assert torch.equal(policy.predict(copy.deepcopy(model), images()).logits, moved.logits)  # another net
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(frozen(images()), before.logits)
    with fails(ConfigError, "images", subject="20x16"):
        frozen(images(1, 20, 16))


def test_macs_are_measured_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model, policy = warmed(opened(small())), Live()
    measured: list[int] = []
    real = cost.measure
    monkeypatch.setattr(cost, "measure", lambda *args: (measured.append(1), real(*args))[1])
    with torch.no_grad():
        first = [policy.predict(model, images(count)).macs for count in (1, 4, 4)]
        assert len(measured) == 1
        assert {value for macs in first for value in macs.tolist()} == {real(model, images(1)).macs}
        alphas(model).add_(2.0)
        moved = policy.predict(model, images()).macs
        assert len(measured) == 2
        assert moved[0] > first[0][0]
        assert moved[0] == real(model, images(1)).macs
        alphas(model).sub_(2.0)
        assert policy.predict(model, images()).macs[0] == first[0][0]
        assert len(measured) == 2


def test_facts_are_the_side_of_each_stage_and_the_alphas() -> None:
    model = warmed(opened(small()))
    with torch.no_grad():
        found = Live().predict(model, images(2, 20, 12)).facts
    assert found["side_px"].tolist() == [list(model.plan((20, 12)).sides_px)] * 2
    assert torch.equal(found["alphas"], alphas(model).expand(2, 3))
    human = opened(small(mode="human")).eval()
    with torch.no_grad():
        assert Live().predict(human, images()).facts == {}


def test_a_net_rebuilt_from_its_state_has_the_same_sizes() -> None:
    model = warmed(opened(small(limit_px=4)))
    move(model, 1.5, -0.3, 0.9)
    again = opened(small(limit_px=4), seed=3).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert again(images()).plan == model(images()).plan
        assert torch.equal(again(images()).logits, model(images()).logits)


# ---- external weights


def torchvisions(net: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A net of torchvision's, up to its head for a VGG, and its state as a file would hold it."""
    torch.manual_seed(9)
    if net.startswith("vgg"):
        features = make_layers(cfgs["D"], batch_norm=net == "vgg16_bn")
        heads = {f"classifier.{n}.{kind}": torch.zeros(1) for n in (0, 3, 6) for kind in ("weight", "bias")}
        return features, {f"features.{name}": value for name, value in features.state_dict().items()} | heads
    plain = torchvision.models.get_model(net)
    return plain, plain.state_dict()


@pytest.mark.parametrize("net", NETS)
def test_torchvisions_weights_are_loaded_but_for_a_head_of_other_classes(net: Any) -> None:
    plain, tensors = torchvisions(net)
    human = build(ShapeConfig(net=net, mode="human"), CLASSES)
    config = ShapeConfig(net=net, mode="human")
    with fails(ConfigError, "--new-head"):
        load_pretrained(config, human, tensors)
    loaded = load_pretrained(config, human, tensors, new_head=True)
    head = human.body.fc if net == "resnet50" else human.body.classifier
    kept = {f"body.{'fc' if net == 'resnet50' else 'classifier'}.{kind}" for kind in ("weight", "bias")}
    assert set(loaded.initial) == kept
    assert len(loaded.left_out) == (6 if net.startswith("vgg") else 2)
    head_of_plain = {"resnet50": "fc", "mobilenet_v2": "classifier"}.get(net)
    if head_of_plain is not None:
        setattr(plain, head_of_plain, head)
    with torch.no_grad():
        x = images(2, 64, 64)
        expected = plain.eval()(x)
        expected = expected if head_of_plain else head(expected.mean(dim=(2, 3)))
        torch.testing.assert_close(human.eval()(x).logits, expected, rtol=1e-4, atol=1e-4)

    config = ShapeConfig(net=net, mode="autotl")
    tuned = build(config, CLASSES)
    first = alphas(tuned).detach().clone()
    assert set(load_pretrained(config, tuned, tensors, new_head=True).initial) == {*kept, "shape.alphas"}
    assert torch.equal(alphas(tuned).detach(), first)
    theirs = human.state_dict()
    body = {name: value for name, value in tuned.state_dict().items() if name not in kept and name != "shape.alphas"}
    assert all(torch.equal(value, theirs[name]) for name, value in body.items())
    assert len(body) == len(tensors) - (6 if net.startswith("vgg") else 2)


@pytest.mark.parametrize("net", ["resnet50", "mobilenet_v2"])
def test_torchvisions_head_is_loaded_where_the_classes_are_as_many(net: Any) -> None:
    plain, tensors = torchvisions(net)
    config = ShapeConfig(net=net, mode="human")
    human = build(config, 1000)
    assert load_pretrained(config, human, tensors) == Loaded([], [])
    with torch.no_grad():
        x = images(1, 64, 64)
        torch.testing.assert_close(human.eval()(x).logits, plain.eval()(x), rtol=1e-4, atol=1e-4)
    with fails(ConfigError, "training.new_head"):
        load_pretrained(config, human, tensors, new_head=True)


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    return torchvisions("resnet50")[1]


def test_weights_that_do_not_fit_are_refused_by_name(resnet: dict[str, Tensor]) -> None:
    config = ShapeConfig(mode="autotl")
    net = on_meta(config, CLASSES)
    for tensors, name in (
        ({**resnet, "extra.weight": torch.zeros(1)}, "body.extra.weight"),
        ({name: value for name, value in resnet.items() if name != "conv1.weight"}, "body.conv1.weight"),
        ({**resnet, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "body.conv1.weight"),
    ):
        with fails(ConfigError, "weights", subject=name):
            load_pretrained(config, net, tensors)
    with fails(ConfigError, "weights", subject="layer1.1.downsample"):  # SA has shortcuts that are not there
        load_pretrained(ShapeConfig(mode="sa"), on_meta(ShapeConfig(mode="sa"), CLASSES), resnet)


# Nets and modes of the paper and of the released code, with their recipes' sides, and the widths of its table.
SMALL_SIDE = [
    (net, mode, 32, 1.0) for net in ("vgg16_bn", "resnet50", "mobilenet_v2") for mode in ("human", "sa", "autosc")
]
LARGE_SIDE = [(net, mode, 224, 1.0) for net, mode, _, _ in SMALL_SIDE]
WIDTHS = [("mobilenet_v2", mode, 224, width) for mode, width in (("human", 0.75), ("autosc", 0.85), ("autosc", 1.1))]
RELEASED = [*SMALL_SIDE, *LARGE_SIDE, *WIDTHS, ("resnet50", "autotl", 224, 1.0)]
SHORTCUTS = (
    ("downsample.0", "downsample.1"),
    ("shape_adaptor.branch.0", "shape_adaptor.branch.1"),
    ("adaptor.0", "adaptor.1"),
)


def released(config: ShapeConfig, net: ShapeNet, shortcut: tuple[str, str] = SHORTCUTS[0]) -> dict[str, Tensor]:
    """The net's values as the released code may name them: layers as torchvision does, a VGG's alphas as one vector.

    In a VGG whose poolings are gone, the layers behind them have lower numbers. shortcut: the names of the layers that
    take the place of an identity.
    """
    stage = {1 + sum(RESNET_STAGES[:s]) + n: f"layer{s + 1}.{n}" for s, c in enumerate(RESNET_STAGES) for n in range(c)}
    vgg = _released_vgg(net) if config.net == "vgg16_bn" else {}
    theirs: dict[str, Tensor] = {}
    for name, value in net.state_dict().items():
        layer, _, kind = name.removeprefix("body.").rpartition(".")
        layer = {"classifier": "classifier.0"}.get(layer, vgg.get(layer, layer))
        layer = layer.replace("downsample.0", shortcut[0]).replace("downsample.1", shortcut[1])
        if name != "shape.alphas":
            theirs[f"{layer}.{kind}"] = value
    if net.shape.alphas is None:
        return theirs
    learned = net.shape.alphas.detach().double()
    if config.net == "vgg16_bn":
        return {"alpha": learned, **theirs}
    for number, (place, alpha) in enumerate(zip(places(config), learned, strict=True)):
        block = stage[place] if config.net == "resnet50" and place else f"features.{place}"
        theirs[f"{block}.alpha" if place else f"alpha_init{number + 1}"] = alpha
    return theirs


def _released_vgg(net: ShapeNet) -> dict[str, str]:
    body, layer, found = net.body, 0, {}
    for number in range(13):
        found |= {f"convs.{number}.0": f"features.{layer}", f"convs.{number}.1": f"features.{layer + 1}"}
        layer += 3 + (number in body.pools)
    return found


@pytest.mark.parametrize(("kind", "mode", "side_px", "width"), RELEASED)
def test_a_released_checkpoint_of_each_net_and_mode_is_loaded_completely(
    kind: Any, mode: Any, side_px: int, width: float, tmp_path: Path
) -> None:
    config = ShapeConfig(net=kind, mode=mode, side_px=side_px, width=width)
    source = build(config, 10)
    net, other = copy.deepcopy(source), build(config, 7)
    _randomise(source)
    for shortcut in SHORTCUTS if kind == "resnet50" else SHORTCUTS[:1]:
        theirs = released(config, source, shortcut)
        assert load_pretrained(config, _zeroed(net), theirs) == Loaded([], [])
        _assert_equal(net, source)
    torch.save({"state_dict": {f"module.{name}": value for name, value in theirs.items()}}, tmp_path / "best.pth")
    found = weights_file.read(tmp_path / "best.pth").tensors
    assert len(found) == len(theirs)
    shuffled = dict(sorted(found.items()))  # as safetensors stores them
    assert load_pretrained(config, _zeroed(net), shuffled) == Loaded([], [])
    _assert_equal(net, source)
    with fails(ConfigError, "--new-head"):
        load_pretrained(config, other, theirs)
    loaded = load_pretrained(config, other, theirs, new_head=True)
    assert len(loaded.left_out) == len(loaded.initial) == 2


def _zeroed(net: ShapeNet) -> ShapeNet:
    with torch.no_grad():
        for value in net.state_dict().values():
            value.zero_()
    return net


def _assert_equal(net: nn.Module, other: nn.Module) -> None:
    wanted = other.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def _randomise(net: nn.Module) -> None:
    with torch.no_grad():
        for value in net.state_dict().values():
            value.copy_(torch.rand_like(value) if value.is_floating_point() else torch.full_like(value, 7))


@pytest.mark.parametrize(
    ("there", "here", "key"),
    [
        ({"mode": "sa"}, {"mode": "sa", "adaptors": 5}, "family.mode"),
        ({"mode": "sa"}, {"mode": "human"}, "family.mode"),
        ({"mode": "autosc"}, {"mode": "autosc", "adaptors": 4}, "family.mode"),
        ({"mode": "autotl", "side_px": 224}, {"mode": "autosc", "side_px": 224, "adaptors": 5}, "family.mode"),
    ],
)
@pytest.mark.parametrize("kind", ["resnet50", "mobilenet_v2", "vgg16_bn"])
def test_a_released_checkpoint_of_another_mode_is_refused(
    kind: Any, there: dict[str, Any], here: dict[str, Any], key: str
) -> None:
    source = ShapeConfig(**{"net": kind, "side_px": 32, **there})
    config = ShapeConfig(**{"net": kind, "side_px": 32, **here})
    if kind == "vgg16_bn" and len(places(source)) == len(places(config)):
        pytest.skip("a VGG's file does not say where its adaptors are")
    with fails(ConfigError, key):
        load_pretrained(config, on_meta(config, 10), released(source, build(source, 10)))


def test_our_own_weights_are_loaded_completely() -> None:
    net, other = opened(small()), opened(small(), seed=1)
    move(other, 1.0, 2.0, 3.0)
    assert load_pretrained(small(), net, other.state_dict()) == Loaded([], [])
    loaded = other.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in net.state_dict().items())


# ---- initial weights and options


def test_initial_weights_are_drawn_as_published() -> None:
    torch.manual_seed(2)
    vgg = build(ShapeConfig(net="vgg16_bn", side_px=32, width=0.5), 10).body
    conv = vgg.convs[5][0]
    fan = (128 + 128) * 9
    assert conv.weight.abs().max().item() == pytest.approx((6 / fan) ** 0.5, rel=1e-3)
    assert not conv.bias.any() and not vgg.classifier.bias.any()
    mobile = build(ShapeConfig(net="mobilenet_v2", side_px=32), 100).body
    assert mobile.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert mobile.features[18][0].weight.std().item() == pytest.approx((2 / 1280) ** 0.5, rel=0.02)
    assert all((module.weight == 1).all() for module in mobile.modules() if isinstance(module, nn.BatchNorm2d))


def test_options_have_their_documented_effect() -> None:
    doubled, single = opened(small("resnet50")), opened(small("resnet50", doubled=False))
    assert doubled.shape.get_buffer("total").tolist() == [1, 2, 2]  # the stem's cell is a plain one
    assert single.shape.get_buffer("total").tolist() == [1, 1, 1]
    route = opened(small(pool="ceil")).body.adaptors
    assert all(adaptor.ceil for adaptor in route.values())
    assert not any(adaptor.ceil for adaptor in opened(small()).body.adaptors.values())
    assert all(adaptor.ceil for adaptor in opened(small(mode="autosc")).body.adaptors.values())
    assert opened(small(mode="autosc", rule="local")).shape.rules.rule == "local"
    assert Route(False).fixed == []
    assert not [module for module in opened(small("vgg16")).modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"side_px": 32, "target_px": 32}, "target_px"),
        ({"side_px": 8}, "side_px"),
        ({"adaptors": 17}, "adaptors"),
        ({"mode": "autosc", "adaptors": 12}, "adaptors"),
        ({"net": "resnet18"}, "net"),
        ({"mode": "SA"}, "mode"),
        ({"limit_px": 0}, "limit_px"),
        ({"alpha_every": 0}, "alpha_every"),
        ({"factors": [0.6, 0.7]}, "factors"),
        ({"factors": [0.5] * 6}, "factors.0"),
        ({"width": -1.0}, "width"),
        ({"max_gmacs": 0}, "max_gmacs"),
        ({"limit": 15}, "limit"),
    ],
)
def test_a_wrong_setting_is_refused(keys: dict[str, object], key: str) -> None:
    with fails(ConfigError, key):
        validate(ShapeConfig, {"name": "shape_adaptor", **keys}, "family")


# ---- recipes


RECIPES = [name for name in recipes.names() if name.startswith("shape_adaptor/")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_fits_its_net_and_gives_the_alphas_their_optimizer(recipe: str) -> None:
    config = run_config.load(recipe, data_home="/data")
    family = config.family
    assert isinstance(family, ShapeConfig)
    assert config.data.side_px == config.data.side_for_eval == family.side_px
    expected = {"main"} if family.mode == "human" else {"main", "shape"}
    assert set(groups(family, on_meta(family, CLASSES))) == {"main", *config.training.other_optimizers} == expected
    for shape in config.training.other_optimizers.values():
        assert (shape.kind, shape.nesterov, shape.weight_decay) == ("sgd", True, 0)
    assert config.training.decay_norms_and_biases == (config.training.optimizer.kind == "sgd")  # LAMB spares them


CONTROLS = [name for name in RECIPES if name.endswith(":human")]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_human_control_is_its_recipe_in_mode_human(control: str) -> None:
    mine = run_config.load(control, data_home="/data").model_dump()
    theirs = run_config.load(control.removesuffix(":human"), ["family.mode=human"], data_home="/data").model_dump()
    for each in (mine, theirs):
        del each["name"], each["tracking"]["register"]
    assert mine == theirs
