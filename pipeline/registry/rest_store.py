"""Reads MLflow's registry over HTTP, by the public REST interface.

The credentials are those of MLflow's client: MLFLOW_TRACKING_* in the environment, MLflow's file of credentials, or
the address itself.
"""

from __future__ import annotations

import base64
import configparser
import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypedDict
from urllib.error import HTTPError
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from pipeline.registry.model_store import RegisteredModel, TrackedRun, VersionRow, unanswered
from pipeline.tracking.client import reason_of, refusal

TIMEOUT_S = 30.0
PER_PAGE = 500  # versions; MLflow's server queries its database once more for the tags of each
CREDENTIALS = Path.home() / ".mlflow" / "credentials"  # MLflow's own file
Query = Mapping[str, str | int]
Answer = dict[str, Any]  # a JSON object of MLflow's interface


class TagEntry(TypedDict):
    """A tag as the interface writes it."""

    key: str
    value: str


class RestStore:
    """A tracking server; `get` answers one GET request (a parameter for tests)."""

    def __init__(self, uri: str, get: Callable[[str, str, Query], Answer] | None = None) -> None:
        self._uri, self._get = uri, get or get_json

    def models(self) -> list[RegisteredModel]:
        pages = self._pages("registered-models/search", {"max_results": 1000})
        return [_model(entry) for page in pages for entry in page]

    def rows(self, name: str | None = None, number: int | None = None) -> list[VersionRow]:
        wanted = [f"name = '{name}'"] if name is not None else []
        wanted += [f"version_number = {number}"] if number is not None else []
        query: Query = {"max_results": PER_PAGE, **({"filter": " AND ".join(wanted)} if wanted else {})}
        return [_row(entry) for page in self._pages("model-versions/search", query) for entry in page]

    def run(self, run_id: str) -> TrackedRun | None:
        try:
            entry = self._get(self._uri, "runs/get", {"run_id": run_id})["run"]
        except LookupError:
            return None
        return TrackedRun(entry["info"].get("lifecycle_stage") == "deleted", _tags(entry["data"].get("tags", ())))

    def _pages(self, call: str, query: Query) -> Iterator[list[Answer]]:
        token = None
        while True:
            page = self._get(self._uri, call, {**query, **({"page_token": token} if token else {})})
            yield from (value for value in page.values() if isinstance(value, list))
            token = page.get("next_page_token")
            if not token:
                return


def _model(entry: Answer) -> RegisteredModel:
    aliases = {alias["alias"]: int(alias["version"]) for alias in entry.get("aliases", ())}
    times = [entry.get(key) for key in ("creation_timestamp", "last_updated_timestamp")]
    stamp = " ".join(map(str, times)) if all(times) else ""
    return RegisteredModel(entry["name"], aliases, _tags(entry.get("tags", ())), entry.get("description", ""), stamp)


def _row(entry: Answer) -> VersionRow:
    created = float(entry["creation_timestamp"]) / 1000
    run_id, tags = entry.get("run_id") or None, _tags(entry.get("tags", ()))
    return VersionRow(entry["name"], int(entry["version"]), run_id, created, tags)


def _tags(pairs: Sequence[TagEntry]) -> dict[str, str]:
    return {pair["key"]: pair.get("value", "") for pair in pairs}


def date(uri: str) -> str | None:
    """The time of a server by its own clock, as its HTTP header writes it. Raises ResourceError without an answer."""
    try:
        with urlopen(f"{_bare(uri)}/health", timeout=TIMEOUT_S, context=_certificates()) as answer:
            header: str | None = answer.headers["Date"]
            return header
    except OSError as error:
        raise unanswered(uri, reason_of(error)) from None


def get_json(uri: str, call: str, query: Query) -> Answer:
    """The answer to a GET request of MLflow's REST interface.

    Raises LookupError if the server has no such thing, ResourceError if it does not answer or refuses.
    """
    request = Request(f"{_bare(uri)}/api/2.0/mlflow/{call}?{urlencode(query)}")
    for key, value in _authorisation(uri).items():
        request.add_unredirected_header(key, value)  # not to a server that this one redirects to
    try:
        with urlopen(request, timeout=TIMEOUT_S, context=_certificates()) as answer:
            content: Answer = json.load(answer)
            return content
    except HTTPError as error:
        if error.code == 404 and b"RESOURCE_DOES_NOT_EXIST" in error.read():
            raise LookupError(call) from None
        raise unanswered(uri, refusal(error.code)) from None
    except (OSError, HTTPException, ValueError) as error:
        raise unanswered(uri, reason_of(error)) from None


def _bare(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def _authorisation(uri: str) -> dict[str, str]:
    """The HTTP header with the user's credentials."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    parts = urlsplit(uri)
    stored = configparser.ConfigParser(interpolation=None)
    stored.read(CREDENTIALS)
    section = stored["mlflow"] if stored.has_section("mlflow") else {}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or section.get("mlflow_tracking_username")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or section.get("mlflow_tracking_password")
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
