"""What a run came from: command, code, packages, machine; and texts freed of passwords before they are stored.

Everything lies in the run folder (environment.json, requirements.txt, git.diff), so that it can be sent to a tracking
server later, from another machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import pwd
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runs.files import write_text

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "nvidia-dali-cuda130", "numpy", "safetensors")
KEPT = "git.json"  # in a copy of a checkout
MAX_DIFF_CHARS = 5_000_000
_USERINFO = re.compile(r"\b([a-z][a-z0-9+.-]*)://([^/\s'\"]*)@", re.IGNORECASE)
_SECRET_QUERY = re.compile(
    r"([?&;](?:\w*(?:password|passwd|pwd|token|secret|signature|key)))=[^&;\s'\"]*", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """`text` with user:password@ taken out of every URI in it, and the values of password-like query keys.

    A database keeps its user's name, so that the URI serves where the password comes from elsewhere.
    """
    return _SECRET_QUERY.sub(r"\1=***", _USERINFO.sub(_without_password, text))


def _without_password(match: re.Match[str]) -> str:
    scheme, user = match[1], match[2].partition(":")[0]
    web = scheme.lower() in ("http", "https")  # there the user may be a token
    return f"{scheme}://" if web or not user else f"{scheme}://{user}@"


def record(run_dir: Path, command: Sequence[str]) -> None:
    """Writes environment.json, requirements.txt and, if the code is a changed git checkout, git.diff into `run_dir`."""
    source = Path(__file__).resolve().parents[2]
    git = git_state(source) or _kept(source)
    environment = {
        "command": [without_secrets(word) for word in command],
        "host": socket.gethostname(),
        "user": _user(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpus": os.cpu_count(),
        "gpus": gpu_names(),
        "git": git,
    }
    write_text(run_dir / "environment.json", json.dumps(environment, indent=1))
    write_text(run_dir / "requirements.txt", "\n".join(installed()) + "\n")
    diff = _git(source, "diff", "HEAD") if git and git["dirty"] and not _kept(source) else None
    if diff:
        write_text(run_dir / "git.diff", without_secrets(diff)[:MAX_DIFF_CHARS])
    else:
        (run_dir / "git.diff").unlink(missing_ok=True)


def read(run_dir: Path) -> dict[str, Any]:
    """What `record` found; empty where it has not been called."""
    try:
        found: dict[str, Any] = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def git_state(folder: Path) -> Mapping[str, Any] | None:
    """{commit, branch, dirty} of a git checkout; None where `folder` is not the top of one."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or top is None or Path(top.strip()).resolve() != folder:
        return None
    status = _git(folder, "status", "--porcelain")
    branch = _git(folder, "rev-parse", "--abbrev-ref", "HEAD") or ""
    return {"commit": commit.strip(), "branch": branch.strip(), "dirty": bool(status)}


def _kept(folder: Path) -> Mapping[str, Any] | None:
    """The state of the checkout that this folder is a copy of, as who made it wrote it down."""
    try:
        found: Mapping[str, Any] | None = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def gpu_names() -> list[str]:
    """This machine's GPUs by nvidia-smi, so that the asking process opens none of them."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def installed() -> list[str]:
    """Every installed distribution as name==version, by name."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return [f"{name}=={version}" for name, version in sorted(found.items(), key=lambda pair: pair[0].lower())]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def who() -> str:
    """USER@HOST of this process."""
    return f"{_user()}@{socket.gethostname()}"


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container without a line for this number
        return str(os.getuid())
