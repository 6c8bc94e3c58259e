"""What a net with exits offers, so that policies can run it from exit to exit.

Letters: B images, n of them still running, E exits, K classes.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.blocks import conv_bn_relu


@dataclass(frozen=True)
class ExitOutput:
    """logits [B, K] of the last exit; exits [B, E, K] of each."""

    logits: Tensor
    exits: Tensor


class ExitWalk(Protocol):
    """Runs a net on a batch from exit to exit. rows [n]: the images still running, rising; None for all."""

    rows: Tensor | None

    def to_next_exit(self) -> Tensor:
        """Runs what is before the next exit; returns the input of its classifier, [n, C, h, w]."""

    def keep(self, places: Tensor) -> None:
        """Keeps only the images at `places` (rising) among the present ones."""


def is_head(name: str) -> bool:
    """Whether a tensor's name is of the linear layer of an exit."""
    return re.fullmatch(r"classifiers\.\d+\.fc\.\w+", name) is not None


class ExitClassifier(nn.Module):
    """Two convolutions with stride 2, global average pooling, one linear layer."""

    def __init__(self, channels: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(conv_bn_relu(channels, hidden, 3, 2), conv_bn_relu(hidden, hidden, 3, 2))
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> logits [B, K]."""
        logits: Tensor = self.fc(self.reduce(x).mean(dim=(2, 3)))
        return logits


class ExitNet(nn.Module):
    """A net that can answer at each of its exits; `classifiers` has one module for each."""

    classifiers: nn.ModuleList

    @abstractmethod
    def walk(self, images: Tensor) -> ExitWalk:
        """A walk over images [B, 3, H, W]. May raise ConfigError for images that are too small."""

    @abstractmethod
    def ways(self) -> Sequence[Sequence[str]]:
        """The modules that run before each exit and after the one before it, without classifiers, [E] of names."""

    def facts(self, taken: Tensor) -> dict[str, Tensor]:
        """Further facts of images that exit at `taken` [B], counted from 1."""
        return {}

    def draw_noise(self, num_images: int) -> Tensor | None:
        return None

    def forward(self, images: Tensor, noise: Tensor | None = None) -> ExitOutput:
        """Runs all exits for all images [B, 3, H, W]; see `walk`."""
        walk = self.walk(images)
        exits = [classifier(walk.to_next_exit()) for classifier in self.classifiers]
        return ExitOutput(exits[-1], torch.stack(exits, dim=1))
