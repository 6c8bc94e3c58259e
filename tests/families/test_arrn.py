"""Tests of ARRN: exact skipping and where it must fail, dropout equal to low resolution, sizes, growing, two ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import two_ranks
from raised import fails
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from pipeline import cost
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.families.arrn import FAMILY
from pipeline.families.arrn.config import SIZES, ArrnConfig
from pipeline.families.arrn.filters import Filter, FilterPair, matrix
from pipeline.families.arrn.growing import cut, load_pretrained
from pipeline.families.arrn.inference import ArrnResolution, policies
from pipeline.families.arrn.inner import Border, ConvNorm
from pipeline.families.arrn.model import Arrn, Residual, affine, build, scaled
from pipeline.family import Prediction, cross_entropy
from pipeline.weights import Loaded

CLASSES = 10
LADDER = (32, 16, 8, 4)
SMALL = {
    "ladder_px": LADDER,
    "widths": (6, 8, 10, 12),
    "inner": ("F2x2", "M2x2", "F1x1"),
    "final": "M2x1",
    "head_width": 24,
}
EXACT: tuple[Filter, ...] = ("dct", "box")
ALL: tuple[Filter, ...] = ("dct", "box", "kaiser")
STEPS = [(64, 32), (224, 160), (7, 5), (28, 14), (301, 151), (9, 3)]


def small(**changes: object) -> ArrnConfig:
    return ArrnConfig(**{**SMALL, **changes})  # type: ignore[arg-type]


def trained(config: ArrnConfig, seed: int = 0) -> Arrn:
    """A net in fp64 and eval mode whose statistics, scales and biases differ from the initial ones."""
    torch.manual_seed(seed)
    net = build(config, CLASSES).double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.2, 0.8)
                module.weight.uniform_(0.6, 1.4)
                module.bias.normal_(0, 0.3)
        for residual in net.residuals:
            residual.project.bias.normal_(0, 0.3)
    return net


def images(count: int, height: int = 32, width: int | None = None) -> Tensor:
    """Images whose amplitude falls with frequency, as photographs' does, each of another colour and contrast."""
    generator = torch.Generator().manual_seed(5)
    width = width or height
    spectrum = torch.fft.rfft2(torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64))
    radius = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt().clamp(1 / height)
    found = torch.fft.irfft2(spectrum / radius, (height, width))
    found = found / found.std(dim=(1, 2, 3), keepdim=True)
    return found + torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    """Root mean square difference relative to b's deviation over images and classes."""
    return ((a - b).double().square().mean().sqrt() / b.double().std()).item()


@torch.no_grad()
def logits(net: Arrn, x: Tensor, noise: Tensor | None = None) -> Tensor:
    found: Tensor = net(x, noise).logits
    return found


def lifted(net: Arrn, y: Tensor, level: int = 0) -> Tensor:
    return net.at_side(y, net.ladder[level])


# ---- filters


@pytest.mark.parametrize(("fine", "coarse"), STEPS)
@pytest.mark.parametrize("kind", EXACT)
def test_downsampling_inverts_interpolation_and_preserves_constants(kind: Filter, fine: int, coarse: int) -> None:
    down, up = matrix(kind, fine, coarse), matrix(kind, coarse, fine)
    assert np.abs(down @ up - np.eye(coarse)).max() <= 1e-12
    assert np.abs(down.astype(np.float32) @ up.astype(np.float32) - np.eye(coarse)).max() <= 5e-6


@pytest.mark.parametrize(("fine", "coarse"), STEPS)
@pytest.mark.parametrize("kind", ALL)
def test_every_filter_preserves_constants_and_commutes_with_flips(kind: Filter, fine: int, coarse: int) -> None:
    for old, new in ((fine, coarse), (coarse, fine)):
        found = matrix(kind, old, new)
        assert np.abs(found.sum(1) - 1).max() <= 1e-12
        if kind != "box" or fine % coarse == 0:
            assert np.abs(found - found[::-1, ::-1]).max() <= 1e-12


@pytest.mark.parametrize("kind", EXACT)
def test_resizing_in_steps_equals_resizing_at_once(kind: Filter) -> None:
    down = matrix(kind, 16, 8) @ matrix(kind, 32, 16)
    up = matrix(kind, 16, 32) @ matrix(kind, 8, 16)
    assert np.abs(down - matrix(kind, 32, 8)).max() <= 1e-12
    assert np.abs(up - matrix(kind, 8, 32)).max() <= 1e-12


