"""Stand-ins for tests: a machine without SLURM, SLURM's and LSF's commands as scripts, and a Ray job server."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SLURM = ("sbatch", "srun", "squeue", "sacct", "sacctmgr", "scontrol", "scancel", "sinfo")


def hide_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leaves no SLURM in the environment; returns a folder, first on PATH, for fake commands."""
    for key in [key for key in os.environ if key.startswith(("SLURM", "SUBMITIT"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("SLURM_CONF", str(folder / "no-slurm.conf"))
    fake, plain = folder / "fake-bin", folder / "plain-bin"
    fake.mkdir()
    plain.mkdir()
    for place in os.get_exec_path():
        for path in Path(place).iterdir() if Path(place).is_dir() else ():
            if path.name not in SLURM and not (plain / path.name).is_symlink():
                (plain / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", f"{fake}:{plain}")
    return fake


def write_tool(folder: Path, name: str, body: str) -> None:
    """A shell script that is run as the command `name`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


SBATCH = """
set -e; cd {state}
job=$(($(cat next) + 1)); echo $job >next
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
if [ -n "$tasks" ]; then for task in $(seq 0 $tasks); do echo RUNNING >${{job}}_$task; done; else echo RUNNING >$job; fi
echo "Submitted batch job $job"
"""
SQUEUE = """
cd {state}
while [ $# -gt 0 ]; do case $1 in -o) format=$2; shift;; -j) ids=$2; shift;; esac; shift; done
for job in $(echo $ids | tr , ' '); do
    [ -f $job ] || continue
    case $format in %T) cat $job;; *) echo "$job|$(cat $job)|None|n1|0:10";; esac
done
"""
SCANCEL = "cd {state}; [ -f $1 ] && echo CANCELLED >$1"
SCONTROL = 'cd {state}; [ "$1" = requeue ] && [ -f $2 ] && echo PENDING >$2'


def fake_slurm(folder: Path, state: Path) -> None:
    """sbatch, squeue, scancel and scontrol over files in `state`: one for each job, which contains its state."""
    state.mkdir()
    (state / "next").write_text("100\n")
    for name, body in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        write_tool(folder, name, body.format(state=state))
    write_tool(folder, "srun", "exit 1")


def fake_lsf(folder: Path, state: Path) -> None:
    """bsub, bjobs, bkill and brequeue, in the same way."""
    state.mkdir()
    write_tool(
        folder, "bsub", f'cd {state}; job=$(($(ls | wc -l) + 1)); echo RUN >$job; echo "Job <$job> is submitted"'
    )
    write_tool(folder, "bjobs", f'cd {state}; for job; do echo "$job $(cat $job)"; done')
    write_tool(folder, "bkill", f"cd {state}; echo EXIT >$1")
    write_tool(folder, "brequeue", f"cd {state}; echo PEND >$1")


class _JobServer(BaseHTTPRequestHandler):
    """The part of Ray's job server that we use; a job runs until it is stopped."""

    server: JobServer

    def do_GET(self) -> None:
        job = self.path.rsplit("/", 1)[-1]
        if self.path == "/api/version":
            self._answer({"version": "4", "ray_version": "2.99.0", "ray_commit": "none", "session_name": "s"})
        elif self.path.startswith("/api/packages/"):
            self._answer({})
        elif job in self.server.jobs:
            self._answer(self.server.jobs[job])
        else:
            self._answer({}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/stop"):
            self.server.jobs[self.path.split("/")[-2]]["status"] = "STOPPED"
            self._answer({"stopped": True})
            return
        request = json.loads(body)
        job = request["submission_id"]
        facts = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": request["entrypoint"], "submission_id": job}
        self.server.jobs[job] = facts
        self._answer({"job_id": job, "submission_id": job})

    def _answer(self, content: dict[str, object], code: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class JobServer(ThreadingHTTPServer):
    """Ray's job server; `jobs` by submission id."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _JobServer)
        self.jobs: dict[str, dict[str, object]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def job_server() -> Iterator[JobServer]:
    with JobServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def has(command: str) -> bool:
    return shutil.which(command) is not None
