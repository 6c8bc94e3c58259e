"""Reads the pickled batches of CIFAR without running any code that a pickle names."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

MOST_TUPLES = 1000  # a batch has a dozen; Python overflows its stack where 100,000 are in one another
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def unpickle(content: bytes, where: str) -> dict[str, object]:
    """A dictionary of plain values and of arrays of bytes. Raises DataError if it is or needs anything else."""
    try:
        _check_opcodes(content)
        batch = _Batch(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise ValueError(f"{type(batch).__name__}, not a dictionary")
        return {_text(key): value.array() if isinstance(value, _Array) else value for key, value in batch.items()}
    except Exception as error:  # unpickling damaged data raises anything
        raise DataError(
            f"{where}: not a batch of CIFAR ({error}); download it again", key="files", subject=where
        ) from None


def _check_opcodes(content: bytes) -> None:
    """Raises ValueError for a pickle that breaks off, or for which the unpickler would need much memory or stack."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _PUTS and int(argument or 0) > len(content):
            raise ValueError("a memo index beyond its length")
        tuples += "TUPLE" in opcode.name
    if tuples > MOST_TUPLES:
        raise ValueError(f"{tuples:,} tuples")


class _Array:
    """An array in a pickle, by what numpy would be given."""

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        """The array. Raises ValueError unless it is a complete one of bytes."""
        match self.state:
            case (_, tuple(shape), _Type(name="u1" | b"u1"), fortran, bytes(content)):
                if all(isinstance(side, int) and side >= 0 for side in shape) and prod(shape) == len(content):
                    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")
        raise ValueError("an array that is incomplete or not of bytes")


class _Type:
    """The type of an array's elements in a pickle."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and the like, which bytes do not have


def _encoded(text: str, _: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    return text.encode("latin-1")


_NAMES: Mapping[tuple[str, str], Callable[..., object]] = {  # all that a batch needs
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
}


class _Batch(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in _NAMES:
            raise ValueError(f"it needs {module}.{name}")
        return _NAMES[module, name]


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str):
        return value
    raise ValueError(f"a key of type {type(value).__name__}")
