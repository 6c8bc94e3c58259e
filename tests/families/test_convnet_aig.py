"""Tests of ConvNet-AIG: the published sizes, the gate's distribution and gradient, and skipping that equals masking."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
import torchvision
from raised import fails
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline import cost
from pipeline.blocks import put, take
from pipeline.config import validate
from pipeline.errors import ConfigError, ContractError
from pipeline.families.baseline.model import BaselineConfig
from pipeline.families.baseline.model import build as build_baseline
from pipeline.families.convnet_aig.controls import FixedMask, ShuffledGates
from pipeline.families.convnet_aig.inference import ExpectedProb, ExpectedRate, Gates, policies
from pipeline.families.convnet_aig.model import STAGES, Aig, AigConfig, GatedBlock, build, logistic, straight_through
from pipeline.families.convnet_aig.objective import groups, loss, rate_loss
from pipeline.families.convnet_aig.released import load_pretrained
from pipeline.family import Prediction, cross_entropy
from pipeline.weights import Loaded

CLASSES = 10
FIXED = 4  # the block of `mixed` that is always open
MIXED = AigConfig(depth=20, target_rate=(0.5,) * FIXED + (1.0,) + (0.5,) * 4, thresholds=(0.2, 0.9))


def num_params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def images(count: int, side_px: int = 16) -> Tensor:
    """Images of very different brightness and contrast, so that gates disagree about them."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.1, 3, count).view(-1, 1, 1, 1)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    return scale * (torch.randn(count, 3, side_px, side_px, generator=generator) + colour)


def decide(net: Aig, examples: Tensor) -> None:
    """Gates that divide the images about in half, but for the first (always closed) and the second (always open)."""
    settings = {0: -1e4, 1: 1e4}

    def settle(gate: nn.Module, inputs: tuple[Tensor], odds: Tensor) -> Tensor:
        shift = settings.get(net.gates().index(gate), -float(odds.median()) - 1e-3)
        gate.fc2.bias[1] = shift
        return odds + shift

    for gate in net.gates():
        nn.init.normal_(gate.fc2.weight)
        nn.init.zeros_(gate.fc2.bias)
    hooks = [gate.register_forward_hook(settle) for gate in net.gates()]
    with torch.no_grad():
        net.eval()(examples)
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def mixed() -> Aig:
    """A small net with open, closed and deciding gates, and one block that is fixed open."""
    torch.manual_seed(0)
    net = build(MIXED, CLASSES)
    with torch.no_grad():
        net(images(32))  # in training mode: running statistics that are not the initial ones
    decide(net, images(8))
    return net


def predict(policy: Gates, net: Aig, batch: Tensor) -> Prediction:
    with torch.no_grad():
        return policy.predict(net.eval(), batch)


# ---- sizes: Veit & Belongie and the code released with it


@pytest.mark.parametrize(
    ("depth", "classes", "params", "gate_params", "macs", "fixed"),
    [
        (110, 10, 1_766_630, 35_916, 253_183_040, 738_368),
        (50, 1000, 25_768_264, 211_232, 4_089_394_688, 479_933_952),
        (101, 1000, 45_040_314, 491_154, 7_801_894_944, 480_213_024),
        (152, 1000, 60_931_116, 738_308, 11_514_362_432, 480_459_328),
    ],
)
def test_parameters_and_macs_are_those_of_the_released_code(
    depth: int, classes: int, params: int, gate_params: int, macs: int, fixed: int
) -> None:
    side_px = 32 if depth == 110 else 224
    with FakeTensorMode():  # shapes only: nothing is computed
        net = build(AigConfig(depth=depth), classes)
        found = cost.measure(net, torch.empty(1, 3, side_px, side_px))
    assert num_params(net) == params
    assert sum(num_params(gate) for gate in net.gates()) == gate_params
    assert found.macs == macs
    assert found.macs - sum(found.by_module[f"blocks.{n}.residual"] for n in range(len(net.blocks))) == fixed


def test_macs_of_a_real_forward_are_those_of_the_shapes() -> None:
    net = build(AigConfig(depth=50), 1000)
    assert cost.measure(net, torch.rand(1, 3, 224, 224)).macs == 4_089_394_688


@pytest.mark.parametrize(("depth", "name"), [(50, "resnet50"), (101, "resnet101"), (152, "resnet152")])
def test_the_backbone_is_as_large_as_torchvisions(depth: int, name: str) -> None:
    with torch.device("meta"):
        net = build(AigConfig(depth=depth), 1000)
        plain = torchvision.models.get_model(name)
    assert num_params(net) - sum(num_params(gate) for gate in net.gates()) == num_params(plain)


