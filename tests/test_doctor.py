"""`adaptnet doctor`: one finding for each component, a fix for each fault, and the exit status."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mlflow_here import database

from jobs.cli import main
from jobs.verbs import doctor

Findings = dict[str, doctor.Finding]


@pytest.fixture
def examine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Findings]:
    """Calls doctor.examine in an empty folder; the findings by component."""
    monkeypatch.chdir(tmp_path)

    def run(
        uri: str | None = None, storage: Path = Path("runs"), ray: str | None = None, least_free_gb: float = 0
    ) -> Findings:
        return {each.what: each for each in doctor.examine(uri, storage, ray, least_free_gb=least_free_gb)}

    return run


def tool(folder: Path, name: str, script: str) -> None:
    """Creates an executable of this name in the folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that precedes /bin in PATH; nothing else is in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    return tmp_path / "bin"


def test_a_machine_without_faults_gets_none_and_no_file_is_left(
    examine: Callable[..., Findings], path: Path, tmp_path: Path
) -> None:
    findings = examine(storage=tmp_path / "deep" / "runs")
    states = {name: finding.state for name, finding in findings.items()}
    assert {name: states[name] for name in ("DALI", "Ray", "storage", "MLflow")} == dict.fromkeys(
        ("DALI", "Ray", "storage", "MLflow"), "ok"
    )
    assert [states[name] for name in ("GPU", "NCCL", "clock")] == ["without"] * 3
    assert "mlflow.db" in findings["MLflow"].said
    assert (findings["decoder"].state, findings["decoder"].said) == ("without", "no GPU: not tried")
    assert not list(tmp_path.iterdir())


def test_each_fault_names_what_it_found(examine: Callable[..., Findings], path: Path) -> None:
    tool(path, "nvidia-smi", "echo a-driver-of-1999")
    tool(path, "sbatch", "echo slurm 23")
    tool(path, "scontrol", "echo Slurmctld is DOWN")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    findings = examine(f"http://me:hush@{address}", ray=address, least_free_gb=1e9)
    for name, found in (
        ("GPU", "a-driver-of-1999"),
        ("SLURM", "DOWN"),
        ("Ray", address),
        ("storage", "1e+09"),
        ("MLflow", address),
    ):
        assert findings[name].state == "fault" and found in findings[name].said, findings[name]
    assert not any("hush" in finding.said for finding in findings.values())
    tool(path, "scontrol", "echo Slurmctld is UP")
    assert examine()["SLURM"].state == "ok"
    assert examine(storage=Path("/proc/nothing"))["storage"].state == "fault"


def test_a_database_with_tables_of_another_version_is_reported(
    examine: Callable[..., Findings], path: Path, tmp_path: Path
) -> None:
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    finding = examine(uri)["MLflow"]
    assert finding.state == "ok" and "0 models" in finding.said
    with sqlite3.connect(tmp_path / "mlflow.db") as tables:
        tables.execute("UPDATE alembic_version SET version_num = 'abcdef'")
    finding = examine(uri)["MLflow"]
    assert finding.state == "fault" and "mlflow db upgrade" in finding.said


class Late(BaseHTTPRequestHandler):
    """A server whose clock is wrong by `skew_s`."""

    skew_s = 0.0

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def date_time_string(self, timestamp: float | None = None) -> str:
        import time

        return super().date_time_string(time.time() + self.skew_s)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize(("skew_s", "state"), [(0.0, "ok"), (3.0, "ok"), (90.0, "fault"), (-90.0, "fault")])
def test_a_clock_that_differs_from_that_of_the_server_is_a_fault(
    examine: Callable[..., Findings], path: Path, skew_s: float, state: str
) -> None:
    handler = type("Skewed", (Late,), {"skew_s": skew_s})
    server = HTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        finding = examine(f"http://127.0.0.1:{server.server_port}")["clock"]
    finally:
        server.shutdown()
    assert finding.state == state, finding


def test_the_verb_prints_lines_or_json_and_exits_with_1_after_a_fault(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere.invalid:1")
    for form in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--storage", str(tmp_path), *form])
        assert ended.value.code == 1
        printed = capsys.readouterr().out
        if form:
            faults = [each["what"] for each in json.loads(printed) if each["state"] == "fault"]
        else:
            lines = printed.splitlines()
            assert all(line.startswith(tuple(doctor.MARKS.values())) for line in lines) and len(lines) >= 7
            faults = [line.split()[1] for line in lines if line.startswith("FAULT")]
        assert faults[:1] == ["Ray"]


def test_storage_of_which_only_the_root_exists_is_a_fault(tmp_path: Path) -> None:
    assert doctor._storage(Path("/no-such-file-system/runs"), 0.0).state == "fault"
    assert doctor._storage(tmp_path / "new" / "runs", 0.0).state == "ok"
