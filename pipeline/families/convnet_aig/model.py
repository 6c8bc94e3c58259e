"""The networks of ConvNet-AIG: y = ReLU(S(x) + z(x) · F(x)) with a gate z in {0, 1} for each image and block.

Letters: B images, K classes, C channels, L blocks, G of them with a gate (the others are always open).
Source: Veit & Belongie, ECCV 2018 (arXiv 1711.11503), and the code released with it. Differences from that code:
a block with target rate 1 has no gate (there it is sampled like any other but counted as executed); the noise is one
logistic number per gate in fp32 (there two Gumbel numbers, which have the same distribution); the pooling of the gates
is adaptive, so that images need not be square; BatchNorm starts with weight 1 (torch 0.3.1 drew it from U(0, 1)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.blocks import conv_bn, he_fan_out, put, take
from pipeline.config import each_once, meant
from pipeline.errors import JsonValue
from pipeline.family import FamilyConfig

Rate = Annotated[float, Field(ge=0, le=1)]
Threshold = Annotated[float, Field(gt=0, lt=1)]
STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
HIDDEN = 16  # hidden units of every gate
OPEN_BIAS = (0.1, 2.0)  # logits of skip and execute at the start: open with probability sigmoid(1.9) = 0.87


class AigConfig(FamilyConfig):
    """depth is 50, 101 or 152 for ImageNet, 6n+2 for CIFAR; the paper uses 110."""

    name: Literal["convnet_aig"] = "convnet_aig"
    depth: Annotated[int, Field(ge=8, le=2000)] = 110
    target_rate: Rate | tuple[Rate, ...] = 0.7  # share of images that open a block; a list: by stage or by block
    schedule: Literal["uniform", "published"] = "uniform"  # published: the README's rates for 50 and 101
    rate_weight: Annotated[float, Field(ge=0, le=10_000)] = (
        2.0  # factor of the rate loss; the code: 2 for CIFAR, 1 for ImageNet
    )
    rate_reduction: Literal["mean", "sum"] = "mean"  # over blocks; the paper sums, the code takes the mean
    gate_batchnorm: bool = True  # in the code, not in the published figure
    gate_lr_factor: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    thresholds: Annotated[tuple[Threshold, ...], meant(each_once)] = ()  # policies that open at this probability
    scaled: Annotated[
        tuple[Literal["rate", "prob"], ...], meant(each_once)
    ] = ()  # policies that run all blocks, scaled by their likelihood
    controls: Annotated[
        tuple[Literal["shuffled", "mask"], ...], meant(each_once)
    ] = ()  # policies that run blocks as often as the gates do, whatever the image

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        rates = values["target_rate"]
        fixed = all(rate == 1 for rate in rates) if isinstance(rates, list) else rates == 1
        if fixed and not (values["schedule"] == "published" and values["depth"] == 50):
            keys = ("rate_weight", "rate_reduction", "gate_batchnorm", "gate_lr_factor")
            return dict.fromkeys(keys, "target_rate is 1 for each block, so that the net has no gate")
        return {"rate_reduction": "rate_weight is 0"} if values["rate_weight"] == 0 else {}

    @model_validator(mode="after")
    def _rules(self) -> AigConfig:
        if self.depth not in STAGES and (self.depth < 8 or (self.depth - 2) % 6):
            raise ValueError(f"depth (={self.depth}): 50, 101, 152 for ImageNet, or 6n+2 for CIFAR, e.g. 20, 110")
        if isinstance(self.target_rate, tuple) and len(self.target_rate) not in (self.num_blocks, len(self.stages)):
            raise ValueError(
                f"target_rate has {len(self.target_rate)} entries, depth {self.depth} has {self.num_blocks} blocks in "
                f"{len(self.stages)} stages"
            )
        if self.schedule == "published" and (self.depth not in (50, 101) or isinstance(self.target_rate, tuple)):
            raise ValueError("schedule: published is for depth 50 and 101 with one target_rate")
        return self

    @property
    def for_imagenet(self) -> bool:
        """Whether the net has the ImageNet stem and bottleneck blocks."""
        return self.depth in STAGES

    @property
    def stages(self) -> tuple[int, ...]:
        """The number of blocks of each stage; the first block of every stage but the first halves the maps."""
        return STAGES[self.depth] if self.for_imagenet else ((self.depth - 2) // 6,) * 3

    @property
    def num_blocks(self) -> int:
        """L."""
        return sum(self.stages)

    @property
    def targets(self) -> tuple[float, ...]:
        """The target rate of each block, [L]; a block with rate 1 has no gate and always runs.

        Source: the README of the released code, for `published`.
        """
        if isinstance(self.target_rate, tuple):
            each = len(self.target_rate) == self.num_blocks
            counts = (1,) * self.num_blocks if each else self.stages
            return tuple(rate for rate, count in zip(self.target_rate, counts, strict=True) for _ in range(count))
        t = self.target_rate
        if self.schedule == "uniform":
            return (t,) * self.num_blocks
        if self.depth == 50:
            return (1, 1, 0.8, 1, t, t, t, 1, t, t, t, t, t, 1, 0.7, 1)
        return (1,) * 8 + (t,) * 25


@dataclass(frozen=True)
class AigOutput:
    """logits [B, K]; gates [B, L] f32, 1 where a block ran, with the straight-through gradient in training."""

    logits: Tensor
    gates: Tensor


def build(config: AigConfig, num_classes: int) -> Aig:
    """The net on CPU, its weights drawn from torch's default generator."""
    return Aig(config, num_classes)


