"""Looking up: fast in a large registry, best first, and nothing but what was asked for."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow_here import database, server

from jobs.cli import main
from pipeline.errors import ConfigError, ResourceError
from pipeline.evaluation.frontier import parse_budget
from pipeline.registry import cache, catalogue, resolve, store_reader
from pipeline.tracking import connect
from pipeline.tracking.address import reason_of

NAMES, EACH = 50, 100


def figures(number: int) -> str:
    """Two policies; of version n of model m the first has top-1 of (m + n) / 200, and the second costs less."""
    base = {
        "num_images": 1000,
        "top5": 0.9,
        "ece": 0.01,
        "macs_p95": 9e8,
        "full_share": 1.0,
        "latency": [],
        "state": {},
    }
    dear = {"policy": "dear", "top1": number / 200, "macs_mean": 8e8, **base}
    cheap = {"policy": "cheap", "top1": number / 250, "macs_mean": 2e8 + number * 1e6, **base}
    dull = {"policy": "dull", "top1": number / 300, "macs_mean": 9e8, **base}
    return json.dumps([dear, cheap, dull])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a registry with 5,000 versions, put into MLflow's own tables."""
    path = tmp_path_factory.mktemp("large") / "mlflow.db"
    shutil.copyfile(database().path, path)
    every = [(f"m{m:02}", n) for m in range(NAMES) for n in range(1, EACH + 1)]
    with sqlite3.connect(path) as tables:
        tables.executemany(
            "INSERT INTO registered_models (workspace, name) VALUES ('default', ?)",
            [(f"m{m:02}",) for m in range(NAMES)],
        )
        tables.executemany(
            "INSERT INTO model_versions (workspace, name, version, creation_time, current_stage, status, source, "
            "run_id) VALUES ('default', ?, ?, 1000, 'None', 'READY', 'file:///nowhere', 'abc')",
            every,
        )
        tables.executemany(
            "INSERT INTO model_version_tags (workspace, name, version, key, value) VALUES ('default', ?, ?, ?, ?)",
            [(name, n, key, value) for name, n in every for key, value in tags(int(name[1:]), n).items()],
        )
    client = connect(f"sqlite:///{path}")
    client.set_registered_model_alias("m07", "champion", "3")
    return f"sqlite:///{path}"


def tags(model: int, number: int) -> dict[str, str]:
    return {
        "adaptnet.family": "convnet_aig",
        "adaptnet.step": "7",
        "adaptnet.dataset": f"set{model % 5}",
        "adaptnet.data": f"identity{model % 5}",
        "adaptnet.weights_sha256": "0" * 64,
        "adaptnet.reports": figures(model + number),
    }


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)


def timed(*arguments: str) -> tuple[float, str]:
    """Seconds of a core that the command takes in a process of its own, imports included, and what it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments], capture_output=True, text=True, timeout=600, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.parametrize(
    "words", [["list"], ["lookup", "--max-macs", "0.5G", "--min-top1", "30"]], ids=["list", "lookup"]
)
def test_five_thousand_versions_are_looked_through_in_two_seconds(large: str, words: list[str]) -> None:
    """In the time of a core, which it takes in one thread without waiting: others may hold the cores of a test."""
    seconds, text = timed("models", *words, "--uri", large)
    assert seconds < 2.0
    assert len(text.splitlines()) > 1000


def test_neither_torch_nor_mlflow_is_imported_to_look_up(large: str) -> None:
    code = f"""
