"""The scripts of infra/mlflow in unusual situations: ports in use, growing files, interrupted restores."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from team_server import PASSWORD, TeamServer, missing

from pipeline.tracking import connect


@contextmanager
def another() -> Iterator[TeamServer]:
    """A server with a home of its own, which is not started yet."""
    if lacking := missing():
        pytest.skip(lacking)
    server = TeamServer()
    try:
        yield server
    finally:
        server.end()


def test_process_lists_hold_no_password_and_files_are_private(team: TeamServer) -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert PASSWORD.encode() not in path.read_bytes()
    readable = [path for path in team.home.rglob("*") if path.lstat().st_mode & 0o077 and not path.is_symlink()]
    assert not [path for path in readable if not path.is_relative_to(team.home / "db")]
    assert (team.home / "db").stat().st_mode & 0o777 == 0o700 and (team.home / "server.log").exists()


def test_a_port_in_use_by_another_server_is_named(team: TeamServer) -> None:
    """Even if that server answers as ours would."""
    with another() as server:
        output = server.run("server.sh", "start", code=1, MLFLOW_PORT=str(team.port))
        assert f"127.0.0.1:{team.port}" in output
        assert "server     up" not in server.run("server.sh", "status", code=1)


def test_processes_of_another_boot_are_not_killed() -> None:
    """After a restart of the machine the stored process id may belong to any process."""
    with another() as server:
        stranger = subprocess.Popen(["sleep", "100"], start_new_session=True)
        try:
            (server.home / "server.pid").write_text(f"{stranger.pid}\n")
            (server.home / "server.boot").write_text("of another day\n")
            server.run("server.sh", "stop")
            assert stranger.poll() is None
        finally:
            stranger.send_signal(signal.SIGKILL)
            stranger.wait()


def test_a_backup_is_made_while_files_arrive(team: TeamServer, tmp_path: Path) -> None:
    growing = team.home / "artifacts" / "growing"
    growing.write_bytes(bytes(50_000_000))
    stop = threading.Event()

    def grow() -> None:
        with growing.open("ab") as file:
            while not stop.wait(0.001):
                file.write(b"x" * 1000)
                file.flush()

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        team.run("backup.sh", tmp_path / "new" / "backup")
    finally:
        stop.set()
        writer.join()
        growing.unlink()
    kept = tmp_path / "new" / "backup"
    assert {path.name for path in kept.iterdir()} == {"mlflow.dump", "mlflow_users.dump", "artifacts.tar", "SHA256SUMS"}
    assert kept.stat().st_mode & 0o777 == 0o700
    assert not [path for path in kept.parent.iterdir() if path != kept]


def test_an_interrupted_restore_leaves_the_server_empty(team: TeamServer, tmp_path: Path) -> None:
    client = connect(team.uri)
    run_id = client.create_run("0").info.run_id
    client.log_text(run_id, "hello", "hello.txt")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    team.run("backup.sh", whole)
    shutil.copytree(whole, broken)
    os.truncate(broken / "mlflow.dump", (broken / "mlflow.dump").stat().st_size // 2)
    sums = subprocess.run("sha256sum ./*.*", shell=True, cwd=broken, capture_output=True, text=True, check=True).stdout
    (broken / "SHA256SUMS").write_text(sums)  # as if it had been written so
    with another() as server:
        server.start()
        server.run("restore.sh", broken, code=1)
        assert connect(server.uri).search_runs(["0"]) == []  # it runs on
        other = {"MLFLOW_ARTIFACTS": "s3://bucket/path"}
        assert "stores artifacts in s3://bucket/path" in server.run("restore.sh", whole, code=1, **other)
        server.run("restore.sh", whole)
        restored = connect(server.uri)
        assert run_id in {run.info.run_id for run in restored.search_runs(["0"])}
        assert (server.home / "artifacts" / "0" / run_id / "artifacts" / "hello.txt").read_text() == "hello"


def test_a_missing_server_is_reported(tmp_path: Path) -> None:
    with another() as server:
        assert "no server here yet" in server.run("backup.sh", tmp_path / "backup", code=1)
        assert not (tmp_path / "backup").exists()
