"""What the doctor says of a machine: a line each, a way out where something is broken, and an exit status to go by."""

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

Say = Callable[..., tuple[int, dict[str, dict[str, str]]]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """The doctor's findings by name, in an empty folder, without what this machine's environment names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "LEAST_FREE_GB", 0)

    def run(*arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--json", *map(str, arguments)])
        found = json.loads(capsys.readouterr().out)
        return int(ended.value.code or 0), {each["what"]: each for each in found}

    return run


def tool(folder: Path, name: str, script: str) -> None:
    """A command of that name, found before all others."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for commands, the only one that is searched but for the shell's own."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    return tmp_path / "bin"


def test_a_machine_in_order_is_told_so_and_leaves_no_trace(say: Say, path: Path, tmp_path: Path) -> None:
    code, found = say("--storage", tmp_path / "deep" / "runs")
    assert code == 0, found
    assert {name: each["state"] for name, each in found.items() if name in ("DALI", "Ray", "storage", "MLflow")} == {
        **dict.fromkeys(("DALI", "Ray", "storage", "MLflow"), "ok")
    }
    assert found["GPU"]["state"] == "without" and "CPU cores" in found["GPU"]["said"]
    assert [found[name]["state"] for name in ("NCCL", "clock")] == ["without", "without"]
    assert "the first training makes it" in found["MLflow"]["said"] and not list(tmp_path.iterdir())


def test_each_fault_brings_a_way_out(say: Say, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(path, "nvidia-smi", "echo a-driver-of-1999")
    tool(path, "sbatch", "echo slurm 23")
    tool(path, "scontrol", "echo Slurmctld is DOWN")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(doctor, "LEAST_FREE_GB", 10**9)
    code, found = say("--ray", f"127.0.0.1:{port}", "--uri", f"http://me:hush@127.0.0.1:{port}")
    assert code == 1
    for name, way_out in (
        ("GPU", "install a driver for that CUDA"),
        ("SLURM", "look at SLURM_CONF"),
        ("Ray", "start its head"),
        ("storage", "free some"),
        ("MLflow", "See that it runs"),
    ):
        assert found[name]["state"] == "fault" and way_out in found[name]["said"], found[name]
    assert "a-driver-of-1999" in found["GPU"]["said"] and "DOWN" in found["SLURM"]["said"]
    assert "hush" not in json.dumps(found)
    tool(path, "scontrol", "echo Slurmctld is UP")
    assert say()[1]["SLURM"]["state"] == "ok"
    assert say("--storage", "/proc/nothing")[1]["storage"]["state"] == "fault"


def test_a_database_that_is_not_migrated_is_named(say: Say, path: Path, tmp_path: Path) -> None:
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    code, found = say("--uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert code == 0 and "0 models" in found["MLflow"]["said"]
    with sqlite3.connect(tmp_path / "mlflow.db") as tables:
        tables.execute("UPDATE alembic_version SET version_num = 'abcdef'")
    code, found = say("--uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert code == 1 and "mlflow db upgrade" in found["MLflow"]["said"]


class Late(BaseHTTPRequestHandler):
    """A server whose clock is wrong by what its class says."""

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
def test_a_clock_that_differs_from_the_server_s_is_named(
    say: Say, path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float, state: str
) -> None:
    monkeypatch.setattr(Late, "skew_s", skew_s)
    server = HTTPServer(("127.0.0.1", 0), Late)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        code, found = say("--uri", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert found["clock"]["state"] == state and code == (state == "fault"), found
    assert state == "ok" or ("chrony" in found["clock"]["said"] and "9" in found["clock"]["said"])


def test_without_json_it_is_a_line_each(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--storage", str(tmp_path), "--ray", "nowhere.invalid:1"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok   ", "  -  ", "FAULT")) for line in lines) and len(lines) >= 7
    assert [line.split()[1] for line in lines if line.startswith("FAULT")][:1] == ["Ray"]
