"""Reads MLflow's registry: models, versions, aliases and the runs behind them, as they are now.

`open_store` chooses how. A server is read over HTTP and a database by SQL, without MLflow's client, whose imports alone
take seconds. A database of a revision that the SQL was not written for is read by MLflow's client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from pipeline.registry.model_store import ModelStore, RegisteredModel, TrackedRun, UnknownRevision, VersionRow

Read = TypeVar("Read")


class DatabaseStore:
    """A database: read by SQL if its revision is known, else by MLflow's client."""

    def __init__(self, uri: str, revisions: Iterable[str] | None = None) -> None:
        from pipeline.registry.table_store import REVISIONS, TableStore

        self._uri = uri
        self._tables = TableStore(uri, REVISIONS if revisions is None else frozenset(revisions))

    def models(self) -> list[RegisteredModel]:
        return self._read(lambda store: store.models())

    def rows(self, name: str | None = None, number: int | None = None) -> list[VersionRow]:
        return self._read(lambda store: store.rows(name, number))

    def run(self, run_id: str) -> TrackedRun | None:
        return self._read(lambda store: store.run(run_id))

    def _read(self, question: Callable[[ModelStore], Read]) -> Read:
        try:
            return question(self._tables)
        except UnknownRevision:
            from pipeline.registry.client_store import ClientStore

            return question(ClientStore(self._uri))


def open_store(uri: str) -> ModelStore:
    """The store behind a tracking URI; nothing is connected yet."""
    if is_web(uri):
        from pipeline.registry.rest_store import RestStore

        return RestStore(uri)
    return DatabaseStore(uri)


def models(uri: str) -> list[RegisteredModel]:
    """See `ModelStore.models`."""
    return open_store(uri).models()


def rows(uri: str, name: str | None = None, number: int | None = None) -> list[VersionRow]:
    """See `ModelStore.rows`."""
    return open_store(uri).rows(name, number)


def run(uri: str, run_id: str) -> TrackedRun | None:
    """See `ModelStore.run`."""
    return open_store(uri).run(run_id)


def is_web(uri: str) -> bool:
    """Whether the registry is a server rather than a database."""
    return uri.startswith(("http://", "https://"))
