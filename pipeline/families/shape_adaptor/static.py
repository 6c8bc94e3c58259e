"""The frozen form as a module; the live policy computes the same as long as no alpha changes, so both names give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from pipeline.families.shape_adaptor.inference import freeze, policies
from pipeline.families.shape_adaptor.model import ShapeConfig
from pipeline.family import Report


def static(
    config: ShapeConfig, net: nn.Module, reports: Sequence[Report]
) -> Mapping[str, Callable[[Tensor], nn.Module]]:
    """`live` and `frozen`, for images of the given size."""

    def at_size(images: Tensor) -> nn.Module:
        return freeze(net, (images.shape[2], images.shape[3]))

    return {policy.name: at_size for policy in policies(config, net)}
