"""Jobs on a running Ray cluster, by Ray Jobs: `adaptnet submit --where ray`.

The job server is part of the head's dashboard. A job runs the code of this checkout, which Ray copies at submission.
Its log is written beside the run as well, so that `adaptnet jobs` shows it when the cluster is gone.
"""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.schedulers import JobState, NodeEnv, Scheduler, records
from jobs.schedulers.records import JobRecord, record_of
from jobs.schedulers.submission import Job, Submission, refuse_options
from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import ray_token
from pipeline.installation import CODE, PACKAGES, module

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STATES = {"SUCCEEDED": "COMPLETED", "STOPPED": "CANCELLED"}  # SLURM's name for each state of Ray
ALIVE = ("PENDING", "RUNNING")
SAVES_WITHIN_S = 120  # grace period after a stop request; Ray's default of 3 s is too short to save a checkpoint
EXTRA = "pip install --constraint constraints.txt --editable '.[cluster]'"


class RayJobs(Scheduler):
    """The job server of a Ray cluster, at the submission's address. Jobs have no queue and get no warning."""

    name = "ray"
    can_requeue = False

    def preview(self, submission: Submission) -> str:
        """The entrypoints, with ID for the jobs' ids. No job waits for another."""
        refuse_options(submission, "after", "dependency", "throttle")
        check_address(submission.address)
        return "\n".join(entrypoint(job, "ID") for job in submission.jobs)

    def submit(self, submission: Submission) -> list[JobRecord]:
        """Submits each job separately to the job server."""
        self.preview(submission)
        client = connect(submission.address)
        made = []
        for job in submission.jobs:
            name = f"adaptnet-{Path(job.home).name}-{secrets.token_hex(4)}"
            line = entrypoint(job, name)
            try:
                client.submit_job(entrypoint=line, submission_id=name, runtime_env=_environment())
            except RuntimeError as error:
                raise ResourceError(
                    f"--address (={submission.address}): Ray refused the job: {str(error)[:600]}",
                    key="--address",
                    subject=submission.address,
                ) from None
            made.append(record_of(submission, job, id=name, log=_log(job, name), script=line))
            records.add(made[-1])
        return made

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobState]:
        """Asks the job server; if it is gone, reads the jobs' files."""
        return {record.id: self._state(record) for record in records}

    def _state(self, record: JobRecord) -> JobState:
        """The state that the job server reports or, if the cluster is gone, that the job's files show."""
        try:
            client = connect(record.address)
        except ResourceError:
            started = "started" if Path(record.log).is_file() else "not started"
            unknown = JobState("UNKNOWN", f"its cluster is gone; it had {started}")
            return records.state_from_files(record, self.logs(record)) or unknown
        try:
            info = client.get_job_info(record.id)
        except RuntimeError as error:
            reason = f"the cluster at {record.address} does not know it ({str(error)[:120]})"
            return JobState("UNKNOWN", reason)
        name = STATES.get(info.status.value, info.status.value)
        reason = "" if name == "COMPLETED" else (info.message or "").strip()[:300]
        return JobState(name, reason, alive=name in ALIVE)

    def cancel(self, record: JobRecord) -> None:
        """Asks the job to stop; a training saves first."""
        connect(record.address).stop_job(record.id)

    def requeue(self, record: JobRecord) -> None:
        """Always raises ResourceError: there is no queue."""
        raise records.not_queued(record)

    def logs(self, record: JobRecord) -> Sequence[Path]:
        """Returns the copy of the log beside the run."""
        return [Path(record.log)]

    def node(self) -> NodeEnv | None:
        """Always None: the verb runs as usual and finds the cluster by compute.address=auto."""
        return None

    def on_preemption(self, callback: Callable[[], None] | None) -> bool:
        """Always False: Ray Jobs gives no warning."""
        return False

    def requeue_this_job(self, reason: str) -> None:
        """Always raises ResourceError: there is no queue."""
        raise ResourceError(f"Ray Jobs has no queue ({reason})", key="job")


def entrypoint(job: Job, name: str) -> str:
    """The shell line that runs a job. Output goes to Ray and to the job's log; `tee` survives the stop signal."""
    joins = ["compute.address=auto"] if job.uses_ray else []
    line = shlex.join(["python", "-m", module("jobs.cli"), job.verb, *job.arguments, *joins])
    log = shlex.quote(str(_log(job, name)))
    return shlex.join(["bash", "-c", f"exec > >(trap '' TERM; exec tee -a {log}) 2>&1; exec {line}"])


def check_address(address: str | None) -> str:
    """The address of a job server. Raises ConfigError if it is missing or not a URL."""
    if address is None or not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address (={address}): --where ray needs the job server of a head with a dashboard, http://HOST:8265",
            key="--address",
            subject=address,
        )
    return address


def connect(address: str | None) -> JobSubmissionClient:
    """Ray's client of the job server. Raises ConfigError for a wrong address, ResourceError if no server answers."""
    url = check_address(address)
    try:
        from ray.job_submission import JobSubmissionClient

        with ray_token.mode(os.environ.get(ray_token.MODE) or ("token" if ray_token.has_token() else None)):
            return JobSubmissionClient(url)
    except ImportError as error:
        raise ResourceError(
            f"--where ray needs the extra `cluster` ({error}): {EXTRA}", key="cluster", subject=error.name
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(
            f"--address (={url}): no job server answers ({str(error)[:300]}). It is part of the head's dashboard: its "
            f"site has dashboard: true, and its environment has the extra `cluster` ({EXTRA})",
            key="--address",
            subject=url,
        ) from None


def _log(job: Job, name: str) -> Path:
    return job.folder / f"{name}.log"


def _environment() -> dict[str, object]:
    """Ray's runtime environment: a copy of our packages as they are now."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVES_WITHIN_S), "PYTHONUNBUFFERED": "1"}
    packages = [str(CODE / package) for package in PACKAGES]
    return {"py_modules": packages, "excludes": ["__pycache__"], "env_vars": variables}


SCHEDULERS: Mapping[str, Scheduler] = {RayJobs.name: RayJobs()}
