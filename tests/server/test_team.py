"""A team's server with a real PostgreSQL: kills lose and double nothing, and no secret is shown."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow_here import CONTEXT, database, events, run_folder
from team_server import PASSWORD, TeamServer, missing
from test_catalogue import tags as figures_of
from test_catalogue import timed
from test_promoting import contend, holder, make_run

from jobs.cli import main
from pipeline import config as configs
from pipeline.data import toy
from pipeline.errors import ResourceError
from pipeline.registry import catalogue, promotion_log
from pipeline.registry.model import load_model
from pipeline.registry.publishing import publish_run, register_best
from pipeline.registry.resolve import resolve
from pipeline.runs.journal import Journal
from pipeline.tracking import TrackingConfig, Uploader, connect, sync, uploader

OUTAGE_S = 60.0
METRICS, STEPS = 200, 50
SHIP = {"upload_checkpoints": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "images", num_classes=3, train=12, val=40, side_px=32, seed=3)


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def ship(run_dir: Path, uri: str, answers: Any) -> None:
    answers.put(sync(run_dir, uri).run_id)


def send_at_once(folders: list[Path], uri: str) -> list[str]:
    """Sends each run in a process of its own, all at the same time. Returns the ids of their MLflow runs."""
    answers = CONTEXT.Queue()
    racing = [CONTEXT.Process(target=ship, args=(folder, uri, answers)) for folder in folders]
    for process in racing:
        process.start()
    found = [answers.get(timeout=600) for _ in racing]
    for process in racing:
        process.join(300)
    return found


def journals(home: Path, count: int, metrics: int = METRICS, steps: int = STEPS) -> list[Path]:
    """Folders of runs that have written `metrics` metrics at each of `steps` steps."""
    folders = []
    for number in range(count):
        folder, _ = run_folder(home / f"run{number}", **SHIP)
        writer = Journal(folder / "journal")
        for step in range(steps):
            writer.metrics(step, {f"m{metric}": 1000.0 * number + step for metric in range(metrics)})
        writer.close()
        folders.append(folder)
    return folders


def test_smoke(team: TeamServer, images: Path, say: Callable[..., Any], tmp_path: Path) -> None:
    """Two runs are sent at the same time and registered; one is promoted, looked up and pulled; the status is shown."""
    for seed in (1, 2):
        make_run(tmp_path / "runs" / f"run{seed}", images, seed)
    folders = [tmp_path / "runs" / f"run{seed}" for seed in (1, 2)]
    assert len(set(send_at_once(folders, team.uri))) == 2
    for folder in folders:
        code, text = say("models", "register", folder, "smoke", "--uri", team.uri)
        assert code == 0, text
    code, text = say("models", "promote", "smoke", 1, "--uri", team.uri)
    assert code == 0, text
    code, text = say("models", "lookup", "smoke", "--max-macs", "1.5M", "--uri", team.uri)
    found = {line.split()[0]: line.split()[1] for line in text.splitlines()[2:]}
    assert code == 0 and found == {"models:/smoke/1": "champion", "models:/smoke/2": "candidate"}, text
    code, text = say("models", "pull", "models:/smoke@champion", tmp_path / "pulled", "--uri", team.uri)
    assert code == 0 and load_model(tmp_path / "pulled").classes
    status = team.run("server.sh", "status")
    assert "database   up" in status and f"server     up: {team.uri}" in status


@pytest.mark.parametrize(
    ("password", "word"),
    [("", "MLFLOW_AUTH_ADMIN_PASSWORD"), ("password1234", "well-known"), ("short-one", "9 characters")],
)
def test_no_server_starts_with_a_weak_password(password: str, word: str) -> None:
    if lacking := missing():
        pytest.skip(lacking)
    other = TeamServer()
    try:
        output = other.run("server.sh", "start", code=1, MLFLOW_AUTH_ADMIN_PASSWORD=password)
        assert word in output and "MLFLOW_AUTH_ADMIN_PASSWORD" in output and not list(other.home.iterdir())
    finally:
        other.end()


def test_a_wrong_password_is_an_error_that_does_not_show_it(
    team: TeamServer, say: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush-hush")
    code, text = say("models", "list", "--uri", team.uri)
    assert code == 2 and "HTTP 401" in text and "hush" not in text
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    run_dir, _ = run_folder(tmp_path / "runs" / "mine", **SHIP)
    with pytest.raises(ResourceError) as found:
        sync(run_dir, team.uri.replace("//", "//admin:hush-hush@"))
    assert "hush" not in str(found.value) and "HTTP 401" in str(found.value)


@pytest.mark.parametrize(("where", "processes"), [("server", 16), ("sqlite", 4)])
def test_every_value_of_many_processes_is_stored_once(
    request: pytest.FixtureRequest, where: str, processes: int, tmp_path: Path
) -> None:
    if where == "server":
        team = request.getfixturevalue("team")
        uri, ask = team.uri, team.rows
    else:
        shutil.copyfile(database().path, tmp_path / "mlflow.db")
        uri = f"sqlite:///{tmp_path}/mlflow.db"

        def ask(query: str) -> list[Any]:
            import sqlite3

            return sqlite3.connect(tmp_path / "mlflow.db").execute(query).fetchall()

    folders = journals(tmp_path / "runs", processes)
    runs = send_at_once(folders, uri)
    assert len(set(runs)) == processes
    wanted = METRICS * STEPS
    named = ", ".join(f"'{run}'" for run in runs)
    found = ask(
        "SELECT run_uuid, count(*), count(DISTINCT key), count(DISTINCT step), max(value) - min(value) FROM metrics "
        f"WHERE run_uuid IN ({named}) GROUP BY run_uuid"
    )
    assert [row[1:] for row in found] == [(wanted, METRICS, STEPS, STEPS - 1)] * processes
    doubled = ask(
        f"SELECT count(*) FROM (SELECT 1 FROM metrics WHERE run_uuid IN ({named}) GROUP BY run_uuid, key, step "
        "HAVING count(*) > 1) AS twice"
    )
    assert doubled == [(0,)]


def test_killing_the_server_in_training_and_publishing_loses_and_doubles_nothing(
    team: TeamServer, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "PAUSE_S", 0.2)
    monkeypatch.setattr(uploader, "LONGEST_PAUSE_S", 3.0)
    run_dir = tmp_path / "runs" / "killed"
    make_run(run_dir, images, 1)
    config = TrackingConfig(uri=team.uri, experiment=tmp_path.name, register="killed", patience_s=280)
    recipe = configs.read_mapping(run_dir / "config.yaml")["recipe"] | {"tracking": configs.as_mapping(config)}
    (run_dir / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    (run_dir / "status.json").rename(tmp_path / "status.json")
    artifacts = team.home / "artifacts"
    with Uploader(run_dir, config, recipe) as uploading:
        assert uploading.ready(60)
        writer = Journal(run_dir / "journal")
        begun = time.monotonic()
        for step in range(600):
            writer.metrics(step, {"train/loss": float(step)})
            if step == 200:
                team.kill()
            if step == 400:
                time.sleep(max(0.0, begun + OUTAGE_S - time.monotonic()))
                team.start()
            time.sleep(0.01)
        writer.close()
        shutil.move(tmp_path / "status.json", run_dir / "status.json")
        killer = threading.Thread(target=kill_in_upload, args=(team, artifacts, str(uploading.run_id)))
        killer.start()
        version = register_best(run_dir, config, uploading)
        killer.join()
    assert version is not None
    kinds = [event["event"] for event in events(run_dir)]
    assert "tracking-away" in kinds and "tracking-back" in kinds and "not-registered" not in kinds
    run_id = uploading.run_id
    found = team.rows(
        "SELECT count(*), count(DISTINCT step), max(step) FROM metrics "
        f"WHERE run_uuid = '{run_id}' AND key = 'train/loss'"
    )
    assert found == [(600, 600, 599)]
    client = connect(team.uri)
    experiment = client.get_experiment_by_name(tmp_path.name).experiment_id
    assert len(client.search_runs([experiment])) == 1
    again = publish_run(run_dir, "killed", run_id=str(run_id), uri=team.uri)
    assert again is not None and [v.version for v in catalogue.versions(team.uri, "killed")] == [1]
    folder = resolve("models:/killed@candidate", team.uri, cache=tmp_path / "cache")
    model = load_model(folder)
    assert model.card["weights"]["sha256"] == version.tags["adaptnet.weights_sha256"]


def kill_in_upload(team: TeamServer, artifacts: Path, run_id: str) -> None:
    """Kills the server once a file of the model has arrived, and starts it after the outage."""
    deadline = time.monotonic() + 300
    models = f"SELECT model_id FROM logged_models WHERE source_run_id = '{run_id}'"
    while not any(any(artifacts.glob(f"*/models/{model}/artifacts/*")) for (model,) in team.rows(models)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    team.kill()
    assert team.rows("SELECT count(*) FROM model_versions WHERE name = 'killed'") == [(0,)]
    time.sleep(OUTAGE_S)
    team.start()


def test_of_concurrent_promotions_one_wins(team: TeamServer) -> None:
    client = connect(team.uri)
    run_id = client.create_run("0").info.run_id
    client.create_registered_model("net")
    for _ in range(4):
        client.create_model_version("net", f"{client.get_run(run_id).info.artifact_uri}/x", run_id)
    start, answers = CONTEXT.Barrier(4), CONTEXT.Queue()
    racing = [CONTEXT.Process(target=contend, args=(team.uri, n, start, answers)) for n in (1, 2, 3, 4)]
    for process in racing:
        process.start()
    results = [answers.get(timeout=600) for _ in racing]
    won = [each for each in results if isinstance(each, int)]
    assert len(won) == 1 and holder(client) == won[0], results
    assert [entry.version for entry in promotion_log.history(team.uri, "net", "champion")] == won


def test_five_thousand_versions_are_searched(team: TeamServer, tmp_path: Path) -> None:
    """The first time at the speed of PostgreSQL and MLflow's server, then from the cache."""
    reports = figures_of(3, 40)
    team.rows(
        "INSERT INTO registered_models (workspace, name, creation_time, last_updated_time) "
        "VALUES ('default', 'many', 1000, 1000)"
    )
    team.rows(
        "INSERT INTO model_versions (workspace, name, version, creation_time, current_stage, status, source, run_id) "
        "SELECT 'default', 'many', n, 1000, 'None', 'READY', 'mlflow-artifacts:/x', 'abc' "
        "FROM generate_series(1, 5000) n"
    )
    for key, value in reports.items():
        team.rows(
            "INSERT INTO model_version_tags (workspace, name, version, key, value) SELECT 'default', 'many', n, "
            f"'{key}', '{value}' FROM generate_series(1, 5000) n".replace(":", "\\:")
        )
    team.rows("ANALYZE")  # as PostgreSQL does by itself a minute later
    waits = []
    for _ in range(2):
        start = time.monotonic()
        found = catalogue.versions(team.uri, "many")
        waits.append(time.monotonic() - start)
        assert len(found) == 5000
    start = time.monotonic()
    seconds, text = timed(tmp_path, "models", "lookup", "many", "--max-macs", "0.5G", "--uri", team.uri)
    whole = time.monotonic() - start
    assert len(text.splitlines()) == 5002
    first, again = waits
    print(f"5,000 versions over HTTP: {first:.2f} s, then {again:.2f} s; the command {whole:.2f} s ({seconds:.2f} s)")
    assert again < 2.0 and seconds < 2.0  # the command's CPU time: other processes may use the cores


