"""Counts what torch asks of the CUDA device that computes nothing (nullgpu.c, preloaded into this process).

Kernels are counted, not run. Convolutions and their gradients are replaced by functions that check devices and dtypes,
allocate what cuDNN would, and count. Import it before the device is used.
"""

from __future__ import annotations

import ctypes
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.library import Library

NAMES = (
    *("LAUNCH", "H2D", "D2H", "D2D", "H2D_PAGEABLE", "SYNC_STREAM", "SYNC_DEVICE", "SYNC_EVENT"),
    *("MALLOC", "SETDEVICE", "EVENT_RECORD", "GEMM", "HOSTALLOC", "MEMSET", "CAPTURED"),
)  # of nullgpu.c
WAITS = ("SYNC_STREAM", "SYNC_DEVICE", "SYNC_EVENT")
_shim = ctypes.CDLL(None)
_counts = (ctypes.c_long * 32).in_dll(_shim, "nullgpu_counts")
_mask = ctypes.c_long.in_dll(_shim, "nullgpu_mask")
_capturing = ctypes.c_int.in_dll(_shim, "nullgpu_capturing")
_contexts = (ctypes.c_int * 16).in_dll(_shim, "nullgpu_ctx")
_outside = ("/torch/", "/gpu/null_gpu.py", "/contextlib.py", "/functools.py")
_waiting: Counter[str] = Counter()
relaid: Counter[str] = Counter()  # tensors that a convolution had to copy into another memory format


def contexts() -> list[int]:
    """The devices that have a context."""
    return [number for number, made in enumerate(_contexts) if made]


@dataclass
class Counts:
    """What happened within `counted`; where: the lines of the project at which the host waited."""

    launches: int = 0
    waits: int = 0
    all: dict[str, int] = field(default_factory=dict)
    where: dict[str, int] = field(default_factory=dict)
    relaid: dict[str, int] = field(default_factory=dict)


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts what happens inside."""
    _waiting.clear()
    relaid.clear()
    before, found = list(_counts), Counts()
    _mask.value = sum(1 << NAMES.index(name) for name in WAITS)
    try:
        yield found
    finally:
        _mask.value = 0
        found.all = {n: now - then for n, now, then in zip(NAMES, _counts, before, strict=False) if now != then}
        found.launches = found.all.get("LAUNCH", 0)
        found.waits = sum(found.all.get(name, 0) for name in WAITS)
        found.where, found.relaid = dict(_waiting), dict(relaid)


def _note(kind: int) -> None:
    frames = [f for f in traceback.extract_stack() if not any(part in f.filename for part in _outside)]
    last = frames[-1] if frames else None
    place = f"{last.filename}:{last.lineno} {last.line}" if last else "a thread of autograd"
    _waiting[f"{NAMES[kind]} {place}"] += 1


_hook = ctypes.CFUNCTYPE(None, ctypes.c_int)(_note)
ctypes.c_void_p.in_dll(_shim, "nullgpu_hook").value = ctypes.cast(_hook, ctypes.c_void_p).value


# ---- convolutions as cuDNN allocates them


def _launch(kernels: int) -> None:
    _counts[NAMES.index("CAPTURED") if _capturing.value else 0] += kernels


def _is_last(x: Tensor) -> bool:
    """Whether torch takes the strides of x for channels_last, as its `suggest_memory_format` does."""
    if x.dim() != 4 or x.stride(1) == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if x.shape[dim] == 0 or x.stride(dim) < least or (dim == 0 and least == x.stride(1)):
            return False
        least = x.stride(dim) * max(1, x.shape[dim])
    return True


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_last(x) or _is_last(weight) else torch.contiguous_format


def _relay(what: str, tensor: Tensor, layout: torch.memory_format) -> None:
    if not tensor.is_contiguous(memory_format=layout):
        relaid[what] += 1
        _launch(1)


def _convolution(
    x: Tensor, weight: Tensor, padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int], *_: object
) -> Tensor:
    assert x.dtype == weight.dtype, f"convolution of {x.dtype} with weights of {weight.dtype}"
    assert x.device == weight.device, f"convolution on {x.device} with weights on {weight.device}"
    size = [x.shape[0], weight.shape[0]]
    for n, side in enumerate(x.shape[2:]):
        size.append((side + 2 * padding[n] - dilation[n] * (weight.shape[n + 2] - 1) - 1) // stride[n] + 1)
    layout = _format(x, weight)
    _relay("input", x, layout)
    _relay("weight", weight, layout)
    _launch(1)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def _depthwise(
    x: Tensor,
    weight: Tensor,
    kernel: object,
    bias: object,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return _convolution(x, weight, padding, stride, dilation)


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, *rest: object
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wanted = rest[-1]
    assert isinstance(wanted, list)
    layout = _format(x, weight)
    for what, tensor in (("gradient", gradient), ("input", x), ("weight", weight)):
        _relay(what, tensor, layout)
    _launch(sum(wanted))
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if wanted[0] else None,
        torch.empty(weight.shape, dtype=weight.dtype, device=x.device, memory_format=layout) if wanted[1] else None,
        torch.empty(weight.shape[0], dtype=weight.dtype, device=x.device) if wanted[2] else None,
    )


_aten = Library("aten", "IMPL")
_aten.impl("cudnn_convolution", _convolution, "CUDA")
_aten.impl("_conv_depthwise2d", _depthwise, "CUDA")
_aten.impl("convolution_backward", _backward, "CUDA")
