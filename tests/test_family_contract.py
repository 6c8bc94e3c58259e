"""The contract of `pipeline.family`: one set of tests, parametrised by small configs of each family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
import two_ranks
from raised import fails
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import as_mapping, dump_yaml, parse_yaml, validate
from pipeline.errors import ConfigError
from pipeline.family import AnyFamily, FamilyConfig, Policy, find, names
from pipeline.training import checkpoint, optim, state, step
from pipeline.training.loop import train
from pipeline.training.optimizers.sgd import SgdConfig
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, train_step

ARRN = {"widths": [6, 8, 10], "final": "M2x1", "head_width": 12}
RANET = {"scales": [1, 2, 3], "channels": 4, "growth": 4, "first_blocks": 1, "more_blocks": 1}
DROPS = {"drop_path": 0.3, "dropout": 0.3}
DISTILLED = {"exit_distillation": 0.5, "exit_temperature": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "arrn": {**ARRN, "ladder_px": [16, 8, 4], "inner": ["F2x2", "M2x1"], "resolutions_px": [12, 8, 4]},
    "arrn-kaiser": {**ARRN, "ladder_px": [18, 13, 9], "inner": ["F1x1", "M2x2"], "filters": "kaiser", "drop": 0.4}
    | DROPS,
    "arrn-box": {**ARRN, "ladder_px": [16, 12, 6], "inner": ["M2x1", "F2x1"], "filters": ["box", "dct"], "drop": 0},
    "baseline": {"net": "cifar_resnet", "depth": 8, "resolutions_px": [8]},
    "baseline-stochastic": {"net": "cifar_preresnet", "depth": 8, "stochastic_depth": 0.5, "dropout": 0.3},
    "baseline-torchvision": {"net": "torchvision:mnasnet0_5"},
    "baseline-timm": {"net": "timm:test_efficientnet"},
    "convnet_aig": {"depth": 8, "target_rate": 0.6, "gate_lr_factor": 0.5, "thresholds": [0.3, 0.7]},
    "convnet_aig-scaled": {"depth": 8, "target_rate": 0.5, "scaled": ["rate", "prob"]}
    | {"controls": ["shuffled", "mask"]},
    "convnet_aig-fixed": {"depth": 14, "target_rate": [1.0, 0.5, 0.2, 1.0, 0.7, 0.9], "rate_reduction": "sum"},
    "msdnet": {"exits": 3, "channels": 4, "growth": 4, "budgets": [0.5, 0.8]},
    "msdnet-imagenet": {"stem": "imagenet", "exits": 2, "first_layers": 2, "layers": 2, "depth": "even", "channels": 4}
    | {"width_factors": [1, 2, 2, 2], "growth": 2, **DISTILLED},
    "ranet": {**RANET, "width_factors": [4, 2, 1], "budgets": [0.5, 0.8]},
    "ranet-imagenet": {**RANET, "stem": "imagenet", "scales": [1, 2, 2], "width_factors": [2, 2, 1], "depth": "even"}
    | DISTILLED,
    "shape_adaptor": {"net": "vgg16_bn", "side_px": 16, "target_px": 5, "width": 0.125, "alpha_every": 7},
    "shape_adaptor-limit": {"net": "resnet50", "side_px": 16, "target_px": 5, "width": 0.125, "limit_px": 4},
    "shape_adaptor-autosc": {"net": "mobilenet_v2", "mode": "autosc", "side_px": 16, "width": 0.25},
}
if find_spec("timm") is None:
    del CASES["baseline-timm"]  # the extra `timm`
IMAGES, CLASSES, SIDE_PX = 8, 5, 16
OFTEN = {"shape_adaptor": {"alpha_every": 2}}  # so that both phases come, before and after a cut
STEPS = [(1, 4), (1, 3), (2, 3), (4, 4)]  # micro-batches of each rank, and the images of rank 0


def opened(case: str) -> tuple[AnyFamily, FamilyConfig, nn.Module]:
    """The family, its config and a net of that case, always with the same weights."""
    name = case.split("-")[0]
    family = find(name)
    config = validate(family.config, {"name": name, **CASES[case]}, "family")
    torch.manual_seed(11)
    return family, config, family.build(config, CLASSES)


def batch(net: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """The global batch: images f64, labels, and the noise of all its images from one draw."""
    torch.manual_seed(12)
    images = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX, dtype=torch.float64)
    return images, torch.arange(IMAGES) % CLASSES, net.draw_noise(IMAGES)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_family_is_tested_by_this_contract() -> None:
    assert {case.split("-")[0] for case in CASES} == set(names())


# ---- training


def test_the_loss_is_finite_and_every_parameter_gets_a_gradient(case: str) -> None:
    family, config, net = opened(case)
    images, labels, _ = batch(net)
    found = family.loss(config, net.train()(images.float()), labels)
    assert found.total.shape == ()
    assert found.total.isfinite()
    found.total.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if parameter.dim() > 1:  # a bias before a BatchNorm has none in truth
            assert parameter.grad.any(), name
    assert all(not part.requires_grad and part.shape == () for part in found.parts.values())


def test_class_probabilities_are_targets_too(case: str) -> None:
    family, config, net = opened(case)
    images, labels, noise = batch(net)
    output = net.eval()(images.float(), noise)
    hard = family.loss(config, output, labels).total
    soft = family.loss(config, output, F.one_hot(labels, CLASSES).float()).total
    torch.testing.assert_close(hard, soft)


def test_groups_partition_the_parameters_and_each_moves(case: str) -> None:
    family, config, net = opened(case)
    groups = family.groups(config, net)
    grouped = [id(p) for params in groups.values() for some in params for p in some.parameters]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert all(list(some.parameters) for params in groups.values() for some in params)
    assert {name for step in range(100) for name in family.updates(config, step)} == set(groups)


def test_noise_has_one_row_per_image_and_alone_decides_what_is_random(case: str) -> None:
    _, _, net = opened(case)
    images, _, noise = batch(net)
    assert noise is None or len(noise) == IMAGES
    net.double().eval()
    whole = net(images, noise).logits
    half = net(images[3:], None if noise is None else noise[3:]).logits
    torch.testing.assert_close(whole[3:], half, rtol=1e-9, atol=1e-9)


def test_the_same_seed_gives_the_same_weights(case: str) -> None:
    family, config, net = opened(case)
    again = opened(case)[2].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())
    other = dict(family.build(config, CLASSES).named_parameters())
    assert not all(torch.equal(value, other[name]) for name, value in net.named_parameters())


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(case: str, tmp_path: Path) -> None:
    straight = trained(case, 6, tmp_path / "straight")
    trained(case, 3, tmp_path / "cut")
    continued = trained(case, 6, tmp_path / "cut")
    found = tiny.tensors(continued)
    assert (continued.step, checkpoint.LocalStorage(tmp_path / "cut").names()[0]) == (6, "step-00000003")
    assert all(torch.equal(value, found[name]) for name, value in tiny.tensors(straight).items())


def trained(case: str, steps: int, folder: Path) -> TrainState:
    """After `steps` steps of the case's net, as a new process would: from the checkpoint in `folder`, if any."""
    name = case.split("-")[0]
    family = find(name)
    config = validate(family.config, {"name": name, **CASES[case]} | OFTEN.get(name, {}), "family")
    training = tiny.training(ema_decay=0.9, other_optimizers={"shape": SgdConfig(lr=0.3)})
    current = state.fresh(family, config, training, num_classes=CLASSES, seed=3, device=tiny.CPU)
    events = tiny.Recorder(folder)
    if (last := events.last_good()) is not None:
        state.restore(current, checkpoint.read(folder / last))
    forward, _ = step.wrap(current.net, training, tiny.CPU, optim.parameters_outside_ddp(current.optimizers))
    plan = tiny.plan(current.net, training, total_steps=steps)
    plan = dataclasses.replace(plan, family=family, config=config, forward=forward)
    train(plan, current, micros(current.step), events)
    return current


