"""Records the command, code, packages and machine of a run, and removes passwords from texts before they are stored.

Everything is stored in the run folder (environment.json, requirements.txt, git.diff), from which it can be sent to a
tracking server later, by another machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import pwd
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, cast

from pipeline.errors import without_secrets
from pipeline.installation import CODE
from pipeline.runs.files import read_json, write_text

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "nvidia-dali-cuda130", "numpy", "safetensors")
KEPT = "git.json"  # file in a copy of a checkout that records the state of the original
MAX_DIFF_CHARS = 5_000_000
RESULTS = ("tuning/claims/kept", "tuning/claims/RESULTS.md")  # in a checkout; what runs write there changes no code


class GitState(TypedDict):
    """The checkout that a run uses; `dirty` means that files differ from the commit."""

    commit: str
    branch: str
    dirty: bool


class Environment(TypedDict, total=False):
    """The content of environment.json."""

    command: list[str]
    host: str
    user: str
    platform: str
    python: str
    packages: dict[str, str]  # {name: version}
    cpus: int | None
    gpus: list[str]
    git: GitState | None


def record(run_dir: Path, command: Sequence[str]) -> None:
    """Writes environment.json, requirements.txt and, if the code is a changed git checkout, git.diff into `run_dir`."""
    source = CODE.resolve()
    git = git_state(source) or _kept(source)
    environment: Environment = {
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


def recipe_of(environment: Environment) -> str | None:
    """The recipe that the command `adaptnet train RECIPE` named; None if it was another command."""
    command = environment.get("command", [])
    place = command.index("train") + 1 if "train" in command else len(command)
    named = command[place : place + 1]
    return named[0] if named and not named[0].startswith("-") and "=" not in named[0] else None


def read(run_dir: Path) -> Environment:
    """environment.json as `record` has written it; empty if it has not."""
    try:
        environment = read_json(run_dir / "environment.json")
    except (OSError, ValueError):
        return {}
    return cast(Environment, environment) if isinstance(environment, dict) else {}


def git_state(folder: Path) -> GitState | None:
    """{commit, branch, dirty} of a git checkout; None if `folder` is not the top of one."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or top is None or Path(top.strip()).resolve() != folder:
        return None
    status = _git(folder, "status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in RESULTS))
    branch = _git(folder, "rev-parse", "--abbrev-ref", "HEAD") or ""
    return {"commit": commit.strip(), "branch": branch.strip(), "dirty": bool(status)}


def _kept(folder: Path) -> GitState | None:
    """The state of the checkout of which this folder is a copy, from the file KEPT."""
    try:
        state = read_json(folder / KEPT)
    except (OSError, ValueError):
        return None
    return cast(GitState, state) if isinstance(state, dict) else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def gpu_names() -> list[str]:
    """The names of this machine's GPUs by nvidia-smi, so that this process does not open any of them."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def installed() -> list[str]:
    """Every installed distribution as name==version, by name."""
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return [f"{name}=={version}" for name, version in sorted(versions.items(), key=lambda pair: pair[0].lower())]


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
    except KeyError:  # a container without an entry for this number
        return str(os.getuid())
