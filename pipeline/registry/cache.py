"""Client-side cache of model versions, invalidated by the model's last-updated time.

MLflow's server takes milliseconds for each version that it lists, but lists all models at once quickly. It changes the
stamp of a model when one of its versions is created, deleted or moved to another stage, so the versions of a model with
an unchanged stamp are unchanged. Setting a tag on a version does not change the stamp: tags that are set later
(licence, note, promotions) are read without the cache by the callers that show them, with `store_reader.rows` of one
number.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, cast

from pipeline.errors import without_secrets
from pipeline.registry.model_store import ModelStore, RegisteredModel, VersionRow
from pipeline.registry.store_reader import open_store
from pipeline.runs.files import read_json, write_text

FORMAT = 1
FEW = 20  # up to so many models are queried one by one; for more, the server lists all versions at once


class CachedRow(TypedDict):
    """A VersionRow in the cache file."""

    name: str
    version: int
    run_id: str | None
    created: float
    tags: dict[str, str]


class CachedModel(TypedDict):
    """The versions of a model while its stamp was this one."""

    stamp: str
    rows: list[CachedRow]


def rows(
    uri: str, models: Sequence[RegisteredModel], *, home: Path | None = None, store: ModelStore | None = None
) -> list[VersionRow]:
    """Every version of these models. home: the folder of the cache; default: the user's. store: that behind `uri`.

    Raises ResourceError if the registry does not answer.
    """
    path = _path(uri, home)
    known = _read(path)
    changed = [m.name for m in models if not m.stamp or m.name not in known or known[m.name]["stamp"] != m.stamp]
    if changed:
        known |= {model.name: CachedModel(stamp=model.stamp, rows=[]) for model in models if model.name in changed}
        for row in _query(store or open_store(uri), changed):
            known[row.name]["rows"].append(cast(CachedRow, asdict(row)))
        _write(path, known)
    return [VersionRow(**row) for model in models for row in known[model.name]["rows"]]


def _query(store: ModelStore, names: Sequence[str]) -> list[VersionRow]:
    if len(names) <= FEW:
        return [row for name in names for row in store.rows(name)]
    return [row for row in store.rows() if row.name in set(names)]


def _path(uri: str, home: Path | None) -> Path:
    address = hashlib.sha256(without_secrets(uri).encode()).hexdigest()[:16]
    return (home or Path.home() / ".cache" / "adaptnet" / "registries") / f"{address}.json"


def _read(path: Path) -> dict[str, CachedModel]:
    """The content of the cache; empty if it cannot be read."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    models = content.get("models") if isinstance(content, dict) and content.get("format") == FORMAT else None
    whole = isinstance(content, dict) and isinstance(models, dict) and content.get("crc32") == _checksum(models)
    return cast(dict[str, CachedModel], models) if whole else {}


def _checksum(models: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(models, sort_keys=True).encode())


def _write(path: Path, models: Mapping[str, CachedModel]) -> None:
    with suppress(OSError):  # a home that cannot be written: every call queries the server
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps({"format": FORMAT, "models": models, "crc32": _checksum(models)}))
