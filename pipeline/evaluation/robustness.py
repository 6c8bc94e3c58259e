"""How a trained net performs on perturbed images: gradient-sign attacks, JPEG compression, lower resolutions.

Attacked images are uint8 pixels like any others, so every policy of every family runs on them as usual. Letters:
B images, S side in pixels, K classes.
Source: Goodfellow et al., ICLR 2015 (arXiv 1412.6572), fast gradient sign; Veit & Belongie, ECCV 2018, §4.5, attacks
gated nets with and without JPEG after the attack. That study does not publish its strengths, its JPEG quality, or
whether the gradient flows through the gates.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import Batches, Evaluator, LabelledBatch
from pipeline.family import Policy, Prediction, Settings

AttackKind = Literal["fgsm"]
TOGETHER = 64  # images whose gradients are computed at once
RESIZED = "resized"  # the kind of a policy that runs another one on resized images


@dataclass(frozen=True)
class Attack:
    """A perturbation: `kind` at strength eps, a share of the range of pixels, then JPEG at quality `jpeg`.

    Raises ConfigError for a value outside its range.
    """

    kind: AttackKind | None = None
    eps: float = 0.0
    jpeg: int | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(AttackKind):
            raise _error("--attack", self.kind, f"no such attack; known: {', '.join(get_args(AttackKind))}")
        if self.kind is None and self.jpeg is None:
            raise ConfigError("give an attack, a JPEG quality, or both", key="--attack")
        if not 0 <= self.eps <= 1:
            raise _error("--eps", f"{self.eps:g}", "must be in 0..1, a share of the range of pixels, e.g. 4/255")
        if self.eps and not self.step:
            raise _error("--eps", f"{self.eps:g}", "moves no pixel by a whole level of 255; use at least 1/255, or 0")
        if self.jpeg is not None and not 1 <= self.jpeg <= 100:
            raise _error("--jpeg", self.jpeg, "must be in 1..100")

    @property
    def step(self) -> int:
        """The levels of 255 by which a pixel moves."""
        return round(255 * self.eps)

    @property
    def name(self) -> str:
        """The name, e.g. `fgsm-eps0.0157-jpeg75`."""
        parts = [self.kind, f"eps{self.eps:.3g}"] if self.kind else []
        return "-".join([*parts, f"jpeg{self.jpeg}"] if self.jpeg is not None else parts)


def _error(option: str, value: object, rule: str) -> ConfigError:
    return ConfigError(f"{option} (={value}): {rule}", key=option, subject=value)


def strength(text: str) -> float:
    """A number or a fraction, "0.0157" or "4/255". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:/\s*(\d+))?\s*", text)
    if match is None or (match[2] is not None and int(match[2]) == 0):
        raise _error("--eps", text, "write a number or a fraction in 0..1, e.g. 4/255")
    return float(match[1]) / int(match[2] or 1)


@dataclass(frozen=True)
class AttackedBatch:
    """Attacked images uint8 [B, S, S, 3], labels [B], rows [B] in the split."""

    images: Tensor
    labels: Tensor
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Attacked:
    """A split whose images are attacked as they are read, with knowledge of the whole net (white box)."""

    batches: Batches
    net: nn.Module
    evaluator: Evaluator
    attack: Attack

    @property
    def unreadable(self) -> Sequence[str]:
        return self.batches.unreadable

    def __iter__(self) -> Iterator[LabelledBatch]:
        for batch in self.batches:
            images = batch.images
            if self.attack.kind == "fgsm":
                images = fgsm(self.net, batch, self.evaluator, self.attack.step)
            if self.attack.jpeg is not None:
                images = compressed(images, self.attack.jpeg)
            yield AttackedBatch(images, batch.labels, batch.rows)