class Gate(nn.Module):
    """Decides from the block's input: pooling, 16 hidden units, log-odds of execution. Always in fp32."""

    def __init__(self, channels: int, batchnorm: bool) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, HIDDEN, 1)  # 1x1 convolutions, as the released code stores them
        self.fc1bn = nn.BatchNorm2d(HIDDEN) if batchnorm else nn.Identity()
        self.fc2 = nn.Conv2d(HIDDEN, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> log-odds that the block executes, [B] f32."""
        with torch.autocast(x.device.type, enabled=False):
            pooled = x.mean(dim=(2, 3), keepdim=True, dtype=self.fc1.weight.dtype)  # [B, C, 1, 1]
            skip, execute = self.fc2(torch.relu(self.fc1bn(self.fc1(pooled)))).flatten(1).unbind(1)
            odds: Tensor = execute - skip
            return odds


def straight_through(odds: Tensor, noise: Tensor) -> Tensor:
    """1 where odds + noise > 0, else 0, with the gradient of sigmoid(odds + noise): all [B].

    With logistic noise a gate opens with probability sigmoid(odds). Source: §3.2, temperature 1.
    """
    hard: Tensor = _StraightThrough.apply(odds + noise)
    return hard


class _StraightThrough(torch.autograd.Function):
    """1 above 0, else 0; the gradient is that of the sigmoid."""

    @staticmethod
    def forward(ctx: Any, odds: Tensor) -> Tensor:
        ctx.save_for_backward(odds)
        return (odds > 0).to(odds.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (odds,) = ctx.saved_tensors
        return torch.ops.aten.sigmoid_backward(gradient, torch.sigmoid(odds))  # type: ignore[no-any-return]


class GatedBlock(nn.Module):
    """A residual block: `residual(x)` without the last ReLU, `shortcut(x)`, and a gate unless it always runs."""

    def __init__(self, residual: nn.Sequential, shortcut: nn.Module, gate: Gate | None) -> None:
        super().__init__()
        self.residual, self.shortcut, self.gate = residual, shortcut, gate

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """For training: every image runs the residual, which is then multiplied by its gate [B]; None means 1."""
        residual = self.residual(x)
        if gate is not None:
            residual = gate.view(-1, 1, 1, 1).to(residual.dtype) * residual
        return torch.relu(self.shortcut(x) + residual)

    def skipping(self, x: Tensor, open_rows: Tensor) -> Tensor:
        """For inference without gradients: the residual runs only on the images at `open_rows` [n].

        x [B, C, H, W] must be the output of a ReLU, as the inputs of all blocks are. If the shortcut is the identity,
        x is overwritten, and images that skip the block are not copied.
        """
        same = isinstance(self.shortcut, nn.Identity)
        if len(open_rows) == 0:
            return x if same else torch.relu_(self.shortcut(x))
        if len(open_rows) == len(x):
            return _added(self.residual(x), self.shortcut(x))
        opened = take(x, open_rows)
        y = x if same else self.shortcut(x)
        kept = opened if same else take(y, open_rows)
        return put(y if same else torch.relu_(y), open_rows, _added(self.residual(opened), kept))


def _added(residual: Tensor, kept: Tensor) -> Tensor:
    """ReLU(kept + residual) in the dtype of kept, in the residual's memory if the dtypes are equal."""
    return torch.relu_(residual.to(kept.dtype).add_(kept))


class Aig(nn.Module):
    """Stem, gated blocks, pooled linear head; submodules `stem`, `blocks`, `fc`."""

    def __init__(self, config: AigConfig, num_classes: int) -> None:
        super().__init__()
        imagenet = config.for_imagenet
        width = 64 if imagenet else 16
        stem: list[nn.Module] = [
            nn.Conv2d(3, width, 7 if imagenet else 3, 2 if imagenet else 1, 3 if imagenet else 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        self.stem = nn.Sequential(*stem, *([nn.MaxPool2d(3, 2, 1)] if imagenet else []))
        self.blocks = nn.ModuleList(_blocks(config))
        self.fc = nn.Linear(2048 if imagenet else 64, num_classes)
        if imagenet:
            he_fan_out(self)  # CIFAR nets keep torch's defaults, as in the released code
        for gate in self.gates():
            _init_gate(gate)

    def gates(self) -> list[Gate]:
        """The gates in the order of their blocks, [G]."""
        return [block.gate for block in self.blocks if isinstance(block, GatedBlock) and block.gate is not None]

    def draw_noise(self, num_images: int) -> Tensor | None:
        """Logistic noise [B, G] from torch's default generator; None for a net without gates."""
        count = len(self.gates())
        if count == 0:
            return None
        uniform = torch.rand(num_images, count, device=self.fc.weight.device, dtype=torch.float32)
        return logistic(uniform)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> AigOutput:
        """Runs every block for every image and masks its output.

        Gates are sampled in training or with `noise`; otherwise they open if the log-odds are positive.
        """
        if noise is None and self.training:
            noise = self.draw_noise(len(images))
        x = self.stem(images)
        gates, used, full = [], 0, torch.promote_types(x.dtype, torch.float32)
        for block in self.blocks:
            assert isinstance(block, GatedBlock)
            gate = None
            if block.gate is not None:
                odds = block.gate(x)
                gate = (odds > 0).to(odds.dtype) if noise is None else straight_through(odds, noise[:, used])
                used += 1
            gates.append(x.new_ones(len(x), dtype=full) if gate is None else gate)
            x = block(x, gate)
        logits = self.fc(x.mean(dim=(2, 3)))
        return AigOutput(logits, torch.stack(gates, dim=1))


def logistic(uniform: Tensor) -> Tensor:
    """Logistic numbers from uniform numbers in [0, 1), clamped so that they are finite."""
    kept = uniform.clamp(1e-7, 1 - 1e-7)
    return torch.log(kept) - torch.log1p(-kept)


def _blocks(config: AigConfig) -> list[GatedBlock]:
    widths = (64, 128, 256, 512) if config.for_imagenet else (16, 32, 64)
    expansion = 4 if config.for_imagenet else 1
    inputs = widths[0]
    made: list[GatedBlock] = []
    for stage, (count, width) in enumerate(zip(config.stages, widths, strict=True)):
        for number in range(count):
            stride = 2 if stage and number == 0 else 1
            outputs = width * expansion
            residual = _bottleneck(inputs, width, stride) if config.for_imagenet else _basic(inputs, width, stride)
            gated = config.targets[len(made)] < 1
            gate = Gate(inputs, config.gate_batchnorm) if gated else None
            made.append(GatedBlock(residual, _shortcut(inputs, outputs, stride), gate))
            inputs = outputs
    return made


def _basic(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*conv_bn(inputs, width, 3, stride), nn.ReLU(), *conv_bn(width, width, 3))


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Sequential:
    """The stride is on the 3x3 convolution ("v1.5")."""
    reduce, middle, expand = conv_bn(inputs, width, 1), conv_bn(width, width, 3, stride), conv_bn(width, 4 * width, 1)
    return nn.Sequential(*reduce, nn.ReLU(), *middle, nn.ReLU(), *expand)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    same = inputs == outputs and stride == 1
    return nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))


def _init_gate(gate: Gate) -> None:
    assert gate.fc2.bias is not None
    nn.init.normal_(gate.fc2.weight, 0.0, 0.001)
    with torch.no_grad():
        gate.fc2.bias.copy_(torch.tensor(OPEN_BIAS))
