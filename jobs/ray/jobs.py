"""Jobs on a running Ray cluster, by Ray Jobs: what `adaptnet submit --where ray` does.

The job server is part of the head's dashboard. A job's code is this checkout's, which Ray takes at submission; its log
is kept beside the run as well, so that `adaptnet jobs` shows it when the cluster is gone.
"""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import ray_token

if TYPE_CHECKING:
    from jobs.slurm.job import Job, Submission

ROOT = Path(__file__).parents[2]
STATES = {"SUCCEEDED": "COMPLETED", "STOPPED": "CANCELLED"}  # Ray's words in SLURM's
SAVES_WITHIN_S = 120  # after it was told to stop; Ray's own 3 s end most trainings before they have saved
EXTRA = "pip install --constraint constraints.txt --editable '.[cluster]'"


def submit(submission: Submission, address: str | None) -> list[str]:
    """Hands each job to the cluster at http://HOST:PORT; their ids. Raises ResourceError where it does not answer."""
    from jobs.slurm import job as slurm

    jobs = submission.array or (submission.job,)
    client = connect(address)
    ids = []
    for job in jobs:
        name = f"adaptnet-{Path(job.home).name}-{secrets.token_hex(4)}"
        line = entrypoint(job, name)
        try:
            ids.append(client.submit_job(entrypoint=line, submission_id=name, runtime_env=_environment()))
        except RuntimeError as error:
            raise ResourceError(f"--address (={address}): Ray refused the job: {str(error)[:600]}") from None
        slurm.remember(Path(job.home), _entry(submission, job, name, str(address)))
    return ids


def entrypoint(job: Job, name: str) -> str:
    """The shell line that runs a job. What is printed goes to Ray and to the job's log; `tee` outlives the stop."""
    joins = ["compute.address=auto"] if job.uses_ray else []
    line = shlex.join(["python", "-m", "jobs.cli", job.verb, *job.arguments, *joins])
    log = shlex.quote(str(_log(job, name)))
    return shlex.join(["bash", "-c", f"exec > >(trap '' TERM; exec tee -a {log}) 2>&1; exec {line}"])


def _log(job: Job, name: str) -> Path:
    return Path(job.home) / "slurm" / f"{name}.log"


def _environment() -> dict[str, Any]:
    """Ray's runtime environment: our packages as they are now."""
    from jobs.slurm.job import PACKAGES

    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVES_WITHIN_S), "PYTHONUNBUFFERED": "1"}
    packages = [str(ROOT / package) for package in PACKAGES]
    return {"py_modules": packages, "excludes": ["__pycache__"], "env_vars": variables}


def _entry(submission: Submission, job: Job, name: str, address: str) -> dict[str, Any]:
    return {
        "id": name,
        "where": "ray",
        "address": address,
        "name": submission.name,
        "verb": job.verb,
        "arguments": list(job.arguments),
        "run_dir": job.run_dir,
        "folder": str(submission.folder),
        "log": str(_log(job, name)),
        "resources": asdict(submission.resources),
        "site": submission.site.model_dump(mode="json"),
        "submitted": time.time(),
        "host": socket.gethostname(),
        "script": entrypoint(job, name),
    }


def state_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    """A job's state in SLURM's words, and Ray's reason. Raises ResourceError where the cluster does not answer."""
    try:
        found = connect(entry["address"]).get_job_info(entry["id"])
    except RuntimeError as error:
        return "UNKNOWN", f"the cluster at {entry['address']} does not know it ({str(error)[:120]})"
    return STATES.get(found.status.value, found.status.value), (found.message or "").strip()[:300]


def stop(entry: Mapping[str, Any]) -> None:
    """Tells a job to end; a training saves first."""
    connect(entry["address"]).stop_job(entry["id"])


def connect(address: str | None) -> Any:
    """Ray's client of the job server. Raises ConfigError for no address, ResourceError where nobody answers."""
    if not address or not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address (={address}): the job server of a head with a dashboard, http://HOST:8265")
    try:
        from ray.job_submission import JobSubmissionClient

        with ray_token.mode(os.environ.get(ray_token.MODE) or ("token" if ray_token.has_token() else None)):
            return JobSubmissionClient(address)
    except ImportError as error:
        raise ResourceError(f"--where ray needs the extra `cluster` ({error}): {EXTRA}") from None
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(
            f"--address (={address}): no job server answers ({str(error)[:300]}). It is part of the head's dashboard: "
            f"its site says dashboard: true, and its environment has the extra `cluster` ({EXTRA})"
        ) from None
