"""Reads MLflow's registry without MLflow's client, whose imports alone take seconds: from its tables, or over HTTP.

Who asks is told from where that client takes it: MLFLOW_TRACKING_* in the environment, MLflow's file of credentials, or
the address. Tables of a revision that this module does not know are refused, with the way to bring them there.
"""

from __future__ import annotations

import base64
import configparser
import json
import os
import sqlite3
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlencode, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from pipeline.errors import ResourceError
from pipeline.runs.provenance import without_secrets
from pipeline.tracking.address import database_file, reason_of, refusal

REVISIONS = {"dc11669786a5"}  # of MLflow 3.17's tables
TIMEOUT_S = 30.0
PER_PAGE = 500  # versions; MLflow's server asks its database anew for the tags of each
CREDENTIALS = Path.home() / ".mlflow" / "credentials"  # MLflow's own file


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model: its aliases {alias: version}, tags and description.

    A server's `stamp` is another one once versions have come or gone; tables have none: "".
    """

    name: str
    aliases: Mapping[str, int]
    tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    stamp: str = ""


@dataclass(frozen=True)
class VersionRow:
    """A version as the registry stores it; created in seconds since 1970."""

    name: str
    version: int
    run_id: str | None
    created: float
    tags: Mapping[str, str]


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run, which may be in the bin, and its tags."""

    deleted: bool
    tags: Mapping[str, str]


def models(uri: str) -> list[RegisteredModel]:
    """Every registered model, by name. Raises ResourceError where the registry does not answer."""
    return _models_over_http(uri) if is_web(uri) else _models_in_tables(uri)


def rows(uri: str, name: str | None = None, number: int | None = None) -> list[VersionRow]:
    """Every version of `name`, or that of this number alone, or all of all names; as they are now.

    Raises ResourceError where the registry does not answer.
    """
    return _rows_over_http(uri, name, number) if is_web(uri) else _rows_in_tables(uri, name, number)


def run(uri: str, run_id: str) -> TrackedRun | None:
    """What is known of a run; None where there is none of this id."""
    if is_web(uri):
        try:
            found = _get(uri, "runs/get", {"run_id": run_id})["run"]
        except LookupError:
            return None
        return TrackedRun(found["info"].get("lifecycle_stage") == "deleted", _tags(found["data"].get("tags", ())))
    with _tables(uri) as tables:
        stages = tables.all("SELECT lifecycle_stage FROM runs WHERE run_uuid = :run", run=run_id)
        tags = dict(map(tuple, tables.all("SELECT key, value FROM tags WHERE run_uuid = :run", run=run_id)))
    return TrackedRun(stages[0][0] == "deleted", tags) if stages else None


def date(uri: str) -> str | None:
    """The time that a server over HTTP puts on its answers, as it writes it."""
    try:
        with urlopen(f"{_bare(uri)}/health", timeout=TIMEOUT_S, context=_certificates()) as answer:
            found: str | None = answer.headers["Date"]
            return found
    except OSError as error:
        raise _unanswered(uri, reason_of(error)) from None


def is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


# ---- over HTTP


def _models_over_http(uri: str) -> list[RegisteredModel]:
    found = [entry for page in _pages(uri, "registered-models/search", {"max_results": 1000}) for entry in page]
    return [
        RegisteredModel(
            entry["name"],
            {alias["alias"]: int(alias["version"]) for alias in entry.get("aliases", ())},
            _tags(entry.get("tags", ())),
            entry.get("description", ""),
            _stamp(entry),
        )
        for entry in found
    ]


def _stamp(entry: Mapping[str, Any]) -> str:
    times = [entry.get(key) for key in ("creation_timestamp", "last_updated_timestamp")]
    return " ".join(map(str, times)) if all(times) else ""


def _rows_over_http(uri: str, name: str | None, number: int | None) -> list[VersionRow]:
    wanted = [f"name = '{name}'"] if name is not None else []
    wanted += [f"version_number = {number}"] if number is not None else []
    query = {"max_results": PER_PAGE, **({"filter": " AND ".join(wanted)} if wanted else {})}
    return [_row(entry) for page in _pages(uri, "model-versions/search", query) for entry in page]


def _row(entry: Mapping[str, Any]) -> VersionRow:
    created = float(entry["creation_timestamp"]) / 1000
    return VersionRow(
        entry["name"], int(entry["version"]), entry.get("run_id") or None, created, _tags(entry.get("tags", ()))
    )


