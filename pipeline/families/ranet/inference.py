"""The policies of the net, and each of its exits as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from pipeline.exits import policies as of_exits
from pipeline.exits import static as modules
from pipeline.families.ranet.config import RanetConfig
from pipeline.families.ranet.model import Ranet
from pipeline.family import Policy, Report


def policies(config: RanetConfig, net: nn.Module) -> Sequence[Policy]:
    """The last exit first, then the others, `anytime`, and the budgets."""
    return of_exits.policies(config.num_exits, config.budgets)


def static(
    config: RanetConfig, net: nn.Module, reports: Sequence[Report]
) -> Mapping[str, Callable[[Tensor], nn.Module]]:
    """`exit-k` for each exit; budgets decide image by image and cannot be exported."""
    assert isinstance(net, Ranet)
    return modules.static(net)
