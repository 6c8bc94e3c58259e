"""Maps external weight names to ours: torchvision's, and those of AutoTL checkpoints of the released code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.families.shape_adaptor.bodies import VGG_POOLED, VGG_WIDTHS, Kind
from pipeline.families.shape_adaptor.model import ShapeConfig
from pipeline.family import load

ALPHAS = "shape.alphas"
RELEASED_ALPHAS = ("alpha_init1", "alpha_init2", "layer2.0.alpha", "layer3.0.alpha", "layer4.0.alpha")
HEADS: dict[Kind, tuple[str, ...]] = {  # modules of torchvision's nets that are not loaded
    "resnet50": ("fc",),
    "mobilenet_v2": ("classifier.1",),
    "vgg16": ("classifier.0", "classifier.3", "classifier.6"),
    "vgg16_bn": ("classifier.0", "classifier.3", "classifier.6"),
}


def load_pretrained(config: ShapeConfig, net: nn.Module, tensors: Mapping[str, Tensor]) -> Sequence[str]:
    """Fills `net` from our weights, from torchvision's, or from a ResNet-50 of the released code's AutoTL.

    Of torchvision's weights all but the head are loaded; head and alphas keep their initial values and their names are
    returned. A released AutoTL checkpoint, recognised by its alphas, is loaded completely. Raises ConfigError listing
    what is missing or unused.
    """
    if any(name.startswith(("body.", "shape.")) for name in tensors):
        return load(net, tensors)
    bare = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if config.net == "resnet50" and all(name in bare for name in RELEASED_ALPHAS):
        alphas = torch.stack([bare.pop(name).reshape(()) for name in RELEASED_ALPHAS]).float()
        return load(net, {ALPHAS: alphas, **{f"body.{name}": tensor for name, tensor in bare.items()}})
    heads = {f"{module}.{kind}" for module in HEADS[config.net] for kind in ("weight", "bias")}
    ours = dict(_vgg_names(config.net)) if config.net.startswith("vgg") else {}
    taken = {_our_name(name, ours): tensor for name, tensor in bare.items() if name not in heads}
    kept = (ALPHAS, "body.fc.", "body.classifier.")
    return load(net, taken, keep=lambda name: name.startswith(kept))


def _our_name(name: str, vgg: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    return f"body.{vgg.get(module, module)}.{kind}"


def _vgg_names(kind: Kind) -> Iterator[tuple[str, str]]:
    """Pairs of torchvision's `features.<layer>` and our `convs.<number>.<part>`; it numbers ReLUs and poolings too."""
    layer, parts = 0, 2 if kind == "vgg16_bn" else 1
    for number in range(len(VGG_WIDTHS)):
        for part in range(parts):
            yield f"features.{layer + part}", f"convs.{number}.{part}"
        layer += parts + 1 + (number in VGG_POOLED)
