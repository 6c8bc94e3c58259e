"""A scheduler's warning that a job must end soon, passed on to the verb that the job runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.schedulers import Scheduler
    from jobs.schedulers.submission import Job

LATE_AFTER = 0.75  # share of the warning time after which a verb that has not stopped is abandoned
POLL_S = 1.0  # interval between SIGTERMs: the verb may not have installed its handler yet


class Preemption:
    """What the scheduler has announced to this task. Its warning becomes SIGTERM, on which a verb saves and stops.

    SIGTERM is repeated until the verb has written the file `stop`, since it may still be starting. If the verb does not
    stop in time, as in a long evaluation, `late` is called with the reason and this object, in a thread.

    warned: the scheduler's warning has come. terminated: SIGTERM has come before the verb installed its own handler.
    over: the verb has ended; set by the caller.
    """

    def __init__(self, job: Job, scheduler: Scheduler, late: Callable[[str, Preemption], object]) -> None:
        self.warned = self.terminated = self.over = False
        self._job, self._late = job, late
        if scheduler.on_preemption(self._warn):
            signal.signal(signal.SIGTERM, self._terminate)
            threading.Thread(target=self._pass_on, name="warning", daemon=True).start()

    def _warn(self) -> None:
        self.warned = True

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True

    def _pass_on(self) -> None:
        while not self.warned:
            time.sleep(POLL_S / 5)
        if self._job.run_dir is None:
            print("warning from the scheduler: this job nears its end", flush=True)
            return
        print("warning from the scheduler: saving, then the job is requeued", flush=True)
        limit_s = LATE_AFTER * self._job.saves_within_s
        deadline = time.monotonic() + limit_s
        while not self.over and time.monotonic() < deadline:
            if not self._job.stopping:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(POLL_S)
        if not self.over:  # the verb does not react
            self._late(f"not stopped {limit_s:g} s after the scheduler's warning", self)
