"""LAMB and Muon against plain computations, and the groups by which layers and matrices are treated apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import tiny
import torch
from raised import fails
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.family import Params, find
from pipeline.training import optim, state
from pipeline.training.depths import by_structure, hidden_matrices, lr_factors
from pipeline.training.optimizers.base import OptimizerConfig
from pipeline.training.optimizers.lamb import LambConfig
from pipeline.training.optimizers.muon import Muon, MuonConfig, orthogonal

STEPS, RATE, DECAY = 4, 0.02, 0.1


def small() -> nn.Module:
    """A convolution on images, one and one in groups within, and a wide and a tall linear layer before the head."""
    torch.manual_seed(1)
    convolutions = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6)]
    linear = [nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *linear).double()


def gradients(net: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in net.named_parameters()}


def moved(net: nn.Module, config: OptimizerConfig, steps: Sequence[int] = range(STEPS)) -> dict[str, Tensor]:
    """The weights after these steps; the optimizer is rebuilt from its state_dict after each."""
    training = tiny.training(optimizer=config)
    saved = None
    for step in steps:
        optimizer = optim.build({"main": [Params(list(net.parameters()))]}, net, training)["main"]
        if saved is not None:
            optimizer.load_state_dict(saved)
        for name, gradient in gradients(net, step).items():
            net.get_parameter(name).grad = gradient
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
    return dict(net.named_parameters())


def adam_directions(net: nn.Module, betas: tuple[float, float], eps: float) -> list[dict[str, Tensor]]:
    """Adam's direction of each step by the sums that define it, without a running mean."""
    found = []
    for last in range(1, STEPS + 1):
        of_steps = [gradients(net, step) for step in range(last)]
        ages = [last - 1 - step for step in range(last)]
        direction = {}
        for name in of_steps[0]:
            mean, square = (
                sum((1 - beta) * beta**age * each[name] ** power for age, each in zip(ages, of_steps, strict=True))
                / (1 - beta**last)
                for beta, power in zip(betas, (1, 2), strict=True)
            )
            direction[name] = mean / (square**0.5 + eps)
        found.append(direction)
    return found


def test_a_parameter_without_a_gradient_in_some_steps_moves_as_by_torchs_adamw() -> None:
    """Muon's other parameters: each is corrected by the number of its own updates, as blocks that were skipped need."""
    betas, start = (0.8, 0.95), torch.linspace(-1, 1, 4, dtype=torch.float64)
    ours, theirs = ([nn.Parameter(start.clone()) for _ in range(3)] for _ in range(2))
    settings = {"lr": RATE, "weight_decay": DECAY}
    muon = Muon([{"params": ours, "hidden": False, **settings}], {"betas": betas})
    adamw = torch.optim.AdamW(theirs, betas=betas, eps=1e-8, **settings)
    for step in range(STEPS):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            for parameter in pair:
                parameter.grad = start.sin() + number + step if number <= step else None
        muon.step()
        adamw.step()
        assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("clip", [False, True])
def test_lamb_is_the_papers_algorithm(clip: bool) -> None:
    net = small()
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    bare = {id(p) for p in optim.norms_and_biases(net)}
    plain = {name for name, p in net.named_parameters() if id(p) in bare}
    for direction in adam_directions(net, (0.8, 0.95), 1e-6):
        for name, weight in expected.items():
            update, ratio = direction[name], 1.0
            if name not in plain:
                update = update + DECAY * weight
                ratio = float(weight.norm() / update.norm())
            expected[name] = weight - RATE * (min(ratio, 1.0) if clip else ratio) * update
    settings = LambConfig(lr=RATE, weight_decay=DECAY, betas=(0.8, 0.95), trust_clip=clip)
    for name, value in moved(net, settings).items():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_lamb_leaves_the_ratio_at_one_where_a_norm_is_zero() -> None:
    net = nn.Linear(3, 2, bias=False).double()
    nn.init.zeros_(net.weight)
    first = adam_directions(net, (0.9, 0.999), 1e-6)[0]["weight"]
    torch.testing.assert_close(moved(net, LambConfig(lr=RATE), [0])["weight"].detach(), -RATE * first)


