"""Maps the weight names of torchvision's files, of timm's and of authors whose nets timm defines, to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.families.baseline import efficientnet_files
from pipeline.families.baseline.foreign import Foreign, OfLibrary, timm_module
from pipeline.families.baseline.model import BaselineConfig
from pipeline.weights import ImagesExpected, Loaded, load

DENSE = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # as in torchvision's own files
AUXILIARY = {  # classifiers for training, which `build` leaves out, by the name of the net
    "googlenet": ("net.aux1.", "net.aux2."),
    "inception_v3": ("net.AuxLogits.",),
}
IMAGENET = ImagesExpected("torchvision", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ImagesExpected("torchvision", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
HALVES = ("googlenet", "inception_v3", "efficientnet_v2_l")  # the first two transform the images if torchvision loads


def load_pretrained(
    config: BaselineConfig, net: nn.Module, tensors: Mapping[str, Tensor], new_head: bool = False
) -> Loaded:
    """Fills `net` from our weights, torchvision's, timm's or, for timm's nets, from what timm can convert.

    Every tensor is used, as by `load`, or named as left out: auxiliary classifiers, and what timm's converter drops.
    A foreign net's new head begins at 0: timm draws the head of an EfficientNet within 1/sqrt(K), which for few classes
    drowns the features. Raises ConfigError if a converter would compute new
    weights, such as position embeddings for another side.
    """
    ours = bool(tensors) and all(name in net.state_dict() for name in tensors)
    if isinstance(net, Foreign) and net.name.startswith("timm:"):
        loaded = _of_timm(net, tensors, new_head)
    else:
        loaded = _of_torchvision(config, net, tensors, new_head)
    if isinstance(net, Foreign) and new_head:
        _clear(net)
    return loaded if ours or config.stem == "cifar" else replace(loaded, expected=expected(net))


def _clear(net: Foreign) -> None:
    """Sets a linear head's weights and biases to 0; its features are not, so it learns from the first step on.

    SqueezeNet's head is a convolution before a ReLU, through which nothing would learn from 0: it is left as drawn.
    """
    for head in map(net.get_submodule, net.head()):
        for parameter in head.parameters() if isinstance(head, nn.Linear) else ():
            nn.init.zeros_(parameter)


def expected(net: nn.Module) -> ImagesExpected | None:
    """The images for which published weights of this net are, as far as all of them agree; None if there are none."""
    if isinstance(net, Foreign) and net.name.startswith("timm:"):
        return _stated(net)
    if not isinstance(net, OfLibrary):
        return None
    return HALF if net.name.rpartition(":")[2] in HALVES else IMAGENET


def _stated(net: Foreign) -> ImagesExpected:
    """As timm states them."""
    stated, source = timm_module().stated(net.net), f"timm {net.name.partition(':')[2]}"
    return ImagesExpected(source, stated.mean, stated.std, stated.side_px, stated.resize_px, stated.interpolation)


def _of_torchvision(config: BaselineConfig, net: nn.Module, tensors: Mapping[str, Tensor], new_head: bool) -> Loaded:
    heads = net.head() if isinstance(net, Foreign) else _last_linear(net)
    wrapped = isinstance(net, OfLibrary)
    names = {_our_name(name) if wrapped else name: name for name in tensors}
    classifiers = AUXILIARY.get(config.net.rpartition(":")[2], ())
    auxiliary = [name for name in names if classifiers and name.startswith(classifiers)]
    rest = {ours: tensors[theirs] for ours, theirs in names.items() if ours not in auxiliary}
    loaded = load(net, rest, head=lambda name: _within(name, heads), new_head=new_head)
    return replace(loaded, left_out=[names[name] for name in (*loaded.left_out, *auxiliary)])


def _last_linear(net: nn.Module) -> Sequence[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1:]


def _within(name: str, layers: Sequence[str]) -> bool:
    return name.rpartition(".")[0] in layers


def _our_name(name: str) -> str:
    return DENSE.sub(r"\1\2", name if name.startswith("net.") else f"net.{name}")


def _of_timm(net: Foreign, tensors: Mapping[str, Tensor], new_head: bool) -> Loaded:
    heads, dropped = net.head(), list[str]()
    plain = {name.removeprefix("net."): value for name, value in tensors.items()}
    names = dict(zip(plain, tensors, strict=True))  # those in the file, by those that the net has
    if efficientnet_files.are(plain):
        names = efficientnet_files.renamed(net.net, net.name, plain)
        plain = {ours: plain[theirs] for ours, theirs in names.items()}
    elif not set(plain) <= set(net.net.state_dict()):
        plain, names, dropped = _converted(net, plain)
    named = {f"net.{name}": value for name, value in plain.items()}
    loaded = load(net, named, head=lambda name: _within(name, heads), new_head=new_head)
    return replace(loaded, left_out=[*(names[name.removeprefix("net.")] for name in loaded.left_out), *dropped])


def _converted(net: Foreign, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The tensors as timm's converter of this net renames them, their old names by the new, and those that it drops.

    It may rename and reshape. It must neither compute new values nor use a part of a tensor: its result is compared
    with copies of the tensors that share no memory with one another.
    """
    copies = {name: value.clone() for name, value in tensors.items()}
    try:
        found = timm_module().converted(net.net, copies)
    except (KeyError, AttributeError, RuntimeError, ValueError):  # of another net: `load` lists what does not fit
        found = None
    if found is None:
        return dict(tensors), dict(zip(tensors, tensors, strict=True)), []
    origins = {_memory(value): name for name, value in copies.items()}
    names = {ours: origins.get(_memory(value), "") for ours, value in found.items()}
    odd = [ours for ours, theirs in names.items() if not theirs or found[ours].numel() != copies[theirs].numel()]
    if odd:
        raise ConfigError(
            f"these weights do not fit {net.name}: timm's converter computes new values for {_listed(odd)}, e.g. "
            "because the weights are for images of another side; take weights of exactly this net",
            key="weights",
            subject=_listed(odd),
        )
    return found, names, [name for name in tensors if name not in names.values()]


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