def test_the_box_filter_of_an_integer_factor_is_mean_and_repetition() -> None:
    assert np.array_equal(matrix("box", 4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert np.array_equal(matrix("box", 2, 4), [[1, 0], [1, 0], [0, 1], [0, 1]])


def test_the_dct_is_the_ideal_low_pass_of_a_mirrored_signal() -> None:
    i = np.arange(64) + 0.5
    for frequency in (0, 5, 31, 32, 50):
        wave = np.cos(np.pi * i * frequency / 64)
        kept = np.cos(np.pi * (np.arange(32) + 0.5) * frequency / 32) if frequency < 32 else np.zeros(32)
        assert np.abs(matrix("dct", 64, 32) @ wave - kept).max() <= 1e-12


def test_the_kaiser_filter_has_the_rolloff_of_the_papers() -> None:
    """Gains at shares of the fine Nyquist limit: the paper's 6 zero crossings and beta 14.77 at a factor of 2."""
    middle = matrix("kaiser", 512, 256)[128]
    assert (np.abs(middle) > 1e-12).sum() <= 25
    offset = np.arange(512) + 0.5 - 2 * (128 + 0.5)
    for share, gain in ((0.25, 0.99), (0.375, 0.88), (0.5, 0.48), (0.6, 0.15), (0.75, 0.004)):
        assert (middle * np.cos(np.pi * share * offset)).sum() == pytest.approx(gain, abs=0.011)
    off = np.abs(matrix("kaiser", 64, 32) @ matrix("kaiser", 32, 64) - np.eye(32)).max()
    assert 0.1 < off < 0.2


@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize("kind", ALL)
def test_a_filter_pair_applies_its_matrix_to_each_axis_in_either_memory_format(kind: Filter, channels: int) -> None:
    x = torch.randn(2, channels, 12, 8, dtype=torch.float64)
    for size in ((6, 4), (24, 16), (9, 5), (30, 11), (12, 8)):
        rows, columns = torch.from_numpy(matrix(kind, 12, size[0])), torch.from_numpy(matrix(kind, 8, size[1]))
        if size == (12, 8):
            rows, columns = torch.eye(12).double(), torch.eye(8).double()
        for layout in (torch.contiguous_format, torch.channels_last):
            found = FilterPair(kind).resize(x.contiguous(memory_format=layout), size)
            torch.testing.assert_close(found, rows @ x @ columns.T, rtol=1e-12, atol=1e-12)
            assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize("kind", ALL)
def test_the_rest_is_what_the_enlarged_low_pass_leaves(
    kind: Filter, channels: int, layout: torch.memory_format
) -> None:
    pair, inputs = FilterPair(kind), []
    for size in ((12, 8), (6, 4)):
        made = torch.randn(2, channels, *size, dtype=torch.float64)
        inputs.append(made.contiguous(memory_format=layout).requires_grad_())
    x, low = inputs
    found, wanted = pair.rest(x, low), x - pair.resize(low, (12, 8))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=layout)
    gradient = torch.randn_like(wanted)
    mine, theirs = (torch.autograd.grad(each, inputs, gradient) for each in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_filter_pair_first_used_in_inference_mode_works_in_training() -> None:
    net = build(small(), CLASSES)
    with torch.inference_mode():
        net.eval()(images(2).float())
    net.train()(images(4).float(), torch.ones(4, 3)).logits.sum().backward()
    assert copy.deepcopy(net).pairs[0].kind == "dct"


# ---- sizes


@pytest.mark.parametrize(
    ("size", "params", "gmacs"),
    [
        ("T", 6_979_468, (1.449, 1.183, 0.846, 0.643)),
        ("S", 19_658_840, (4.290, 3.779, 3.202, 2.026)),
        pytest.param("S-steep", 19_952_528, (5.082, 3.577, 2.422, 1.600), marks=pytest.mark.long),
        pytest.param("M", 23_651_208, (6.714, 5.771, 4.525, 2.691), marks=pytest.mark.long),
        ("cifar", 7_908_682, (0.622, 0.430, 0.145)),
        pytest.param("tiny-imagenet", 9_161_128, (1.036, 0.687, 0.347, 0.205), marks=pytest.mark.long),
        pytest.param("stl10", 8_917_738, (2.343, 1.547, 0.779, 0.459), marks=pytest.mark.long),
    ],
)
def test_parameters_and_macs_of_the_named_sizes(size: str, params: int, gmacs: tuple[float, ...]) -> None:
    classes = {"cifar": 10, "tiny-imagenet": 200, "stl10": 10}.get(size, 1000)
    with FakeTensorMode():  # shapes only: nothing is computed
        net = build(ArrnConfig(size=size), classes)  # type: ignore[arg-type]
        found = [cost.measure(net, torch.empty(1, 3, side, side)).macs / 1e9 for side in net.ladder[: len(gmacs)]]
    assert sum(p.numel() for p in net.parameters()) == params
    assert found == pytest.approx(gmacs, abs=0.00051)


def test_box_filters_take_no_macs() -> None:
    with FakeTensorMode():
        net = build(ArrnConfig(size="S-steep", filters="box"), 1000)
        assert cost.measure(net, torch.empty(1, 3, 224, 224)).macs / 1e9 == pytest.approx(4.51, abs=0.0051)


# ---- skipping is exact


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("kind", EXACT)
def test_the_whole_net_on_an_upsampled_image_equals_the_skipping_net_on_the_small_one(kind: Filter, level: int) -> None:
    for factor in (1, 1.5):  # square, and not
        net = trained(small(filters=kind))
        x = images(6, 32, int(32 * factor))
        y = net.at_side(x, LADDER[level])
        skipped, full = logits(net, y), logits(net, lifted(net, y))
        assert apart(full, skipped) <= 1e-10
        assert apart(logits(net, x), skipped) >= 0.1  # the true high-resolution effect: the law is not vacuous
        net.float()
        assert apart(logits(net, lifted(net, y.float())), logits(net, y.float())) <= 1e-3


@pytest.mark.parametrize(
    ("ladder", "sides"), [((30, 21, 13, 9), (21, 13, 9)), ((24, 8, 5), (8, 5)), ((20, 4), (4,)), ((33, 17, 9), (17, 9))]
)
def test_skipping_is_exact_on_ladders_of_any_steps_and_shapes(ladder: tuple[int, ...], sides: tuple[int, ...]) -> None:
    count = len(ladder)
    config = small(ladder_px=ladder, widths=(5, 6, 7, 8)[:count], inner=("F2x1", "M2x1", "F1x2")[: count - 1])
    net = trained(config)
    for side in sides:
        y = images(3, side, side * 5 // 3)
        full = lifted(net, y)
        assert min(full.shape[-2:]) == ladder[0]
        assert apart(logits(net, full), logits(net, y)) <= 1e-10


def test_an_image_between_two_resolutions_enters_at_the_higher_one() -> None:
    net = trained(small())
    for side, level in ((31, 0), (20, 0), (12, 1), (7, 2), (5, 2)):
        y = images(4, side)
        assert net.level(y) == level
        skipped = logits(net, y)
        assert apart(logits(net, lifted(net, y, level)), skipped) <= 1e-10
        assert apart(logits(net, lifted(net, y)), skipped) <= 1e-10


def test_detail_above_the_finest_resolution_is_filtered_out() -> None:
    net = trained(small())
    x = images(3, 40)
    assert torch.equal(logits(net, x), logits(net, net.at_side(x, 32)))


def test_skipping_with_the_kaiser_filter_is_nearly_exact() -> None:
    wide = {"widths": (24, 32, 48, 64), "inner": ("F4x2", "F4x2", "M4x2"), "ladder_px": (64, 32, 16, 8)}
    shares, x = [], images(8, 64)
    for seed in range(3):
        torch.manual_seed(seed)
        net = build(small(**wide, filters="kaiser", residual_gain=1.0), CLASSES).double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # statistics of this batch alone
        with torch.no_grad():
            net.train()(x, torch.ones(8, 3))
        y = net.eval().at_side(x, 32)
        skipped = logits(net, y)
        leak = apart(logits(net, lifted(net, y)), skipped)
        assert leak > 1e-6
        shares.append(leak / apart(logits(net, x), skipped))
    assert sorted(shares)[1] <= 0.15


def test_zero_padding_inside_a_residual_breaks_exact_skipping() -> None:
    net = trained(small())
    for module in net.residuals.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "zeros"
    y = images(4, 16)
    assert apart(logits(net, lifted(net, y)), logits(net, y)) >= 1e-3


def test_normalising_each_image_inside_a_residual_breaks_exact_skipping() -> None:
    net = trained(small())
    for module in list(net.residuals.modules()):
        if isinstance(module, ConvNorm):
            module.norm = nn.GroupNorm(1, module.conv.out_channels).double()  # type: ignore[assignment]
    y = images(4, 16)
    assert apart(logits(net, lifted(net, y)), logits(net, y)) >= 1e-6


@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), (3, 6), (1, 1)])
@pytest.mark.parametrize("border", ["replicate", "zeros"])
def test_a_norm_that_is_folded_into_its_convolution_changes_nothing(kernel: int, groups: int, border: Border) -> None:
    layer = ConvNorm(6, 12, kernel, border, groups).double()
    layer(2 + torch.randn(8, 6, 9, 7).double(), 8)  # statistics other than 0 and 1
    nn.init.uniform_(layer.norm.weight)
    nn.init.uniform_(layer.norm.bias)
    few, many = torch.randn(1, 6, 1, 1).double(), torch.randn(64, 6, 9, 7).double()
    assert not layer._folds(many), "it trains"
    layer.eval()
    assert not layer._folds(many), "gradients are wanted"
    with torch.no_grad():
        assert layer._folds(many) and not layer._folds(few)
        hook = layer.conv.register_forward_hook(lambda *given: None)
        assert not layer._folds(many), "somebody looks at the convolution"
        hook.remove()
        torch.testing.assert_close(layer(many, 64), layer.norm(layer.conv(many)), rtol=1e-12, atol=1e-12)
        layer.norm.running_mean += 1  # as a later step of training does: nothing is cached from the previous call
        torch.testing.assert_close(layer(many, 64), layer.norm(layer.conv(many)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_layers_of_a_residual_map_zero_to_a_constant(training: bool) -> None:
    net = trained(small()).train(training)
    for residual in net.residuals:
        assert isinstance(residual, Residual)
        h = residual.inner(torch.zeros(2, residual.project.in_channels, 9, 7).double(), 2)
        assert h.std(dim=(2, 3)).max() <= 1e-6 * max(1.0, h.abs().max().item())


def test_a_residual_adds_its_low_pass_and_nothing_to_the_mean() -> None:
    net = trained(small())
    residual, r = net.residuals[1], torch.randn(2, 8, 16, 12).double()
    assert isinstance(residual, Residual)
    low = residual.pair.resize(r, (8, 6))
    rest = r - residual.pair.resize(low, (16, 12))
    torch.testing.assert_close(residual.pair.resize(low, (16, 12)) + rest, r)
    out, idle = residual(low, rest, 2)
    assert idle is None
    added = out - affine(residual.project)(low)
    assert added.abs().max() > 0.01
    assert added.mean(dim=(2, 3)).abs().max() <= 1e-12


def test_more_than_the_mean_colour_reaches_the_logits() -> None:
    net, x = trained(small()), images(6)
    plain = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    assert apart(logits(net, plain), logits(net, x)) >= 0.05
    assert apart(logits(net, net.at_side(x, 4)), logits(net, plain)) >= 0.05


def test_linear_maps_compose_into_one() -> None:
    net = trained(small())
    x = images(2, 8)
    folded, one_by_one = affine(net.stem), net.stem(x)
    for residual in net.residuals[:2]:
        folded, one_by_one = folded.then(residual.project), residual.project(one_by_one)
    torch.testing.assert_close(folded(x), one_by_one, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded.linear(x) + folded.bias.view(1, -1, 1, 1), folded(x))


def test_the_memory_format_does_not_change_the_logits() -> None:
    net, x = trained(small(drop=0.5)), images(4)
    wanted = logits(net, x, noise_for([0, 1, 2, 0]))
    net.to(memory_format=torch.channels_last)
    found = logits(net, x.contiguous(memory_format=torch.channels_last), noise_for([0, 1, 2, 0]))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_under_bf16_autocast_filters_and_the_chain_stay_in_fp32() -> None:
    net, seen = trained(small()).float(), []
    hooks = [r.register_forward_hook(lambda m, i, o: seen.append((i[0], i[1], o[0]))) for r in net.residuals]
    hooks += [net.residuals[0].inner.blocks[0].register_forward_hook(lambda m, i, o: seen.append((o,)))]
    x = images(6).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net.at_side(x, 16)
        high, full, skipped = logits(net, x), logits(net, lifted(net, y)), logits(net, y)
    for hook in hooks:
        hook.remove()
    assert seen[0][0].dtype == torch.bfloat16  # what the layers compute in
    assert all(tensor.dtype == torch.float32 for row in seen for tensor in row if len(row) == 3)
    assert apart(full.float(), skipped.float()) / apart(high.float(), skipped.float()) <= 0.01


# ---- Laplacian dropout


def noise_for(levels: list[int], count: int = 3) -> Tensor:
    """Noise that drops so many residuals of each image: at p = 0.5, 0 drops and 1 keeps."""
    return torch.tensor([([0.0] * level + [1.0] + [0.0] * count)[:count] for level in levels])


@pytest.mark.parametrize("kind", ALL)
def test_dropping_the_first_residuals_equals_running_at_low_resolution(kind: Filter) -> None:
    net, x = trained(small(filters=kind, drop=0.5)), images(8)
    levels = [2, 0, 3, 1, 0, 2, 1, 3]
    output = net(x, noise_for(levels))
    assert output.levels.tolist() == levels
    for row, level in enumerate(levels):
        low = net.at_side(x[row : row + 1], LADDER[level])
        torch.testing.assert_close(output.logits[row : row + 1], logits(net, low), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.logits[[1, 4]], logits(net, x)[[1, 4]], rtol=1e-10, atol=1e-10)  # no rescaling


def test_only_leading_residuals_are_dropped_with_the_configured_probabilities() -> None:
    config = small(level_weights=(3, 1, 2))
    assert config.probabilities == pytest.approx((0.5, 2 / 3, 0))
    net = build(config, CLASSES)
    torch.manual_seed(1)
    found = np.bincount(net._drawn(net.draw_noise(60_000), 60_000), minlength=4) / 60_000
    assert found == pytest.approx([0.5, 1 / 6, 1 / 3, 0], abs=0.01)
    chain = build(small(drop=(0.6, 0.5, 0.25)), CLASSES)
    found = np.bincount(chain._drawn(chain.draw_noise(60_000), 60_000), minlength=4) / 60_000
    assert found == pytest.approx([0.4, 0.3, 0.225, 0.075], abs=0.01)
    assert chain._drawn(torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.9, 0.0]]), 2) == [0, 1]


