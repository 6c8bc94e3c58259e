"""GPUs as sites request them: a number or TYPE:NUMBER, by --gpus-per-node, --gpus-per-task, --gpus or --gres."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.errors import ConfigError

Value = str | int | float | bool | None  # of an option of sbatch; True and None: the option has no value; False: unset
TYPED = r"^[A-Za-z][A-Za-z0-9_.-]*:[0-9]+$"
PER_NODE = ("gpus-per-node", "gpus-per-task")  # a job has one task on each node
GRES = re.compile(r"(?:gres[:/])?gpu(?::(?P<type>[A-Za-z][\w.-]*))?(?::(?P<count>\d+))?")


def typed(text: str) -> str:
    """TYPE:NUMBER as it is. Raises ValueError for other text."""
    if not re.fullmatch(TYPED, text):
        raise ValueError("a number of GPUs or TYPE:NUMBER, e.g. 8 or h100:8")
    return text


def number(text: Value) -> int:
    """The GPUs in 4, "4" or "a100:4". Raises ValueError."""
    return int(str(text).rpartition(":")[2])


def requested(extra: Mapping[str, Value], nodes: int) -> int | None:
    """The GPUs of each node that sbatch's options in `extra` request; None if none is about GPUs.

    Raises ValueError for values that cannot be read, or that nodes do not share equally.
    """
    counts = [number(extra[name]) for name in PER_NODE if name in extra]
    if "gpus" in extra:
        whole = number(extra["gpus"])
        if whole % nodes:
            raise ValueError(f"extra.gpus (={extra['gpus']}): {nodes} nodes do not share them equally")
        counts.append(whole // nodes)
    found = [match for item in str(extra.get("gres", "")).split(",") if (match := GRES.fullmatch(item.strip()))]
    if found:
        counts.append(sum(int(match["count"] or 1) for match in found))
    if len(set(counts)) > 1:
        raise ValueError("extra: two options request GPUs, and differ in their number; give one of them")
    return counts[0] if counts else None


def per_node(gpus_per_node: int | str, extra: Mapping[str, Value], nodes: tuple[int, int]) -> int:
    """The GPUs of each node. Raises ConfigError if a number for the whole job cannot be shared by (fewest, most)."""
    if "gpus" in extra and nodes[0] < nodes[1]:
        raise ConfigError(
            f"extra.gpus (={extra['gpus']}): for a job of {nodes[0]} to {nodes[1]} nodes use gpus_per_node",
            key="extra.gpus",
            subject=extra["gpus"],
        )
    try:
        count = requested(extra, nodes[0])
    except ValueError as error:
        raise ConfigError(f"profile: {error}", key="extra.gpus", subject=extra.get("gpus")) from None
    return number(gpus_per_node) if count is None else count


def check(gpus_per_node: int | str, extra: Mapping[str, Value]) -> None:
    """Raises ValueError if `extra` requests GPUs in a way that cannot be read, or others than `gpus_per_node`."""
    for name in (*PER_NODE, "gpus"):
        if name in extra and not re.fullmatch(rf"\d+|{TYPED[1:-1]}", str(extra[name])):
            raise ValueError(f"extra.{name} (={extra[name]}): a number or TYPE:NUMBER, e.g. a100:4")
    if "gpus" in extra:  # a number for the whole job, compared when the nodes are known
        return
    count = requested(extra, 1)
    if count is not None and gpus_per_node != 0 and gpus_per_node != count:
        raise ValueError(
            f"gpus_per_node (={gpus_per_node}): extra requests {count} GPUs of each node; give one of them"
        )


def replaced(given: object, extra: Mapping[str, Value]) -> tuple[object, dict[str, Value]]:
    """The keys gpus_per_node and extra where the command line requests `given` GPUs: a --gres stays a --gres."""
    others = [item for item in str(extra.get("gres", "")).split(",") if item and not GRES.fullmatch(item.strip())]
    plain = {name: value for name, value in extra.items() if name not in (*PER_NODE, "gpus", "gres")}
    by_gres = len(others) < len([item for item in str(extra.get("gres", "")).split(",") if item])
    if by_gres and str(given) != "0":
        kind = next((match["type"] for item in str(extra["gres"]).split(",") if (match := GRES.fullmatch(item))), None)
        request = f"{kind}:{given}" if kind and ":" not in str(given) else str(given)
        return 0, {**plain, "gres": ",".join([f"gpu:{request}", *others])}
    by_task = "gpus-per-task" in extra and str(given) != "0"
    plain |= {"gpus-per-task": str(given)} if by_task else {}
    plain |= {"gres": ",".join(others)} if others else {}
    return (0 if by_task else given), plain
