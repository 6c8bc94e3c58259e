"""The policies of the net, and its weights by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.exits import policies as of_exits
from pipeline.exits.net import is_head
from pipeline.families.msdnet.config import MsdnetConfig
from pipeline.family import Policy
from pipeline.weights import Loaded, load


def policies(config: MsdnetConfig, net: nn.Module) -> Sequence[Policy]:
    """The last exit first, then the others, `anytime`, and the budgets."""
    return of_exits.policies(config.exits, config.budgets)


def load_pretrained(
    config: MsdnetConfig, net: nn.Module, tensors: Mapping[str, Tensor], new_head: bool = False
) -> Loaded:
    """Fills `net` from our weights; uses every tensor, as `load` does. The heads are those of all exits."""
    return load(net, tensors, head=is_head, new_head=new_head)
