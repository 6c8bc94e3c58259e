"""Whether munged runs here, without which each command of SLURM's is silent for 49 s before it says so."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from pathlib import Path

CONFIGS = ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf", "/etc/slurm-llnl/slurm.conf")
SOCKET = "/run/munge/munge.socket.2"  # where libmunge looks by default
ANSWER_S = 10.0  # within which SLURM must answer where munged seems to be away
STANDS_S = 30.0  # for which a verdict against munged stands: each costs those 10 s


def absent() -> str:
    """What is known of a munged that should run on this machine and does not; empty where all is well.

    Its socket is where SLURM's configuration says. That may lie where we do not look, so SLURM is asked before a
    silent socket counts.
    """
    path = _socket()
    if path is None:
        return ""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(ANSWER_S)
            probe.connect(path)
        return ""
    except OSError as error:
        return "" if _answers(path) else f"munged does not run on this machine ({path}: {error.strerror or error})"


_silent: dict[str, float] = {}  # until when munged counts as away, by its socket


def _answers(path: str) -> bool:
    """Whether SLURM can be spoken to all the same; what else is wrong with it, it will say itself."""
    if time.monotonic() < _silent.get(path, 0.0):
        return False
    try:
        done = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, timeout=ANSWER_S)
        answers = done.returncode == 0 or not re.search("munge|authentication", done.stderr, re.IGNORECASE)
    except (OSError, subprocess.SubprocessError):
        answers = False
    if not answers:
        _silent[path] = time.monotonic() + STANDS_S
    return answers


def _socket() -> str | None:
    """The socket that SLURM's commands speak to; None where that is unknown, or they use no munge."""
    found = os.environ.get("SLURM_CONF")
    path = next((Path(each) for each in ((found,) if found else CONFIGS) if Path(each).is_file()), None)
    if path is None:  # no cluster, or one that tells each command its configuration: SLURM itself will say
        return None
    settings = _settings(path)
    if settings.get("authtype", "auth/munge") != "auth/munge":
        return None
    match = re.search(r"socket=([^,\s]+)", settings.get("authinfo", ""))
    return match[1] if match else SOCKET


def _settings(path: Path) -> dict[str, str]:
    """AuthType and AuthInfo, by lower case, of slurm.conf and what it includes."""
    found: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for key, value in re.findall(r"^\s*(AuthType|AuthInfo|Include)\s*[=\s]\s*(\S+)", text, re.I | re.M):
        found |= _settings(path.parent / value) if key.lower() == "include" else {key.lower(): value}
    return found