def plain_orthogonal(matrix: Tensor) -> Tensor:
    """Five iterations of the quintic on the singular values themselves."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


RULES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


@pytest.mark.parametrize("rule", RULES)
def test_muon_moves_hidden_matrices_by_its_formulas_and_the_rest_by_adamw(rule: str) -> None:
    net = small()
    hidden = {"2.weight", "6.weight", "7.weight"}
    ids = hidden_matrices(net, by_structure(net))
    assert {name for name, p in net.named_parameters() if id(p) in ids} == hidden
    bare = {id(p) for p in optim.norms_and_biases(net)}
    decays = {name: 0.0 if id(p) in bare else DECAY for name, p in net.named_parameters()}
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    momenta = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step, direction in enumerate(adam_directions(net, (0.9, 0.95), 1e-8)):
        for name, gradient in gradients(net, step).items():
            weight = expected[name]
            if name in hidden:
                momenta[name] = 0.9 * momenta[name] + 0.1 * gradient
                matrix = (0.1 * gradient + 0.9 * momenta[name]).flatten(1)
                move = RULES[rule](*matrix.shape) * plain_orthogonal(matrix).view_as(weight)
                expected[name] = weight - RATE * (DECAY * weight + move)
            else:
                expected[name] = weight - RATE / 2 * (decays[name] * weight + direction[name])
    settings = MuonConfig(lr=RATE, weight_decay=DECAY, momentum=0.9, adamw_lr_factor=0.5, scale=rule)
    for name, value in moved(net, settings).items():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_muons_iteration_brings_singular_values_near_one() -> None:
    found = torch.linalg.svdvals(orthogonal(torch.randn(3, 8, 20), 5))
    assert ((found > 0.6) & (found < 1.3)).all()


def test_torchs_own_muon_moves_a_matrix_alike() -> None:
    """It computes in bf16, so that only the direction and the size agree."""
    net = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 8), nn.Linear(8, 3))
    matrix = nn.Parameter(net[1].weight.detach().clone())
    theirs = torch.optim.Muon([matrix], lr=RATE, weight_decay=DECAY)
    before, matrix.grad = matrix.detach().clone(), gradients(net, 0)["1.weight"]
    theirs.step()
    ours = moved(net, MuonConfig(lr=RATE, weight_decay=DECAY, scale="original"), [0])["1.weight"].detach()
    torch.testing.assert_close(ours - before, matrix.detach() - before, rtol=0.05, atol=0.05 * RATE)


def test_a_net_without_hidden_matrices_is_refused_for_muon() -> None:
    with fails(ConfigError, "training.optimizer.kind", "muon"):
        tiny.fresh(tiny.training(optimizer=MuonConfig(lr=0.01)))


def test_layers_follow_the_depth_and_their_rates_fall_towards_the_images() -> None:
    family = find("baseline")
    net = family.build(family.config(net="resnet18"), 5)
    layers = by_structure(net)
    assert len(layers) == 1 + 8 + 1  # stem, blocks, head
    training = tiny.training(layer_decay=0.5, decay_norms_and_biases=True)
    built = optim.build(family.groups(family.config(), net), net, training)["main"]
    rates = {id(p): group["full_lr"] for group in built.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in (net.net.fc.weight, net.net.layer4[1].conv2.weight)] == pytest.approx([0.1, 0.05])
    assert rates[id(net.net.conv1.weight)] == rates[id(net.net.bn1.weight)] == pytest.approx(0.1 * 0.5**9)
    assert sum(p.numel() for group in built.param_groups for p in group["params"]) == sum(
        p.numel() for p in net.parameters()
    )


@pytest.mark.parametrize("name", ["arrn", "convnet_aig", "msdnet", "ranet", "shape_adaptor"])
def test_every_family_has_an_order_of_layers_that_holds_each_weight_once(name: str) -> None:
    family = find(name)
    config = family.config()
    net = family.build(config, 3)
    layers = by_structure(net) if family.layers is None else family.layers(config, net)
    outside = {
        id(p) for some in family.groups(config, net).values() for g in some if g.outside_ddp for p in g.parameters
    }
    held = [id(p) for modules in layers for module in modules for p in module.parameters()]
    assert len(held) == len(set(held))
    assert set(held) | outside == {id(p) for p in net.parameters()}
    seen = [m for module in layers[0] for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert seen[0].in_channels == 3 and len(seen) == 1
    heads = [m for module in layers[-1] for m in module.modules() if isinstance(m, nn.Linear)]
    assert heads and all(head.out_features == 3 for head in heads)
    assert min(lr_factors(layers, 0.9).values()) == pytest.approx(0.9 ** (len(layers) - 1))


def test_the_warm_up_of_the_moving_average() -> None:
    net, ema = nn.Linear(2, 2), nn.Linear(2, 2)
    for warmup, decay in (("ramp", 8 / 17), ("power", 0.75), ("none", 0.999)):
        before = ema.weight.detach().clone()
        state.update_ema(ema, net, 0.999, 7, warmup)
        torch.testing.assert_close(ema.weight, net.weight + decay * (before - net.weight))
