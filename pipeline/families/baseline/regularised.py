"""torchvision's ResNets with stochastic depth and dropout. Letters: B images, C channels, L blocks, F pooled features.

Source: Huang et al., ECCV 2016 (arXiv 1603.09382), the linear rule: block l of L is dropped with l/L · drop_path. What
is kept is divided by its probability, as in torchvision and timm; the CIFAR nets' `stochastic_depth` multiplies in
evaluation instead, as the paper does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pipeline.blocks import Logits, dropped
from pipeline.families.baseline.foreign import OfLibrary


class RegularisedResNet(OfLibrary):
    """A ResNet that drops blocks and pooled features, for each image, in training or with `noise`.

    Otherwise it is torchvision's; its state dict is that of the same net without either.
    """

    net: ResNet

    def __init__(self, net: ResNet, name: str, drop_path: float, dropout: float) -> None:
        super().__init__(net, name)
        self.dropout = dropout
        count = len(list(self._blocks()))
        rates = torch.linspace(0, 1, count + 1)[1:] * drop_path
        self.register_buffer("survival", 1 - rates, persistent=False)  # [L]

    def draw_noise(self, num_images: int) -> Tensor | None:
        """Uniform numbers [B, L + F]: for each block, then for each feature."""
        survival = self.get_buffer("survival")
        return torch.rand(num_images, len(survival) + self.net.fc.in_features, device=survival.device)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Logits:
        """images [B, 3, H, W] -> logits [B, K]; noise as from `draw_noise`."""
        if noise is None and self.training:
            noise = self.draw_noise(len(images))
        if noise is None:
            return Logits(self.net(images))
        net, survival = self.net, self.get_buffer("survival")
        blocks, features = torch.split(noise, [len(survival), noise.shape[1] - len(survival)], dim=1)
        scales = (blocks < survival) / survival  # [B, L]
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        for block, scale in zip(self._blocks(), scales.unbind(1), strict=True):
            x = _scaled(block, x, scale.view(-1, 1, 1, 1))
        x = net.avgpool(x).flatten(1)  # [B, F]
        return Logits(net.fc(dropped(x, features, self.dropout)))

    def _blocks(self) -> Iterator[nn.Module]:
        for stage in (self.net.layer1, self.net.layer2, self.net.layer3, self.net.layer4):
            yield from stage


def _scaled(block: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """torchvision's forward of a block, its residual multiplied by scale [B, 1, 1, 1]."""
    assert isinstance(block, BasicBlock | Bottleneck)
    residual = block.conv2(block.relu(block.bn1(block.conv1(x))))
    if isinstance(block, Bottleneck):
        residual = block.bn3(block.conv3(block.relu(block.bn2(residual))))
    else:
        residual = block.bn2(residual)
    shortcut = x if block.downsample is None else block.downsample(x)
    joined: Tensor = block.relu(shortcut + residual * scale.to(residual.dtype))
    return joined