def test_costs_of_blocks_and_gates_follow_the_closed_forms() -> None:
    with FakeTensorMode():
        found = cost.measure(build(AigConfig(depth=110), 10), torch.empty(1, 3, 32, 32)).by_module
        net = build(AigConfig(depth=110), 10)
    for number in range(54):
        channels = (16, 32, 64)[(number - 1) // 18] if number else 16  # of the block's input
        assert found[f"blocks.{number}.gate"] == 16 * channels + 32
        assert num_params(net.blocks[number].gate) == 16 * channels + 82
        assert found[f"blocks.{number}.residual"] == (3_538_944 if number in (18, 36) else 4_718_592)


# ---- gates


def test_a_block_with_target_rate_1_has_no_gate_and_counts_as_open(mixed: Aig) -> None:
    assert [block.gate is None for block in mixed.blocks] == [number == FIXED for number in range(9)]
    assert mixed.draw_noise(3).shape == (3, 8)
    noise = torch.full((6, 8), -1e6)
    noise[:, 1] = -1e9
    gates = mixed(images(6), noise).gates
    assert torch.equal(gates, torch.eye(9)[FIXED].expand(6, 9))
    assert predict(Gates("gates-hard"), mixed, images(6)).facts["gates"][:, FIXED].all()


def test_a_net_without_gates_is_a_plain_resnet_and_trains() -> None:
    config = AigConfig(depth=8, target_rate=1.0)
    net = build(config, CLASSES)
    assert net.draw_noise(2) is None
    assert len(groups(config, net)["main"]) == 1
    assert torch.isfinite(loss(config, net(images(4)), torch.arange(4)).total)
    assert predict(policies(config, net)[1], net, images(2)).facts["gates"].all()


def test_the_published_schedules_are_those_of_the_released_readme() -> None:
    fifty = AigConfig(depth=50, schedule="published", target_rate=0.4).targets
    assert fifty == (1, 1, 0.8, 1, 0.4, 0.4, 0.4, 1, 0.4, 0.4, 0.4, 0.4, 0.4, 1, 0.7, 1)
    assert AigConfig(depth=101, schedule="published", target_rate=0.3).targets == (1,) * 8 + (0.3,) * 25
    assert AigConfig(depth=14, target_rate=(0.2, 0.5, 1)).targets == (0.2, 0.2, 0.5, 0.5, 1, 1)
    assert AigConfig(depth=50, target_rate=(1, 1, 1, 0.4)).targets == (1,) * 13 + (0.4,) * 3
    assert AigConfig(depth=8, target_rate=(0.2, 0.5, 1)).targets == (0.2, 0.5, 1)
    with torch.device("meta"):
        assert len(build(AigConfig(depth=50, schedule="published", target_rate=0.4), 10).gates()) == 10


def test_gates_open_with_probability_0_87_initially() -> None:
    torch.manual_seed(1)
    net = build(AigConfig(depth=20), CLASSES)
    with torch.no_grad():
        gates = net.train()(images(400, 4)).gates
    assert gates.mean().item() == pytest.approx(0.870, abs=0.02)
    for gate in net.gates():
        torch.testing.assert_close(gate.fc2.bias.detach(), torch.tensor([0.1, 2.0]))


@pytest.mark.parametrize("odds", [-2.0, 0.0, 1.9])
def test_a_gate_opens_with_the_probability_of_its_odds(odds: float) -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(2))
    gates = straight_through(torch.full_like(uniform, odds), logistic(uniform))
    p = torch.sigmoid(torch.tensor(odds)).item()
    assert gates.mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 200_000) ** 0.5)


def test_noise_is_finite_and_independent_across_images_and_gates(mixed: Aig) -> None:
    assert logistic(torch.tensor([0.0, 1.0])).isfinite().all()
    torch.manual_seed(3)
    noise = mixed.draw_noise(20_000)
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.04
    assert torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))[0, 1].abs() < 0.04


@pytest.mark.parametrize("training", [True, False])
def test_gates_are_exactly_0_or_1(training: bool) -> None:
    torch.manual_seed(4)
    net = build(AigConfig(depth=20), CLASSES).train(training)
    gates = net(images(16), net.draw_noise(16)).gates
    assert gates.requires_grad
    assert set(gates.unique().tolist()) == {0.0, 1.0}


