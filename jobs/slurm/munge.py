"""Whether munged runs on this machine: without it every SLURM command hangs for 49 s before it fails."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from pathlib import Path

from jobs.slurm.ask import ask

CONFIGS = ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf", "/etc/slurm-llnl/slurm.conf")
SOCKET = "/run/munge/munge.socket.2"  # libmunge's default
ANSWER_S = 10.0  # how long to wait for SLURM's answer if munged seems to be absent
CACHED_S = 30.0  # how long a verdict against munged is cached: each costs those 10 s


def absent(default_socket: str = SOCKET) -> str:
    """A sentence if munged should run on this machine and does not; "" if all is well.

    SLURM's configuration names munged's socket. We may have missed the configuration file, so SLURM itself is queried
    before a missing socket counts as a fault.
    """
    path = _socket(default_socket)
    if path is None:
        return ""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(ANSWER_S)
            probe.connect(path)
        return ""
    except OSError as error:
        why = f"munged does not run on this machine ({path}: {error.strerror or error})"
        return "" if _slurm_answers(path) else why


_absent_until: dict[str, float] = {}  # the time until which munged counts as absent, by its socket


def _slurm_answers(path: str) -> bool:
    """Whether SLURM can be reached all the same. Any other fault SLURM reports by itself."""
    if time.monotonic() < _absent_until.get(path, 0.0):
        return False
    try:
        done = ask("sinfo", "-h", "-o", "%R", timeout_s=ANSWER_S)
        answers = done.returncode == 0 or not re.search("munge|authentication", done.stderr, re.IGNORECASE)
    except (OSError, subprocess.SubprocessError):
        answers = False
    if not answers:
        _absent_until[path] = time.monotonic() + CACHED_S
    return answers


def _socket(default: str) -> str | None:
    """The socket that SLURM's commands use; None if it is unknown, or if they do not use munge."""
    named = os.environ.get("SLURM_CONF")
    path = next((Path(each) for each in ((named,) if named else CONFIGS) if Path(each).is_file()), None)
    if path is None:  # no cluster, or one that sends each command its configuration: SLURM itself reports a fault
        return None
    settings = _settings(path)
    if settings.get("authtype", "auth/munge") != "auth/munge":
        return None
    match = re.search(r"socket=([^,\s]+)", settings.get("authinfo", ""))
    return match[1] if match else default


def _settings(path: Path) -> dict[str, str]:
    """AuthType and AuthInfo, with keys in lower case, of slurm.conf and the files that it includes."""
    settings: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return settings
    for key, value in re.findall(r"^\s*(AuthType|AuthInfo|Include)\s*[=\s]\s*(\S+)", text, re.I | re.M):
        settings |= _settings(path.parent / value) if key.lower() == "include" else {key.lower(): value}
    return settings
