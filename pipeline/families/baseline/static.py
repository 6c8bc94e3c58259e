"""A fixed net at each of its resolutions, as modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from pipeline.families.baseline.inference import BaselineResolution, resolutions
from pipeline.families.baseline.model import BaselineConfig
from pipeline.family import Report


class StaticBaseline(nn.Module):
    """The net after a policy's resizing."""

    def __init__(self, policy: BaselineResolution, net: nn.Module) -> None:
        super().__init__()
        self.policy, self.net = policy, net

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> logits [B, K]."""
        logits: Tensor = self.net(self.policy.sized(images)).logits
        return logits


def static(
    config: BaselineConfig, net: nn.Module, reports: Sequence[Report]
) -> Mapping[str, Callable[[Tensor], nn.Module]]:
    """`native`, and each resolution natively and down-and-up."""
    return {policy.name: partial(_at, policy, net) for policy in resolutions(config)}


def _at(policy: BaselineResolution, net: nn.Module, images: Tensor) -> nn.Module:
    return StaticBaseline(policy, net)
