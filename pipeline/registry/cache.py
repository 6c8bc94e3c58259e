"""What a server has told of its versions, kept in the user's cache until it is told otherwise.

MLflow's server takes milliseconds for each version that it tells of, and tells of all models at once in no time. It
stamps a model anew when a version of it is made, deleted or moved to another stage, so versions of a model whose stamp
is the one that was kept are the same. Setting a tag on a version does not stamp: the tags that are set later (licence,
note, promotions) are read afresh by those who show them, with `store_reader.rows` of one number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.registry import store_reader
from pipeline.registry.store_reader import RegisteredModel, VersionRow
from pipeline.runs.files import write_text
from pipeline.runs.provenance import without_secrets

FORMAT = 1
FEW = 20  # models whose versions are asked for one by one; of more, the server is asked for everything at once


def rows(uri: str, models: Sequence[RegisteredModel], *, home: Path | None = None) -> list[VersionRow]:
    """Every version of these models. home: the cache's folder; default: the user's.

    Raises ResourceError where the registry does not answer.
    """
    path = _path(uri, home)
    known = _read(path)
    changed = [m for m in models if not m.stamp or known.get(m.name, {}).get("stamp") != m.stamp]
    if changed:
        known |= {model.name: {"stamp": model.stamp, "rows": []} for model in changed}
        for row in _asked(uri, [model.name for model in changed]):
            known[row.name]["rows"].append(asdict(row))
        _write(path, known)
    return [VersionRow(**row) for model in models for row in known[model.name]["rows"]]


def _asked(uri: str, names: Sequence[str]) -> list[VersionRow]:
    if len(names) <= FEW:
        return [row for name in names for row in store_reader.rows(uri, name)]
    return [row for row in store_reader.rows(uri) if row.name in set(names)]


def _path(uri: str, home: Path | None) -> Path:
    address = hashlib.sha256(without_secrets(uri).encode()).hexdigest()[:16]
    return (home or Path.home() / ".cache" / "adaptnet" / "registries") / f"{address}.json"


def _read(path: Path) -> dict[str, Any]:
    """What was kept; nothing where that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        models: dict[str, Any] = found["models"] if found["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return models


def _write(path: Path, models: Mapping[str, Any]) -> None:
    with suppress(OSError):  # a home that cannot be written: asked anew each time
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps({"format": FORMAT, "models": models}))
