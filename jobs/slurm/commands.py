"""Runs SLURM's commands, either to read their output or to change a job."""

from __future__ import annotations

import shutil
import subprocess

from jobs.slurm import munge
from jobs.slurm.ask import TIMEOUT_S, ask
from pipeline.errors import ResourceError

MUNGE_HINT = "start it (systemctl start munge), or ask who runs SLURM here"


def query(*command: str, timeout_s: float = TIMEOUT_S) -> list[str]:
    """The lines that a command prints; none if it is missing or fails."""
    if shutil.which(command[0]) is None or munge.absent():
        return []
    try:
        done = ask(*command, timeout_s=timeout_s)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def run_slurm(*command: str) -> None:
    """Runs a command that changes a job. Raises ResourceError with SLURM's message if it is refused."""
    line = " ".join(command)
    if shutil.which(command[0]) is None:
        raise ResourceError(
            f"{command[0]}: this machine has no SLURM; run the command where the job was submitted", key=command[0]
        )
    if why := munge.absent():
        raise ResourceError(f"{line}: {why}; {MUNGE_HINT}", key="munge", subject=line)
    try:
        done = ask(*command)
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"{line}: {error}", key=command[0], subject=line) from None
    if done.returncode != 0:
        raise ResourceError(f"{line}: {' '.join(done.stderr.split())}", key=command[0], subject=line)


def check_slurm() -> None:
    """Raises ResourceError if this machine has no SLURM, or SLURM cannot be reached from it."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ResourceError(
            "sbatch: this machine has no SLURM. --dry-run shows the script, --where local runs the job here, and "
            "infra/slurm/testcluster brings up a SLURM to try",
            key="sbatch",
        )
    if why := munge.absent():
        raise ResourceError(
            f"sbatch: {why}, and SLURM accepts no job without it; {MUNGE_HINT}. --where local runs the job on this "
            "machine",
            key="munge",
        )


def why_silent() -> str:
    """Why SLURM does not answer at all, with its message; "" if it answers or is not installed."""
    if shutil.which("sinfo") is None:
        return ""
    why = munge.absent()
    if not why:
        why = _why_refused()
    return f"SLURM does not answer ({why})" if why else ""


def _why_refused() -> str:
    try:
        done = ask("sinfo", "-h", "-o", "%P")
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return " ".join(done.stderr.split())[:300] if done.returncode else ""