def test_dropout_probabilities_of_worked_examples() -> None:
    assert small(level_weights=(1, 1, 1, 1)).probabilities == pytest.approx((3 / 4, 2 / 3, 1 / 2))  # uniform
    assert small().probabilities == pytest.approx((0.5, 0.5, 0))  # half whole, the others at 16 and 8
    assert small(level_weights=(0, 0, 1)).probabilities == (1, 1, 0)
    assert small(drop=0.3).probabilities == (0.3, 0.3, 0.3)
    assert build(small(drop=0), CLASSES).draw_noise(4) is None
    assert build(small(drop=1), CLASSES)._drawn(torch.rand(5, 3), 5) == [3] * 5


def test_evaluation_drops_no_residual() -> None:
    net, x = trained(small(drop=0.9)), images(6)
    assert torch.equal(net(x).logits, net(x).logits)
    assert not net(x).levels.any()
    torch.manual_seed(2)
    assert net.train()(x).levels.any()


def rows_of(net: Arrn) -> tuple[list[int], list[object]]:
    """How many rows each residual's layers were given, counted by hooks."""
    rows = [0] * len(net.residuals)

    def count(number: int) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, int], output: Tensor) -> None:
            rows[number] += len(inputs[0])

        return hook

    return rows, [residual.inner.register_forward_hook(count(n)) for n, residual in enumerate(net.residuals)]


