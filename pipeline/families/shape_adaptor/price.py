"""What an image costs at given sizes, found by running the net's own body on torch's meta device: shapes alone.

So a shape can be refused before anything of it is computed, and no formula stands beside the net.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline import cost
from pipeline.families.shape_adaptor.bodies import Adaptor, Cells, Layout, build_body
from pipeline.families.shape_adaptor.shape import Size


@dataclass(frozen=True)
class Price:
    """Of one image: values is Σ C·h·w over what every convolution and every adaptor gives; macs as in `cost`."""

    values: int
    macs: int


@dataclass
class PriceList:
    """Prices bodies of a layout by size of image and of adaptors; each once."""

    layout: Layout
    num_classes: int
    _body: nn.Module | None = None
    _values: list[int] = field(default_factory=list)
    _known: dict[tuple[Size, tuple[Size, ...]], Price] = field(default_factory=dict)

    def price(self, size: Size, sizes: tuple[Size, ...]) -> Price:
        """The price of an image of `size` where the adaptors give `sizes` [N]."""
        if (size, sizes) not in self._known:
            self._known[size, sizes] = self._measured(size, sizes)
        return self._known[size, sizes]

    def _measured(self, size: Size, sizes: tuple[Size, ...]) -> Price:
        if self._body is None:
            self._body = self._on_meta()
        self._values.clear()
        with torch.device("meta"):
            images, weights = torch.empty(1, 3, *size), torch.empty(len(sizes), 2)
        macs = cost.measure(_Shaped(self._body, Cells(sizes, weights)), images).macs
        return Price(sum(self._values), macs)

    def _on_meta(self) -> nn.Module:
        with torch.device("meta"):
            body, _ = build_body(self.layout, self.num_classes)
        for module in body.modules():
            if isinstance(module, nn.Conv2d | Adaptor):
                module.register_forward_hook(self._count)
        return body

    def _count(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._values.append(output.numel())


class _Shaped(nn.Module):
    """A body with cells of its own."""

    def __init__(self, body: nn.Module, cells: Cells) -> None:
        super().__init__()
        self.body, self.cells = body, cells

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images, self.cells)
        return logits