def fgsm(net: nn.Module, batch: LabelledBatch, evaluator: Evaluator, step: int) -> Tensor:
    """The batch's pixels moved by `step` levels along the sign of the loss's gradient, within 0..255.

    The loss is the cross-entropy of the logits of the net's own forward in eval mode, without noise, in fp32: for RANet
    those of the last exit, for ARRN those at the images' own resolution, for ConvNet-AIG those along the gates'
    decisions, which are constants here (the straight-through gradient is for training only). The net is not changed.
    """
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            images = torch.split(evaluator.images(batch), TOGETHER)
            signs = [_signs(net, *part) for part in zip(images, torch.split(batch.labels, TOGETHER), strict=True)]
    finally:
        for module, mode in modes.items():
            module.training = mode
    moved = batch.images.short() + step * torch.cat(signs).permute(0, 2, 3, 1)
    return moved.clamp(0, 255).to(torch.uint8)


def _signs(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Signs [B, 3, S, S] i16 of the loss's gradient; normalisation scales by positive numbers and changes none."""
    images = images.clone().requires_grad_()
    loss = F.cross_entropy(net(images).logits.float(), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    return gradient.sign().short()


def compressed(images: Tensor, quality: int) -> Tensor:
    """Images uint8 [B, S, S, 3] encoded as JPEG, with colours at half the resolution as usual, and decoded again."""
    decoded = [_through_jpeg(image, quality) for image in images.cpu().numpy()]
    return torch.from_numpy(np.stack(decoded)).to(images.device)


def _through_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as decoded:
        return np.asarray(decoded.convert("RGB"))


# ---- lower resolutions


@dataclass(frozen=True)
class ResizedPolicy:
    """A calibrated policy on images resized to side_px first, and back to their own side if `up_again`.

    Bilinear with antialiasing. The resizing is part of the time but, as it multiplies no weights, not of the MACs.
    """

    policy: Policy
    side_px: int
    up_again: bool = False

    @property
    def name(self) -> str:
        """The name, e.g. `native@112px-and-up`."""
        return f"{self.policy.name}@{self.side_px}px{'-and-up' if self.up_again else ''}"

    @property
    def kind(self) -> str:
        return RESIZED

    @property
    def settings(self) -> Settings:
        return {"policy": self.policy.name, "side_px": self.side_px, "up_again": self.up_again}

    def calibrated(self, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> ResizedPolicy:
        """Returns the policy itself, which uses the thresholds of the full resolution."""
        return self

    def predict(self, net: nn.Module, images: Tensor) -> Prediction:
        smaller = _resized(images, self.side_px, self.side_px)
        back = _resized(smaller, images.shape[-2], images.shape[-1]) if self.up_again else smaller
        return self.policy.predict(net, back)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
    return resized.to(images.dtype)


@dataclass(frozen=True)
class ResolutionSweep:
    """The sides at which policies are run, and whether images are brought back to their own side for the net.

    Raises ConfigError if there is no side, one twice, or one below 1.
    """

    sides_px: tuple[int, ...]
    up_again: bool = False

    def __post_init__(self) -> None:
        if not self.sides_px or len(set(self.sides_px)) < len(self.sides_px) or min(self.sides_px) < 1:
            raise _error("--sides", list(self.sides_px), "write sides in pixels, each once, e.g. 224,160,112")

    @property
    def name(self) -> str:
        """The name, e.g. `sides224+160+112-and-up`."""
        return f"sides{'+'.join(map(str, self.sides_px))}{'-and-up' if self.up_again else ''}"

    def of(self, policies: Sequence[Policy]) -> list[Policy]:
        """Each policy at each side."""
        return [ResizedPolicy(policy, side, self.up_again) for policy in policies for side in self.sides_px]

    def check(self, net: nn.Module, side_px: int) -> None:
        """Raises ConfigError for a side above the images' side_px, and the net's own error for a side too small."""
        above = [side for side in self.sides_px if side > side_px]
        if above:
            raise ConfigError(
                f"--sides {', '.join(map(str, above))}: larger than the images ({side_px} px), which are not enlarged; "
                f"data.eval_side_px={max(above)} evaluates larger images",
                key="--sides",
                subject=", ".join(map(str, above)),
            )
        weight = next(net.parameters())
        with torch.no_grad():
            for side in () if self.up_again else self.sides_px:
                net(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))


def sides(text: str) -> tuple[int, ...]:
    """The numbers in "224,160,112". Raises ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise _error("--sides", text, "write sides in pixels, e.g. 224,160,112")
    return tuple(int(part) for part in parts)
