"""One team's server for all of tests/server; the tests log in as its administrator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from team_server import PASSWORD, TeamServer, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/server/" in item.nodeid or item.path.parent.name == "server":
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def team() -> Iterator[TeamServer]:
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    server = TeamServer()
    try:
        yield server.start()
    finally:
        server.end()


@pytest.fixture(autouse=True)
def logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # for this test's caches
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
