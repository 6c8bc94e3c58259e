"""Nets of torchvision and timm: built as there, dropping by each image's noise, filled from a file tensor by tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
import torchvision
from raised import fails
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline import cost
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.families.baseline import foreign, image_noise
from pipeline.families.baseline.foreign import Foreign
from pipeline.families.baseline.image_noise import DroppedImages, DroppedValues, ImageNoise
from pipeline.families.baseline.model import BaselineConfig, build
from pipeline.families.baseline.released import load_pretrained
from pipeline.weights import Loaded

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed: the extra `timm`")
SMALL = ["mnasnet0_5", "squeezenet1_1", "shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0"]


def made(name: str, classes: int = 7, seed: int = 0) -> Foreign:
    torch.manual_seed(seed)
    net = build(BaselineConfig(net=name), classes)
    assert isinstance(net, Foreign)
    return net


def filled(
    name: str, tensors: Mapping[str, Tensor], classes: int = 7, new_head: bool = False
) -> tuple[Foreign, Loaded]:
    net = made(name, classes, seed=1)
    return net, load_pretrained(BaselineConfig(net=name), net, tensors, new_head)


def random_like(net: nn.Module) -> dict[str, Tensor]:
    """Other values for the net, of its own sizes and types."""
    torch.manual_seed(5)
    return {n: torch.rand_like(v) if v.is_floating_point() else v.clone() for n, v in net.state_dict().items()}


# ---- torchvision's nets


def is_theirs(name: str, **options: object) -> None:
    """The same weights from the same draws, and then the same logits."""
    ours = made(f"torchvision:{name}").eval()
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=7, **options).eval()
    assert list(theirs.state_dict()) == [key.removeprefix("net.") for key in ours.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x).logits, theirs(x))


@pytest.mark.parametrize("name", SMALL)
def test_a_net_is_torchvisions_to_the_bit(name: str) -> None:
    is_theirs(name)


@pytest.mark.faults
@pytest.mark.parametrize("name", foreign.torchvision_names())
def test_every_net_that_classifies_is_built_learns_and_has_a_head_for_the_classes(name: str) -> None:
    other = build(BaselineConfig(net=f"torchvision:{name}"), 6)
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    del other  # the largest take gigabytes
    torch.manual_seed(0)
    net = build(BaselineConfig(net=f"torchvision:{name}"), 5)
    assert isinstance(net, Foreign)
    differ = {key.rpartition(".")[0] for key, value in net.state_dict().items() if value.shape != shapes[key]}
    assert differ == set(net.head())
    side = 224 if name.startswith(("vit", "maxvit")) else 75 if name == "inception_v3" else 64
    net.train()(torch.randn(2, 3, side, side)).logits.logsumexp(1).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    del net
    ctypes.CDLL(None).malloc_trim(0)  # else this process keeps the gigabytes of the largest


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"net": "torchvision:resnet19"}, "net"),
        ({"net": "torchvision:"}, "net"),
        ({"net": "torchvision:fasterrcnn_resnet50_fpn"}, "net"),
        ({"net": "timm:"}, "net"),
        ({"net": "keras:resnet50"}, "net"),
        ({"net": "torchvision:resnet18", "stem": "cifar"}, "stem"),
        ({"net": "torchvision:resnet18", "depth": 20}, "depth"),
        ({"net": "timm:resnet18", "stochastic_depth": 0.5}, "stochastic_depth"),
    ],
)
def test_a_wrong_net_or_a_key_that_it_does_not_have_is_refused(keys: dict[str, object], key: str) -> None:
    with fails(ConfigError, key):
        validate(BaselineConfig, {"name": "baseline", **keys}, "family")


def test_a_momentum_without_batchnorm_is_refused() -> None:
    with fails(ConfigError, "family.batchnorm_momentum", subject="squeezenet1_1"):
        build(BaselineConfig(net="torchvision:squeezenet1_1", batchnorm_momentum=0.1), 5)
    norms = [m for m in made("torchvision:mnasnet0_5").modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {torchvision.models.mnasnet._BN_MOMENTUM}


def test_images_of_a_size_that_the_net_cannot_take_are_refused_and_other_errors_are_not_touched() -> None:
    net = made("torchvision:squeezenet1_1").eval()
    with fails(ConfigError, "images", subject="8x16"):
        net(torch.zeros(1, 3, 8, 16))
    assert net(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 7)
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 4, 64, 64))  # channels
    with pytest.raises(ValueError) as caught:
        made("torchvision:mnasnet0_5").train()(torch.zeros(1, 3, 16, 16))
    assert caught.type is ValueError  # torch's own: BatchNorm needs more than one image


# ---- noise


def frozen(net: Foreign) -> Foreign:
    """In training mode, but for BatchNorm, which mixes images; it has the statistics of one batch."""
    norms = [module for module in net.train().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    net(torch.randn(8, 3, 64, 64, dtype=next(net.parameters()).dtype))
    for norm in norms:
        norm.eval()
    return net


@pytest.mark.parametrize("name", ["torchvision:efficientnet_b0", "torchvision:squeezenet1_1"])
def test_what_is_dropped_is_each_images_own(name: str) -> None:
    net, x = frozen(made(name).double()), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    noise = net.draw_noise(4)
    whole = net(x, noise).logits
    torch.testing.assert_close(net(x[1:3], noise[1:3]).logits, whole[1:3], rtol=1e-9, atol=1e-9)
    assert torch.equal(net(x, noise).logits, whole)
    assert not torch.allclose(net(x, net.draw_noise(4)).logits, whole)
    net.eval()
    assert torch.equal(net(x, noise).logits, net(x).logits)  # nothing is dropped in evaluation
    assert net.noise.rows is None


def test_training_draws_its_noise_from_the_default_generator() -> None:
    net, x, found = frozen(made("torchvision:squeezenet1_1")), torch.randn(2, 3, 32, 32), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(net(x).logits)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_no_random_layer_of_torchvisions_remains() -> None:
    net = made("torchvision:efficientnet_b0")
    kinds = [type(module) for module in net.modules()]
    assert (kinds.count(DroppedImages), kinds.count(DroppedValues)) == (15, 1)
    rates = [m.rate for m in net.modules() if isinstance(m, DroppedImages)]
    assert all(a < b for a, b in pairwise(rates)) and rates[-1] < 0.2
    assert not any(isinstance(m, nn.Dropout | torchvision.ops.StochasticDepth) and m.p > 0 for m in net.modules())


def test_values_are_dropped_with_their_probability_independently_of_image_layer_and_place() -> None:
    torch.manual_seed(0)
    noise = ImageNoise(image_noise.draw(400, torch.device("cpu")))
    kept = [noise.keeps(0.3, layer, 500).double() - 0.7 for layer in (0, 1)]  # [B, 500]
    sigma = (0.3 * 0.7 / kept[0].numel()) ** 0.5
    assert all(abs(each.mean()) < 4 * sigma for each in kept)
    assert kept[0].mean(1).std().isclose(torch.tensor((0.21 / 500) ** 0.5).double(), rtol=0.2)
    one, shifted = kept[0][:, :-1], kept[0][:, 1:]
    for product in (kept[0] * kept[1], kept[0][1:] * kept[0][:-1], one * shifted):
        assert abs(product.mean()) < 4 * 0.21 / product.numel() ** 0.5


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    noise = ImageNoise(image_noise.draw(3000, torch.device("cpu")))
    x = torch.ones(3000, 2, 5)
    for layer in (DroppedValues(noise, 0.25, 0), DroppedImages(noise, 0.25, 1)):
        found = layer.train()(x)
        assert found.unique().tolist() == pytest.approx([0, 4 / 3])
        assert abs(found.mean() - 1) < 0.05
        assert torch.equal(layer.eval()(x), x)
    whole = DroppedImages(noise, 0.25, 1, scales=False).train()(x)
    assert whole.unique().tolist() == [0, 1] and (whole.flatten(1).std(1) == 0).all()


# ---- files of torchvision's


def test_auxiliary_classifiers_are_left_out_by_name() -> None:
    theirs = torchvision.models.inception_v3(init_weights=False, num_classes=7)
    net, loaded = filled("torchvision:inception_v3", theirs.state_dict())
    assert set(loaded.left_out) == {name for name in theirs.state_dict() if name.startswith("AuxLogits.")}
    assert not loaded.initial and loaded.expected is not None and loaded.expected.mean == (0.5, 0.5, 0.5)
    assert net.train()(torch.zeros(2, 3, 75, 75)).logits.shape == (2, 7)


@pytest.mark.parametrize("name", ["mnasnet0_5", "squeezenet1_1"])
def test_every_tensor_of_a_file_is_used_or_a_head_for_other_classes_left_out(name: str) -> None:
    weights = random_like(torchvision.models.get_model(name))
    net, loaded = filled(f"torchvision:{name}", weights, 1000)
    assert not loaded.initial and not loaded.left_out
    assert all(torch.equal(value, weights[key.removeprefix("net.")]) for key, value in net.state_dict().items())
    with fails(ConfigError, "--new-head"):
        filled(f"torchvision:{name}", weights)
    net, loaded = filled(f"torchvision:{name}", weights, new_head=True)
    assert set(loaded.left_out) == {"classifier.1.weight", "classifier.1.bias"}
    head = [value for key, value in net.state_dict().items() if key.startswith("net.classifier.1.")]
    assert any(value.any() for value in head) == name.startswith("squeezenet")  # nothing would learn from 0 there
    with fails(ConfigError, "weights", subject="more.weight"):
        filled(f"torchvision:{name}", weights | {"more.weight": torch.zeros(2)}, 1000)
    net = made(f"torchvision:{name}")
    again, loaded = filled(f"torchvision:{name}", net.state_dict())  # our own file, without torch's version numbers
    assert loaded == Loaded([], [])
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())


# ---- timm


@needs_timm
def test_a_net_is_timms_to_the_bit_and_its_drop_paths_are_ours() -> None:
    import timm

    ours = made("timm:test_efficientnet").eval()
    torch.manual_seed(0)
    theirs = timm.create_model("test_efficientnet", num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x).logits, theirs(x))
    deep = Foreign(
        timm.create_model("test_efficientnet", drop_path_rate=0.5, num_classes=7),
        "timm:test_efficientnet",
        foreign.timm_layers(),
    )
    dropping = [module for module in deep.modules() if isinstance(module, DroppedImages)]
    assert dropping and deep.random and all(module.scales for module in dropping)
    assert not any(type(module).__name__ == "DropPath" and module.drop_prob > 0 for module in deep.modules())


@needs_timm
def test_an_unknown_net_or_tag_of_timms_is_refused_with_the_nearest() -> None:
    for name in ("resnet51q_x", "resnet50.none_such"):
        with fails(ConfigError, "family.net", subject=name):
            made(f"timm:{name}")


@needs_timm
def test_a_net_with_attention_has_the_macs_of_both_products() -> None:
    net = made("timm:test_vit").eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x)
    assert cost.measure(net, x).macs == counter.get_total_flops() // 2
    assert any("attn" in name for name in cost.measure(net, x).by_module)


@needs_timm
def test_timms_own_names_are_used_whole_and_its_statement_of_images_is_passed_on() -> None:
    import timm

    weights = random_like(timm.create_model("test_efficientnet", num_classes=9))
    net, loaded = filled("timm:test_efficientnet", weights, 9)
    assert not loaded.initial and not loaded.left_out and loaded.expected is not None
    stated = net.net.pretrained_cfg
    assert loaded.expected.mean == tuple(stated["mean"]) and loaded.expected.side_px == stated["input_size"][1]
    assert all(torch.equal(value, weights[key.removeprefix("net.")]) for key, value in net.state_dict().items())
    _, loaded = filled("timm:test_efficientnet", weights, new_head=True)
    assert set(loaded.left_out) == {"classifier.weight", "classifier.bias"}


def first_authors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ConvNeXt's weights with the names of its authors' files."""
    found = {}
    for name, value in weights.items():
        name = name.replace("stages.", "stages_").replace(".blocks.", ".").replace("conv_dw", "dwconv")
        name = name.replace("mlp.fc", "pwconv").replace("head.norm", "norm").replace("head.fc", "head")
        name = name.replace("stem.", "downsample_layers.0.").replace("stages_", "stages.")
        if ".downsample." in name:
            stage, _, rest = name.removeprefix("stages.").partition(".downsample.")
            name = f"downsample_layers.{stage}.{rest}"
        found[name] = value.flatten(1) if "pwconv" in name and value.dim() == 4 else value
    return found


