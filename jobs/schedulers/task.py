"""What submitit keeps on disk and calls on each node: a job, run there as a `NodeTask`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs import schedulers
from jobs.schedulers.node import NodeTask
from jobs.schedulers.submission import Job

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


@dataclass(frozen=True)
class SubmittedTask:
    """A callable that runs a job's part on the node that calls it."""

    job: Job

    def __call__(self) -> str:
        """Runs the part of the node that this process is on; see `NodeTask.run`."""
        return NodeTask(self.job, schedulers.get(self.job.scheduler)).run()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs next if a warning comes before `__call__` has begun: the same task again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
