"""Dropout and stochastic depth whose masks depend on each image's own noise, for nets that other libraries define.

A net's random layers are replaced by these. Their masks are a hash of two numbers of the image, of the layer and of the
place in the map: an image has the same masks in a batch of any composition, on any rank and device.
Letters: B images, n values of an image in a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BITS = 31  # products with the factors below stay within 63 bits
MASK = 2**BITS - 1


@dataclass
class ImageNoise:
    """rows: the numbers [B, 2] of the images in the forward that is running, below 2**31; None outside of training."""

    rows: Tensor | None = None

    def keeps(self, rate: float, layer: int, size: int) -> Tensor:
        """Whether each of `size` values of each image is kept, [B, size]; each is dropped with probability `rate`."""
        assert self.rows is not None, "the net's own forward gives the noise"
        first, second = self.rows[:, :1], self.rows[:, 1:]
        place = torch.arange(size, device=self.rows.device)
        numbers = _mixed(_mixed(first + place & MASK) ^ (second + layer * 0x2545F491 & MASK))
        return numbers.ge(round(rate * 2**BITS))


def draw(num_images: int, device: torch.device) -> Tensor:
    """Noise [B, 2] i64 from torch's default generator."""
    return torch.randint(2**BITS, (num_images, 2), device=device)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of the numbers below 2**31 that changes half of the bits with any bit of x, i64."""
    x = (x ^ (x >> 16)) * 0x45D9F3B & MASK
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & MASK
    return x ^ (x >> 16)


class DroppedValues(nn.Module):
    """Dropout: sets values to 0 with probability `rate` in training, and divides the others by 1 - rate."""

    def __init__(self, noise: ImageNoise, rate: float, layer: int) -> None:
        super().__init__()
        self.noise, self.rate, self.layer = noise, rate, layer

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] of any shape."""
        if not self.training:
            return x
        kept = self.noise.keeps(self.rate, self.layer, x[0].numel()).view(x.shape)
        return x * kept / (1 - self.rate)


class DroppedImages(nn.Module):
    """Stochastic depth: sets x to 0 for a share `rate` of the images in training.

    What is kept is divided by 1 - rate if `scales`.
    """

    def __init__(self, noise: ImageNoise, rate: float, layer: int, scales: bool = True) -> None:
        super().__init__()
        self.noise, self.rate, self.layer, self.scales = noise, rate, layer, scales

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] of any shape."""
        if not self.training:
            return x
        kept = self.noise.keeps(self.rate, self.layer, 1).view(-1, *[1] * (x.dim() - 1))
        return x * kept / (1 - self.rate if self.scales else 1)


Replacement = Callable[[nn.Module], tuple[float, bool, bool]]  # rate, whether whole images are dropped, scales


def replace_random_layers(
    net: nn.Module, noise: ImageNoise, more: Mapping[type[nn.Module], Replacement] | None = None
) -> int:
    """Replaces the net's dropouts and stochastic depths by those of this module. Returns how many there are.

    more: further kinds of layers. One with rate 0 drops nothing and stays.
    """
    from torchvision.ops import StochasticDepth  # torchvision takes as long to import as torch

    kinds: dict[type[nn.Module], Replacement] = {
        nn.Dropout: lambda module: (float(module.p), False, True),  # type: ignore[arg-type]
        StochasticDepth: lambda module: (float(module.p), module.mode == "row", True),  # type: ignore[arg-type]
        **(more or {}),
    }
    count = 0
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in kinds:
                continue
            rate, whole, scales = kinds[type(child)](child)
            if rate > 0:
                new = DroppedImages(noise, rate, count, scales) if whole else DroppedValues(noise, rate, count)
                setattr(parent, name, new.train(child.training))
                count += 1
    return count
