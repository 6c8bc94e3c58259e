"""RANet's operations in training, which run together what inference runs layer by layer: the values are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import validate
from pipeline.exits.net import ExitOutput
from pipeline.exits.objective import loss
from pipeline.families.ranet import together
from pipeline.families.ranet.config import RanetConfig
from pipeline.families.ranet.model import Ranet, build

CLASSES, SIDE_PX, IMAGES = 5, 18, 6  # 18 px: the halved maps have 9 and 5
SHAPES = {
    "even": {"depth": "even"},
    "growing": {},
    "repeated": {"scales": [1, 2, 2, 3], "width_factors": [3, 2, 2, 1]},
    "wide": {"channels": 16, "growth": 8, "scales": [1, 2], "width_factors": [2, 1]},
    "one": {"scales": [1], "width_factors": [1]},
}
Step = tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]


def net_of(shape: str) -> Ranet:
    torch.manual_seed(0)
    config = validate(RanetConfig, {"name": "ranet", "channels": 4, "growth": 4, **SHAPES[shape]}, "family")
    return build(config, CLASSES).double()


def batch(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX, dtype=torch.float64, generator=generator)
    return images.contiguous(memory_format=layout)


def stepped(net: Ranet, images: Tensor, exits: Sequence[int] | None = None) -> Step:
    """The exits' logits, the gradients of parameters and images, and the buffers after one forward and backward."""
    images = images.clone().requires_grad_()
    output: ExitOutput = net(images)
    chosen = output.exits if exits is None else output.exits[:, list(exits)]
    answer = ExitOutput(chosen[:, -1], chosen)
    net.zero_grad()
    loss(net.config, answer, torch.arange(IMAGES) % CLASSES).total.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return output.exits.detach(), {**gradients, "images": images.grad}, dict(net.named_buffers())


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Step]:
    """`stepped`, layer by layer."""

    def step(net: Ranet, images: Tensor, exits: Sequence[int] | None = None) -> Step:
        with monkeypatch.context() as patched:
            patched.setattr(together, "trains", lambda net: False)
            return stepped(net, images, exits)

    return step


def assert_equal(found: Step, wanted: Step) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(
                mine[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, at=name: f"{at}: {text}"
            )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_together_equals_one_layer_by_layer(
    one_by_one: Callable[..., Step], shape: str, layout: torch.memory_format
) -> None:
    net = net_of(shape).to(memory_format=layout)
    literal = copy.deepcopy(net)
    for _ in range(2):  # the second starts from the running statistics of the first
        assert_equal(stepped(net, batch(layout)), one_by_one(literal, batch(layout)))


def test_layers_run_together_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    net, joined = net_of("growing"), []
    kept = together.joined_bottlenecks
    monkeypatch.setattr(together, "joined_bottlenecks", lambda *given: joined.append(1) or kept(*given))
    net(batch())
    assert len(joined) == sum(block.fused for blocks in net.config.plan for block in blocks)
    joined.clear()
    with torch.no_grad():
        net(batch())
    net.eval()(batch())
    assert not joined


@pytest.mark.parametrize("exits", [[0], [1, 2]])
def test_gradients_of_some_exits_alone(one_by_one: Callable[..., Step], exits: Sequence[int]) -> None:
    net = net_of("growing")
    literal = copy.deepcopy(net)
    assert_equal(stepped(net, batch(), exits), one_by_one(literal, batch(), exits))


def test_gradients_of_a_net_that_is_frozen_in_part(one_by_one: Callable[..., Step]) -> None:
    net = net_of("growing")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("layers.1" in name or "classifiers" in name)
    literal = copy.deepcopy(net)
    found = stepped(net, batch())
    assert {name for name, value in found[1].items() if value is not None} == {
        "images",
        *(name for name, parameter in net.named_parameters() if parameter.requires_grad),
    }
    assert_equal(found, one_by_one(literal, batch()))


def test_a_graph_can_be_gone_back_twice() -> None:
    net = net_of("growing")
    total = net(batch()).exits.square().sum()
    weights = list(net.parameters())
    first = torch.autograd.grad(total, weights, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, weights), first)


def test_norms_of_other_kinds_run_layer_by_layer(one_by_one: Callable[..., Step]) -> None:
    net = net_of("growing")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches, which needs each norm's count
    literal = copy.deepcopy(net)
    assert_equal(stepped(net, batch()), one_by_one(literal, batch()))


@pytest.mark.parametrize("of_gradient", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [1, 2, together.FEW - 1, together.FEW])
def test_a_norm_of_few_channels_equals_torchs(width: int, of_gradient: torch.memory_format) -> None:
    norm = nn.BatchNorm2d(width).double()
    x = torch.randn(4, width, 5, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(x.shape, dtype=torch.float64).contiguous(memory_format=of_gradient)
    inputs = [x, *norm.parameters()]
    found, wanted = together.by_channel(norm, x), norm(x)
    torch.testing.assert_close(found, wanted)
    mine, theirs = (torch.autograd.grad(each, inputs, gradient) for each in (found, wanted))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("sizes", [((9, 6), (5, 3)), ((8, 8), (4, 4)), ((5, 7), (1, 2))])
def test_reducing_equals_torchs_interpolation(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    old, new = sizes
    x = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    found, wanted = together.reduced(x, new), F.interpolate(x, new, mode="bilinear", align_corners=True)
    torch.testing.assert_close(found, wanted)
    gradient = torch.randn(wanted.shape, dtype=torch.float64)
    mine, theirs = (cast(Tensor, torch.autograd.grad(each, x, gradient)[0]) for each in (found, wanted))
    torch.testing.assert_close(mine, theirs)
