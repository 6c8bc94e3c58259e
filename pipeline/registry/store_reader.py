"""Reads MLflow's registry: models, versions, aliases and the runs behind them, as they are now.

`open_store` chooses how. A server is read over HTTP and a database by SQL, without MLflow's client, whose imports alone
take seconds. A database of a revision that the SQL was not written for is read by MLflow's client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from pipeline.errors import ResourceError
from pipeline.runs.provenance import without_secrets

Read = TypeVar("Read")
HOME = "default"  # MLflow's workspace


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model: its aliases {alias: version}, tags and description.

    stamp: changes whenever versions of the model appear or disappear; "" if the store has no such mark.
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
    """An MLflow run, which may have been deleted, and its tags."""

    deleted: bool
    tags: Mapping[str, str]


class ModelStore(Protocol):
    """The interface through which the registry is read. Methods raise ResourceError if the registry does not answer."""

    def models(self) -> list[RegisteredModel]:
        """Every registered model, by name."""

    def rows(self, name: str | None = None, number: int | None = None) -> list[VersionRow]:
        """Every version of `name`, only that of `number`, or all versions of all names; in any order."""

    def run(self, run_id: str) -> TrackedRun | None:
        """The run of this id; None if there is none."""


class UnknownRevision(Exception):
    """The tables are of a revision that the SQL was not written for."""


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


def unanswered(uri: str, reason: str) -> ResourceError:
    """The error for a registry that does not answer."""
    shown = without_secrets(uri)
    return ResourceError(
        f"registry {shown}: {reason}. Check that it is running and that this address is right, then give the same "
        "command again",
        key="--uri",
        subject=shown,
    )