def test_dropped_images_do_not_run_but_with_gradients_at_least_two_rows_do() -> None:
    net, x = trained(small(drop=0.5)), images(8)
    noise = noise_for([2, 1, 3, 1, 3, 2, 1, 3])  # kept: none, 3, 5
    rows, hooks = rows_of(net)
    with torch.no_grad():
        net(x, noise)
    assert rows == [0, 3, 5]
    net(x, noise)
    assert rows == [2, 6, 10]
    net(x[:1], noise[:1])
    assert rows == [3, 7, 11]  # there is but one image
    net(images(4, 8))
    assert rows == [5, 9, 15]  # two of nothing above their level
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_batchnorm_statistics_are_of_the_images_that_are_not_dropped(kept: int) -> None:
    net, x = trained(small(drop=0.5)).train(), images(6)
    alone = copy.deepcopy(net)
    mixed = net(x, noise_for([0] * kept + [1] * (6 - kept)))
    if kept:
        entry = affine(alone.stem)
        rest = entry.linear(x[:kept] - alone.at_side(alone.at_side(x[:kept], 16), 32))
        alone.residuals[0].inner(rest, kept)
    for name, value in net.residuals[0].inner.named_buffers():
        if not name.endswith("tracked"):
            torch.testing.assert_close(value, dict(alone.residuals[0].inner.named_buffers())[name])
    assert mixed.logits.isfinite().all()


