"""Looking up versions: fast in a large registry, best first; the same answers however the registry is read."""

from __future__ import annotations

import json
import os
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
from raised import fails

from jobs.cli import main
from pipeline.compat import mlflow as compat
from pipeline.errors import ConfigError, ResourceError
from pipeline.evaluation.frontier import parse_budget
from pipeline.registry import cache, catalogue, store_reader, table_store
from pipeline.registry.client_store import ClientStore
from pipeline.registry.rest_store import RestStore, get_json
from pipeline.registry.session import session
from pipeline.registry.store_reader import DatabaseStore
from pipeline.tracking import connect
from pipeline.tracking.client import reason_of

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
    costly = {"policy": "costly", "top1": number / 200, "macs_mean": 8e8, **base}
    cheap = {"policy": "cheap", "top1": number / 250, "macs_mean": 2e8 + number * 1e6, **base}
    dominated = {"policy": "dominated", "top1": number / 300, "macs_mean": 9e8, **base}
    return json.dumps([costly, cheap, dominated])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a registry with 5,000 versions, inserted into MLflow's own tables."""
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


def timed(tmp_path: Path, *arguments: str) -> tuple[float, str]:
    """CPU seconds that the command takes in a process of its own, imports included, and what it prints.

    Only of this process: others, of earlier tests, may end meanwhile.
    """
    with open(tmp_path / "printed", "w") as printed:
        process = subprocess.Popen([sys.executable, "-m", "jobs.cli", *arguments], stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime, (tmp_path / "printed").read_text()


@pytest.mark.parametrize(
    "words", [["list"], ["lookup", "--max-macs", "0.5G", "--min-top1", "30"]], ids=["list", "lookup"]
)
def test_five_thousand_versions_are_searched_in_few_cpu_seconds(large: str, words: list[str], tmp_path: Path) -> None:
    """CPU time, of one thread that does not wait: other processes may use the cores during a test."""
    seconds, text = timed(tmp_path, "models", *words, "--uri", large)
    assert seconds < 4.0
    assert len(text.splitlines()) > 1000


def test_looking_up_imports_neither_torch_nor_mlflow(large: str) -> None:
    code = f"""
import sys
from pipeline.registry import catalogue
assert len(catalogue.versions({large!r})) == {NAMES * EACH}
assert catalogue.lookup("models:/m07@champion", {large!r}).version == 3
print(sorted({{"torch", "mlflow", "pandas", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr


def test_sql_and_mlflow_s_client_give_the_same_answers(large: str, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copyfile(large.removeprefix("sqlite:///"), path)
    client = connect(uri := f"sqlite:///{path}")
    run_id = client.create_run("0", tags={"adaptnet.run_dir": "/somewhere"}).info.run_id
    gone = client.create_run("0").info.run_id
    client.delete_run(gone)
    place = f"{client.get_run(run_id).info.artifact_uri}/x"
    client.create_registered_model("described", tags={"a": "b"}, description="words")
    for _ in range(2):
        client.create_model_version("described", place, run_id)
    client.delete_model_version("described", "1")
    client.register_prompt("prompt", "Describe {{image}}.")  # stored among the models, not listed there
    tables, other = DatabaseStore(uri), ClientStore(uri)
    assert tables.models() == other.models() and len(tables.models()) == NAMES + 1
    for name, number in ((None, None), ("m03", None), ("m03", 5), ("described", None), ("described", 1), ("m03", 999)):
        ours, theirs = tables.rows(name, number), other.rows(name, number)
        assert sorted(ours, key=lambda row: (row.name, row.version)) == sorted(
            theirs, key=lambda row: (row.name, row.version)
        )
    assert len(tables.rows("m03")) == EACH and len(tables.rows("described")) == 1
    for each in (run_id, gone, "f" * 32):
        assert tables.run(each) == other.run(each)


def test_the_installed_mlflow_has_a_known_revision() -> None:
    """If this fails after an upgrade of MLflow, check the SQL of table_store and add the revision."""
    assert compat.head_revision() in table_store.REVISIONS


@pytest.fixture
def renumbered(large: str, tmp_path: Path) -> Path:
    """A copy of the registry whose tables say that they are of a later MLflow."""
    path = tmp_path / "mlflow.db"
    shutil.copyfile(large.removeprefix("sqlite:///"), path)
    with sqlite3.connect(path) as tables:
        tables.execute("UPDATE alembic_version SET version_num = 'abcdef'")
    return path


def test_tables_of_an_unknown_revision_are_read_by_mlflow_s_client(
    large: str, renumbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.db import utils

    monkeypatch.setattr(utils, "_get_latest_schema_revision", lambda: "abcdef")  # as the later MLflow has it
    uri = f"sqlite:///{renumbered}"
    assert catalogue.versions(uri) == catalogue.versions(large)
    assert catalogue.lookup("models:/m07@champion", uri).version == 3
    assert store_reader.run(uri, "f" * 32) is None


def test_a_revision_that_mlflow_does_not_know_either_is_its_error(renumbered: Path) -> None:
    with fails(ResourceError, "--uri", subject=renumbered):
        catalogue.versions(f"sqlite:///{renumbered}")


def test_tables_of_an_earlier_mlflow_are_not_upgraded_by_reading_them(renumbered: Path) -> None:
    earlier = min(compat.earlier_revisions())
    with sqlite3.connect(renumbered) as tables:
        tables.execute("UPDATE alembic_version SET version_num = ?", (earlier,))
    before = renumbered.read_bytes()
    with fails(ResourceError, "--uri", subject=renumbered):
        catalogue.versions(f"sqlite:///{renumbered}")
    assert renumbered.read_bytes() == before


def test_a_database_without_tables_of_mlflow_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    with sqlite3.connect(path) as tables:
        tables.execute("CREATE TABLE x (y)")
    before = path.read_bytes()
    with fails(ResourceError, "--uri", subject=path):
        catalogue.versions(f"sqlite:///{path}")
    assert path.read_bytes() == before
    with fails(ConfigError, "--uri", subject="absent.db"):
        catalogue.versions(f"sqlite:///{tmp_path}/absent.db")


@pytest.mark.server
def test_a_server_is_read_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with fails(ResourceError, "--uri", subject="http://127.0.0.1:9"):
        catalogue.versions("http://me:hush@127.0.0.1:9")


class CountingStore(RestStore):
    """Counts its requests by call."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri, self._counted)
        self.calls: list[str] = []

    def _counted(self, uri: str, call: str, query: Any) -> Any:
        self.calls.append(call)
        return get_json(uri, call, query)

    def versions_read(self) -> int:
        """How many requests for versions there were since the last call."""
        count = self.calls.count("model-versions/search")
        self.calls.clear()
        return count


@pytest.mark.long
def test_a_server_is_queried_again_only_for_models_that_have_changed(tmp_path: Path) -> None:
    there = server().uri
    client = connect(there)
    run_id = client.create_run("0").info.run_id
    names = [f"cached-{run_id[:6]}-{n}" for n in (1, 2)]
    place = f"{client.get_run(run_id).info.artifact_uri}/x"
    for name in names:
        client.create_registered_model(name)
        client.create_model_version(name, place, run_id, tags=tags(0, 1))
    store = CountingStore(there)

    def look() -> dict[str, list[int]]:
        models = [model for model in store.models() if model.name in names]
        found = cache.rows(there, models, home=tmp_path, store=store)
        assert [dict(row.tags) for row in found] == [tags(0, 1)] * len(found)
        return {name: sorted(row.version for row in found if row.name == name) for name in names}

    assert look() == {names[0]: [1], names[1]: [1]} and store.versions_read() == 2
    assert look() == {names[0]: [1], names[1]: [1]} and store.versions_read() == 0
    client.create_model_version(names[1], place, run_id, tags=tags(0, 1))
    assert look() == {names[0]: [1], names[1]: [1, 2]} and store.versions_read() == 1
    client.delete_model_version(names[1], "1")
    assert look() == {names[0]: [1], names[1]: [2]} and store.versions_read() == 1
    client.delete_registered_model(names[0])
    client.create_registered_model(names[0])
    assert look() == {names[0]: [], names[1]: [2]} and store.versions_read() == 1
    (written,) = tmp_path.iterdir()
    written.write_text("{")
    assert look() == {names[0]: [], names[1]: [2]} and store.versions_read() == 2
    assert look() == {names[0]: [], names[1]: [2]} and store.versions_read() == 0
    client.set_model_version_tag(names[1], "2", "adaptnet.licence", "MIT")
    assert catalogue.lookup(f"models:/{names[1]}/2", there).tags["adaptnet.licence"] == "MIT"  # as it is now


class Elsewhere(BaseHTTPRequestHandler):
    """Redirects requests for models to /other on `localhost`, another name; its answer about versions is cut off."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path.partition("?")[0], self.headers["Authorization"]))
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


def test_a_redirect_gets_no_password_and_a_cut_off_answer_is_an_error() -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        uri = f"http://me:hush@127.0.0.1:{web.server_port}"
        assert store_reader.models(uri) == []
        (path, given), (other, repeated) = Elsewhere.seen
        assert path.endswith("search") and str(given).startswith("Basic ") and (other, repeated) == ("/other", None)
        with fails(ResourceError, "--uri", subject="http://127.0.0.1"):
            store_reader.rows(uri, "net")
    finally:
        web.shutdown()


def test_a_refused_password_and_a_missing_permission_are_explained() -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, PERMISSION_DENIED, UNAUTHENTICATED

    reasons = [reason_of(MlflowException("x", error_code=code)) for code in (UNAUTHENTICATED, PERMISSION_DENIED)]
    assert [reason.partition("HTTP ")[2][:3] for reason in reasons] == ["401", "403"]
    assert "HTTP" not in reason_of(MlflowException("x", error_code=ENDPOINT_NOT_FOUND))


def test_no_traceback_shows_a_password() -> None:
    secret = str(time.time_ns())
    with pytest.raises(ResourceError) as caught, session(f"http://me:{secret}@127.0.0.1:9") as client:
        client.get_registered_model("net")
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_policies_within_a_budget_come_best_first(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = catalogue.versions(large)
    matches = catalogue.matching(found, max_macs=parse_budget("0.5G"), min_top1=0.2, dataset="set1")
    assert matches and all(m.policy == "cheap" and m.macs <= 5e8 and m.top1 >= 0.2 for m in matches)
    assert {m.version.tags["adaptnet.dataset"] for m in matches} == {"set1"}
    assert [m.top1 for m in matches] == sorted((m.top1 for m in matches), reverse=True)
    assert matches == catalogue.matching(found, max_macs=parse_budget("0.5G"), min_top1=0.2, dataset="identity1")
    every = catalogue.matching(found, max_macs=None, min_top1=None, dataset=None)
    assert {m.policy for m in every} == {"costly", "cheap"}  # a dominated policy is left out
    assert (every[0].version.reference, every[0].top1) == ("models:/m49/100", 149 / 200)
    assert run("models", "lookup", "m01", "--max-macs", "500M", "--json", "--uri", large) == 0
    first: dict[str, Any] = json.loads(capsys.readouterr().out)[0]
    assert (first["version"], first["policy"], first["dataset"]) == ("models:/m01/100", "cheap", "set1")


@pytest.mark.parametrize(
    ("bounds", "key"),
    [
        ({"max_macs": "1M"}, "--max-macs"),
        ({"max_macs": "0.3G", "min_top1": 0.9}, "--min-top1"),
        ({"dataset": "set9"}, "--dataset"),
    ],
)
def test_bounds_that_no_policy_meets_are_named(large: str, bounds: dict[str, Any], key: str) -> None:
    budget = parse_budget(bounds["max_macs"]) if "max_macs" in bounds else None
    with fails(ConfigError, key):
        catalogue.matching(
            catalogue.versions(large),
            max_macs=budget,
            min_top1=bounds.get("min_top1"),
            dataset=bounds.get("dataset"),
        )


def test_an_unknown_name_is_refused(large: str) -> None:
    with fails(ConfigError, "name", subject="m99"):
        catalogue.versions(large, "m99")


@pytest.mark.parametrize("options", [("--max-macs", "5ms"), ("m99",)])
def test_the_command_ends_with_2_if_it_cannot_look_up(
    large: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "lookup", *options, "--uri", large) == 2
    printed = capsys.readouterr()
    assert printed.err and not printed.out


def test_the_code_of_a_version_is_that_of_its_run(tmp_path: Path) -> None:
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    git = {"mlflow.source.git.commit": "c0ffee", "adaptnet.git.dirty": "true"}
    run_ids = [client.create_run("0", tags=own).info.run_id for own in (git, {})]
    client.create_registered_model("of-code")
    for number, run_id in enumerate(run_ids, 1):
        place = f"{client.get_run(run_id).info.artifact_uri}/x"
        client.create_model_version("of-code", place, run_id, tags=tags(0, number))
    known = [catalogue.code_of(catalogue.lookup(f"models:/of-code/{number}", uri), uri) for number in (1, 2)]
    assert known == [{"commit": "c0ffee", "uncommitted": "true"}, {}]
