"""torchvision's networks with an ImageNet or a CIFAR stem. Letters: B images, K classes, H×W pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import ResNet, get_model
from torchvision.models.googlenet import GoogLeNetOutputs

from pipeline.blocks import Logits
from pipeline.errors import ConfigError
from pipeline.families.baseline.foreign import OfLibrary
from pipeline.families.baseline.model import MIN_SIDE_PX, BaselineConfig
from pipeline.families.baseline.regularised import RegularisedResNet


def build(config: BaselineConfig, num_classes: int) -> nn.Module:
    """One of TORCHVISION on CPU, its weights drawn from torch's default generator as its authors do."""
    options = {"aux_logits": False, "init_weights": True} if config.net == "googlenet" else {}
    net = get_model(config.net, num_classes=num_classes, weights=None, **options)
    if config.stem == "cifar":
        _shrink_stem(net)
    if isinstance(net, ResNet) and (config.drop_path or config.dropout):
        return RegularisedResNet(net, config.net, config.drop_path, config.dropout)
    return Plain(net, config.net)


class Plain(OfLibrary):
    """A torchvision net with the forward that the pipeline expects. GoogLeNet has no auxiliary classifiers here."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__(net, name)

    def draw_noise(self, num_images: int) -> Tensor | None:
        return None

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Logits:
        """images [B, 3, H, W] -> logits [B, K]. Raises ConfigError for images below MIN_SIDE_PX."""
        side, least = min(images.shape[-2:]), MIN_SIDE_PX.get(self.name, 1)
        if side < least:
            raise ConfigError(
                f"images of {images.shape[-2]}x{images.shape[-1]} px: {self.name} needs at least {least} px",
                key="images",
                subject=side,
            )
        output = self.net(images)
        return Logits(output.logits if isinstance(output, GoogLeNetOutputs) else output)


def _shrink_stem(net: nn.Module) -> None:
    """Sets the first convolution to stride 1 (3x3 in ResNets) and removes max pooling, as for 32 px images."""
    if isinstance(net, ResNet):
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    else:
        first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
        first.stride = (1, 1)
