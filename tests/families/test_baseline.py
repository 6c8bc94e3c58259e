"""Tests of the fixed nets: each builds and runs, sizes are the published ones, and a policy's price is what it ran."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from raised import fails
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline import cost
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.families.baseline.inference import BaselineResolution, MultiCrop, policies
from pipeline.families.baseline.model import MIN_SIDE_PX, TORCHVISION, BaselineConfig, CifarResNet, build
from pipeline.families.baseline.objective import groups
from pipeline.families.baseline.speedrun import SpeedrunNet
from pipeline.families.convnet_aig.model import AigConfig
from pipeline.families.convnet_aig.model import build as build_aig
from pipeline.family import Prediction


def num_params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def sized(net: nn.Module, side_px: int) -> tuple[int, ...]:
    """The shape of the logits of two images, by a net on the meta device: nothing is computed."""
    return tuple(net.eval()(torch.empty(2, 3, side_px, side_px, device="meta")).logits.shape)


# ---- nets


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_net_is_torchvisions_and_accepts_images_of_its_smallest_side(name: str) -> None:
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    with torch.device("meta"):
        net = build(BaselineConfig(net=name), 1000)
        plain = torchvision.models.get_model(name, **options)
    assert {key.removeprefix("net."): value.shape for key, value in net.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    least = MIN_SIDE_PX.get(name, 8)
    assert sized(net, 64) == sized(net, least) == (2, 1000)
    if name in MIN_SIDE_PX:
        with fails(ConfigError, "images", subject=least - 1):
            sized(net, least - 1)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "cifar_resnet", "cifar_preresnet"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_small_nets_run_and_learn(name: str, stem: str) -> None:
    torch.manual_seed(0)
    net = build(BaselineConfig.model_validate({"net": name, "stem": stem, "depth": 8}), 7)
    assert net.draw_noise(2) is None
    logits = net.train()(torch.randn(2, 3, 32, 32)).logits
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_googlenet_trains_without_its_auxiliary_classifiers() -> None:
    net = build(BaselineConfig(net="googlenet"), 7)
    assert net.train()(torch.randn(2, 3, 32, 32)).logits.shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_cifar_stem_does_not_reduce_small_images(name: str) -> None:
    sides: list[int] = []
    for stem in ("imagenet", "cifar"):
        net = build(BaselineConfig.model_validate({"net": name, "stem": stem}), 7).eval()
        last = [module for module in net.modules() if isinstance(module, nn.Conv2d)][-1]
        last.register_forward_hook(lambda _, __, y: sides.append(y.shape[-1]))
        net(torch.randn(1, 3, 32, 32))
    assert sides == {"resnet18": [1, 4], "mobilenet_v2": [1, 2]}[name]


def test_resnet_110_has_the_papers_size_and_is_convnet_aigs_backbone() -> None:
    with FakeTensorMode():
        plain, gated = build(BaselineConfig(net="cifar_resnet"), 10), build_aig(AigConfig(depth=110), 10)
        macs = cost.measure(plain, torch.empty(1, 3, 32, 32)).macs
    assert num_params(plain) == 1_730_714 == num_params(gated) - 35_916
    assert macs == 253_183_040 - 33_216  # ConvNet-AIG-110 less its gates


def test_preresnet_110_takes_the_shortcut_from_the_activated_input_where_it_projects() -> None:
    torch.manual_seed(1)
    net = build(BaselineConfig(net="cifar_preresnet", depth=8), 10).eval()
    plain, down = net.layers[0], net.layers[1]
    x = torch.randn(2, 16, 8, 8)
    zero = torch.zeros(1, 1, 1, 1)
    assert torch.equal(plain(x, zero), x)
    assert torch.equal(down(x, zero), down.shortcut(down.first(x)))


def test_preresnet_110_is_resnet_110_with_other_places_of_its_norms() -> None:
    with torch.device("meta"):
        net = build(BaselineConfig(net="cifar_preresnet"), 10)
    stem, shortcuts, firsts, tail = -2 * 16, -2 * (32 + 64), -2 * (16 + 32), 2 * 64  # where a norm left, shrank, came
    assert num_params(net) == 1_730_714 + stem + shortcuts + firsts + tail


# ---- stochastic depth


def stochastic(rate: float = 0.5, depth: int = 20) -> CifarResNet:
    torch.manual_seed(2)
    net = build(BaselineConfig(net="cifar_resnet", depth=depth, stochastic_depth=rate), 10)
    assert isinstance(net, CifarResNet)
    return net


def test_survival_falls_linearly_to_the_last_block() -> None:
    expected = 1 - 0.5 * torch.arange(1, 10) / 9
    torch.testing.assert_close(stochastic().get_buffer("survival"), expected)
    assert "survival" not in stochastic().state_dict()


def test_a_block_survives_with_its_probability() -> None:
    net = stochastic()
    noise = net.draw_noise(40_000)
    assert noise.shape == (40_000, 9)
    survival = net.get_buffer("survival")
    kept: list[Tensor] = []
    for layer in net.layers:
        layer.forward = lambda x, scale: (kept.append(scale.mean()), x)[1]  # type: ignore[method-assign]
    net.tail.forward = lambda x: x.expand(-1, 64, -1, -1)[:, :64] if x.shape[1] == 64 else x.repeat(1, 4, 1, 1)
    net.train()(torch.zeros(40_000, 3, 1, 1), noise)
    torch.testing.assert_close(torch.stack(kept), survival, rtol=0, atol=4 * 0.5 / 200)


def test_dropped_images_skip_a_block_and_others_get_its_unscaled_residual() -> None:
    net = stochastic(depth=8)
    seen: list[Tensor] = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, inputs, y: seen.append((module, inputs[0], y)))
    noise = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    net.eval()(torch.randn(2, 3, 16, 16), noise)
    for layer, x, y in seen:
        torch.testing.assert_close(y[0], torch.relu(layer.shortcut(x) + layer.residual(x))[0])
        torch.testing.assert_close(y[1], torch.relu(layer.shortcut(x))[1])


def test_evaluation_scales_each_block_by_its_survival() -> None:
    net = stochastic(depth=8).eval()
    seen: list[Tensor] = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, inputs, y: seen.append((module, inputs[0], y)))
    net(torch.randn(2, 3, 16, 16))
    for (layer, x, y), survival in zip(seen, net.get_buffer("survival"), strict=True):
        torch.testing.assert_close(y, torch.relu(layer.shortcut(x) + survival * layer.residual(x)))


def test_training_draws_its_own_noise_and_repeats_with_the_seed() -> None:
    net = stochastic(depth=8).train()
    x = torch.randn(8, 3, 16, 16)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(net(x).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---- policies


def predict(policy: BaselineResolution, net: nn.Module, images: Tensor) -> Prediction:
    with torch.no_grad():
        return policy.predict(net.eval(), images)


def test_policies_are_native_then_each_resolution_natively_and_down_and_up() -> None:
    config = BaselineConfig(net="cifar_resnet", depth=8, resolutions_px=(8, 24))
    found = policies(config, build(config, 10))
    assert [policy.name for policy in found] == [
        "native",
        "native-8px",
        "down-and-up-8px",
        "native-24px",
        "down-and-up-24px",
    ]


def test_a_resolution_runs_the_net_on_resized_images_and_counts_their_macs() -> None:
    config = BaselineConfig(net="cifar_resnet", depth=8, resolutions_px=(8,))
    net = build(config, 10).eval()
    x = torch.randn(3, 3, 16, 16)
    small = F.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    again = F.interpolate(small, (16, 16), mode="bilinear", antialias=True)
    found = [predict(policy, net, x) for policy in policies(config, net)]
    for prediction, images in zip(found, (x, small, again), strict=True):
        torch.testing.assert_close(prediction.logits, net(images).logits.detach())
        assert prediction.macs.tolist() == [cost.measure(net, images[:1]).macs] * 3
    native, lower, control = (int(prediction.macs[0]) for prediction in found)
    head = 640  # does not shrink with the image
    assert (native - head) == 4 * (lower - head)
    assert control == native


def test_macs_are_counted_for_each_size_of_images() -> None:
    net = build(BaselineConfig(net="cifar_resnet", depth=8), 10)
    policy = BaselineResolution()
    for x in (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 24), torch.randn(5, 3, 16, 16)):
        predict(policy, net, x)
        with FlopCounterMode(display=False) as counter:
            found = predict(policy, net, x)
        assert found.macs.sum().item() == counter.get_total_flops() // 2


# ---- the speed-run net


def patches_of(net: SpeedrunNet, x: Tensor) -> Tensor:
    """Outputs of the whitening filters, [12, n]."""
    return F.conv2d(x, net.whiten.get_buffer("weight")[:12]).transpose(0, 1).flatten(1)


def test_the_speedrun_net_whitens_the_first_training_batch_once() -> None:
    torch.manual_seed(0)
    net, x = build(BaselineConfig(net="speedrun"), 10), torch.randn(16, 3, 16, 16).cumsum(-1)
    assert isinstance(net, SpeedrunNet) and cost.measure(net, torch.zeros(1, 3, 32, 32)).macs == 118_147_360
    net.eval()(x)
    assert not net.whiten.is_fitted
    net.train()(x)
    flat = patches_of(net, x)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(12), atol=0.02, rtol=0)
    before = net.state_dict()
    net(10 * x)
    assert torch.equal(before["whiten.weight"], net.whiten.get_buffer("weight"))
    other = build(BaselineConfig(net="speedrun"), 10)
    other.load_state_dict(before)
    assert isinstance(other, SpeedrunNet) and other.whiten.is_fitted


def test_the_speedrun_nets_norms_learn_their_biases_alone_and_faster() -> None:
    config = BaselineConfig(net="speedrun")
    net = build(config, 10)
    (rest, biases) = groups(config, net)["main"]
    assert biases.lr_factor == 64 and not biases.decay and len(biases.parameters) == 6
    grouped = {id(p) for p in (*rest.parameters, *biases.parameters)}
    assert grouped == {id(p) for p in net.parameters() if p.requires_grad}


def test_six_views_of_an_image_and_of_its_mirror_image_have_the_same_answer() -> None:
    net = build(BaselineConfig(net="cifar_resnet", depth=8), 10).eval()
    policy, x = MultiCrop(), torch.randn(3, 3, 16, 16)
    found, mirrored = predict(policy, net, x), predict(policy, net, x.flip(-1))
    assert (found.macs == 6 * predict(BaselineResolution(), net, x).macs).all()
    plain = predict(BaselineResolution(), net, x).logits, predict(BaselineResolution(), net, x.flip(-1)).logits
    assert not torch.allclose(found.logits, plain[0])
    torch.testing.assert_close(found.logits.sum(), mirrored.logits.sum(), atol=0.5, rtol=0.05)


# ---- config


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"net": "resnet19"}, "net"),
        ({"net": "cifar_resnet", "depth": 109}, "depth"),
        ({"net": "cifar_resnet", "depth": 2}, "depth"),
        ({"net": "cifar_resnet", "stochastic_depth": 1.0}, "stochastic_depth"),
        ({"net": "densenet121", "resolutions_px": [64, 28]}, "resolutions_px"),
        ({"net": "resnet50", "resolutions_px": [4]}, "resolutions_px.0"),
        ({"net": "vgg16", "stem": "cifar"}, "stem"),
        ({"net": "resnet50", "stem": "tiny"}, "stem"),
    ],
)
def test_a_wrong_setting_is_refused(keys: dict[str, object], key: str) -> None:
    with fails(ConfigError, key):
        validate(BaselineConfig, {"name": "baseline", **keys}, "family")


def test_batchnorm_momentum_is_the_nets_default_or_the_configs() -> None:
    for asked, expected in ((None, 0.01), (0.1, 0.1)):
        net = build(BaselineConfig(net="mobilenet_v3_small", batchnorm_momentum=asked), 5)
        assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {expected}