def test_gradients_of_dropped_images() -> None:
    net, x = trained(small(drop=0.5)).train(), images(4).requires_grad_()
    net(x, noise_for([1, 1, 1, 1])).logits.square().sum().backward()
    for parameter in net.residuals[0].inner.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    assert net.residuals[0].project.weight.grad.abs().max() > 0
    assert x.grad is not None
    fine = x.grad - net.at_side(net.at_side(x.grad, 16), 32)  # what the filter takes away reaches nothing
    assert fine.abs().max() <= 1e-12 * x.grad.abs().max()
    net.zero_grad()
    net(x, noise_for([0, 1, 2, 0])).logits.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and (parameter.dim() == 1 or parameter.grad.any()), name


STEPS_OF_TWO = 3


def _lonely(rank: int, folder: Path) -> None:
    """Rank 0 drops every residual of every image, rank 1 none; weights, gradients and statistics after three steps."""
    net = trained(small(drop=1.0 if rank == 0 else 0.0)).train()
    wrapped = DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(STEPS_OF_TWO):
        optimizer.zero_grad()
        torch.manual_seed(step)
        output = wrapped(images(8)[rank * 4 : rank * 4 + 4])
        cross_entropy(output.logits, torch.arange(4)).backward()
        optimizer.step()
    found = {name: p.detach() for name, p in net.named_parameters()}
    gradients = {name: p.grad for name, p in net.named_parameters()}
    torch.save((found, gradients, dict(net.named_buffers())), folder / f"{rank}.pt")


