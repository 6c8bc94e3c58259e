"""Jobs on SLURM, submitted by submitit: one task per node.

submitit's own signal handler would requeue at once, count each preemption of a short job as a time-out, and interrupt
Ray's main thread in the middle of a step; `on_preemption` replaces it.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.schedulers import JobState, NodeEnv, Scheduler, records
from jobs.schedulers.attempts import Attempts
from jobs.schedulers.records import JobRecord, record_of
from jobs.schedulers.submission import Submission, refuse_options
from jobs.slurm import queue
from jobs.slurm.ask import REACH, ask
from jobs.slurm.commands import check_slurm, query, run_slurm, why_silent
from jobs.slurm.node import in_slurm, job_id, node_env
from jobs.slurm.script import parameters, python, requeue_mark, script
from pipeline.errors import ResourceError

TIMEOUT_S = 10.0  # how long to wait for SLURM's answer in a job whose time is running out


class Slurm(Scheduler):
    """SLURM's queue. States are SLURM's own; once SLURM no longer knows a job, the job's files are read instead."""

    name = "slurm"
    can_requeue = True

    def preview(self, submission: Submission) -> str:
        """Returns the batch script. Refuses --address, which SLURM does not have."""
        refuse_options(submission, "address")
        return script(submission)

    def submit(self, submission: Submission) -> list[JobRecord]:
        """Submits the jobs with sbatch; several jobs become an array."""
        text = self.preview(submission)
        check_slurm()
        submission.prepare()
        made = []
        for job, (number, log) in zip(submission.jobs, _sbatch(submission), strict=True):
            made.append(record_of(submission, job, id=number, log=log, script=text))
            records.add(made[-1])
        return made

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobState]:
        """Reads squeue, then sacct, then the jobs' files."""
        known = queue.states_of([record.id for record in records])
        return {record.id: self._state(record, known.get(record.id)) for record in records}

    def _state(self, record: JobRecord, known: JobState | None) -> JobState:
        """The job's state; `known` is None if SLURM no longer knows the job."""
        state = known or records.state_from_files(record, self.logs(record)) or _forgotten(record, self.logs(record))
        if state.name == "COMPLETED" and record.run_dir is not None and not record.finished:
            return replace(state, reason="it was stopped; `adaptnet jobs resubmit` resumes it")
        return state

    def cancel(self, record: JobRecord) -> None:
        """Ends a job at once."""
        run_slurm("scancel", record.id)

    def requeue(self, record: JobRecord) -> None:
        """SLURM ends the job's tasks and starts its script again, in the same job."""
        run_slurm("scontrol", "requeue", record.id)

    def logs(self, record: JobRecord) -> Sequence[Path]:
        """Returns one file for each node."""
        from pipeline.compat.submitit import task_logs

        first = Path(record.log)
        return [*(path for path in task_logs(record.folder, record.id) if path != first), first]

    def node(self) -> NodeEnv | None:
        """Reads SLURM's environment variables."""
        return node_env()

    def on_preemption(self, callback: Callable[[], None] | None) -> bool:
        """SLURM warns by USR2, `signal_delay_s` before the job's end."""
        if not in_slurm():
            return False
        handler = (lambda number, frame: callback()) if callback else signal.SIG_IGN
        signal.signal(signal.SIGUSR2, handler)
        return True

    def requeue_this_job(self, reason: str) -> None:
        """SLURM then ends the job's tasks. In a container, which has no SLURM, the batch script requeues the job."""
        job = job_id(os.environ)
        if _is_ending(job):
            print(f"job {job} is not requeued: SLURM is already ending it", flush=True)
            return
        print(f"requeueing job {job}: {reason}", flush=True)
        if shutil.which("scontrol") is None:
            requeue_mark(Path(os.environ["SUBMITIT_FOLDER"]), os.environ["SLURM_JOB_ID"]).touch()
        else:
            run_slurm("scontrol", "requeue", job)