def test_the_straight_through_gradient_is_that_of_the_sigmoid_at_the_same_noise() -> None:
    generator = torch.Generator().manual_seed(6)
    odds = torch.randn(50, generator=generator, dtype=torch.float64).requires_grad_()
    noise = logistic(torch.rand(50, generator=generator, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(straight_through(odds, noise).sum(), odds)
    step = 1e-6
    soft = [torch.sigmoid(odds.detach() + noise + shift) for shift in (step, -step)]
    torch.testing.assert_close(gradient, (soft[0] - soft[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("source", ["ce", "rate"])
def test_gradients_reach_every_gate_from_either_loss_alone(source: str) -> None:
    torch.manual_seed(7)
    config = AigConfig(depth=14, target_rate=0.5)
    net = build(config, CLASSES).train()
    output = net(images(16))
    wanted = torch.tensor(config.targets)
    alone = cross_entropy(output.logits, torch.arange(16) % 10) if source == "ce" else rate_loss(output.gates, wanted)
    alone.backward()
    for gate in net.gates():
        assert gate.fc1.weight.grad.abs().max() > 0
        assert gate.fc2.weight.grad.abs().max() > 0


def test_evaluation_without_noise_makes_the_more_likely_choice(mixed: Aig) -> None:
    odds: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda *a: odds.append(a[2])) for gate in mixed.gates()]
    gates = mixed.eval()(images(8)).gates
    for hook in hooks:
        hook.remove()
    gated = [number for number in range(9) if number != FIXED]
    assert torch.equal(gates[:, gated] == 1, torch.stack(odds, 1) > 0)


def test_bf16_autocast_keeps_the_gates_odds_in_fp32(mixed: Aig) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [gate.register_forward_hook(lambda _, x, odds: seen.append((x[0], odds))) for gate in mixed.gates()]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = mixed.eval()(images(8))
        skipped = Gates("gates-hard").predict(mixed, images(8))
    for hook in hooks:
        hook.remove()
    assert seen[0][0].dtype == torch.bfloat16  # what the backbone computes in
    assert all(odds.dtype == torch.float32 for _, odds in seen)
    torch.testing.assert_close(seen[0][1], mixed.gates()[0](seen[0][0].float()).detach())
    assert output.gates.dtype == torch.float32
    assert skipped.logits.dtype == torch.float32
    assert torch.equal(skipped.facts["gates"], output.gates == 1)


# ---- the loss


def test_the_rate_loss_of_a_worked_example() -> None:
    gates = torch.tensor([[1.0, 0], [0, 0], [1, 0], [1, 1]])  # rates 3/4 and 1/4
    half = torch.tensor([0.5, 0.5])
    assert rate_loss(gates, half).item() == pytest.approx(0.0625)
    assert rate_loss(gates, half, "sum").item() == pytest.approx(0.125)
    with_fixed = torch.cat([gates, torch.zeros(4, 1)], 1)  # adds nothing, but counts in the mean
    assert rate_loss(with_fixed, torch.tensor([0.5, 0.5, 1])).item() == pytest.approx(0.125 / 3)


def test_the_rate_loss_is_flat_at_its_target_and_pulls_towards_it() -> None:
    gates = torch.tensor([[1.0, 1, 0], [0, 1, 0]]).requires_grad_()
    rate_loss(gates, torch.tensor([0.5, 0.5, 0.5])).backward()
    assert gates.grad.sign().tolist() == [[0, 1, -1], [0, 1, -1]]  # at it, above it, below it


def test_the_loss_is_cross_entropy_and_the_weighted_rate_loss(mixed: Aig) -> None:
    labels = torch.arange(8)
    output = mixed.eval()(images(8))
    for weight, reduction in ((0.0, "mean"), (3.0, "mean"), (0.5, "sum")):
        config = MIXED.model_copy(update={"rate_weight": weight, "rate_reduction": reduction})
        wanted = cross_entropy(output.logits, labels)
        wanted = wanted + weight * rate_loss(output.gates, torch.tensor(MIXED.targets), reduction)
        torch.testing.assert_close(loss(config, output, labels).total, wanted)
    parts = loss(MIXED, output, labels).parts
    assert [parts[f"rate/{n:02d}"].item() for n in range(9)] == output.gates.mean(0).tolist()


def test_gates_have_their_own_learning_rate(mixed: Aig) -> None:
    config = MIXED.model_copy(update={"gate_lr_factor": 0.1})
    backbone, gates = groups(config, mixed)["main"]
    assert (backbone.lr_factor, gates.lr_factor) == (1.0, 0.1)
    assert sum(p.numel() for p in gates.parameters) == sum(num_params(gate) for gate in mixed.gates())


# ---- blocks


def test_a_closed_gate_with_an_identity_shortcut_leaves_the_input_bit_equal() -> None:
    net = build(AigConfig(depth=14), CLASSES).eval()
    x = torch.rand(4, 16, 8, 8)
    block = net.blocks[1]
    assert torch.equal(block(x, torch.zeros(4)), x)
    assert torch.equal(block.skipping(x, torch.tensor([], dtype=torch.long)), x)
    down = net.blocks[2]  # with a projection
    assert torch.equal(down(x, torch.zeros(4)), torch.relu(down.shortcut(x)))


@pytest.mark.parametrize("rows", [[], [2], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("number", [1, 2])
def test_a_skipping_block_equals_the_masked_one(rows: list[int], number: int) -> None:
    block = build(AigConfig(depth=14), CLASSES).eval().blocks[number]
    x, gate = torch.rand(4, 16, 8, 8), torch.zeros(4)
    gate[rows] = 1
    expected = block(x, gate)
    torch.testing.assert_close(block.skipping(x, torch.tensor(rows, dtype=torch.long)), expected)


def test_all_gates_open_is_torchvisions_resnet() -> None:
    net = build(AigConfig(depth=50), 10).eval()
    plain = torchvision.models.resnet50(num_classes=10).eval()
    ours = [value for name, value in net.state_dict().items() if ".gate." not in name]
    plain.load_state_dict(dict(zip(plain.state_dict(), ours, strict=True)))
    with torch.no_grad():
        x = images(2, 32)
        torch.testing.assert_close(net(x, torch.full((2, 16), 1e4)).logits, plain(x), rtol=1e-4, atol=1e-4)


def test_all_gates_open_is_the_plain_cifar_resnet() -> None:
    net = build(AigConfig(depth=14), 10).eval()
    plain = build_baseline(BaselineConfig(net="cifar_resnet", depth=14), 10).eval()
    ours = [value for name, value in net.state_dict().items() if ".gate." not in name]
    plain.load_state_dict(dict(zip(plain.state_dict(), ours, strict=True)))
    assert torch.equal(net(images(4), torch.full((4, 6), 1e4)).logits, plain(images(4)).logits)


# ---- policies


def test_skipping_equals_masking_and_runs_each_residual_only_on_its_open_images(mixed: Aig) -> None:
    x, rows = images(8), [0] * 9
    before = x.clone()

    def count(number: int) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            rows[number] += len(inputs[0])

        return hook

    with torch.no_grad():
        masked = mixed.eval()(x)
    policy = Gates("gates-hard")
    predict(policy, mixed, x)  # costs known from here on
    hooks = [block.residual.register_forward_hook(count(n)) for n, block in enumerate(mixed.blocks)]
    skipped = predict(policy, mixed, x)
    for hook in hooks:
        hook.remove()
    gates = skipped.facts["gates"]
    assert torch.equal(gates, masked.gates == 1)
    torch.testing.assert_close(skipped.logits, masked.logits, rtol=1e-4, atol=1e-4)
    assert rows == gates.sum(0).tolist()
    assert rows[0] == 0 and rows[1] == rows[FIXED] == 8 and any(0 < n < 8 for n in rows)
    assert torch.equal(skipped.facts["layers"], gates.sum(1))
    assert torch.equal(x, before)


def test_skipping_equals_masking_in_the_bottleneck_net() -> None:
    torch.manual_seed(8)
    net = build(AigConfig(depth=50), 10)
    with torch.no_grad():
        net(images(8, 32))
        decide(net, images(4, 32))
        masked = net(images(4, 32))
    skipped = predict(Gates("gates-hard"), net, images(4, 32))
    assert torch.equal(skipped.facts["gates"], masked.gates == 1)
    assert any(0 < n < 4 for n in masked.gates.sum(0))
    torch.testing.assert_close(skipped.logits, masked.logits, rtol=1e-4, atol=1e-4)


def test_nan_in_a_block_that_is_always_closed_does_not_reach_the_logits(mixed: Aig) -> None:
    torch.manual_seed(9)
    net = build(MIXED, CLASSES)
    net.load_state_dict(mixed.state_dict())
    first = net.blocks[0]
    assert isinstance(first, GatedBlock)
    nn.init.constant_(first.residual[0].weight, float("nan"))
    assert net.eval()(images(8)).logits.isnan().all()  # the masked net multiplies it by 0, which is no cure
    torch.testing.assert_close(
        predict(Gates("gates-hard"), net, images(8)).logits, predict(Gates("gates-hard"), mixed, images(8)).logits
    )


@pytest.mark.parametrize("policy", policies(MIXED, build(MIXED, CLASSES)), ids=lambda policy: policy.name)
def test_reported_macs_equal_those_counted_on_the_forward(policy: Gates, mixed: Aig) -> None:
    for batch in (*images(4).split(1), images(8)):
        predict(policy, mixed, batch)  # the costs of this size are known from here on
        with FlopCounterMode(display=False) as counter:
            found = predict(policy, mixed, batch)
        assert found.macs.sum().item() == counter.get_total_flops() // 2


def test_the_decisions_about_an_image_do_not_depend_on_the_others(mixed: Aig) -> None:
    x = images(8)
    together = predict(Gates("gates-hard"), mixed, x)
    for number in range(8):
        alone = predict(Gates("gates-hard"), mixed, x[number : number + 1])
        assert torch.equal(alone.facts["gates"][0], together.facts["gates"][number])
        assert alone.macs[0] == together.macs[number]
        torch.testing.assert_close(alone.logits[0], together.logits[number], rtol=1e-4, atol=1e-4)


def test_sampled_gates_repeat_and_open_by_their_odds() -> None:
    torch.manual_seed(10)
    net = build(AigConfig(depth=14), CLASSES).eval()
    policy = policies(AigConfig(depth=14), net)[1]
    assert policy.name == "gates-sampled"
    state = torch.random.get_rng_state()
    first, second = (predict(policy, net, images(256, 4)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.facts["gates"], second.facts["gates"])
    assert torch.equal(first.logits, second.logits)
    assert first.facts["gates"].double().mean().item() == pytest.approx(0.870, abs=0.03)
    assert predict(Gates("gates-hard"), net, images(256, 4)).facts["gates"].all()


def constant(net: Aig, scales: Sequence[float], batch: Tensor) -> Tensor:
    """Logits of the net whose blocks are scaled by these numbers for every image, by the masked forward."""
    with torch.no_grad():
        x = net.eval().stem(batch)
        for block, scale in zip(net.blocks, scales, strict=True):
            x = block(x, torch.full((len(x),), scale))
        return net.fc(x.mean(dim=(2, 3)))


def test_expected_rates_are_the_sampled_gates_and_scale_every_block(mixed: Aig) -> None:
    batches = [(images(40), torch.zeros(40)), (images(25, 24), torch.zeros(25))]
    with torch.no_grad():
        fitted = ExpectedRate().calibrated(mixed.eval(), batches)
        opened = sum(mixed(batch, mixed.draw_noise(len(batch))).gates.sum(0) for batch, _ in batches for _ in range(60))
    assert fitted.rates[0] == 0 and fitted.rates[1] == fitted.rates[FIXED] == 1
    assert torch.tensor(fitted.rates).sub(opened / (65 * 60)).abs().max() < 0.06
    found = predict(fitted, mixed, images(6))
    torch.testing.assert_close(found.logits, constant(mixed, fitted.rates, images(6)), rtol=1e-5, atol=1e-5)
    assert (found.logits - predict(Gates("gates-hard"), mixed, images(6)).logits).abs().max() > 1e-2
    again = ExpectedRate().restored(json.loads(json.dumps(fitted.state())))
    assert again == fitted and ExpectedRate().state() == {}
    with fails(ContractError, "calibration", subject="expected-rate"):
        predict(ExpectedRate(), mixed, images(2))


def test_expected_probabilities_scale_each_image_by_its_own_odds(mixed: Aig) -> None:
    batch, policy, odds = images(6), ExpectedProb(), []
    found = predict(policy, mixed, batch)
    hooks = [gate.register_forward_hook(lambda *call: odds.append(call[2])) for gate in mixed.gates()]
    predict(policy, mixed, batch)
    for hook in hooks:
        hook.remove()
    probabilities = torch.stack(odds, 1).sigmoid()
    rows = torch.cat([probabilities[:, :FIXED], torch.ones(6, 1), probabilities[:, FIXED:]], 1)
    assert torch.allclose(found.facts["probabilities"], rows, atol=1e-6)
    for row in range(6):
        alone = constant(mixed, rows[row].tolist(), batch[row : row + 1])
        torch.testing.assert_close(found.logits[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    assert (rows[0] - rows[5]).abs().max() > 0.01


@pytest.mark.long
def test_the_rate_loss_alone_brings_the_open_rate_to_its_target() -> None:
    config = AigConfig(depth=14, target_rate=0.4)
    torch.manual_seed(0)
    net = build(config, CLASSES).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    rates = []
    for step in range(200):
        generator = torch.Generator().manual_seed(step)
        output = net(torch.randn(32, 3, 16, 16, generator=generator))
        rates.append(float(output.gates.detach().mean()))
        (2 * rate_loss(output.gates, output.gates.new_tensor(config.targets))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rates[0] > 0.75
    assert abs(sum(rates[100:]) / 100 - 0.4) < 0.1


def test_a_threshold_opens_gates_whose_probability_exceeds_it(mixed: Aig) -> None:
    hard, _, low, high = policies(MIXED, mixed)
    assert [policy.name for policy in (hard, low, high)] == ["gates-hard", "gates-0.2", "gates-0.9"]
    gated = [number for number in range(9) if number != FIXED]
    for policy, p in ((low, 0.2), (hard, 0.5), (high, 0.9)):
        predict(policy, mixed, images(8))
        odds: list[Tensor] = []
        hooks = [gate.register_forward_hook(lambda *a, odds=odds: odds.append(a[2])) for gate in mixed.gates()]
        gates = predict(policy, mixed, images(8)).facts["gates"]
        for hook in hooks:
            hook.remove()
        assert torch.equal(gates[:, gated], torch.stack(odds, 1).sigmoid() > p)


# ---- config


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"depth": 20, "target_rate": [0.5, 0.5]}, "target_rate"),
        ({"depth": 33}, "depth"),
        ({"depth": 2}, "depth"),
        ({"depth": 110, "schedule": "published"}, "schedule"),
        ({"depth": 152, "schedule": "published"}, "schedule"),
        ({"depth": 50, "schedule": "published", "target_rate": [0.5] * 16}, "schedule"),
        ({"target_rate": 1.5}, "target_rate"),
        ({"thresholds": [1.0]}, "thresholds.0"),
        ({"target_rat": 0.5}, "target_rat"),
    ],
)
def test_a_wrong_setting_is_refused(keys: dict[str, object], key: str) -> None:
    with fails(ConfigError, key):
        validate(AigConfig, {"name": "convnet_aig", **keys}, "family")


# ---- external weights


def released_names(net: Aig) -> dict[str, str]:
    """The name that the released code gives to each tensor of such a net."""
    parts = {"residual.0": "conv1", "residual.1": "bn1", "residual.3": "conv2", "residual.4": "bn2"}
    parts |= {"residual.6": "conv3", "residual.7": "bn3", "gate.fc1": "fc1", "gate.fc1bn": "fc1bn", "gate.fc2": "fc2"}
    stages = STAGES[50] if net.fc.in_features == 2048 else (len(net.blocks) // 3,) * 3
    places = [f"layer{stage + 1}.{number}" for stage, count in enumerate(stages) for number in range(count)]
    found = {}
    for name in net.state_dict():
        top, *rest = name.split(".")
        if top == "blocks":
            number, part, rest = int(rest[0]), ".".join(rest[1:3]), rest[3:]
            part = part if part.startswith("shortcut") else parts[part]
            found[name] = ".".join([places[number], part, *rest])
        else:
            found[name] = {"stem.0": "conv1", "stem.1": "bn1"}.get(f"{top}.{rest[0]}", "linear") + f".{rest[-1]}"
    return found


@pytest.mark.parametrize("depth", [20, 50])
def test_released_weights_load_by_name_and_completely(depth: int) -> None:
    config = AigConfig(depth=depth)
    torch.manual_seed(0)
    source, net = build(config, 7), build(config, 7)
    names = released_names(source)
    theirs = {names[name]: value for name, value in source.state_dict().items()}
    theirs = {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}  # torch 0.3
    assert "layer2.0.shortcut.0.weight" in theirs and "layer3.1.fc1bn.running_var" in theirs
    assert load_pretrained(config, net, theirs) == Loaded([], [])
    loaded = net.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(loaded[name], value), name
    with fails(ConfigError, "weights", subject="blocks.0.odd.weight"):
        load_pretrained(config, net, {**theirs, "layer1.0.odd.weight": torch.zeros(1)})
    with fails(ConfigError, "weights", subject="fc.bias"):
        load_pretrained(config, net, {name: value for name, value in theirs.items() if name != "linear.bias"})
    fixed = AigConfig(depth=depth, target_rate=(1.0, *(0.5,) * (config.num_blocks - 1)))
    with fails(ConfigError, "family.target_rate", subject="0"):
        load_pretrained(fixed, build(fixed, 7), theirs)


def test_torchvisions_weights_fill_all_but_the_gates() -> None:
    config = AigConfig(depth=50)
    torch.manual_seed(0)
    plain, net = torchvision.models.resnet50(num_classes=4).eval(), build(config, 4).eval()
    kept = load_pretrained(config, net, plain.state_dict()).initial
    assert kept and all(".gate." in name for name in kept)
    batch = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        opened = net.stem(batch)
        for block in net.blocks:
            opened = block(opened, None)
        torch.testing.assert_close(net.fc(opened.mean(dim=(2, 3))), plain(batch), rtol=1e-4, atol=1e-4)
    with fails(ConfigError, "--new-head", subject="fc"):
        load_pretrained(config, build(config, 5), plain.state_dict())
    loaded = load_pretrained(config, build(config, 5), plain.state_dict(), new_head=True)
    assert loaded.left_out == ["fc.weight", "fc.bias"] and {*loaded.initial} == {*kept, "fc.weight", "fc.bias"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_take_and_put_preserve_the_memory_format(layout: torch.memory_format) -> None:
    x = torch.randn(5, 4, 3, 2).contiguous(memory_format=layout)
    rows = torch.tensor([0, 3])
    taken = take(x, rows)
    assert torch.equal(taken, x[[0, 3]]) and taken.is_contiguous(memory_format=layout)
    found = put(x.clone(), rows, taken + 1)
    assert torch.equal(found[[0, 3]], x[[0, 3]] + 1) and torch.equal(found[[1, 2, 4]], x[[1, 2, 4]])
    assert found.is_contiguous(memory_format=layout)


# ---- controls


def held_out(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part))) for part in images(count).split(16)]


@pytest.mark.parametrize("kind", [ShuffledGates, FixedMask])
def test_a_control_keeps_the_rates_but_not_the_decisions(mixed: Aig, kind: type[ShuffledGates | FixedMask]) -> None:
    with torch.no_grad():
        control = kind().calibrated(mixed.eval(), held_out())
        gates = torch.cat([predict(Gates("gates-hard"), mixed, part).facts["gates"] for part, _ in held_out()]).float()
        found = control.predict(mixed, images(400)).facts["gates"].float()
    assert control.rates == pytest.approx(gates.mean(0).tolist())
    if kind is FixedMask:
        assert (found == found[0]).all() and found[0].sum() == math.ceil(gates.sum(1).mean() - 1e-6)
        assert gates.mean(0)[found[0] == 1].min() >= gates.mean(0)[found[0] == 0].max()
    else:
        assert (found.mean(0) - gates.mean(0)).abs().max() < 0.1
        assert {tuple(row) for row in found.tolist()} <= {tuple(row) for row in gates.tolist()}
    assert json.loads(json.dumps(control.state())) == control.state()
    assert kind().restored(control.state()) == control


def test_the_draw_of_shuffled_gates_does_not_depend_on_the_batch(mixed: Aig) -> None:
    with torch.no_grad():
        control = ShuffledGates().calibrated(mixed.eval(), held_out())
        whole = control.predict(mixed, images(40)).facts["gates"]
        parts = [control.predict(mixed, images(40)[n : n + 3]).facts["gates"] for n in range(0, 40, 3)]
    assert torch.equal(torch.cat(parts), whole) and len(whole.unique(dim=0)) > 1


def test_controls_that_run_all_blocks_give_the_whole_nets_answers(mixed: Aig) -> None:
    for kind in (ShuffledGates, FixedMask):
        control = kind(patterns=(("1" * len(mixed.blocks), 3),))
        with torch.no_grad():
            noise = torch.full((8, len(mixed.gates())), math.inf)
            whole = mixed.eval()(images(8), noise).logits
            torch.testing.assert_close(control.predict(mixed, images(8)).logits, whole)
