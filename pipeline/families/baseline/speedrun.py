"""A small net that learns CIFAR in about ten epochs. Letters: B images, K classes, C channels, S side in pixels.

Source: Keller Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498, 2024), the description of
its smallest net: a fixed whitening layer (Page, 2018), three groups of two convolutions that begin as partial
identities (Zagoruyko & Komodakis, arXiv 1706.00388), GELU, BatchNorm without scales, a scaled head. Written anew.
Differences: whitened are the patches of the first training batch, over all ranks, not of the first 5,000 images; the
whitening layer's bias is trained to the end, not for three epochs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import ranks
from pipeline.blocks import Logits
from pipeline.errors import ConfigError
from pipeline.families.baseline.model import MIN_SIDE_PX

PATCH = 2  # side of a whitened patch in pixels
WIDTHS = (64, 256, 256)
MOMENTUM = 0.4  # of BatchNorm's running statistics: few steps follow
NORM_EPSILON, WHITENING_EPSILON = 1e-12, 5e-4
HEAD_SCALE = 1 / 9


class SpeedrunNet(nn.Module):
    """Whitening layer, three groups that halve the maps, max pooling over what is left, a linear head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.whiten = Whitening()
        inputs = (self.whiten.outputs, *WIDTHS[:-1])
        self.groups = nn.Sequential(*(_group(*pair) for pair in zip(inputs, WIDTHS, strict=True)))
        self.fc = nn.Linear(WIDTHS[-1], num_classes, bias=False)

    def draw_noise(self, num_images: int) -> Tensor | None:
        return None

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Logits:
        """images [B, 3, S, S] -> logits [B, K]. Raises ConfigError for images below MIN_SIDE_PX."""
        if (side := min(images.shape[-2:])) < (least := MIN_SIDE_PX["speedrun"]):
            message = f"images of {side} px: speedrun needs at least {least} px"
            raise ConfigError(message, key="images", subject=side)
        x = self.groups(F.gelu(self.whiten(images)))  # [B, 256, S/8, S/8]
        return Logits(HEAD_SCALE * self.fc(x.amax(dim=(2, 3))))

    def norm_biases(self) -> list[nn.Parameter]:
        """The biases of BatchNorm, which learn faster than all else."""
        return [module.bias for module in self.modules() if isinstance(module, nn.BatchNorm2d)]


class Whitening(nn.Module):
    """A convolution over patches whose outputs are uncorrelated and of variance 1, each with both signs.

    The filters are the eigenvectors of the patches' covariance over the roots of their eigenvalues, from the first
    batch (of several micro-batches the first one) that is seen in training mode; until then they are drawn. `fitted` []
    is 1 from then on. Collective in that forward. A moving average of the net takes the filters over as it takes over
    the weights of the first steps: at once with a warm-up of the average, slowly with `training.ema_warmup: none`.
    """

    def __init__(self) -> None:
        super().__init__()
        values = 3 * PATCH**2
        self.outputs = 2 * values
        basis = nn.init.orthogonal_(torch.empty(values, values))
        self.register_buffer("weight", _both_signs(basis))  # [24, 3, 2, 2]
        self.register_buffer("fitted", torch.zeros((), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(self.outputs))
        self.is_fitted = False  # as `fitted`, but known without waiting for a device
        self.register_load_state_dict_post_hook(_take_over)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> [B, 24, S - 1, S - 1]."""
        if self.training and not self.is_fitted and not images.is_meta:
            self.fit(images)
        return F.conv2d(images, self.get_buffer("weight"), self.bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Sets the filters by the patches of images [B, 3, S, S]. Collective."""
        with torch.autocast(images.device.type, enabled=False):
            patches = F.unfold(images.float(), PATCH).transpose(1, 2).flatten(0, 1)  # [n, 12]
            covariance = ranks.rank_mean((patches.T @ patches / len(patches)).expand(len(images), -1, -1))
            values, vectors = torch.linalg.eigh(covariance.double())
        whitened = (vectors / (values + WHITENING_EPSILON).sqrt()).T.flip(0)  # of falling variance
        self.get_buffer("weight").copy_(_both_signs(whitened))
        self.get_buffer("fitted").fill_(1)
        self.is_fitted = True


def _take_over(module: nn.Module, _: object) -> None:
    assert isinstance(module, Whitening)
    module.is_fitted = not module.bias.is_meta and bool(module.get_buffer("fitted"))


def _both_signs(filters: Tensor) -> Tensor:
    """filters [n, 12] as the weight of a convolution, [2n, 3, 2, 2]."""
    return torch.cat([filters, -filters]).view(-1, 3, PATCH, PATCH)


def _group(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, 2x2 max pooling, BatchNorm, GELU; convolution, BatchNorm, GELU."""
    first, second = _identity_conv(inputs, outputs), _identity_conv(outputs, outputs)
    return nn.Sequential(first, nn.MaxPool2d(2), _norm(outputs), nn.GELU(), second, _norm(outputs), nn.GELU())


def _identity_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution whose first outputs are its inputs; the others are torch's own."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight.data[:inputs])
    return convolution


def _norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm whose scale stays 1."""
    norm = nn.BatchNorm2d(channels, eps=NORM_EPSILON, momentum=MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm
