"""A third party's scheduler: this folder, copied into `jobs`, and no other file."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.schedulers import JobState, NodeEnv, records
from jobs.schedulers.records import JobRecord, record_of
from jobs.schedulers.submission import Submission, refuse_options

STATES = {"PEND": "PENDING", "RUN": "RUNNING", "DONE": "COMPLETED", "EXIT": "FAILED"}


class Lsf:
    """IBM's LSF, by its commands."""

    name = "lsf"
    can_requeue = True

    def preview(self, submission: Submission) -> str:
        refuse_options(submission, "address", "after")
        return "\n".join(shlex.join(["adaptnet", job.verb, *job.arguments]) for job in submission.jobs)

    def submit(self, submission: Submission) -> list[JobRecord]:
        lines = self.preview(submission).splitlines()
        made = []
        for job, line in zip(submission.jobs, lines, strict=True):
            number = re.findall(r"<(\d+)>", _run("bsub", line))[0]
            made.append(record_of(submission, job, id=number, log=job.folder / f"{number}.log", script=line))
            records.add(made[-1])
        return made

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobState]:
        lines = _run("bjobs", *(record.id for record in records)).splitlines()
        words = {job: STATES[state] for job, state in map(str.split, lines)}
        return {job: JobState(word, alive=word in ("PENDING", "RUNNING")) for job, word in words.items()}

    def cancel(self, record: JobRecord) -> None:
        _run("bkill", record.id)

    def requeue(self, record: JobRecord) -> None:
        _run("brequeue", record.id)

    def logs(self, record: JobRecord) -> Sequence[Path]:
        return [Path(record.log)]

    def node(self) -> NodeEnv | None:
        job = os.environ.get("LSB_JOBID")
        if job is None:
            return None
        hosts = tuple(os.environ["LSB_HOSTS"].split())
        return NodeEnv(job, int(os.environ["LSF_PM_TASKID"]) - 1, hosts)

    def on_preemption(self, callback: Callable[[], None] | None) -> bool:
        if self.node() is None:
            return False
        signal.signal(signal.SIGUSR2, (lambda number, frame: callback()) if callback else signal.SIG_IGN)
        return True

    def requeue_this_job(self, reason: str) -> None:
        _run("brequeue", os.environ["LSB_JOBID"])


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


SCHEDULERS = {Lsf.name: Lsf()}
