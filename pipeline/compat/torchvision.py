"""Private parts of torchvision: how MNASNet reads its weights."""

from __future__ import annotations

from typing import Any

import torchvision.models
from torch import Tensor

from pipeline.compat import require

TRIED = "0.29"
require("torchvision", torchvision.models.MNASNet, ("_load_from_state_dict", "_version"), tried=TRIED)


class UnversionedMNASNet(torchvision.models.MNASNet):  # type: ignore[misc]
    """torchvision's net; it also loads weights without torch's version numbers, such as those of safetensors."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, {"version": 2, **local_metadata}, *rest)