import sys
from pipeline.registry import catalogue
assert len(catalogue.versions({large!r})) == {NAMES * EACH}
assert catalogue.lookup("models:/m07@champion", {large!r}).version == 3
print(sorted({{"torch", "mlflow", "pandas", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_quick_reader_sees_what_mlflow_s_client_sees(large: str) -> None:
    client = connect(large)
    there = {(v.name, int(v.version)): dict(v.tags) for v in client.search_model_versions(max_results=10_000)}
    assert {(row.name, row.version): dict(row.tags) for row in store_reader.rows(large)} == there
    models = {model.name: model.aliases for model in store_reader.models(large)}
    assert models == {m.name: {a: int(v) for a, v in m.aliases.items()} for m in client.search_registered_models()}
    assert [row.version for row in store_reader.rows(large, "m03")].count(5) == 1 and len(
        store_reader.rows(large, "m03")
    ) == EACH


def test_over_http_the_same_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    there = server().uri
    client = connect(there)
    run_id = client.create_run("0", tags={"adaptnet.run_dir": "/somewhere"}).info.run_id
    name = f"http-{run_id[:6]}"
    client.create_registered_model(name, tags={"a": "b"}, description="words")
    place = f"{client.get_run(run_id).info.artifact_uri}/x"
    for number in (1, 2):
        client.create_model_version(name, place, run_id, tags=tags(0, number))
    client.set_registered_model_alias(name, "champion", "1")
    found = catalogue.versions(there, name)
    assert [(v.version, v.aliases, v.run_id) for v in found] == [(2, (), run_id), (1, ("champion",), run_id)]
    assert dict(found[0].tags) == tags(0, 2) and abs(found[0].created - time.time()) < 600
    model = next(model for model in store_reader.models(there) if model.name == name)
    assert (model.aliases, model.tags, model.description) == ({"champion": 1}, {"a": "b"}, "words")
    known = store_reader.run(there, run_id)
    assert known is not None and known.tags["adaptnet.run_dir"] == "/somewhere" and not known.deleted
    assert store_reader.run(there, "f" * 32) is None
    client.delete_run(run_id)
    deleted = store_reader.run(there, run_id)
    assert deleted is not None and deleted.deleted
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:9: .*refused.*same command again"):
        catalogue.versions("http://me:hush@127.0.0.1:9")


class Asked:
    """What `store_reader` was asked over HTTP."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        get = store_reader._get

        def counted(uri: str, call: str, query: Any) -> Any:
            self.calls.append(call)
            return get(uri, call, query)

        monkeypatch.setattr(store_reader, "_get", counted)

    def versions(self) -> int:
        """How often versions were asked for since the last time."""
        found = self.calls.count("model-versions/search")
        self.calls.clear()
        return found


def test_a_server_is_asked_again_for_what_has_changed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = server().uri
    client = connect(there)
    run_id = client.create_run("0").info.run_id
    names = [f"kept-{run_id[:6]}-{n}" for n in (1, 2)]
    place = f"{client.get_run(run_id).info.artifact_uri}/x"
    for name in names:
        client.create_registered_model(name)
        client.create_model_version(name, place, run_id, tags=tags(0, 1))
    asked = Asked(monkeypatch)

    def look() -> dict[str, list[int]]:
        models = [model for model in store_reader.models(there) if model.name in names]
        found = cache.rows(there, models, home=tmp_path)
        assert [dict(row.tags) for row in found] == [tags(0, 1)] * len(found)
        return {name: sorted(row.version for row in found if row.name == name) for name in names}

    assert look() == {names[0]: [1], names[1]: [1]} and asked.versions() == 2
    assert look() == {names[0]: [1], names[1]: [1]} and asked.versions() == 0
    client.create_model_version(names[1], place, run_id, tags=tags(0, 1))
    assert look() == {names[0]: [1], names[1]: [1, 2]} and asked.versions() == 1
    client.delete_model_version(names[1], "1")
    assert look() == {names[0]: [1], names[1]: [2]} and asked.versions() == 1
    client.delete_registered_model(names[0])
    client.create_registered_model(names[0])
    assert look() == {names[0]: [], names[1]: [2]} and asked.versions() == 1
    (written,) = tmp_path.iterdir()
    written.write_text("{")
    assert look() == {names[0]: [], names[1]: [2]} and asked.versions() == 2
    assert look() == {names[0]: [], names[1]: [2]} and asked.versions() == 0
    client.set_model_version_tag(names[1], "2", "adaptnet.licence", "MIT")
    assert catalogue.lookup(f"models:/{names[1]}/2", there).tags["adaptnet.licence"] == "MIT"  # as it is now


class Elsewhere(BaseHTTPRequestHandler):
    """Sends those who ask for models to /other on `localhost`, another name; its answer about versions breaks off."""

    told: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.told.append((self.path.partition("?")[0], self.headers["Authorization"]))
        if "registered-models" in self.path:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/other")  # type: ignore[attr-defined]
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", "2" if self.path == "/other" else "100")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


def test_a_password_goes_to_no_other_server_and_half_an_answer_is_told() -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        uri = f"http://me:hush@127.0.0.1:{web.server_port}"
        assert store_reader.models(uri) == []
        (asked, given), (other, repeated) = Elsewhere.told
        assert asked.endswith("search") and str(given).startswith("Basic ") and (other, repeated) == ("/other", None)
        with pytest.raises(ResourceError, match=r"IncompleteRead.*same command again"):
            store_reader.rows(uri, "net")
    finally:
        web.shutdown()


def test_what_mlflow_s_client_says_of_a_wrong_password_is_put_in_words() -> None:
    from mlflow.exceptions import MlflowException

    said = "API request to endpoint /api/2.0/mlflow/runs/get failed with error code 401 != 200. Response body: 'You'"
    assert reason_of(MlflowException(said)).startswith("it refuses this name and password (HTTP 401); set MLFLOW_")
    assert "not permitted" in reason_of(MlflowException(said.replace("401", "403")))
    assert "error code 404" in reason_of(MlflowException(said.replace("401", "404")))


def test_no_traceback_shows_a_password() -> None:
    secret = str(time.time_ns())
    with pytest.raises(ResourceError) as found, resolve.asking(f"http://me:{secret}@127.0.0.1:9") as client:
        client.search_registered_models()
    assert secret not in "".join(traceback.format_exception(found.value))


def test_what_meets_a_budget_comes_best_first(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = catalogue.versions(large)
    matches = catalogue.matching(found, max_macs=parse_budget("0.5G"), min_top1=0.2, dataset="set1")
    assert matches and all(m.policy == "cheap" and m.macs <= 5e8 and m.top1 >= 0.2 for m in matches)
    assert {m.version.tags["adaptnet.dataset"] for m in matches} == {"set1"}
    assert [m.top1 for m in matches] == sorted((m.top1 for m in matches), reverse=True)
    assert matches == catalogue.matching(found, max_macs=parse_budget("0.5G"), min_top1=0.2, dataset="identity1")
    every = catalogue.matching(found, max_macs=None, min_top1=None, dataset=None)
    assert {m.policy for m in every} == {"dear", "cheap"}  # what another policy of the same net beats is left out
    assert (every[0].version.reference, every[0].top1) == ("models:/m49/100", 149 / 200)
    assert run("models", "lookup", "m01", "--max-macs", "500M", "--json", "--uri", large) == 0
    first: dict[str, Any] = json.loads(capsys.readouterr().out)[0]
    assert (first["version"], first["policy"], first["dataset"]) == ("models:/m01/100", "cheap", "set1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-macs", "1M"), "the cheapest is cheap of models:/m00/1 at"),
        (("--max-macs", "0.3G", "--min-top1", "90"), "the best is cheap of models:/m.* with"),
        (("--max-macs", "5ms"), "give MACs"),
        (("--dataset", "set9"), "no version is of it; there are: set0, set1"),
        (("m99",), "no model of that name; there are: m00"),
    ],
)
def test_what_nothing_meets_is_told_the_nearest(
    large: str, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "lookup", *options, "--uri", large) == 2
    assert re.search(said, capsys.readouterr().err)


def test_tables_of_another_mlflow_are_named(tmp_path: Path) -> None:
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as tables:
        tables.execute("UPDATE alembic_version SET version_num = 'abcdef'")
    with pytest.raises(ResourceError, match=r"revision abcdef.*mlflow db upgrade"):
        catalogue.versions(f"sqlite:///{tmp_path}/mlflow.db")
    sqlite3.connect(tmp_path / "empty.db").execute("CREATE TABLE x (y)")
    with pytest.raises(ResourceError, match="revision none"):
        catalogue.versions(f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(ConfigError, match="no registry here yet"):
        catalogue.versions(f"sqlite:///{tmp_path}/none.db")