def test_a_rank_that_drops_all_and_one_that_drops_none_train_together(tmp_path: Path) -> None:
    two_ranks.run(_lonely, tmp_path)
    nets = [trained(small(drop=p)).train() for p in (1.0, 0.0)]
    start = dict(trained(small()).named_buffers())
    for step in range(STEPS_OF_TWO):
        for rank, net in enumerate(nets):
            net.zero_grad()
            torch.manual_seed(step)
            rows = slice(rank * 4, rank * 4 + 4)
            cross_entropy(net(images(8)[rows]).logits, torch.arange(4)).backward()
        for first, second in zip(*(net.parameters() for net in nets), strict=True):
            mean = (first.grad + second.grad) / 2
            for parameter in (first, second):
                parameter.grad = mean
                parameter.data -= 0.05 * mean
    for rank, net in enumerate(nets):
        weights, gradients, buffers = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-11)
        for name, value in net.named_buffers():
            torch.testing.assert_close(buffers[name], value, rtol=1e-9, atol=1e-11)
            if rank == 0 and name.startswith("residuals."):
                assert torch.equal(value, start[name]), name  # idle rows did not count


# ---- policies


def predict(policy: ArrnResolution, net: Arrn, x: Tensor) -> Prediction:
    with torch.no_grad():
        return policy.predict(net, x)


def test_each_resolution_has_a_skipping_and_a_full_policy() -> None:
    def names(**changes: object) -> list[str]:
        config = small(**changes)
        return [policy.name for policy in policies(config, build(config, CLASSES))]

    assert names() == ["32px", "16px", "full-16px", "8px", "full-8px"]
    assert names(resolutions_px=(24, 4)) == ["32px", "24px", "full-24px", "4px", "full-4px"]
    assert names(finest_px=8) == ["8px", "4px", "full-4px"]
    assert names(finest_px=4) == ["4px"]


def test_skipping_policies_run_fewer_residuals_for_fewer_macs_and_full_ones_run_all() -> None:
    config = small(resolutions_px=(24, 16, 12, 8, 4))
    net, x = trained(config).float(), images(5).float()
    before = x.clone()
    wanted = {32: [5, 5, 5], 24: [5, 5, 5], 16: [0, 5, 5], 12: [0, 5, 5], 8: [0, 0, 5], 4: [0, 0, 0]}
    costs = {}
    for policy in policies(config, net):
        predict(policy, net, x)  # priced from here on
        rows, hooks = rows_of(net)
        found = predict(policy, net, x)
        for hook in hooks:
            hook.remove()
        assert rows == ([5, 5, 5] if policy.full else wanted[policy.side_px]), policy.name
        assert found.facts["residuals"].tolist() == [sum(n > 0 for n in rows)] * 5
        assert found.logits.dtype == torch.float32
        costs[policy.name] = found.macs[0].item()
        if policy.full:
            skipped = predict(ArrnResolution(policy.side_px), net, x).logits
            assert apart(found.logits, skipped) <= 1e-3
            assert apart(skipped, predict(ArrnResolution(32), net, x).logits) >= 0.1
    assert costs["32px"] > costs["16px"] > costs["8px"] > costs["4px"]
    assert costs["full-8px"] > costs["32px"]
    assert torch.equal(x, before)


