"""Time and MACs that skipping saves: each policy against the same net without skipping.

The nets have random weights; their gates and thresholds are set so that they skip as often as the published nets do.
Each pair is measured in one run, interleaved.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import log
from statistics import median

import torch
from torch import Tensor, nn

from pipeline import cost
from pipeline.bench.rows import chosen, interleave, on_threads
from pipeline.config import validate
from pipeline.exits.budget import shares, thresholds
from pipeline.exits.net import ExitClassifier
from pipeline.exits.policies import confidence, early_exit, measure
from pipeline.families import arrn, baseline, convnet_aig, ranet, shape_adaptor
from pipeline.families.arrn.inference import ArrnResolution
from pipeline.families.convnet_aig.inference import Gates
from pipeline.families.convnet_aig.model import Aig, AigConfig
from pipeline.families.ranet.model import Ranet
from pipeline.families.shape_adaptor.bodies import Adaptor, Cells, resized
from pipeline.families.shape_adaptor.inference import freeze
from pipeline.family import AnyFamily

CLASSES = 10
SHORTEST_S = 0.3  # shortest turn


@dataclass(frozen=True)
class PolicyPair:
    """A policy and its peer on the same images; `macs` is the policy's MACs as a share of the peer's."""

    name: str
    peer: str
    batch: int
    macs: float
    ours: Callable[[], object]
    theirs: Callable[[], object]


@dataclass(frozen=True)
class PairTiming:
    """A measured pair: the policy's MACs and time as shares of the peer's, medians over the rounds."""

    name: str
    peer: str
    batch: int
    threads: int
    macs: float
    time: float
    peer_ms: float

    @property
    def quotient(self) -> float:
        """The share of time over the share of MACs."""
        return self.time / self.macs


def inference(
    kinds: Sequence[str] | None = None, *, rounds: int = 7, threads: int | None = None
) -> Iterator[PairTiming]:
    """Measures every pair of the families `kinds` (default: all) on `threads` CPU threads (default: torch's own)."""
    for kind in chosen("inference", kinds, PAIRS):
        with on_threads(threads), torch.inference_mode():
            yield from map(partial(_timed, rounds=rounds), PAIRS[kind]())


def _timed(pair: PolicyPair, rounds: int) -> PairTiming:
    seconds = interleave({"ours": lambda: _seconds(pair.ours), "theirs": lambda: _seconds(pair.theirs)}, rounds + 1)
    ours, theirs = seconds["ours"][1:], seconds["theirs"][1:]  # the first round warms up
    share = median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return PairTiming(pair.name, pair.peer, pair.batch, torch.get_num_threads(), pair.macs, share, 1e3 * median(theirs))


def _seconds(run: Callable[[], object]) -> float:
    """The median time of one pass, over as many passes as fill SHORTEST_S."""
    passes: list[float] = []
    while sum(passes) < SHORTEST_S:
        start = time.perf_counter()
        run()
        passes.append(time.perf_counter() - start)
    return median(passes)


def _net(family: AnyFamily, **keys: object) -> nn.Module:
    torch.manual_seed(0)
    return _placed(family.build(validate(family.config, keys, "bench"), CLASSES).eval())


def _placed(net: nn.Module) -> nn.Module:
    """The net in channels-last layout, as in evaluation."""
    return net.to(memory_format=torch.channels_last)


def _images(count: int, side_px: int) -> Tensor:
    """Random images [count, 3, S, S] of different contrast, so that a net's decisions differ between them."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(count, 1, 1, 1, generator=generator) * 2 + 0.2
    images = scale * torch.randn(count, 3, side_px, side_px, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def _settle(net: nn.Module, images: Tensor) -> None:
    """Sets BatchNorm's statistics from these images, so that activations are as large as in a trained net."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    net.train()(images)
    net.eval()


# ---- ConvNet-AIG: gates that open at their published target rates


def aig_pairs() -> Iterator[PolicyPair]:
    """ConvNet-AIG-50 with hard gates against all its blocks, at two target rates."""
    for t in (0.4, 0.7):
        config = AigConfig(depth=50, target_rate=t, schedule="published")
        torch.manual_seed(0)
        net = _placed(convnet_aig.FAMILY.build(config, 1000))
        assert isinstance(net, Aig)
        _settle(net, _images(32, 224))
        _set_gates(net, config, _images(32, 224))
        full = cost.measure(net, _images(1, 224)).macs
        for batch in (32, 1):
            images, policy = _images(batch, 224), Gates("gates-hard")
            macs = float(policy.predict(net, images).macs.mean()) / full
            ours = _call(policy.predict, net, images)
            yield PolicyPair(
                f"AIG-50 gates-hard, t = {t:g}", "the same, all blocks run", batch, macs, ours, _call(net, images)
            )


def _set_gates(net: Aig, config: AigConfig, images: Tensor) -> None:
    """Shifts the gates' biases one after the other, so that each opens for its target share of these images."""
    x = net.stem(images)
    for block, target in zip(net.blocks, config.targets, strict=True):
        gate = block.gate
        opened = None
        if isinstance(gate, nn.Module):
            nn.init.normal_(gate.fc2.weight)  # type: ignore[arg-type,union-attr]
            shift = -float(gate(x).quantile(1 - target))
            gate.fc2.bias[1] += shift  # type: ignore[index,operator,union-attr]
            opened = (gate(x) > 0).float()
        x = block(x, opened)


# ---- RANet: thresholds that spread the images over the exits by q^k


def ranet_pairs() -> Iterator[PolicyPair]:
    """RANet's early exits against all its exits, and against ResNet-50 and VGG-16."""
    net = _net(ranet.FAMILY, name="ranet")  # C-b1
    assert isinstance(net, Ranet)
    images = _images(256, 32)
    _settle(net, images)
    exits = net(images).exits.float()
    for classifier, spread in zip(net.classifiers, exits.std((0, 2)), strict=True):
        assert isinstance(classifier, ExitClassifier)
        classifier.fc.weight.div_(float(spread))
    confidences, costs = confidence(net(images).exits), measure(net, images)
    for batch, qs in ((256, (0.5, 0.8, 1.0, 1.5)), (32, (0.5, 1.0, 1.5)), (8, (1.0, 1.5)), (1, (1.0,))):
        for q in qs:
            until = (*thresholds(confidences, shares(log(q), net.config.num_exits)), 0.0)
            some = images[:batch]
            macs = float(early_exit(net, some, until, costs).macs.mean()) / costs.cumulative[-1]
            ours = _call(early_exit, net, some, until, costs)
            yield PolicyPair(
                f"RANet C-b1, q = {q:g}", "the same, every exit of every image", batch, macs, ours, _call(net, some)
            )
    for peer, keys in {"ResNet-50": {"net": "resnet50", "stem": "cifar"}, "VGG-16": {"net": "vgg16_bn"}}.items():
        plain = _net(baseline.FAMILY, name="baseline", **keys)
        full, until = cost.measure(plain, images[:1]).macs, (*thresholds(confidences, shares(0.0, 6)), 0.0)
        for batch in (256, 1):
            some = images[:batch]
            macs = float(early_exit(net, some, until, costs).macs.mean()) / full
            ours = _call(early_exit, net, some, until, costs)
            yield PolicyPair("RANet C-b1, q = 1", f"{peer}, CIFAR-10", batch, macs, ours, _call(plain, some))


# ---- ARRN: the net at a half and a quarter of its resolution


ARRN_SIZES = {  # the finest side in px, and the batches
    "cifar": (32, (256, 64, 1)),
    "tiny-imagenet": (64, (256, 64, 1)),
    "T": (224, (8,)),
    "S": (224, (8,)),
}


def arrn_pairs() -> Iterator[PolicyPair]:
    """ARRN at a half and a quarter of its resolution against its full resolution."""
    for size, (finest, batches) in ARRN_SIZES.items():
        net = _net(arrn.FAMILY, name="arrn", size=size)
        for batch, part in product(batches, (2, 4)):
            images, policy = _images(batch, finest), ArrnResolution(finest // part)
            small = _images(batch, finest // part)
            full = float(ArrnResolution(finest).predict(net, images[:1]).macs)
            macs = float(policy.predict(net, small[:1]).macs) / full
            name = f"ARRN {size} at {finest // part} px"
            yield PolicyPair(
                name, f"the same at {finest} px", batch, macs, _call(policy.predict, net, small), _call(net, images)
            )


# ---- Shape Adaptor: the frozen net against one that resizes once where an adaptor blends two


class _Resize(nn.Module):
    """Resizes the larger branch to the adaptor's size: the cost in a net that was designed with this shape."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, *given: object) -> Tensor:
        *branches, cells = given
        assert isinstance(cells, Cells)
        x = branches[-1]
        assert isinstance(x, Tensor)
        return resized(x, cells.sizes[self.number])


def _without_blends(net: nn.Module) -> nn.Module:
    """A copy of the net with one resize in place of each adaptor."""
    plain = copy.deepcopy(net)
    adaptors = [name for name, module in plain.named_modules() if isinstance(module, Adaptor)]
    for name in adaptors:
        adaptor = plain.get_submodule(name)
        assert isinstance(adaptor, Adaptor)
        plain.set_submodule(name, _Resize(adaptor.number))
    return plain


def shape_pairs() -> Iterator[PolicyPair]:
    """Frozen Shape Adaptor nets against nets with one resize in place of each adaptor."""
    for kind, side, batch in (("vgg16_bn", 32, 64), ("mobilenet_v2", 224, 8), ("resnet50", 224, 8)):
        net = _net(shape_adaptor.FAMILY, name="shape_adaptor", net=kind, side_px=side)
        images = _images(batch, side)
        frozen = freeze(net, (side, side))
        plain = _without_blends(frozen)
        macs = cost.measure(frozen, images[:1]).macs / cost.measure(plain, images[:1]).macs
        yield PolicyPair(
            f"Shape Adaptor {kind}, frozen",
            "one resize for each blend",
            batch,
            macs,
            _call(frozen, images),
            _call(plain, images),
        )


PAIRS: Mapping[str, Callable[[], Iterator[PolicyPair]]] = {
    "convnet_aig": aig_pairs,
    "ranet": ranet_pairs,
    "arrn": arrn_pairs,
    "shape_adaptor": shape_pairs,
}


def _call(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)
