"""What an image costs at given sizes, found by running the net's own body on torch's meta device: shapes alone.

So a shape can be refused before anything of it is computed, and no formula stands beside the net. A price is asked for
within a forward, which may itself be under a counter of MACs: dispatch modes are off meanwhile, so it counts nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline import cost
from pipeline.compat.torch import without_dispatch_modes
from pipeline.families.shape_adaptor.bodies import Adaptor, Body, BodyLayout, Cells, build_body
from pipeline.families.shape_adaptor.shape import Size

Asked = tuple[Size, tuple[Size, ...]]  # of an image, and of what its adaptors give, [N]


@dataclass
class BodyCosts:
    """Prices one image in a body of this layout, by its size and those of the adaptors; each once."""

    layout: BodyLayout
    num_classes: int
    _body: Body | None = None
    _given: list[int] = field(default_factory=list)  # values of each convolution and adaptor in the forward under way
    _read: list[int] = field(default_factory=list)  # the longer side that each layer reads in it
    _values: dict[Asked, int] = field(default_factory=dict)
    _macs: dict[Asked, int] = field(default_factory=dict)

    def values(self, size: Size, sizes: tuple[Size, ...]) -> int:
        """Σ C·h·w over what every convolution and every adaptor gives for one image: what memory grows with."""
        if (size, sizes) not in self._values:
            self._run(size, sizes)
            self._values[size, sizes] = sum(self._given)
        return self._values[size, sizes]

    def sides(self, size: Size, sizes: tuple[Size, ...]) -> tuple[int, ...]:
        """The longer side in pixels of what each layer reads, in the order of their numbers."""
        self._run(size, sizes)
        return tuple(self._read)

    @property
    def parameters(self) -> int:
        """How many weights the body has; the alphas, one for each adaptor, are not among them."""
        return sum(parameter.numel() for parameter in self._on_meta().parameters())

    def _run(self, size: Size, sizes: tuple[Size, ...]) -> None:
        self._given.clear()
        self._read.clear()
        shaped, image = self._shaped(size, sizes)
        with torch.no_grad(), without_dispatch_modes():
            shaped.eval()(image)

    def macs(self, size: Size, sizes: tuple[Size, ...]) -> int:
        """MACs of one image as `cost` defines them; the slower of the two questions."""
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
        self._given.append(output.numel())

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._read.append(max(inputs[0].shape[2:]))


class _Shaped(nn.Module):
    """A body with cells of its own."""

    def __init__(self, body: nn.Module, cells: Cells) -> None:
        super().__init__()
        self.body, self.cells = body, cells

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images, self.cells)
        return logits