def _sbatch(submission: Submission) -> list[tuple[str, Path]]:
    """Queues the jobs; their ids and logs. Raises ResourceError with SLURM's message if it refuses."""
    from submitit.helpers import clean_env

    from jobs.schedulers.task import SubmittedTask
    from pipeline.compat.submitit import SlurmExecutor, UnknownAnswer, submit_all

    reach = {key: os.environ[key] for key in REACH if key in os.environ}
    with clean_env():
        os.environ.update(reach)  # submitit hides these with the other variables, but sbatch needs them
        try:
            executor = SlurmExecutor(submission.folder, max_num_timeout=10**6, python=python(submission))
            executor.update_parameters(**parameters(submission))
            return [
                (each.id, each.log) for each in submit_all(executor, [SubmittedTask(job) for job in submission.jobs])
            ]
        except UnknownAnswer as error:
            raise _without_id(submission, str(error)) from None
        except Exception as error:  # sbatch's failure, and what submitit makes of its output
            raise refused(error) from None


def _without_id(submission: Submission, answer: str) -> ResourceError:
    """The error for a job that may be queued: sbatch succeeded, but its answer names no job."""
    return ResourceError(
        f"sbatch answered {answer!r}, which does not name a job (Submitted batch job NUMBER, or the number alone). The "
        f"job may be in the queue: look for {submission.name} in `squeue --me`, and end it with `scancel --me --name="
        f"{submission.name}` before you submit it again",
        key="sbatch",
        subject=answer,
    )


def refused(error: Exception) -> ResourceError:
    """SLURM's message, and what the site offers instead of what was requested."""
    message = " ".join(str(error).replace("subprocess-exited-with-error", "").split())[-600:]
    return ResourceError(f"SLURM refused the job: {message}{_offer(message.lower())}", key="sbatch", subject=message)


def _offer(message: str) -> str:
    """What SLURM has of the kind of thing that its message, in lower case, is about."""
    if "account" in message:  # before "partition": SLURM's message about accounts names the partition as well
        user = f"user={getpass.getuser()}"
        return f". Your accounts: {_listed('sacctmgr', '-nP', 'show', 'assoc', 'where', user, 'format=account')}"
    if "partition" in message:
        return f". Known partitions: {_listed('sinfo', '-h', '-o', '%R')}"
    if "qos" in message:
        return f". Known QOS: {_listed('sacctmgr', '-nP', 'show', 'qos', 'format=name')}"
    if "time limit" in message or "node count" in message:
        return f". The partitions allow: {_listed('sinfo', '-h', '-o', '%R: %l on %D nodes')}"
    if "configuration is not available" in message:
        return f". The nodes have: {_listed('sinfo', '-h', '-o', '%N: %c CPUs, %m MB, %G')}"
    if "munge" in message or "authentication" in message:
        return ". Is munged running on this machine?"
    return ""


def _listed(*command: str) -> str:
    return ", ".join(dict.fromkeys(query(*command, timeout_s=30))) or "unknown"


def _forgotten(record: JobRecord, logs: Sequence[Path]) -> JobState:
    """The state of a job that SLURM does not know and that left no result."""
    attempts = [attempt for attempt in Attempts(Path(record.home)).read() if attempt.job == record.id]
    why = why_silent() or "SLURM no longer knows it"
    if attempts and attempts[-1].last_step is not None:
        return JobState("UNKNOWN", f"{why}; it had started, and ended at step {attempts[-1].last_step}")
    if attempts:
        return JobState("UNKNOWN", f"{why}; it had started, and left nothing of its end")
    printed = any(path.is_file() and path.stat().st_size for path in logs)
    return JobState("UNKNOWN", f"{why}; {'its script had started' if printed else 'it had not started'}")


def _is_ending(job: str) -> bool:
    """Whether SLURM is ending the job, by itself or for a user: `scontrol requeue` would undo a cancellation."""
    try:
        done = ask("squeue", "-h", "-j", job, "-o", "%T", timeout_s=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):  # no SLURM in a container, or SLURM is too busy to answer
        return False
    return done.stdout.strip() == "COMPLETING"


SCHEDULERS: Mapping[str, Scheduler] = {Slurm.name: Slurm()}