def micros(start: int) -> Iterator[list[MicroBatch]]:
    while True:
        generator = torch.Generator().manual_seed(start)
        images = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX, generator=generator)
        labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
        yield [MicroBatch(images, labels, labels)]
        start += 1


# ---- neither ranks nor micro-batches change a step


class Noised(nn.Module):
    """The net with the noise of one global draw: an image's row is the integer part of its first value."""

    def __init__(self, net: nn.Module, noise: Tensor | None) -> None:
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, images: Tensor) -> object:
        rows = images[:, 0, 0, 0].long()
        return self.net(images, None if self.noise is None else self.noise[rows])


def stepped(case: str, rows: slice, parts: int, *, frozen: bool = True) -> dict[str, Tensor]:
    """What `train_step` gives in fp64 over `parts` micro-batches of these rows: loss, gradients, and the net after it.

    BatchNorm is frozen, unless told otherwise: in training it normalises by the micro-batch, by its nature.
    """
    family, config, net = opened(case)
    images, labels, noise = batch(net)
    images[:, 0, 0, 0] = torch.arange(IMAGES) + 0.5
    net.double().train()
    for module in net.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    training = tiny.training(batch_size=IMAGES, other_optimizers={"shape": SgdConfig(lr=0.3)})
    optimizers = optim.build(family.groups(config, net), net, training)
    found: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in net.named_parameters()}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        found.update({f"gradient of {names[id(each)]}": each.grad.clone() for each in parameters})

    for optimizer in optimizers.values():
        optimizer.register_step_pre_hook(keep)
    forward, _ = step.wrap(Noised(net, noise), training, tiny.CPU, optim.parameters_outside_ddp(optimizers))
    plan = tiny.plan(net, training)
    plan = dataclasses.replace(plan, family=family, config=config, forward=forward, num_classes=CLASSES)
    pieces = [(images[rows][some], labels[rows][some]) for some in step.split(len(labels[rows]), parts)]
    meter = Meter()
    train_step(plan, TrainState(net, None, optimizers), [MicroBatch(x, y, y) for x, y in pieces], meter)
    found |= {name: torch.tensor(value) for name, value in meter.flush().items() if name != "grad_norm"}
    return found | net.state_dict()


