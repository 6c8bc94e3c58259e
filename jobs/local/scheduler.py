"""Jobs on this machine: `--where local` starts a process, `--where debug` runs the job within `adaptnet submit`."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from jobs.schedulers import JobState, NodeEnv, Scheduler, records
from jobs.schedulers.records import JobRecord, record_of
from jobs.schedulers.submission import Submission, refuse_options
from pipeline.errors import ResourceError

CLOCKS_S = 30.0  # tolerance when start times of processes are compared


class LocalProcess(Scheduler):
    """Runs each job as a process on this machine, started by submitit."""

    name = "local"
    can_requeue = False

    def preview(self, submission: Submission) -> str:
        """Returns the command line. Jobs on this machine do not wait for each other."""
        refuse_options(submission, "after", "dependency", "address", "throttle")
        return "\n".join(shlex.join(["adaptnet", job.verb, *job.arguments]) for job in submission.jobs)

    def submit(self, submission: Submission) -> list[JobRecord]:
        """Starts a process for each job, with a snapshot of the code. The process outlives this one."""
        import submitit
        from submitit.helpers import clean_env

        from jobs.schedulers.task import SubmittedTask
        from pipeline.compat.submitit import submit_all

        script = self.preview(submission)
        submission.prepare()
        executor = submitit.LocalExecutor(submission.folder, python=f"{shlex.quote(sys.executable)} -P")
        executor.update_parameters(timeout_min=submission.resources.minutes)
        made = []
        for job in submission.jobs:
            with clean_env(), _code_from(submission.snapshot):
                (started,) = submit_all(executor, [SubmittedTask(job)])
            made.append(record_of(submission, job, id=started.id, log=started.log, script=script))
            records.add(made[-1])
        return made

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobState]:
        """Reads the jobs' results and processes; a job of another machine is UNKNOWN."""
        return {record.id: self._state(record) for record in records}

    def _state(self, record: JobRecord) -> JobState:
        from pipeline.compat.submitit import result_file

        if result_file(record.folder, record.id).is_file():
            return JobState("COMPLETED" if record.run_dir is None or record.finished else "FAILED")
        if record.host != socket.gethostname():
            return JobState("UNKNOWN", f"it was started on {record.host}; run `adaptnet jobs` there")
        return JobState("RUNNING", alive=True) if _is_running(record) else self._ended(record)

    def _ended(self, record: JobRecord) -> JobState:
        return JobState("FAILED", "its process has ended without a result")

    def cancel(self, record: JobRecord) -> None:
        """Sends SIGTERM, on which a training saves before it ends."""
        state = self._state(record)
        if not state.alive:
            reason = f" ({state.reason})" if state.reason else ""
            raise ResourceError(
                f"job {record.id} is {state.name.lower()}{reason}; no process of it can be ended here",
                key="job",
                subject=record.id,
            )
        os.kill(_process_id(record), signal.SIGTERM)

    def requeue(self, record: JobRecord) -> None:
        """Always raises ResourceError: there is no queue."""
        raise records.not_queued(record)

    def logs(self, record: JobRecord) -> Sequence[Path]:
        """Returns the only log of the process."""
        return [Path(record.log)]

    def node(self) -> NodeEnv | None:
        """Describes one host, on which the verb starts Ray by itself."""
        job = os.environ.get("SUBMITIT_LOCAL_JOB_ID")
        return None if job is None else NodeEnv(job, 0, (socket.gethostname(),))

    def on_preemption(self, callback: Callable[[], None] | None) -> bool:
        """Installs nothing: submitit's own handlers end the job when its time is over."""
        return False

    def requeue_this_job(self, reason: str) -> None:
        """Always raises ResourceError: there is no queue."""
        raise ResourceError(f"a job on this machine cannot be requeued ({reason})", key="job")


class ThisProcess(LocalProcess):
    """Runs each job within `submit`, so that its output appears on the user's terminal."""

    name = "debug"

    def submit(self, submission: Submission) -> list[JobRecord]:
        """Records all jobs, then runs them one after another."""
        import submitit
        from submitit.helpers import clean_env

        from jobs.schedulers.task import SubmittedTask
        from pipeline.compat.submitit import submit_all

        script = self.preview(submission)
        submission.prepare()
        executor = submitit.DebugExecutor(submission.folder)
        with clean_env():
            started = [submit_all(executor, [SubmittedTask(job)])[0] for job in submission.jobs]
        made = []
        for job, one in zip(submission.jobs, started, strict=True):
            made.append(record_of(submission, job, id=one.id, log=one.log, pid=os.getpid(), script=script))
            records.add(made[-1])
        for one in started:
            one.result()
        return made

    def _ended(self, record: JobRecord) -> JobState:
        if record.finished:
            return JobState("COMPLETED")
        return JobState("UNKNOWN", "it ran in the process that submitted it, which printed its outcome")

    def node(self) -> NodeEnv | None:
        """The same as for a job in its own process."""
        job = os.environ.get("SUBMITIT_DEBUG_JOB_ID")
        return None if job is None else NodeEnv(job, 0, (socket.gethostname(),))


@contextmanager
def _code_from(folder: Path) -> Iterator[None]:
    """Makes processes that are started inside the block import our code from `folder`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _process_id(record: JobRecord) -> int:
    return record.pid if record.pid is not None else int(record.id)


def _is_running(record: JobRecord) -> bool:
    """Whether the job's process still runs. A process that started later merely reuses its id."""
    try:
        process = psutil.Process(_process_id(record))
        began = process.create_time()
        return process.status() != psutil.STATUS_ZOMBIE and began <= record.submitted_at + CLOCKS_S
    except (ValueError, psutil.Error):
        return False


SCHEDULERS: Mapping[str, Scheduler] = {each.name: each for each in (LocalProcess(), ThisProcess())}
