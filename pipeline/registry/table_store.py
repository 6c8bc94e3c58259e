"""Reads MLflow's registry from its tables, for the revisions of these tables that the SQL was written for."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pipeline.registry.model_store import HOME, RegisteredModel, TrackedRun, UnknownRevision, VersionRow, unanswered
from pipeline.tracking.address import database_file
from pipeline.tracking.client import reason_of

REVISIONS = frozenset({"dc11669786a5"})  # schema revisions of MLflow 3.17
TIMEOUT_S = 30.0
HERE = f"WHERE workspace = '{HOME}'"
PROMPT = "mlflow.prompt.is_prompt"  # a tag: MLflow stores prompts among the models but does not list them there
SqlRow = Sequence[Any]  # the columns that the query selects


class TableStore:
    """A database with MLflow's tables. Methods raise UnknownRevision if these are of none of `revisions`."""

    def __init__(self, uri: str, revisions: frozenset[str] = REVISIONS) -> None:
        self._uri, self._revisions = uri, revisions

    def models(self) -> list[RegisteredModel]:
        aliases: dict[str, dict[str, int]] = {}
        tags: dict[str, dict[str, str]] = {}
        with self._open() as tables:
            for name, alias, version in tables.all(f"SELECT name, alias, version FROM registered_model_aliases {HERE}"):
                aliases.setdefault(name, {})[alias] = version
            for name, key, value in tables.all(f"SELECT name, key, value FROM registered_model_tags {HERE}"):
                tags.setdefault(name, {})[key] = value
            entries = tables.all(f"SELECT name, description FROM registered_models {HERE} ORDER BY name")
        return [
            RegisteredModel(name, aliases.get(name, {}), tags.get(name, {}), text or "")
            for name, text in entries
            if tags.get(name, {}).get(PROMPT, "").lower() != "true"
        ]

    def rows(self, name: str | None = None, number: int | None = None) -> list[VersionRow]:
        values = {key: value for key, value in (("name", name), ("version", number)) if value is not None}
        wanted = "".join(f" AND {key} = :{key}" for key in values)
        tags: dict[tuple[str, int], dict[str, str]] = {}
        with self._open() as tables:
            query = f"SELECT name, version, key, value FROM model_version_tags {HERE}{wanted}"
            for owner, version, key, value in tables.all(query, **values):
                tags.setdefault((owner, version), {})[key] = value
            query = f"SELECT name, version, run_id, creation_time, current_stage FROM model_versions {HERE}{wanted}"
            entries = tables.all(query, **values)
        return [
            VersionRow(owner, version, run_id or None, created / 1000, tags.get((owner, version), {}))
            for owner, version, run_id, created, stage in entries
            if stage != "Deleted_Internal" and tags.get((owner, version), {}).get(PROMPT, "").lower() != "true"
        ]

    def run(self, run_id: str) -> TrackedRun | None:
        with self._open() as tables:
            stages = tables.all("SELECT lifecycle_stage FROM runs WHERE run_uuid = :run", run=run_id)
            tags = dict(map(tuple, tables.all("SELECT key, value FROM tags WHERE run_uuid = :run", run=run_id)))
        return TrackedRun(stages[0][0] == "deleted", tags) if stages else None

    @contextmanager
    def _open(self) -> Iterator[_Tables]:
        """Raises ResourceError if the database does not answer or has none of MLflow's tables."""
        path = database_file(self._uri)
        with _file(self._uri, path) if path else _server(self._uri) as (tables, marked):
            if not marked:
                raise unanswered(self._uri, "this database has no tables of MLflow")
            if not {row[0] for row in tables.all("SELECT version_num FROM alembic_version")} <= self._revisions:
                raise UnknownRevision(self._uri)
            yield tables


class _Tables:
    """One connection to MLflow's database."""

    def __init__(self, execute: Callable[[str, Mapping[str, str | int]], Iterable[SqlRow]]) -> None:
        self._execute = execute

    def all(self, query: str, **values: str | int) -> list[SqlRow]:
        return list(self._execute(query, values))


@contextmanager
def _file(uri: str, path: Path) -> Iterator[tuple[_Tables, bool]]:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S)) as connection:
            tables = _Tables(connection.execute)
            yield tables, bool(tables.all("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"))
    except (sqlite3.Error, OSError) as error:
        raise unanswered(uri, reason_of(error)) from None


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
        raise unanswered(uri, reason_of(error)) from None