def test_images_below_a_policys_resolution_are_not_resized() -> None:
    net, y = trained(small()), images(3, 16)
    assert torch.equal(predict(ArrnResolution(32), net, y).logits, logits(net, y).float())
    assert torch.equal(predict(ArrnResolution(16, full=True), net, y).logits, logits(net, lifted(net, y)).float())
    assert predict(ArrnResolution(32), net, y).facts["residuals"].tolist() == [2, 2, 2]


def test_non_square_images_keep_their_aspect_at_every_resolution() -> None:
    net = trained(small())
    x = images(2, 45, 32)
    shapes = [tuple(net.at_side(x, side).shape[-2:]) for side in LADDER]
    assert shapes == [(45, 32), (23, 16), (12, 8), (6, 4)]
    assert scaled(x, 16) == (23, 16)
    assert predict(ArrnResolution(16), net, x).logits.isfinite().all()


# ---- growing


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("kind", ALL)
def test_a_net_grown_from_a_smaller_one_computes_the_same_function(kind: Filter, start: int) -> None:
    smaller = trained(small(finest_px=LADDER[start], filters=kind, drop=0))
    torch.manual_seed(9)
    config = small(filters=kind)
    net = build(config, CLASSES).double().eval()
    for layer in (net.stem, *(residual.project for residual in net.residuals)):
        nn.init.normal_(layer.bias)
    initial = {name: value.clone() for name, value in net.state_dict().items()}
    kept = load_pretrained(config, net, smaller.state_dict()).initial
    x = images(4)
    assert apart(logits(net, x), logits(smaller, net.at_side(x, LADDER[start]))) <= 1e-10
    assert apart(logits(net, net.at_side(x, LADDER[start])), logits(smaller, net.at_side(x, LADDER[start]))) <= 1e-10
    loaded = net.state_dict()
    assert kept and all(torch.equal(loaded[name], initial[name]) for name in kept)
    assert "stem.weight" in kept and not any(name.startswith("final") for name in kept)


def test_a_grown_net_learns_in_its_new_residual() -> None:
    net = build(small(drop=0.5), CLASSES).double()
    load_pretrained(small(drop=0.5), net, trained(small(finest_px=16)).state_dict())
    net.train()(images(6), noise_for([0] * 6)).logits.square().sum().backward()
    first = net.residuals[0]
    assert isinstance(first, Residual)
    assert first.inner.gains[0].grad.abs().max() > 0
    assert first.project.weight.grad.abs().max() > 0


def test_growing_in_fp32_also_preserves_the_function() -> None:
    smaller = trained(small(finest_px=16, drop=0)).float()
    net = build(small(), CLASSES).eval()
    load_pretrained(small(), net, smaller.state_dict())
    x = images(4).float()
    assert apart(logits(net, x), logits(smaller, net.at_side(x, 16))) <= 1e-4


def test_weights_of_the_same_ladder_are_loaded_unchanged() -> None:
    net = build(small(), CLASSES).double().eval()
    assert load_pretrained(small(), net, trained(small()).state_dict()) == Loaded([], [])
    assert torch.equal(logits(net, images(2)), logits(trained(small()), images(2)))


