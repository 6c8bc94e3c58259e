"""MACs and activations of an image at given sizes, measured by running the net's own body on torch's meta device.

So a shape can be refused before anything is computed, and no formula duplicates the net. A cost is measured within a
forward, which may itself be under a MAC counter: dispatch modes are disabled meanwhile, so the measurement is not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline import cost
from pipeline.compat.torch import without_dispatch_modes
from pipeline.families.shape_adaptor.bodies import Adaptor, Body, BodyLayout, Cells, build_body
from pipeline.families.shape_adaptor.shape import Size

Sizes = tuple[Size, tuple[Size, ...]]  # sizes of an image and of the adaptors' outputs, [N]


@dataclass
class BodyCosts:
    """The costs of one image in a body of this layout, by its size and the adaptors' sizes; each is measured once."""

    layout: BodyLayout
    num_classes: int
    _body: Body | None = None
    _outputs: list[int] = field(default_factory=list)  # output values by layer, in the current forward
    _inputs: list[int] = field(default_factory=list)  # the longer side of each layer's input in it
    _values: dict[Sizes, int] = field(default_factory=dict)
    _macs: dict[Sizes, int] = field(default_factory=dict)

    def values(self, size: Size, sizes: tuple[Size, ...]) -> int:
        """Σ C·h·w over the outputs of all convolutions and adaptors for one image: what memory is proportional to."""
        if (size, sizes) not in self._values:
            self._run(size, sizes)
            self._values[size, sizes] = sum(self._outputs)
        return self._values[size, sizes]

    def sides(self, size: Size, sizes: tuple[Size, ...]) -> tuple[int, ...]:
        """The longer side in pixels of each layer's input, in the order of the layers' numbers."""
        self._run(size, sizes)
        return tuple(self._inputs)

    @property
    def parameters(self) -> int:
        """The number of weights of the body, without the alphas, of which there is one per adaptor."""
        return sum(parameter.numel() for parameter in self._on_meta().parameters())

    def _run(self, size: Size, sizes: tuple[Size, ...]) -> None:
        self._outputs.clear()
        self._inputs.clear()
        shaped, image = self._shaped(size, sizes)
        with torch.no_grad(), without_dispatch_modes():
            shaped.eval()(image)

    def macs(self, size: Size, sizes: tuple[Size, ...]) -> int:
        """MACs of one image as `pipeline.cost` defines them; slower to measure than `values`."""
        if (size, sizes) not in self._macs:
            shaped, image = self._shaped(size, sizes)
            with without_dispatch_modes():
                self._macs[size, sizes] = cost.measure(shaped, image).macs
        return self._macs[size, sizes]

    def _shaped(self, size: Size, sizes: tuple[Size, ...]) -> tuple[nn.Module, Tensor]:
        with torch.device("meta"):
            return _Shaped(self._on_meta(), Cells(sizes, torch.empty(len(sizes), 2))), torch.empty(1, 3, *size)

    def _on_meta(self) -> Body:
        if self._body is None:
            with torch.device("meta"):
                self._body, _ = build_body(self.layout, self.num_classes)
            for module in self._body.modules():
                if isinstance(module, nn.Conv2d | Adaptor):
                    module.register_forward_hook(self._count)
            for layer in self._body.layers:
                layer.register_forward_pre_hook(self._note)
        return self._body

    def _count(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._outputs.append(output.numel())

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs.append(max(inputs[0].shape[2:]))


class _Shaped(nn.Module):
    """A body with fixed cells."""

    def __init__(self, body: nn.Module, cells: Cells) -> None:
        super().__init__()
        self.body, self.cells = body, cells

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images, self.cells)
        return logits
