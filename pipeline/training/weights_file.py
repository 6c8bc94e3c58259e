"""Weights in a file from anywhere: where it is in a folder of ours, and the tensors by name in a file of any maker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.runs.records import read_status
from pipeline.training import torchvision_weights
from pipeline.weights import ImagesExpected

WRAPPERS = ("module", "_orig_mod")  # what DataParallel, DDP and torch.compile put before names
ENTRIES = (  # under which training programs save a net; an average comes first, as in our own checkpoints
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "shadow"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params"),
)


@dataclass(frozen=True)
class WeightsFile:
    """tensors: by name. entry: the dotted key under which they are in the file; others: keys that were not read.

    expected: the images that the weights are for, if the file is one of torchvision's.
    """

    tensors: Mapping[str, Tensor]
    entry: str = ""
    others: Sequence[str] = ()
    expected: ImagesExpected | None = None


def locate(path: Path) -> Path:
    """The weights' file at `path`: the file itself, or the one in the folder of a checkpoint, a model or a run.

    For a run it is the best checkpoint's, if it is in the run's folder. `torchvision:NAME/WEIGHTS` is downloaded.
    Raises CheckpointError if there is none, ConfigError if torchvision publishes no such weights.
    """
    if torchvision_weights.are_named(path):
        return torchvision_weights.locate(str(path))
    if not path.exists():
        raise no_weights(path, "no such file or folder to take weights from")
    if path.is_file():
        return path
    places = [path]
    best = read_status(path).best
    if best is not None:
        places.append(path / "checkpoints" / best)
    for place in places:
        for name in ("ema.safetensors", "net.safetensors", "model.safetensors"):
            if (place / name).is_file():
                return place / name
    raise no_weights(
        path,
        f"a folder without weights; looked for ema.safetensors, net.safetensors and model.safetensors in "
        f"{' and '.join(map(str, places))}. Name the folder of a checkpoint, or of a finished run whose checkpoints "
        "are in its own folder (checkpoint.storage=null)",
    )


def no_weights(path: Path, what: str) -> CheckpointError:
    """The error about weights that are not in `path`, or cannot be read there."""
    return CheckpointError(f"{path}: {what}", key="weights", subject=path)


def read(path: Path) -> WeightsFile:
    """The tensors by name at `path`, as `locate` finds the file: safetensors', or torch's, read with weights_only.

    They may be in one of ENTRIES, nested too. The names of WRAPPERS are removed from theirs. Raises CheckpointError if
    there is no such file, it holds no named tensors, or it is not clear which of them are the net's.
    """
    path = locate(path)
    content = _content(path)
    found = _entry(content)
    if found is None:
        held = f"; it holds {_listed([*content])}" if isinstance(content, Mapping) else f" but a {_kind(content)}"
        raise no_weights(path, f"contains no named tensors, neither at the top nor under {', '.join(ENTRIES)}{held}")
    entry, values, others = found
    nested = [name for name, value in values.items() if isinstance(value, Mapping) and _entry(value) is not None]
    if nested:
        raise no_weights(
            path, f"holds tensors both at the top and under {_listed(nested)}: unclear which are the net's"
        )
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    plain = {_without_wrappers(name): value for name, value in tensors.items()}
    if len(plain) < len(tensors):
        raise no_weights(path, f"has names that differ only in {' or '.join(WRAPPERS)}")
    others = [*others, *(name for name in values if name not in tensors)]
    return WeightsFile(plain, ".".join(entry), others, torchvision_weights.expected(path))


def _content(path: Path) -> object:
    from safetensors.torch import load_file

    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # its header is JSON, after 8 bytes with its length
        return load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen classes
        why = str(error).strip().partition("\n")[0][:200]
        hint = ". It holds Python objects, not tensors alone: save net.state_dict()" if "weights" in why.lower() else ""
        raise no_weights(path, f"no weights can be read ({type(error).__name__}{why and ': '}{why}){hint}") from None


def _entry(content: object) -> tuple[tuple[str, ...], Mapping[str, object], list[str]] | None:
    """The keys down to the first mapping with named tensors, that mapping, and the keys beside its own; or None."""
    if not isinstance(content, Mapping):
        return None
    for key in ENTRIES:
        found = _entry(content.get(key))
        if found is not None:
            keys, values, others = found
            return (key, *keys), values, [*(str(other) for other in content if other != key), *others]
    named = all(isinstance(key, str) for key in content)
    return ((), content, []) if named and any(isinstance(value, Tensor) for value in content.values()) else None


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _kind(content: object) -> str:
    return type(content).__name__


def _listed(keys: Sequence[object], most: int = 8) -> str:
    return ", ".join(map(str, keys[:most])) + (", ..." if len(keys) > most else "")