def test_weights_of_another_net_are_refused_by_name() -> None:
    net = build(small(), CLASSES)
    before = copy.deepcopy(net.state_dict())
    with fails(ConfigError, "weights", subject="layer1"):
        load_pretrained(small(), net, {**net.state_dict(), "layer1": torch.zeros(1)})
    with fails(ConfigError, "weights", subject="stem.weight"):
        load_pretrained(small(), net, {"fc.weight": torch.zeros(1)})
    wider = build(small(finest_px=16, widths=(6, 9, 10, 12), drop=0), CLASSES)
    with fails(ConfigError, "weights", subject="stem.weight"):
        load_pretrained(small(), net, wider.state_dict())
    longer = build(small(), CLASSES).state_dict()
    with fails(ConfigError, "weights", subject="3"):
        load_pretrained(small(finest_px=16, drop=0), build(small(finest_px=16, drop=0), CLASSES), longer)
    other = build(small(finest_px=16, inner=("F2x2", "M2x1", "F1x1"), drop=0), CLASSES)
    with fails(ConfigError, "weights", subject="residuals.1.inner.blocks.1"):
        load_pretrained(small(), net, other.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("level", [0, 1, 3])
def test_a_net_cut_at_a_resolution_equals_what_images_of_that_resolution_run(level: int) -> None:
    config = small(drop=(0.1, 0.2, 0.3), resolutions_px=(16,))
    net = trained(config)
    smaller, part = cut(config, net, LADDER[level])
    y = images(3, LADDER[level])
    torch.testing.assert_close(logits(part, y), logits(net, y), rtol=1e-10, atol=1e-10)
    assert part.ladder == smaller.plan.ladder == LADDER[level:]
    assert sum(p.numel() for p in part.parameters()) <= sum(p.numel() for p in net.parameters())
    with fails(ConfigError, "family.finest_px", subject="12"):
        cut(config, net, 12)


# ---- config


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({**SMALL, "ladder_px": (32, 16, 16, 4)}, "ladder_px"),
        ({**SMALL, "ladder_px": (8, 16, 32, 64)}, "ladder_px"),
        ({**SMALL, "ladder_px": (32, 16, 8, 1)}, "ladder_px"),
        ({"ladder_px": (32, 16)}, ""),
        ({**SMALL, "widths": (6, 8, 10)}, "widths"),
        ({**SMALL, "inner": ("F2x1",)}, "inner"),
        ({**SMALL, "inner": ("F2x1", "F2", "F2x1")}, "inner"),
        ({**SMALL, "widths": (2, 8, 10, 12)}, "widths"),
        ({"size": "T", "widths": (8, 8)}, "widths"),
        ({"finest_px": 20}, "finest_px"),
        ({"drop": 1.2}, "drop"),
        ({"drop": (0.5, -0.1, 0.5)}, "drop"),
        ({"drop": (0.5, 0.5)}, "drop"),
        ({"drop": 0.5, "level_weights": (1, 1)}, "drop"),
        ({"level_weights": (1, -1)}, "level_weights"),
        ({"level_weights": (0, 0)}, "level_weights"),
        ({"level_weights": (1, 1, 1, 1, 1)}, "level_weights"),
        ({"resolutions_px": (3,)}, "resolutions_px"),
        ({"resolutions_px": (32,)}, "resolutions_px"),
        ({"resolutions_px": (16, 16)}, "resolutions_px"),
        ({"filters": ("dct", "box")}, "filters"),
        ({"filters": "gauss"}, "filters"),
        ({"size": "XL"}, "size"),
    ],
)
def test_a_wrong_setting_is_refused(keys: dict[str, object], key: str) -> None:
    with fails(ConfigError, key):
        validate(ArrnConfig, {"name": "arrn", **keys}, "family")


@pytest.mark.parametrize("side_px", [40, 32, 20, 16, 9, 8, 4])
def test_a_warning_names_the_residuals_that_training_images_would_skip(side_px: int) -> None:
    warned = FAMILY.warnings(small(), side_px)
    skipped = build(small(), CLASSES).level(torch.zeros(1, 3, side_px, side_px))
    assert (len(warned) == 1 and f"{skipped} of 3 residuals" in warned[0]) if skipped else not warned


def test_images_below_the_last_resolution_are_refused() -> None:
    net = trained(small())
    with fails(ConfigError, "images", subject="3"):
        net(images(2, 3, 9))
    with fails(ConfigError, "images", subject="3"):
        ArrnResolution(4).predict(net, images(2, 3, 3))


def test_a_ladder_may_have_its_filter_by_residual_and_any_length() -> None:
    net = trained(small(filters=("box", "dct", "kaiser")))
    assert [pair.kind for pair in net.pairs] == ["box", "dct", "kaiser"]
    y = images(3, 8)
    assert apart(logits(net, lifted(net, y)), logits(net, y)) <= 1e-10  # the kaiser filter lies below
    assert [pair.kind for pair in build(small(filters=("box", "dct", "kaiser"), finest_px=16), 2).pairs] == [
        "dct",
        "kaiser",
    ]
    one = trained(small(filters=("box", "dct", "kaiser"), finest_px=4))
    assert logits(one, images(2, 9)).isfinite().all()
    assert FAMILY.policies(small(finest_px=4), one)[0].name == "4px"


def test_each_named_size_has_its_ladder() -> None:
    for size, plan in SIZES.items():
        assert ArrnConfig(size=size).plan == plan  # type: ignore[arg-type]
    assert ArrnConfig(size="T", finest_px=28).plan.inner == ("M4x4", "M4x6")
