"""`adaptnet doctor`: what this machine offers, what is missing for what, and the way out."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.errors import AdaptNetError

MOST_SKEW_S = 5.0  # leases and MLflow's times are compared between machines
LEAST_FREE_GB = 10
TIMEOUT_S = 10.0
SIGNS = {"ok": "ok   ", "without": "  -  ", "fault": "FAULT"}

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

EXAMPLES = """Looks at what this machine offers: GPUs, driver, NCCL, DALI, compiler, Ray, SLURM, MLflow, storage, clock.
One line each: ok, "-" for what is not here and not needed, or FAULT with the way out; then the exit status is 1.

Examples:

  adaptnet doctor

  adaptnet doctor --uri http://tracking:5000 --storage /data/runs --ray head:6379
"""


@dataclass(frozen=True)
class Finding:
    """How one thing stands. "without": it is not here, and what is done without it."""

    what: str
    state: Literal["ok", "without", "fault"]
    said: str


@app.command(help=EXAMPLES)
def doctor(
    uri: Annotated[str | None, typer.Option(help="tracking server; default runs/mlflow.db")] = None,
    storage: Annotated[Path, typer.Option(help="where runs are to lie")] = Path("runs"),
    ray: Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster; default $RAY_ADDRESS")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    found = list(_look(uri, storage, ray or os.environ.get("RAY_ADDRESS")))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    else:
        for each in found:
            typer.echo(f"{SIGNS[each.state]}  {each.what:<9}  {each.said}")
    if any(each.state == "fault" for each in found):
        raise typer.Exit(1)


def _look(uri: str | None, storage: Path, ray: str | None) -> Iterator[Finding]:
    yield from _gpus()
    yield _dali()
    yield _compiler()
    yield _ray(ray)
    yield _slurm()
    yield _storage(storage)
    yield from _mlflow(uri)


def _gpus() -> Iterator[Finding]:
    import torch

    from pipeline.runs import provenance

    names, cores = provenance.gpu_names(), os.cpu_count()
    if not names:
        yield Finding("GPU", "without", f"no GPU that nvidia-smi knows; trains on {cores} CPU cores")
        yield Finding("NCCL", "without", "not looked at: several GPUs would train together by it")
        return
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = _words("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1]
    said = f"{usable} of {len(names)} ({names[0]}), driver {''.join(driver)}, torch built for CUDA {torch.version.cuda}"
    if usable < len(names):
        fix = "install a driver for that CUDA or newer, or look at CUDA_VISIBLE_DEVICES; a CPU build of torch sees none"
        yield Finding("GPU", "fault", f"{said}; {fix}")
    else:
        yield Finding("GPU", "ok", said)
    yield _nccl(usable)


def _nccl(usable: int) -> Finding:
    import torch

    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", "fault", "this torch has no NCCL: several GPUs cannot train together; infra/venv.sh")
    text = ".".join(map(str, torch.cuda.nccl.version())) if usable else "there, not tried: no GPU is usable"  # type: ignore[no-untyped-call]
    return Finding("NCCL", "ok", text)


def _dali() -> Finding:
    name = "nvidia-dali-cuda130"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding("DALI", "fault", f"{name} is not installed, and images are decoded by it: infra/venv.sh")
    try:
        from pipeline.data import dali
        from pipeline.data.config import DataConfig

        dali.Decoding(DataConfig(root=Path("/")), "cpu", threads=1, most=1)([_pixel()])
    except (ImportError, RuntimeError, AdaptNetError) as error:
        return Finding("DALI", "fault", f"{found} does not decode a PNG ({error}); make .venv anew: infra/venv.sh")
    return Finding("DALI", "ok", f"{found}, decodes")


def _pixel() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def _compiler() -> Finding:
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        return Finding("compiler", "without", "no c++: training.compile is left out; apt-get install g++")
    return Finding("compiler", "ok", _words(found, "--version").partition("\n")[0])


def _ray(address: str | None) -> Finding:
    try:
        found = version("ray")
    except PackageNotFoundError:
        return Finding("Ray", "fault", "ray is not installed: compute.workers above 0 needs it; infra/venv.sh")
    if address is None or address in ("auto", "local"):
        return Finding("Ray", "ok", f"{found}; no address given, so each training starts its own here")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    reason = _unreachable(host, port)
    if reason:
        fix = "start its head (ray start --head --port=PORT), or take another address"
        return Finding("Ray", "fault", f"{address} does not answer ({reason}); {fix}")
    return Finding("Ray", "ok", f"{found}; {address} answers")


def _unreachable(host: str, port: str) -> str | None:
    try:
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        return str(error)
    return None


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("SLURM", "without", "no sbatch here: adaptnet submit works on a log-in node of a cluster")
    from jobs.slurm import munge

    if why := munge.absent():
        return Finding(
            "SLURM", "fault", f"{why}, so SLURM's commands cannot speak to it; start it: systemctl start munge"
        )
    said = " ".join(_words("scontrol", "ping").split())
    if "_establish_config_source" in said:
        return Finding(
            "SLURM", "without", "sbatch is here, and no cluster: neither slurm.conf nor a host to ask for it"
        )
    if "UP" not in said:
        fix = "ask the cluster's people, or look at SLURM_CONF"
        return Finding("SLURM", "fault", f"its controller does not answer ({said[:200] or 'no word'}); {fix}")
    return Finding("SLURM", "ok", _words("sbatch", "--version"))


def _storage(folder: Path) -> Finding:
    from pipeline.tracking.address import NETWORK_FILE_SYSTEMS, file_system

    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    probe = there / f".adaptnet-probe-{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        fix = "take another folder with --storage, or have it made yours"
        return Finding("storage", "fault", f"{there} cannot be written ({error.strerror}); {fix}")
    free, kind = shutil.disk_usage(there).free / 1e9, file_system(there)
    shared = f"; {kind} is shared: mlflow.db must lie elsewhere, --uri" if kind in NETWORK_FILE_SYSTEMS else ""
    if free < LEAST_FREE_GB:
        return Finding("storage", "fault", f"{there} has {free:.1f} GB left, below {LEAST_FREE_GB}; free some{shared}")
    return Finding("storage", "ok", f"{there} can be written, {free:,.0f} GB free on {kind or 'its disk'}{shared}")


def _mlflow(uri: str | None) -> Iterator[Finding]:
    from pipeline.registry import catalogue, store_reader
    from pipeline.runs.provenance import without_secrets
    from pipeline.tracking.address import database_file, unusable

    try:
        place = catalogue.address(uri)
        path, shown = database_file(place), without_secrets(place)
        if reason := unusable(place):
            yield Finding("MLflow", "fault", f"{reason}; name a server or a local file with --uri")
            return
        if path is not None and not path.exists():
            said = f"{path} is not there yet: the first training makes it"
        else:
            said = f"{shown} answers and is migrated; {len(store_reader.models(place)):,} models"
    except AdaptNetError as error:
        yield Finding("MLflow", "fault", str(error))
        return
    yield Finding("MLflow", "ok", f"{version('mlflow')}; {said}")
    if path is None and place.startswith("http"):
        yield _clock(place)
    else:
        yield Finding("clock", "without", "not compared: no tracking server over HTTP; name yours with --uri")


def _clock(place: str) -> Finding:
    """This clock against the server's, by the time that it puts on its answers."""
    from pipeline.registry import rest_store

    before = time.time()
    stamp = rest_store.date(place)
    after = time.time()
    if stamp is None:
        return Finding("clock", "without", "the tracking server puts no time on its answers; not compared")
    there = parsedate_to_datetime(stamp).timestamp()  # in whole seconds, cut off
    skew = max(0.0, there - after, before - there - 1)
    if skew > MOST_SKEW_S:
        said = f"{skew:.0f} s from the tracking server's, above {MOST_SKEW_S:.0f}"
        return Finding("clock", "fault", f"{said}; set this machine's, or that one's (chrony, ntpd)")
    return Finding("clock", "ok", f"within {max(1.0, skew):.0f} s of the tracking server's")


def _words(*command: str) -> str:
    """What a command says; its error where it does not work."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()
