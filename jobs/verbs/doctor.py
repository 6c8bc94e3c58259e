"""`adaptnet doctor`: checks what this machine offers, and how to fix what is broken."""

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

MOST_SKEW_S = 5.0  # largest clock difference: leases and MLflow compare times of different machines
LEAST_FREE_GB = 10.0  # free disk space below which storage is a fault
TIMEOUT_S = 10.0  # timeout of each command and connection
MARKS = {"ok": "ok   ", "without": "  -  ", "fault": "FAULT"}

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@dataclass(frozen=True)
class Finding:
    """The state of one component.

    state: "ok"; "without" if it is absent and not required; "fault" if it must be fixed.
    said: a sentence for the user, which in case of a fault contains the fix.
    """

    what: str
    state: Literal["ok", "without", "fault"]
    said: str


@app.command()
def doctor(
    uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="tracking server; default: runs/mlflow.db")
    ] = None,
    storage: Annotated[Path, typer.Option(help="folder for runs")] = Path("runs"),
    ray: Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster; default: $RAY_ADDRESS")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Checks what this machine offers: GPUs, driver, NCCL, DALI, compiler, Ray, SLURM, MLflow, storage, clock. Prints
    one line for each: ok, "-" if it is absent and not required, or FAULT with a fix. After a fault the exit status is
    1.

    Examples:

      adaptnet doctor

      adaptnet doctor --uri http://tracking:5000 --storage /data/runs --ray head:6379
    """
    findings = list(examine(uri, storage, ray or os.environ.get("RAY_ADDRESS")))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in findings], indent=1))
    else:
        for each in findings:
            typer.echo(f"{MARKS[each.state]}  {each.what:<9}  {each.said}")
    if any(each.state == "fault" for each in findings):
        raise typer.Exit(1)


def examine(
    uri: str | None, storage: Path, ray: str | None, *, least_free_gb: float = LEAST_FREE_GB
) -> Iterator[Finding]:
    """The findings about this machine, one for each component.

    uri: tracking server; storage: folder for runs; ray: HOST:PORT of a Ray cluster.
    least_free_gb: free disk space below which storage is a fault.
    """
    yield from _gpus()
    yield _dali()
    yield _gpu_decoder()
    yield _compiler()
    yield _ray(ray)
    yield _slurm()
    yield _storage(storage, least_free_gb)
    yield from _mlflow(uri)


def _gpus() -> Iterator[Finding]:
    import torch

    from pipeline.runs import provenance

    names, cores = provenance.gpu_names(), os.cpu_count()
    if not names:
        yield Finding("GPU", "without", f"nvidia-smi finds no GPU; training uses {cores} CPU cores")
        yield Finding("NCCL", "without", "not checked: only training on several GPUs uses it")
        return
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1]
    summary = (
        f"{usable} of {len(names)} ({names[0]}), driver {''.join(driver)}, torch built for CUDA {torch.version.cuda}"
    )
    if usable < len(names):
        fix = (
            "install a driver for that CUDA or newer, or check CUDA_VISIBLE_DEVICES; a CPU build of torch finds no GPU"
        )
        yield Finding("GPU", "fault", f"{summary}; {fix}")
    else:
        yield Finding("GPU", "ok", summary)
    yield _nccl(usable)


def _nccl(usable: int) -> Finding:
    import torch

    if not torch.distributed.is_nccl_available():
        return Finding(
            "NCCL", "fault", "this torch has no NCCL, so several GPUs cannot train together; run infra/venv.sh"
        )
    text = ".".join(map(str, torch.cuda.nccl.version())) if usable else "present, not tried: no GPU is usable"  # type: ignore[no-untyped-call]
    return Finding("NCCL", "ok", text)


def _dali() -> Finding:
    name = "nvidia-dali-cuda130"
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding("DALI", "fault", f"{name}, which decodes images, is not installed; run infra/venv.sh")
    try:
        from pipeline.data import dali
        from pipeline.data.config import DataConfig

        dali.Decoding(DataConfig(root=Path("/")), "cpu", threads=1, most=1)([_pixel()])
    except (ImportError, RuntimeError, AdaptNetError) as error:
        return Finding(
            "DALI", "fault", f"{installed} cannot decode a PNG ({error}); remove .venv and run infra/venv.sh"
        )
    return Finding("DALI", "ok", f"{installed}, decodes")


def _gpu_decoder() -> Finding:
    """Decodes JPEGs on the first GPU in a child process, or remembers that."""
    import torch

    name = "decoder"
    if not torch.cuda.is_available():
        return Finding(name, "without", "no GPU: not tried")
    try:
        from pipeline.data import probe
        from pipeline.data.config import DataConfig

        fault = probe.fault(DataConfig(root=Path("/")), torch.device("cuda", 0))
    except (ImportError, OSError) as error:
        fault = str(error)
    if fault:
        fix = "trainings decode on the CPU here; install another version of nvidia-dali-cuda130 or of the driver"
        return Finding(name, "fault", f"decoding a JPEG on the GPU failed ({fault}); {fix}")
    return Finding(name, "ok", "the GPU decodes windows of JPEGs")


def _pixel() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def _compiler() -> Finding:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return Finding("compiler", "without", "no c++, so training.compile has no effect; apt-get install g++")
    return Finding("compiler", "ok", _output(compiler, "--version").partition("\n")[0])


def _ray(address: str | None) -> Finding:
    try:
        installed = version("ray")
    except PackageNotFoundError:
        return Finding("Ray", "fault", "ray is not installed, and compute.workers above 0 needs it; run infra/venv.sh")
    if address is None or address in ("auto", "local"):
        return Finding("Ray", "ok", f"{installed}; no address given, so each training starts its own Ray here")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    reason = _unreachable(host, port)
    if reason:
        fix = "start its head (ray start --head --port=PORT), or use another address"
        return Finding("Ray", "fault", f"{address} does not answer ({reason}); {fix}")
    return Finding("Ray", "ok", f"{installed}; {address} answers")


def _unreachable(host: str, port: str) -> str | None:
    try:
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        return str(error)
    return None


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding(
            "SLURM",
            "without",
            "no sbatch on this machine; `adaptnet submit` to SLURM works on a login node of a cluster",
        )
    from jobs.slurm import munge

    if why := munge.absent():
        return Finding("SLURM", "fault", f"{why}, so SLURM's commands cannot reach it; start it: systemctl start munge")
    ping = " ".join(_output("scontrol", "ping").split())
    if "_establish_config_source" in ping:
        return Finding(
            "SLURM",
            "without",
            "sbatch is installed, but there is no cluster: neither slurm.conf nor a host that provides it",
        )
    if "UP" not in ping:
        fix = "ask the administrators of the cluster, or check SLURM_CONF"
        return Finding("SLURM", "fault", f"its controller does not answer ({ping[:200] or 'no output'}); {fix}")
    return Finding("SLURM", "ok", _output("sbatch", "--version"))


def _storage(folder: Path, least_free_gb: float) -> Finding:
    from pipeline.tracking.address import NETWORK_FILE_SYSTEMS, file_system

    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    probe = existing / f".adaptnet-probe-{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        fix = "choose another folder with --storage, or change its permissions"
        return Finding("storage", "fault", f"{existing} is not writable ({error.strerror}); {fix}")
    free, kind = shutil.disk_usage(existing).free / 1e9, file_system(existing)
    shared = (
        f"; {kind} is a network file system, so mlflow.db must be elsewhere: --uri"
        if kind in NETWORK_FILE_SYSTEMS
        else ""
    )
    if free < least_free_gb:
        text = f"{existing} has {free:.1f} GB free, below {least_free_gb:g}; free some space{shared}"
        return Finding("storage", "fault", text)
    if existing.parent == existing and folder.absolute() != existing:
        fix = "is its file system mounted here? Otherwise make the folder"
        return Finding("storage", "fault", f"{folder} does not exist, nor a folder above it but {existing}; {fix}")
    return Finding("storage", "ok", f"{existing} is writable, {free:,.0f} GB free on {kind or 'its disk'}{shared}")


def _mlflow(uri: str | None) -> Iterator[Finding]:
    from pipeline.errors import without_secrets
    from pipeline.registry import catalogue, store_reader
    from pipeline.tracking.address import database_file, unusable

    try:
        address = catalogue.address(uri)
        path, shown = database_file(address), without_secrets(address)
        if reason := unusable(address):
            yield Finding("MLflow", "fault", f"{reason}; give a server or a local file with --uri")
            return
        if path is not None and not path.exists():
            summary = f"{path} does not exist yet; the first training creates it"
        else:
            summary = f"{shown} answers and its tables are current; {len(store_reader.models(address)):,} models"
    except AdaptNetError as error:
        yield Finding("MLflow", "fault", str(error))
        return
    yield Finding("MLflow", "ok", f"{version('mlflow')}; {summary}")
    if path is None and address.startswith("http"):
        yield _clock(address)
    else:
        yield Finding("clock", "without", "not compared: no tracking server over HTTP; give yours with --uri")


def _clock(address: str) -> Finding:
    """Compares this machine's clock with the Date header of the server's responses."""
    from pipeline.registry import rest_store

    before = time.time()
    stamp = rest_store.date(address)
    after = time.time()
    if stamp is None:
        return Finding("clock", "without", "not compared: the tracking server's responses have no Date header")
    remote = parsedate_to_datetime(stamp).timestamp()  # rounded down to whole seconds
    skew = max(0.0, remote - after, before - remote - 1)
    if skew > MOST_SKEW_S:
        text = f"{skew:.0f} s from the tracking server's clock, above {MOST_SKEW_S:.0f}"
        return Finding("clock", "fault", f"{text}; set the clock of this machine or of the server (chrony, ntpd)")
    return Finding("clock", "ok", f"within {max(1.0, skew):.0f} s of the tracking server's clock")


def _output(*command: str) -> str:
    """The output of a command, or the error message if it fails."""
    from jobs.slurm.ask import ask

    try:
        done = ask(*command, timeout_s=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()
