"""Fills a net from weights by name: each tensor is used, or left out by name, or an error lists those that do not fit.

Letters: K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError

COUNTERS = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")  # left out if the net has no such value
NEW_HEAD = ("--new-head", "training.new_head")
Named = Callable[[str], bool]


@dataclass(frozen=True)
class ImagesExpected:
    """The images that weights were made for, as `source` states: None where it does not state it.

    mean, std: of each channel, for pixels in 0..1; side_px: of an evaluated image, which is cut from the middle of one
    whose shorter side is resize_px; interpolation: of the resizing.
    """

    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side_px: int | None = None
    resize_px: int | None = None
    interpolation: str | None = None


@dataclass(frozen=True)
class Loaded:
    """initial: names of the net's values that keep their initial ones; left_out: names of the tensors not used.

    expected: the images that the weights are for, if that is known.
    """

    initial: Sequence[str] = ()
    left_out: Sequence[str] = ()
    expected: ImagesExpected | None = None


def nothing(name: str) -> bool:
    """Contains no name."""
    return False


def load(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    keep: Named = nothing,
    *,
    head: Named = nothing,
    new_head: bool = False,
) -> Loaded:
    """Loads all `tensors` into `net` by name; only names that `keep` contains may be missing.

    head: names of the layers whose outputs are the K classes, in the net and in `tensors`. Where those of `tensors` are
    for another K, of another kind or missing, they are left out if `new_head` is set, and ours keep their initial
    values. Raises ConfigError, listing what is missing, unused, of another shape or not finite; and where `new_head` is
    needed, or would replace a head that fits. Then nothing is loaded.
    """
    own = net.state_dict()
    counters = [name for name in tensors if name not in own and name.rpartition(".")[2] in COUNTERS]
    theirs = {name: value for name, value in tensors.items() if name not in counters}
    problems = _problems(own, theirs, keep)
    faulty = {name for entries in problems.values() for name in entries}
    other_head = bool(faulty) and all(map(head, faulty)) and _differ(own, theirs, head)
    if faulty and not other_head:
        listed = "; ".join(f"{kind}: {_some([*entries.values()])}" for kind, entries in problems.items() if entries)
        raise ConfigError(f"these weights do not fit the net: {listed}", key="weights", subject=listed)
    if other_head != new_head:
        raise _about_new_head(own, theirs, head, needed=other_head)
    dropped = [name for name in theirs if new_head and head(name)]
    used = {name: value for name, value in theirs.items() if name not in dropped}
    net.load_state_dict(used, strict=False)
    initial = [name for name in own if name not in used and (keep(name) or (new_head and head(name)))]
    return Loaded(initial, [*dropped, *counters])


def _problems(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], keep: Named) -> dict[str, dict[str, str]]:
    """What does not fit: the kind of fault -> the names, each with how it is listed."""
    absent = [name for name in own if name not in theirs and not keep(name)]
    shared = [(name, value, own[name]) for name, value in theirs.items() if name in own]
    same = [(name, value) for name, value, here in shared if value.shape == here.shape and here.is_floating_point()]
    odd = {name: f"{name} ({value.dtype})" for name, value in same if not _dense(value)}
    return {
        "missing": {name: name for name in absent if not name.endswith("num_batches_tracked")},
        "not used": {name: name for name in theirs if name not in own},
        "of another shape": {
            name: f"{name} {tuple(value.shape)}, here {tuple(here.shape)}"
            for name, value, here in shared
            if value.shape != here.shape
        },
        "not dense real numbers": odd,
        "not finite": {name: name for name, value in same if name not in odd and not value.isfinite().all()},
    }


def _dense(value: Tensor) -> bool:
    return value.layout == torch.strided and value.is_floating_point() and not value.is_quantized


def _differ(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], head: Named) -> bool:
    """Whether the heads are for other numbers of classes, or of other kinds; one with a fault is neither."""
    ours, other = _head(own, head), _head(theirs, head)
    return not set(ours) & set(other) or {s[0] for s in ours.values()} != {s[0] for s in other.values()}


def _head(tensors: Mapping[str, Tensor], head: Named) -> dict[str, tuple[int, ...]]:
    return {name: (*value.shape, 0) for name, value in tensors.items() if head(name)}


def _about_new_head(
    own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], head: Named, *, needed: bool
) -> ConfigError:
    ours, other = _head(own, head), _head(theirs, head)
    classes = [([*shapes.values()] or [(0,)])[-1][0] for shapes in (ours, other)]
    if not needed:
        message = (
            f"new head: the head of these weights fits the net ({classes[0]} classes); omit --new-head or new_head"
        )
    else:
        message = (
            f"the head of these weights ({_some([*other]) or 'none'}) is for {classes[1]} classes, the net's "
            f"({_some([*ours])}) for {classes[0]}; to leave theirs out and train a new one, add --new-head to models "
            "import, or training.new_head=true to training.start_from"
        )
    return ConfigError(message, keys=NEW_HEAD, subject=_some([*other]))


def _some(entries: Sequence[str], most: int = 8) -> str:
    more = f", and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more


def unwrapped(net: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`tensors` without the name of a module that wrapped the whole net, as `model.` in Lightning's files."""
    own, tops = net.state_dict(), {name.partition(".")[0] for name in tensors}
    if len(tops) != 1 or not tops <= {"model", "net", "network", "backbone"} or any(name in own for name in tensors):
        return tensors
    return {name.partition(".")[2]: value for name, value in tensors.items()}
