"""Longer and shorter ladders with the same function: train a small sub-network, then add residuals on top.

Letters: k residuals that only the larger net has, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.families.arrn.config import ArrnConfig
from pipeline.families.arrn.model import Affine, Arrn, Residual, affine
from pipeline.weights import Loaded, load

PART = "residuals."


def load_pretrained(
    config: ArrnConfig, net: nn.Module, tensors: Mapping[str, Tensor], new_head: bool = False
) -> Loaded:
    """Fills a fresh net from an ARRN whose ladder is as long, or starts k resolutions lower.

    In the second case the k new residuals add nothing at first, and the linear map below them is set so that all
    linear maps down to it equal the smaller net's stem: net(x) = smaller(D...D x). Raises ConfigError as `load` does,
    and if the stem's weights have another shape.
    """
    assert isinstance(net, Arrn)
    count = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith(PART)), default=-1)
    k = len(net.residuals) - count
    if k < 0:
        raise ConfigError(
            f"these weights have {count} residuals, the net has {len(net.residuals)}: a net can load weights of "
            "its own ladder or of a shorter one; set the longer ladder (family.ladder_px, or omit finest_px)",
            key="weights",
            subject=count,
        )
    if k == 0:
        return load(net, tensors, head=is_head, new_head=new_head)
    moved = {_shifted(name, k): value for name, value in tensors.items()}
    stem = _stem(net, moved, k)
    loaded = load(
        net,
        moved,
        lambda name: name.startswith("stem.") or _number(name) in range(k),
        head=is_head,
        new_head=new_head,
    )
    names = {id(value): name for name, value in net.named_parameters()}
    changed = {f"{PART}{k - 1}.project.weight", f"{PART}{k - 1}.project.bias"}
    with torch.no_grad():
        _take_over(net, stem, k)
        for residual in net.residuals[:k]:
            assert isinstance(residual, Residual)
            for weight in residual.inner.gains:
                weight.zero_()
                changed.add(names[id(weight)])
    return replace(loaded, initial=[name for name in loaded.initial if name not in changed])


def is_head(name: str) -> bool:
    """Whether the name is of the last layer."""
    return name.startswith("fc.")


def _shifted(name: str, k: int) -> str:
    if not name.startswith(PART):
        return name
    _, number, rest = name.split(".", 2)
    return f"{PART}{int(number) + k}.{rest}"


def _number(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith(PART) else -1


def _stem(net: Arrn, tensors: dict[str, Tensor], k: int) -> Affine:
    """The smaller net's stem, removed from its tensors."""
    last = net.residuals[k - 1]
    assert isinstance(last, Residual)
    wanted = {"stem.weight": (last.project.out_channels, 3, 1, 1), "stem.bias": (last.project.out_channels,)}
    for name, shape in wanted.items():
        given = tuple(tensors[name].shape) if name in tensors else "nothing"
        if given != shape:
            raise ConfigError(
                f"these weights do not fit the net: {name} of a ladder {k} shorter would be {shape}, found {given}",
                key="weights",
                subject=name,
            )
    return Affine(tensors.pop("stem.weight").flatten(1), tensors.pop("stem.bias"))


def _take_over(net: Arrn, stem: Affine, k: int) -> None:
    """Sets A_{k-1}, as close as possible to its initial weights, so that the linear maps down to it equal `stem`.

    With V [C, 3] the maps above it, A + (W - A V) V⁺ is the solution, because the three columns of V are independent.
    """
    above = _chain(net, k - 1)
    last = net.residuals[k - 1]
    assert isinstance(last, Residual) and last.project.bias is not None
    v, a = above.weight.double(), last.project.weight.flatten(1).double()
    a = a + (stem.weight.double().to(a.device) - a @ v) @ torch.linalg.pinv(v)
    last.project.weight.copy_(a[:, :, None, None])
    last.project.bias.copy_(stem.bias.double().to(a.device) - a @ above.bias.double())


def _chain(net: Arrn, k: int) -> Affine:
    """The stem and the first k linear maps, composed."""
    chain = affine(net.stem)
    for residual in net.residuals[:k]:
        assert isinstance(residual, Residual)
        chain = chain.then(residual.project)
    return chain


def cut(config: ArrnConfig, net: Arrn, finest_px: int) -> tuple[ArrnConfig, Arrn]:
    """The sub-network that images of finest_px run, as a net without dropout; finest_px is on the ladder.

    Its stem is the whole net's stem composed with the linear maps of the omitted residuals. Raises ConfigError for a
    resolution that is not on the ladder.
    """
    if finest_px not in net.ladder:
        raise ConfigError(
            f"finest_px (={finest_px}) is not on the ladder {list(net.ladder)}",
            key="family.finest_px",
            subject=finest_px,
        )
    k = net.ladder.index(finest_px)
    smaller = config.model_copy(update={"finest_px": finest_px, "drop": 0.0, "level_weights": (), "resolutions_px": ()})
    subnetwork = Arrn(smaller, net.fc.out_features).to(net.fc.weight.device, net.fc.weight.dtype)
    tensors = {_shifted(name, -k): value for name, value in net.state_dict().items() if _number(name) not in range(k)}
    stem = _chain(net, k)
    tensors |= {"stem.weight": stem.weight.detach()[:, :, None, None], "stem.bias": stem.bias.detach()}
    load(subnetwork, tensors)
    return smaller, subnetwork.train(net.training)
