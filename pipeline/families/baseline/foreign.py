"""Nets that torchvision and timm define, by name: `torchvision:NAME` and `timm:NAME`.

They are built as their authors build them, but without auxiliary classifiers, and with masks of dropout and stochastic
depth that depend on each image's own noise. A random layer of another kind draws from torch's default generator, which
training seeds at each micro-step: then a run still resumes to the same bits, but its masks depend on the world size.
Letters: B images, K classes, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.blocks import Logits
from pipeline.compat.torch import without_dispatch_modes
from pipeline.errors import ConfigError, ResourceError
from pipeline.families.baseline import image_noise
from pipeline.families.baseline.image_noise import ImageNoise

if TYPE_CHECKING:
    from types import ModuleType

LIBRARIES = ("torchvision", "timm")
WITHOUT_AUXILIARY = ("googlenet", "inception_v3")
MNASNET = {"mnasnet0_5": 0.5, "mnasnet0_75": 0.75, "mnasnet1_0": 1.0, "mnasnet1_3": 1.3}  # its width by name


@cache
def torchvision_names() -> Sequence[str]:
    """The names of all nets of torchvision that classify images."""
    import torchvision  # it takes as long as torch

    return tuple(torchvision.models.list_models(module=torchvision.models))


def is_foreign(name: str) -> bool:
    """Whether the name of a net is `torchvision:NAME` or `timm:NAME`."""
    return name.partition(":")[0] in LIBRARIES and ":" in name


def why_unknown(name: str) -> str | None:
    """Why there is no such foreign net; None if there is one. timm's nets are only looked up when one is built."""
    library, _, plain = name.partition(":")
    if library == "timm":
        return None if plain else "give a name of timm's, e.g. timm:resnet50"
    if plain in torchvision_names():
        return None
    close = get_close_matches(plain, torchvision_names(), 3)
    return "torchvision has no such net; " + (f"did you mean {' or '.join(close)}?" if close else "see its list_models")


def timm_module() -> ModuleType:
    """The module `pipeline.compat.timm`. Raises ResourceError if timm is not installed."""
    if find_spec("timm") is None:
        raise ResourceError(
            "a net of timm's needs timm, which is not installed here: install the extra `timm`, e.g. "
            "pip install -c constraints.txt -e '.[timm]'",
            key="family.net",
            subject="timm",
        )
    from pipeline.compat import timm

    return timm


def build(name: str, num_classes: int) -> Foreign:
    """The net on CPU, its weights drawn from torch's default generator as its authors do.

    Raises ConfigError if timm has no such net, ResourceError if timm is not installed.
    """
    library, _, plain = name.partition(":")
    if library == "timm":
        return Foreign(timm_module().create(plain, num_classes), name, timm_layers())
    return Foreign(_of_torchvision(plain, num_classes), name)


def timm_layers() -> Mapping[type[nn.Module], image_noise.Replacement]:
    """timm's own layers that drop something, for `Foreign`."""
    timm = timm_module()
    return {timm.DropPath: lambda module: (timm.drop_path_rate(module), True, timm.drop_path_scales(module))}


def _of_torchvision(name: str, num_classes: int) -> nn.Module:
    if name in MNASNET:
        from pipeline.compat.torchvision import UnversionedMNASNet

        net: nn.Module = UnversionedMNASNet(MNASNET[name], num_classes=num_classes)
        return net
    from torchvision.models import get_model

    options = {"aux_logits": False, "init_weights": True} if name in WITHOUT_AUXILIARY else {}
    built: nn.Module = get_model(name, num_classes=num_classes, weights=None, **options)
    return built


class OfLibrary(nn.Module):
    """A net that another library defines; the names of its weights in our files are `net.` and the library's.

    name: as in `family.net`.
    """

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name


class Foreign(OfLibrary):
    """A net of another library with the forward that the pipeline expects.

    name: as in `family.net`. random_layers: kinds of layers to replace, besides torch's and torchvision's.
    """

    def __init__(
        self, net: nn.Module, name: str, random_layers: Mapping[type[nn.Module], image_noise.Replacement] | None = None
    ) -> None:
        super().__init__(net, name)
        self.noise = ImageNoise()
        self.random = image_noise.replace_random_layers(net, self.noise, random_layers) > 0

    def draw_noise(self, num_images: int) -> Tensor | None:
        """Two whole numbers for each image, [B, 2]; None if nothing is dropped."""
        return image_noise.draw(num_images, next(self.parameters()).device) if self.random else None

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Logits:
        """images [B, 3, H, W] -> logits [B, K]. Raises ConfigError for images of a size that the net cannot take."""
        if self.training:
            self.noise.rows = self.draw_noise(len(images)) if noise is None else noise
        output = self.net(images) if torch.compiler.is_compiling() else self._explained(images)
        self.noise.rows = None
        return Logits(output)

    def head(self) -> Sequence[str]:
        """The names of the layers whose outputs are the classes."""
        if self.name.startswith("timm:"):
            return [f"net.{name}" for name in timm_module().head_of(self.net)]
        layers = [(name, type(module)) for name, module in self.named_modules()]
        linear = [name for name, kind in layers if kind is nn.Linear]  # SqueezeNet has none
        return (linear or [name for name, kind in layers if kind is nn.Conv2d])[-1:]

    def _explained(self, images: Tensor) -> Tensor:
        """The net's logits, or a ConfigError if it is the size of the images that the net cannot take."""
        try:
            output: Tensor = self.net(images)
        except (RuntimeError, ValueError, AssertionError):
            height, width = images.shape[-2:]
            reason = _why_not(self.net, height, width)
            if not reason:
                raise
            raise ConfigError(
                f"images of {height}x{width} px: {self.name} does not take them ({reason}); choose data.side_px, "
                "data.eval_side_px and family.resolutions_px for it",
                key="images",
                subject=f"{height}x{width}",
            ) from None
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            message = f"family.net (={self.name}): it returns a {kind}, not one tensor of logits; take another net"
            raise ConfigError(message, key="family.net", subject=self.name)
        return output


def _why_not(net: nn.Module, height: int, width: int) -> str:
    """Why the net in eval mode cannot take images of this size, tried on torch's meta device; "" if it can."""
    values = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    shapes = {name: torch.empty_like(value, device="meta") for name, value in values}
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad(), without_dispatch_modes():
            functional_call(net, shapes, torch.empty(2, 3, height, width, device="meta"))
    except Exception as error:  # whatever a library raises, from its assertions to torch's errors of shapes
        return str(error).strip().partition("\n")[0][:200] or type(error).__name__
    finally:
        for module, mode in modes.items():
            module.training = mode
    return ""
