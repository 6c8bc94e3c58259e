"""Private parts of torch: tensors' version counters, modules' hooks and casts, dispatch modes, what DDP ignores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.compat import require

TRIED = "2.14"
_python_dispatch = import_module("torch.utils._python_dispatch")
require("torch", torch, ("Tensor._version",), tried=TRIED)
require("torch", nn.Module(), ("_forward_hooks", "_apply"), tried=TRIED)  # Shape overrides _apply
require("torch", _python_dispatch, ("_disable_current_modes", "TorchDispatchMode"), tried=TRIED)
require("torch", DistributedDataParallel, ("_set_params_and_buffers_to_ignore_for_model",), tried=TRIED)


class SeenOperations(_python_dispatch.TorchDispatchMode):  # type: ignore[misc, name-defined]
    """A context in which `seen` gets each operation and its arguments, below autograd and autocast, before it runs."""

    def __init__(self, seen: Callable[[object, tuple[object, ...], Mapping[str, object]], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def ignore_in_ddp(net: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Makes a DistributedDataParallel that is built over `net` from now on leave these parameters alone."""
    chosen = {id(parameter) for parameter in parameters}
    names = [name for name, parameter in net.named_parameters() if id(parameter) in chosen]
    names += [f".{name}" for name in names]  # DDP's own spelling of a parameter of the net itself
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names)  # type: ignore[no-untyped-call]


def uncompiled(module: object) -> object:
    """The module that `torch.compile` was given; any other object unchanged."""
    return getattr(module, "_orig_mod", module)


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
