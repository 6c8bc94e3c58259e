"""Runs a command of SLURM's without the user's settings for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

TIMEOUT_S = 60.0
REACH = ("SLURM_CONF", "SLURM_JWT")  # variables by which the commands reach SLURM
SETTINGS = (  # prefixes of variables that stand for options of SLURM's commands
    *("SLURM_", "SLURMD_", "SQUEUE_", "SACCT_", "SACCTMGR_", "SBATCH_", "SALLOC_", "SRUN_", "SCANCEL_"),
    *("SCONTROL_", "SINFO_", "SPRIO_", "SSTAT_", "SREPORT_"),
)


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """`given`, by default this process's environment, without variables that stand for options of SLURM's commands.

    A user's SQUEUE_PARTITION, say, would hide a job that runs from us.
    """
    given = os.environ if given is None else given
    return {key: value for key, value in given.items() if key in REACH or not key.startswith(SETTINGS)}


def ask(*command: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Runs a command of SLURM's. Raises OSError or subprocess.TimeoutExpired."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=timeout_s, env=environment(), check=False
    )
