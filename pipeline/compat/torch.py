"""Private parts of torch: version counters of tensors, hooks of modules, dispatch modes, and how a module is cast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module

import torch
from torch import Tensor, nn

from pipeline.compat import require

TRIED = "2.14"
_python_dispatch = import_module("torch.utils._python_dispatch")
require("torch", torch, ("Tensor._version",), tried=TRIED)
require("torch", nn.Module(), ("_forward_hooks", "_apply"), tried=TRIED)  # Shape overrides _apply
require("torch", _python_dispatch, ("_disable_current_modes",), tried=TRIED)


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None for a tensor made in inference mode, which has no counter."""
    return None if tensor.is_inference() else tensor._version


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a forward hook is registered on this very module."""
    return bool(module._forward_hooks)


def without_dispatch_modes() -> AbstractContextManager[object]:
    """A context in which no dispatch mode is active, e.g. no counter of operations and no tracer."""
    context: AbstractContextManager[object] = _python_dispatch._disable_current_modes()
    return context
