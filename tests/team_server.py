"""A team's server for tests, as infra/mlflow/server.sh starts it: PostgreSQL, log-in, artifacts by the server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[1] / "infra" / "mlflow"
PASSWORD = "correct horse: battery/staple@9"  # with characters that must be written as %-codes in an address


def missing() -> str | None:
    """What this machine lacks to run it; None if it lacks nothing."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return "needs PostgreSQL: apt-get install postgresql"
    absent = [name for name in ("psycopg", "flask_wtf") if find_spec(name) is None]
    return f"needs {' and '.join(absent)}: make venv" if absent else None


class TeamServer:
    """One MLFLOW_HOME of infra/mlflow, with a port of its own."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="adaptnet-team-"))  # short: a socket's path has at most 107 characters
        self.home.chmod(0o711)  # PostgreSQL runs as another user if we are root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "MLFLOW_HOME": str(self.home),
            "MLFLOW_PYTHON": sys.executable,
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        }

    def run(self, script: str, *words: object, code: int | None = 0, **environment: str) -> str:
        """The output of a script, which must end with `code` (None: any)."""
        done = subprocess.run(
            [SCRIPTS / script, *map(str, words)],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        output = done.stdout + done.stderr
        assert code is None or done.returncode == code, output
        return output

    def start(self) -> TeamServer:
        self.run("server.sh", "start")
        return self

    def kill(self) -> None:
        """SIGKILLs all of MLflow's processes; the database keeps running."""
        group = int((self.home / "server.pid").read_text())
        os.killpg(group, signal.SIGKILL)

    def rows(self, query: str) -> list[Any]:
        """The result of a query in PostgreSQL itself."""
        from sqlalchemy import create_engine, text

        engine = create_engine(f"postgresql://mlflow@/mlflow?host={self.home}/db/sockets")
        try:
            with engine.begin() as connection:
                result = connection.execute(text(query))
                return [tuple(row) for row in result] if result.returns_rows else []
        finally:
            engine.dispose()

    def end(self) -> None:
        self.run("server.sh", "stop", code=None)
        shutil.rmtree(self.home, ignore_errors=True)