def test_no_secret_is_stored_anywhere(team: TeamServer, images: Path, tmp_path: Path, say: Callable[..., Any]) -> None:
    run_dir = tmp_path / "runs" / "secretive"
    make_run(run_dir, images, 1)
    spelt = quote(PASSWORD, safe="")
    uri = team.uri.replace("//", f"//admin:{spelt}@")
    config = TrackingConfig(uri=uri, experiment="secretive", register="secretive")
    recipe = configs.read_mapping(run_dir / "config.yaml")["recipe"] | {"tracking": configs.as_mapping(config)}
    (run_dir / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    with Uploader(run_dir, config, recipe, command=["adaptnet", "train", f"tracking.uri={uri}"]) as uploading:
        assert register_best(run_dir, config, uploading) is not None
    with pytest.raises(ResourceError) as found:
        sync(run_dir, uri.replace(str(team.port), "9"))
    code, text = say("models", "show", "models:/secretive/1", "--uri", uri)
    assert code == 0, text
    code, more = say("models", "list", "nothing", "--uri", uri)
    assert code == 2
    places = [run_dir, team.home]
    for place in places:
        grep = ["grep", "-rlaF", "-e", PASSWORD, "-e", spelt, "--exclude-dir=db", str(place)]
        assert subprocess.run(grep, capture_output=True, text=True).stdout == ""
    dump = json.dumps(team.rows("SELECT key, value FROM params") + team.rows("SELECT key, value FROM tags"))
    dump += json.dumps(team.rows("SELECT key, value FROM model_version_tags"))
    for secret in (PASSWORD, spelt):
        assert secret not in text + more + str(found.value) + dump


def test_a_backup_is_restored_only_into_an_empty_server(
    team: TeamServer, images: Path, tmp_path: Path, say: Callable[..., Any]
) -> None:
    make_run(tmp_path / "runs" / "kept", images, 1)
    code, text = say("models", "register", tmp_path / "runs" / "kept", "kept", "--note", "keep me", "--uri", team.uri)
    assert code == 0, text
    backup = tmp_path / "backup"
    team.run("backup.sh", backup)
    assert "already exists" in team.run("backup.sh", backup, code=1)
    assert "already contains" in team.run("restore.sh", backup, code=1)
    other = TeamServer()
    try:
        other.start()
        other.run("restore.sh", backup)
        for where in (team, other):
            assert say("models", "list", "--uri", where.uri)[0] == 0
        assert catalogue.versions(other.uri) == catalogue.versions(team.uri)
        assert "keep me" in say("models", "show", "models:/kept/1", "--uri", other.uri)[1]
        code, text = say("models", "pull", "models:/kept/1", tmp_path / "pulled", "--uri", other.uri)
        assert code == 0 and load_model(tmp_path / "pulled").classes, text
        run_id = catalogue.lookup("models:/kept/1", other.uri).run_id
        assert sync(tmp_path / "runs" / "kept", other.uri).run_id == run_id  # found again
        with open(backup / "mlflow.dump", "r+b") as dump:
            dump.truncate(1000)
        assert "damaged" in other.run("restore.sh", backup, code=1)
    finally:
        other.end()


def test_a_new_server_is_stopped_and_started_again(team: TeamServer) -> None:
    assert "already running" in team.run("server.sh", "start")
    team.run("server.sh", "stop")
    assert "down" in team.run("server.sh", "status", code=1)
    team.run("server.sh", "start", MLFLOW_AUTH_ADMIN_PASSWORD="")  # its administrator exists already
    assert connect(team.uri).search_experiments()