def _steps_of_two(rank: int, folder: Path) -> None:
    found = {}
    for case in CASES:
        for parts, cut in STEPS:
            found[case, parts, cut] = stepped(case, slice(0, cut) if rank == 0 else slice(cut, IMAGES), parts)
    if rank == 0:
        torch.save(found, folder / "steps.pt")


@pytest.fixture(scope="module")
def steps_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], dict[str, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    two_ranks.run(_steps_of_two, folder)
    found: dict[tuple[str, int, int], dict[str, Tensor]] = torch.load(folder / "steps.pt")
    return found


def _assert_same(found: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert set(found) == set(whole)
    for name, value in found.items():
        torch.testing.assert_close(
            value, whole[name], rtol=1e-9, atol=1e-9, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(case: str, parts: int) -> None:
    whole = stepped(case, slice(None), 1)
    assert sum(name.startswith("gradient") and bool(value.any()) for name, value in whole.items()) > 3
    _assert_same(stepped(case, slice(None), parts), whole)


@pytest.mark.parametrize(("parts", "cut"), STEPS)
def test_micro_batches_of_two_ranks_give_those_of_one_rank_with_the_whole_batch(
    case: str, parts: int, cut: int, steps_of_two: dict[tuple[str, int, int], dict[str, Tensor]]
) -> None:
    _assert_same(steps_of_two[case, parts, cut], stepped(case, slice(None), 1))


def test_each_image_moves_the_running_statistics_once(case: str) -> None:
    """Whatever passes a step makes. Only an update of the alphas, before that of the weights, moves them as well."""
    family, config, _ = opened(case)
    passes = len(family.updates(config, 0)) * 2
    after = stepped(case, slice(None), 2, frozen=False)
    counts = [value for name, value in after.items() if name.endswith("num_batches_tracked")]
    assert set(map(int, counts)) <= {passes}
    assert after["loss"].isfinite()


# ---- policies


def test_each_policy_returns_logits_and_the_macs_of_that_forward(case: str) -> None:
    family, config, net = opened(case)
    images = batch(net)[0].float()
    net.eval()
    policies = family.policies(config, net)
    assert len({policy.name for policy in policies}) == len(policies) > 0
    said = [family.describe(policy.kind, policy.settings) for policy in policies]
    assert len(set(said)) == len(said) and all(len(text.split()) > 2 and len(text) <= 100 for text in said)
    for policy in policies:
        assert isinstance(policy, Policy)
        fitted = policy.calibrated(net, [(images, torch.arange(IMAGES) % CLASSES)])
        for some in (images[:1], images):
            _predicts(fitted, net, some)


def _predicts(policy: Policy, net: nn.Module, images: Tensor) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        policy.predict(net, images)  # whatever it measures once is measured now
        with FlopCounterMode(display=False) as counter:
            found = policy.predict(net, images)
    assert found.logits.shape == (len(images), CLASSES)
    assert found.logits.dtype == torch.float32
    assert found.logits.isfinite().all()
    assert found.macs.shape == (len(images),)
    assert found.macs.dtype == torch.float64
    assert (found.macs > 0).all()
    assert found.macs.sum().item() == counter.get_total_flops() // 2, policy.name
    assert all(len(fact) == len(images) for fact in found.facts.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training


# ---- config


def test_a_config_survives_yaml(case: str) -> None:
    family, config, _ = opened(case)
    assert validate(family.config, parse_yaml(dump_yaml(as_mapping(config)), "recipe"), "recipe") == config


def test_an_unknown_key_is_refused(case: str) -> None:
    family, config, _ = opened(case)
    known = max((key for key in family.config.model_fields), key=len)
    with fails(ConfigError, f"{known}t", subject=8):
        validate(family.config, {**as_mapping(config), f"{known}t": 8}, "family")
    with fails(ConfigError, "name", subject="another"):
        validate(family.config, {**as_mapping(config), "name": "another"}, "family")


def test_an_unknown_family_is_refused() -> None:
    with fails(ConfigError, "family.name", subject="convnet_aigs"):
        find("convnet_aigs")
