"""Reads MLflow's registry by MLflow's own client: slowly, but from tables of any revision that the client knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import quote

from pipeline.errors import ResourceError, without_secrets
from pipeline.registry.model_store import RegisteredModel, TrackedRun, VersionRow, unanswered
from pipeline.tracking.client import (
    Client,
    EntityPage,
    ModelEntity,
    VersionEntity,
    connect,
    failures,
    reason_of,
)

Entity = TypeVar("Entity")
PER_PAGE = 1000  # MLflow's limit for models


class ClientStore:
    """A database, read by MLflow's client.

    Raises ResourceError for tables of an earlier MLflow: the client would migrate them in order to read them, and the
    server that uses them would stop working.
    """

    def __init__(self, uri: str, client: Client | None = None) -> None:
        self._uri, self._client = uri, client

    def models(self) -> list[RegisteredModel]:
        with self._ask() as client:
            pages = all_pages(lambda token: client.search_registered_models(max_results=PER_PAGE, page_token=token))
            return sorted((_model(entity) for entity in pages), key=lambda model: model.name)

    def rows(self, name: str | None = None, number: int | None = None) -> list[VersionRow]:
        wanted = [f"name = '{name}'"] if name is not None else []
        wanted += [f"version_number = {number}"] if number is not None else []
        with self._ask() as client:
            return search_versions(client, " AND ".join(wanted) or None)

    def run(self, run_id: str) -> TrackedRun | None:
        with self._ask() as client:
            try:
                entity = client.get_run(run_id)
            except failures() as error:
                if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise
        return TrackedRun(entity.info.lifecycle_stage == "deleted", dict(entity.data.tags))

    @contextmanager
    def _ask(self) -> Iterator[Client]:
        try:
            if self._client is None:
                _refuse_earlier_tables(self._uri)
                self._client = connect(self._uri)
            yield self._client
        except failures() as error:
            raise unanswered(self._uri, reason_of(error)) from None  # a traceback would show the password


def _refuse_earlier_tables(uri: str) -> None:
    from pipeline.compat import mlflow as compat

    revision = compat.revision_of(uri)
    if revision not in compat.earlier_revisions():
        return
    shown = without_secrets(uri)
    raise ResourceError(
        f"registry {shown}: its tables are of revision {revision}, those of the installed MLflow of "
        f"{compat.head_revision()}. Upgrade them, after a backup: `mlflow db upgrade {quote(shown, safe=':/@.')}`",
        key="--uri",
        subject=shown,
    )


def all_pages(search: Callable[[str | None], EntityPage[Entity]]) -> Iterator[Entity]:
    """All results of a paged search; `search` takes the token of a page."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def search_versions(client: Client, wanted: str | None) -> list[VersionRow]:
    """The versions that MLflow's filter `wanted` selects; None selects all."""
    pages = all_pages(lambda token: client.search_model_versions(wanted, max_results=PER_PAGE, page_token=token))
    return [version_row(entity) for entity in pages]


def version_row(entity: VersionEntity) -> VersionRow:
    """The version that MLflow's client returned."""
    created = float(entity.creation_timestamp) / 1000
    return VersionRow(entity.name, int(entity.version), entity.run_id or None, created, dict(entity.tags))


def _model(entity: ModelEntity) -> RegisteredModel:
    aliases = {alias: int(number) for alias, number in entity.aliases.items()}
    return RegisteredModel(entity.name, aliases, dict(entity.tags), entity.description or "")