def _tags(pairs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {pair["key"]: pair.get("value", "") for pair in pairs}


def _pages(uri: str, call: str, query: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    token = None
    while True:
        page = _get(uri, call, {**query, **({"page_token": token} if token else {})})
        yield from (value for value in page.values() if isinstance(value, list))
        token = page.get("next_page_token")
        if not token:
            return


def _get(uri: str, call: str, query: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a GET of MLflow's REST interface. Raises LookupError where the thing asked for is not there."""
    request = Request(f"{_bare(uri)}/api/2.0/mlflow/{call}?{urlencode(query)}")
    for key, value in _authorisation(uri).items():
        request.add_unredirected_header(key, value)  # to no other server that this one may name
    try:
        with urlopen(request, timeout=TIMEOUT_S, context=_certificates()) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except HTTPError as error:
        if error.code == 404 and b"RESOURCE_DOES_NOT_EXIST" in error.read():
            raise LookupError(call) from None
        raise _unanswered(uri, refusal(error.code)) from None
    except (OSError, HTTPException, ValueError) as error:
        raise _unanswered(uri, reason_of(error)) from None


def _bare(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def _authorisation(uri: str) -> dict[str, str]:
    """The header with what MLflow's own settings or the address say of who asks."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    parts = urlsplit(uri)
    stored = configparser.ConfigParser(interpolation=None)
    stored.read(CREDENTIALS)
    kept = stored["mlflow"] if stored.has_section("mlflow") else {}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or kept.get("mlflow_tracking_username")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or kept.get("mlflow_tracking_password")
    if parts.username:
        user, password = unquote(parts.username), unquote(parts.password or "")
    if not user:
        return {}
    pair = base64.b64encode(f"{user}:{password or ''}".encode()).decode()
    return {"Authorization": f"Basic {pair}"}


def _certificates() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


# ---- from MLflow's tables


class _Tables:
    """One connection to MLflow's database."""

    def __init__(self, execute: Callable[[str, Mapping[str, Any]], Iterable[Any]]) -> None:
        self._execute = execute

    def all(self, query: str, **values: Any) -> list[Any]:
        return list(self._execute(query, values))


@contextmanager
def _tables(uri: str) -> Iterator[_Tables]:
    """Raises ResourceError where the database does not answer, or its tables are of another MLflow."""
    path = database_file(uri)
    with _file(uri, path) if path else _server(uri) as (tables, marked):
        found = tables.all("SELECT version_num FROM alembic_version") if marked else []
        _check_revision(uri, [row[0] for row in found])
        yield tables


@contextmanager
def _file(uri: str, path: Path) -> Iterator[tuple[_Tables, bool]]:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S)) as connection:
            tables = _Tables(connection.execute)
            yield tables, bool(tables.all("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"))
    except (sqlite3.Error, OSError) as error:
        raise _unanswered(uri, reason_of(error)) from None


@contextmanager
def _server(uri: str) -> Iterator[tuple[_Tables, bool]]:
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    try:
        with create_engine(uri, poolclass=NullPool).connect() as connection:
            tables = _Tables(lambda query, values: connection.execute(text(query), values))
            yield tables, inspect(connection).has_table("alembic_version")
    except (SQLAlchemyError, OSError, ImportError) as error:
        raise _unanswered(uri, reason_of(error)) from None


def _check_revision(uri: str, found: Sequence[str]) -> None:
    if not set(found) <= REVISIONS or not found:
        raise ResourceError(
            f"registry {without_secrets(uri)}: its tables are of revision {', '.join(found) or 'none'}, this adaptnet "
            f"reads {', '.join(sorted(REVISIONS))} (MLflow 3.17). Bring them there, after a backup: `mlflow db upgrade "
            f"{quote(without_secrets(uri), safe=':/@.')}`; tables of a newer MLflow need a newer adaptnet"
        )


def _models_in_tables(uri: str) -> list[RegisteredModel]:
    with _tables(uri) as tables:
        aliases: dict[str, dict[str, int]] = {}
        for name, alias, version in tables.all(f"SELECT name, alias, version FROM registered_model_aliases {HERE}"):
            aliases.setdefault(name, {})[alias] = version
        tags: dict[str, dict[str, str]] = {}
        for name, key, value in tables.all(f"SELECT name, key, value FROM registered_model_tags {HERE}"):
            tags.setdefault(name, {})[key] = value
        found = tables.all(f"SELECT name, description FROM registered_models {HERE} ORDER BY name")
    return [RegisteredModel(name, aliases.get(name, {}), tags.get(name, {}), text or "") for name, text in found]


HERE = "WHERE workspace = 'default'"


def _rows_in_tables(uri: str, name: str | None, number: int | None) -> list[VersionRow]:
    values = {key: value for key, value in (("name", name), ("version", number)) if value is not None}
    wanted = "".join(f" AND {key} = :{key}" for key in values)
    with _tables(uri) as tables:
        tags: dict[tuple[str, int], dict[str, str]] = {}
        query = f"SELECT name, version, key, value FROM model_version_tags {HERE}{wanted}"
        for owner, version, key, value in tables.all(query, **values):
            tags.setdefault((owner, version), {})[key] = value
        query = f"SELECT name, version, run_id, creation_time, current_stage FROM model_versions {HERE}{wanted}"
        found = tables.all(query, **values)
    return [
        VersionRow(owner, version, run_id, created / 1000, tags.get((owner, version), {}))
        for owner, version, run_id, created, stage in found
        if stage != "Deleted_Internal"
    ]


def _unanswered(uri: str, reason: str) -> ResourceError:
    return ResourceError(
        f"registry {without_secrets(uri)}: {reason}. See that it runs and that this address is right, then give the "
        "same command again"
    )
