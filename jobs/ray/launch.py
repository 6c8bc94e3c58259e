"""Clusters that other tools bring up: Ray's own launcher on hosts and clouds, kubectl under Kubernetes."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from jobs.ray import render as ray_render
from jobs.ray.site import Kubernetes, Launched, Site
from pipeline.errors import ConfigError, ResourceError
from pipeline.runs.files import write_text

NEEDS = {"aws": "boto3", "gcp": "googleapiclient"}  # modules of Ray's launcher; the extra has the kind's name
TOOLS = {"ssh": "openssh-client", "rsync": "rsync"}


def up(site: Site, folder: Path) -> str:
    """Renders the site below `folder` and brings its cluster up; returns how to train on it."""
    path = _write(site, folder)
    if isinstance(site, Kubernetes):
        _kubectl(site, "apply", "--filename", str(path))
        forward = f"kubectl --namespace {site.namespace} get rayclusters {site.name}"
        return f"{site.name} is requested in namespace {site.namespace}; `{forward}` shows when it is ready"
    check(site)
    _make_token()
    _ray("up", str(path), "--yes", "--no-config-cache", "--disable-usage-stats")
    line = "adaptnet train RECIPE --run-dir " + f"{site.shared.path}/runs/NAME compute.address=auto"
    return f"{site.name} is up; to train on it:\n\n  ray exec {path} '{line}'"


def down(site: Site, folder: Path) -> str:
    """Takes the site's cluster down and removes its rendered file; returns a message."""
    path = _write(site, folder)
    if isinstance(site, Kubernetes):
        _kubectl(site, "delete", "--ignore-not-found", "--filename", str(path))
    else:
        _ray("down", str(path), "--yes")
    path.unlink()
    with suppress(OSError):
        path.parent.rmdir()
    return f"{site.name} is taken down"


def status(site: Site, folder: Path) -> str:
    """The state of the cluster as the tool prints it."""
    if isinstance(site, Kubernetes):
        return _kubectl(site, "get", "rayclusters", site.name, "--output", "wide")
    return _ray("exec", str(_write(site, folder)), "RAY_AUTH_MODE=token ray status")


def _write(site: Site, folder: Path) -> Path:
    ((name, text),) = ray_render.render(site).items()
    path = folder / site.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _kubectl(site: Kubernetes, *arguments: str) -> str:
    if shutil.which("kubectl") is None:
        raise ResourceError(
            f"{site.name} (kind: kubernetes) needs kubectl, which is not on this machine; `adaptnet cluster render "
            "SITE --out FOLDER` writes the manifest, which can be applied on another machine",
            key="kubectl",
            subject=site.name,
        )
    context = ["--context", site.context] if site.context else []
    return _run(["kubectl", *context, "--namespace", site.namespace, *arguments], site.name)


def _ray(*arguments: str) -> str:
    """Runs this environment's `ray` command without the variable that would send it to another cluster."""
    env = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS",)}
    return _run([str(Path(sys.executable).parent / "ray"), *arguments], arguments[1], env)


def check(
    site: Launched,
    *,
    which: Callable[[str], str | None] = shutil.which,
    find_module: Callable[[str], object | None] = find_spec,
) -> None:
    """Raises ResourceError for a tool or extra that Ray's launcher needs, ConfigError if the ssh key does not exist."""
    for tool, package in TOOLS.items():
        if which(tool) is None:
            raise ResourceError(
                f"{site.name} (kind: {site.kind}) needs {tool} on this machine; install {package}",
                key=tool,
                subject=site.name,
            )
    module = NEEDS.get(site.kind)
    if module and find_module(module) is None:
        raise ResourceError(
            f"{site.name} (kind: {site.kind}) needs the extra `{site.kind}`, which is not installed: "
            f"pip install --constraint constraints.txt --editable '.[{site.kind}]'",
            key=site.kind,
            subject=site.name,
        )
    if site.ssh.key and not Path(site.ssh.key).expanduser().is_file():
        raise ConfigError(f"ssh.key (={site.ssh.key}): no such file", key="ssh.key", subject=site.ssh.key)


def _make_token() -> None:
    """Creates this user's Ray token, which is copied to every node. Ray itself would make it readable for everyone."""
    path = Path(ray_render.TOKEN).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    path.chmod(0o600)


def _run(command: Sequence[str], what: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        output = " ".join(f"{done.stdout[-1500:]} {done.stderr[-1500:]}".split())
        hint = "; is KubeRay's operator installed there?" if "no matches for kind" in output else ""
        raise ResourceError(
            f"{what}: {' '.join(command[:4])} ... failed: {output[-1200:]}{hint}",
            key=Path(command[0]).name,
            subject=what,
        )
    return done.stdout.strip()
