"""Reports written before policies had a kind and settings (format 1, until November 2026): read from the policy's name.

The regular expressions below are for such old files only; new code selects reports by `Report.kind` and `.settings`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from pipeline.errors import JsonValue
from pipeline.family import Report, Settings

SIDE = re.compile(r"(.+)@(\d+)px(-and-up)?")  # any policy, of `adaptnet evaluate --sides`
NAMES: Mapping[str, tuple[str, Callable[[re.Match[str]], Settings]]] = {
    r"native": ("resolution", lambda name: {}),
    r"(native|down-and-up)-(\d+)px": (
        "resolution",
        lambda name: {"side_px": int(name[2]), "up_again": name[1] == "down-and-up"},
    ),
    r"(full-)?(\d+)px": ("resolution", lambda name: {"side_px": int(name[2]), "full": name[1] is not None}),
    r"exit-(\d+)": ("exit", lambda name: {"exit": int(name[1])}),
    r"anytime": ("anytime", lambda name: {}),
    r"budget-([\d.e+-]+)(M?)": ("budget", lambda name: {"budget": float(name[1]) * (1e6 if name[2] else 1)}),
    r"gates-(hard|sampled)": ("gates", lambda name: {"gates": name[1]}),
    r"gates-([\d.e-]+)": ("gates", lambda name: {"gates": "threshold", "threshold": float(name[1])}),
    r"expected-(rate|prob)": ("scaled", lambda name: {"by": name[1]}),
    r"live|frozen": ("shape", lambda name: {"frozen": name[0] == "frozen"}),
}


def read(record: Mapping[str, JsonValue]) -> Report:
    """A stored report of any format."""
    if "kind" in record:
        return Report.from_json(record)
    kind, settings = identity(str(record["policy"]))
    return Report.from_json({**record, "kind": kind, "settings": dict(settings)})


def read_all(content: JsonValue) -> list[Report]:
    """Stored reports of any format. Raises ValueError if there is none, or one is damaged."""
    if not isinstance(content, list) or not content:
        raise ValueError("it holds no reports")
    try:
        reports = [read(record) for record in content if isinstance(record, dict)]
        sound = all(type(each.top1) in (int, float) and type(each.macs_mean) in (int, float) for each in reports)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if len(reports) < len(content) or not sound:
        raise ValueError("a report has values of wrong types")
    return reports


def identity(policy: str) -> tuple[str, Settings]:
    """Kind and settings of a policy of this name; "" and {} for a name that no family of ours gave."""
    if resized := SIDE.fullmatch(policy):
        return "resized", {"policy": resized[1], "side_px": int(resized[2]), "up_again": resized[3] is not None}
    for pattern, (kind, settings) in NAMES.items():
        if match := re.fullmatch(pattern, policy):
            return kind, settings(match)
    return "", {}