@needs_timm
def test_what_timms_converter_drops_is_named_and_what_it_computes_is_refused() -> None:
    import timm

    weights = random_like(timm.create_model("test_convnext", num_classes=7))
    theirs = first_authors(weights)
    assert len(theirs) == len(weights) and not set(theirs) <= set(weights)
    net, loaded = filled("timm:test_convnext", theirs | {"norms.0.weight": torch.ones(3)})
    assert loaded.left_out == ["norms.0.weight"] and not loaded.initial
    assert all(torch.equal(value, weights[key.removeprefix("net.")]) for key, value in net.state_dict().items())
    tower = {f"visual.trunk.{name}": value for name, value in weights.items() if not name.startswith("head.fc")}
    with fails(ConfigError, "weights", subject="head.fc.bias"):  # which timm sets to 0
        filled("timm:test_convnext", tower | {"visual.head.proj.weight": weights["head.fc.weight"]})


def tensorflows(squeezes: bool, blocks: int) -> list[str]:
    """The names of the layers of an EfficientNet file in its own order; only the first block does not expand."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    squeeze = [("_se_reduce", ("weight", "bias")), ("_se_expand", ("weight", "bias"))] if squeezes else []
    layers: list[tuple[str, tuple[str, ...]]] = [("_conv_stem", ("weight",)), ("_bn0", norm)]
    for number in range(blocks):
        inner = [("_expand_conv", ("weight",)), ("_bn0", norm)] if number else []
        inner += [("_depthwise_conv", ("weight",)), ("_bn1", norm), *squeeze]
        inner += [("_project_conv", ("weight",)), ("_bn2", norm)]
        layers += [(f"_blocks.{number}.{layer}", parts) for layer, parts in inner]
    layers += [("_conv_head", ("weight",)), ("_bn1", norm), ("_fc", ("weight", "bias"))]
    return [f"{layer}.{part}" for layer, parts in layers for part in parts]


@needs_timm
@pytest.mark.parametrize(("name", "squeezes"), [("tf_efficientnet_lite0", False), ("tf_efficientnet_b0", True)])
def test_each_tensor_of_an_efficientnet_file_finds_its_layer(name: str, squeezes: bool) -> None:
    """The order of the layers in such a file is that of timm's modules, which the map of names does not use."""
    import timm

    weights = random_like(timm.create_model(name))
    file = dict(zip(tensorflows(squeezes, 16), weights.values(), strict=True))
    shuffled = dict(sorted(file.items()))
    net, loaded = filled(f"timm:{name}", shuffled, 1000)
    assert not loaded.initial and not loaded.left_out
    assert all(torch.equal(value, weights[key.removeprefix("net.")]) for key, value in net.state_dict().items())
    _, loaded = filled(f"timm:{name}", shuffled, new_head=True)
    assert set(loaded.left_out) == {"_fc.weight", "_fc.bias"}
    with fails(ConfigError, "weights"):
        filled(f"timm:{name}", shuffled | {"_blocks.16._bn2.weight": torch.ones(3)}, 1000)


@needs_timm
def test_an_efficientnet_file_is_refused_by_a_net_that_pads_otherwise() -> None:
    file = {name: torch.zeros(1) for name in tensorflows(False, 16)}
    with fails(ConfigError, "family.net", subject="timm:efficientnet_lite0"):
        filled("timm:efficientnet_lite0", file, 1000)


# ---- compiled and exported


@pytest.mark.parametrize(
    "name", ["torchvision:squeezenet1_1", pytest.param("timm:test_efficientnet", marks=needs_timm)]
)
def test_a_net_is_traced_as_one_graph_with_what_it_drops(name: str) -> None:
    net, x = frozen(made(name)), torch.randn(2, 3, 64, 64)
    compiled, noise = torch.compile(net, backend="eager", fullgraph=True), net.draw_noise(2)
    torch.testing.assert_close(compiled(x, noise).logits, net(x, noise).logits)
    exported = torch.export.export(net.eval().net, (x,))
    torch.testing.assert_close(exported.module()(x), net(x).logits)
