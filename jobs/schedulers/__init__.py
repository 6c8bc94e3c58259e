"""The interface of what runs jobs (SLURM, Ray Jobs, processes of this machine) to `adaptnet submit` and `jobs`.

A scheduler is a folder of `jobs` with a module `scheduler` that defines `SCHEDULERS`, a mapping from the names that
`--where` takes to objects that satisfy `Scheduler`. A new one is a new folder; no other file names it.
tests/test_scheduler_contract.py holds what each must do.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import jobs
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from jobs.schedulers.records import JobRecord
    from jobs.schedulers.submission import Submission


@dataclass(frozen=True)
class JobState:
    """A job's state under SLURM's name (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, UNKNOWN, ...).

    alive: the job waits or runs. reason: why it waits, failed or is unknown. nodes and elapsed: where and how long it
    has run, as the scheduler writes them; empty if it does not.
    """

    name: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    alive: bool = False


@dataclass(frozen=True)
class NodeShare:
    """What a job has on this node, one of several. key names this start of the job; ip is where other nodes reach it.

    memory_bytes is None if the scheduler does not limit memory.
    """

    key: str
    ip: str
    cpus: int
    gpus: int
    memory_bytes: int | None = None


@dataclass(frozen=True)
class NodeEnv:
    """The job that this process is a task of: task `rank`, one for each of `hosts`.

    job is the id that `submit` returned, restart counts how often the scheduler has started the job again.
    ends_at is the end of its time in seconds since the epoch, None if unknown or unlimited. share is None for a job
    whose verb starts Ray by itself; otherwise the tasks first bring up Ray over all hosts.
    """

    job: str
    rank: int
    hosts: tuple[str, ...]
    restart: int = 0
    ends_at: float | None = None
    share: NodeShare | None = None

    @property
    def time_left_s(self) -> float | None:
        """Seconds until `ends_at`; None if that is unknown."""
        return None if self.ends_at is None else self.ends_at - time.time()


class Scheduler(Protocol):
    """Runs jobs. The first group of methods is called on the user's machine, the second inside a job."""

    name: str
    can_requeue: bool  # whether a job can be put back into the queue, by a user or by itself

    def preview(self, submission: Submission) -> str:
        """The script or command line that `submit` would run, for `--dry-run`.

        Raises ConfigError for an option that this scheduler cannot honour.
        """

    def submit(self, submission: Submission) -> list[JobRecord]:
        """Submits the jobs of `submission` in order; each is recorded by `records.add` as soon as it is accepted.

        Raises ConfigError as `preview` does, ResourceError if the scheduler is absent or refuses.
        """

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobState]:
        """The state of each job by its id, from one query for all jobs."""

    def cancel(self, record: JobRecord) -> None:
        """Ends a job. Raises ResourceError if that is not possible here or the job has ended."""

    def requeue(self, record: JobRecord) -> None:
        """Puts a running job back into the queue. Raises ResourceError if `can_requeue` is False or it is refused."""

    def logs(self, record: JobRecord) -> Sequence[Path]:
        """The files that the job's tasks print to, the first task's last."""

    def node(self) -> NodeEnv | None:
        """The job that this process is a task of; None outside a job of this scheduler."""

    def on_preemption(self, callback: Callable[[], None] | None) -> bool:
        """Has `callback` called in the main thread when the scheduler warns that this job must end soon.

        None ignores warnings. Returns whether this process can be warned. Main thread only.
        """

    def requeue_this_job(self, reason: str) -> None:
        """Puts the job of this process back into the queue; a job that is being cancelled is left alone.

        Raises ResourceError if the scheduler refuses.
        """


def registry() -> dict[str, Scheduler]:
    """All schedulers by the names that `--where` takes."""
    folders = [path.parent.name for root in jobs.__path__ for path in sorted(Path(root).glob("*/scheduler.py"))]
    modules = [importlib.import_module(f"{jobs.__name__}.{folder}.scheduler") for folder in folders]
    return {name: scheduler for module in modules for name, scheduler in module.SCHEDULERS.items()}


def get(name: str) -> Scheduler:
    """The scheduler of that name. Raises ConfigError listing those that exist."""
    known = registry()
    if name not in known:
        raise ConfigError(f"--where (={name}): unknown; choose one of {', '.join(known)}", key="--where", subject=name)
    return known[name]


def states(records: Sequence[JobRecord]) -> list[JobState]:
    """The state of each job, in order. Each scheduler is queried once for all of its jobs."""
    known: Mapping[str, Scheduler] = registry()
    found: dict[tuple[str, str], JobState] = {}
    for name in dict.fromkeys(record.scheduler for record in records):
        mine = [record for record in records if record.scheduler == name]
        answers = known[name].states(mine) if name in known else {}
        found |= {(name, job): state for job, state in answers.items()}
    return [
        found.get((each.scheduler, each.id), JobState("UNKNOWN", f"no scheduler {each.scheduler} here"))
        for each in records
    ]


def state_of(record: JobRecord) -> JobState:
    """The state of one job."""
    return states([record])[0]
