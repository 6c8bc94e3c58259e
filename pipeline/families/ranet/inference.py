"""The policies of the net."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.exits import policies as of_exits
from pipeline.families.ranet.config import RanetConfig
from pipeline.family import Policy


def policies(config: RanetConfig, net: nn.Module) -> Sequence[Policy]:
    """The last exit first, then the others, `anytime`, and the budgets."""
    return of_exits.policies(config.num_exits, config.budgets)
