"""The driver's watch: says when the run makes no progress, and ends a start that does not.

Progress is judged, not speed. A run hangs if no rank gives a sign of progress within the limit of its phase, if a
process is stopped, or if a guardian falls silent. The watch reports it, writes hang-<n>.txt and the journal, and with
`compute.on_hang: restart` has the guardians kill the ranks, which Ray Train then starts again. It needs neither Ray nor
the run folder for that: guardians speak over TCP, and a thread of its own writes files.

A phase without regular signs, such as reading an index or compiling, has a longer limit. It is reported as early as a
step is: as a hang if its processes only wait, as for a mount that does not answer, else in one line. The ranks are
ended at the longer limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pipeline.errors import AdaptNetError, ResourceError
from pipeline.execution import hang_report
from pipeline.execution.folder_thread import FolderThread
from pipeline.execution.guardian import STATES
from pipeline.execution.guardians import Guardians
from pipeline.execution.hang_report import Sight, clock
from pipeline.execution.ray_processes import STARTS_STOPPED_S, RayState
from pipeline.execution.sockets import HERE
from pipeline.execution.watched import WatchAddress
from pipeline.run_config import ComputeConfig
from pipeline.runs.journal import Journal
from pipeline.runs.progress import RunProgress

POLL_S = 0.25
STACKS_WITHIN_S = 5.0
STOPS_WITHIN_S = 10.0  # after a request to stop, a longer step hangs unless five median ones are longer still
SAYS_WITHIN_S = 3.0  # a run that has not stopped by then says what it waits for
ENDS_WITHIN_S = 5.0  # how long the other ranks of a failed start may run on
LEFT = "the run is left as it is"
Notify = Callable[[str], None]


class RunWatch:
    """Listens from `with` to its end.

    error is set when the run must be given up although Ray has not ended it; reason: why the newest start failed.
    ray_lost: whether the run was given up because a process of Ray's own has died.
    """

    def __init__(self, run_dir: Path, compute: ComputeConfig, notify: Notify | None = None) -> None:
        self.error: AdaptNetError | None = None
        self.reason: str | None = None
        self.ray_lost = False
        self._run_dir, self._compute, self._notify = run_dir, compute, notify or (lambda text: None)
        self._guardians = Guardians(self._failed, other_machines=compute.address is not None)
        self._ray: RayState | None = None
        self._ray_reported: str | None = None
        self._folder = FolderThread(run_dir)
        self._stop_at: float | None = None  # when a request to stop was seen
        self._stop_reported = False
        self._hang: str | None = None  # the reported hang that is not over
        self._hanging: list[Sight] = []  # the processes that hang, where nothing was ended
        self._slow_reported = False  # whether this long phase was already reported as one that computes
        self._killed_for: str | None = None  # the hang for which the ranks of this start were killed
        self._ending = False  # whether the ranks of this start were killed
        self._end: str | None = None  # why there is no other start
        self._failures = self._hangs = 0
        self._looked = time.monotonic()
        self._rank_heard = False  # whether a rank of this start was heard of
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def address(self, host: str = HERE) -> WatchAddress:
        """Where the guardians connect; host: this machine as the nodes of the cluster know it."""
        return self._guardians.address(host)

    def journal(self, journal: Journal) -> AbstractContextManager[None]:
        """Writes the watch's events to `journal` in the block."""
        return self._folder.journal(journal)

    @contextmanager
    def over_ray(self, ray: RayState) -> Iterator[None]:
        """Watches Ray's own processes in the block."""
        self._ray = ray
        try:
            yield
        finally:
            self._ray = None

    @property
    def end(self) -> AdaptNetError | None:
        """What the run ends with, if the watch has ended it."""
        return ResourceError(self._end, key="compute.on_hang", subject=self._run_dir) if self._end else None

    @property
    def stops_unstarted(self) -> bool:
        """Whether the run was asked to stop before a rank of this start was heard of."""
        return self._stop_at is not None and not self._rank_heard

    def __enter__(self) -> RunWatch:
        self._folder.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._folder.stop()
        self._guardians.close()

    def _run(self) -> None:
        self._looked = time.monotonic()
        while not self._over.is_set():
            self._guardians.receive(POLL_S)
            if time.monotonic() - self._looked > 5 * POLL_S + 1:  # this process was stopped, or had no turn
                self._guardians.forgive()
                self._folder.forgive()
            self._looked = time.monotonic()
            self._guardians.kill_retired()
            self._look(self._looked)

    def _look(self, now: float) -> None:
        if self._stop_at is None and self._folder.stop_requested:
            self._stop_at = now
        self._rank_heard = self._rank_heard or bool(self._ranks())
        ray = self._frozen_ray()
        ends = ray is not None and (self._ray_died() or not self._progresses(now))
        if not ends:
            self._say_that_ray_is_frozen(ray)
        cause = ray if ends else self._frozen_rank(now)
        cause, helps = (cause, True) if cause is not None else (self._frozen_driver(now), False)
        until = LEFT
        if cause is None and (waiting := self._waiting(now)) is not None:
            cause, until = waiting
        if cause is None and self._hang is not None:
            if any(sight in self._guardians.sights() and _moves(sight, now) for sight in self._hanging):
                self._folder.event("progress-again")
            self._hang = None
        end = helps and self._ends_start() and not self._ending
        if cause is not None and (self._hang is None or end):
            self._hang, self._hanging = cause, [] if end else self._ranks() or self._guardians.sights()
            self._act(cause, end=end, until=until)
        self._folder.progress = self._progress(now)
        self._say_what_a_stop_waits_for(now)

    # --- judging

    def _ranks(self) -> list[Sight]:
        """The processes that train: the driver itself where there are no workers."""
        return [sight for sight in self._guardians.sights() if sight.rank is not None or self._compute.workers == 0]

    def _frozen_ray(self) -> str | None:
        ray, limit_s = self._ray, self._compute.hang_after_s
        if ray is None:
            return None
        ray.hang_after_s = limit_s if self._rank_heard else min(limit_s, STARTS_STOPPED_S)
        return ray.frozen()

    def _ray_died(self) -> bool:
        ray = self._ray
        return ray is not None and ray.died

    def _frozen_rank(self, now: float) -> str | None:
        """Which rank hangs, and since when; None if none does."""
        ranks, hang_after_s = self._ranks(), self._compute.hang_after_s
        for sight in ranks:
            if sight.stopped_for(now) >= hang_after_s:
                return (
                    f"{sight.name} is {STATES[sight.state]} (state {sight.state}) since {clock(sight.stopped_for(now))}"
                )
            if now - sight.heard >= max(hang_after_s, STOPS_WITHIN_S):
                return f"nothing was heard of {sight.name} since {clock(now - sight.heard)}; is its node lost?"
        if ranks and all(sight.age(now) >= self._limit(sight) for sight in ranks):
            return _stands_still(max(ranks, key=lambda sight: sight.age(now)), now)
        return None

    def _progresses(self, now: float) -> bool:
        """Whether a rank has lately given a sign of progress; ranks need Ray only to start, to report and to end."""
        return any(sight.age(now) < self._compute.hang_after_s for sight in self._ranks())

    def _frozen_driver(self, now: float) -> str | None:
        late = (each for each in self._guardians.sights() if each.rank is None and each.age(now) >= each.limit_s)
        return next((_stands_still(each, now) for each in late), None)

    def _waiting(self, now: float) -> tuple[str, str] | None:
        """A process that has waited in a long phase for longer than a step may take: a sentence, and what happens next.

        Reports a long phase in which a process computes, which is no hang.
        """
        ranks = self._ranks()
        slow = False
        for sights in (ranks, [sight for sight in self._guardians.sights() if sight.rank is None]):
            late = bool(sights) and not self._guardians.deaths() and not any(_moves(sight, now) for sight in sights)
            in_long_phase = [sight for sight in sights if sight.patience > 1]
            if late and in_long_phase:
                sight = max(in_long_phase, key=lambda each: each.age(now))
                busy = next((each for each in sights if each.busy), None)
                if busy is None or self._hang is not None:  # a reported hang stays one until a sign of progress
                    return _stands_still(sight, now, "only waits"), self._until(sights, now)
                slow = True
                self._say_that_it_computes(busy, sights, now)
        self._slow_reported = slow
        silent_s = self._folder.silent_s()
        if not ranks and silent_s >= self._compute.hang_after_s:
            return f"the run folder {self._run_dir} has not answered since {clock(silent_s)}", LEFT
        return None

    def _say_that_it_computes(self, busy: Sight, sights: Sequence[Sight], now: float) -> None:
        """One line, and where each thread stands in a file: it may compile, or wait without sleeping."""
        if self._slow_reported:
            return
        self._slow_reported = True
        self._ask_for_stacks(STACKS_WITHIN_S)
        name = f"slow-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        reason = f"{busy.name}: {busy.phase} since {busy.since(now)}, with threads that run"
        text = f"{reason}\n\n{self._text(reason)}\n\n{hang_report.all_lines(self._guardians.sights())}\n"
        self._notify(f"{reason}; {self._until(sights, now)}. Where each thread stands: {self._run_dir / name}")
        self._folder.report(name, text)
        self._folder.event("slow", reason=reason, report=name)

    def _until(self, sights: Sequence[Sight], now: float) -> str:
        """What happens to these processes unless there is a sign of progress, and when."""
        if not self._ends_start() or any(sight.rank is None for sight in sights):
            return LEFT
        until = clock(min(sight.age(now) - self._limit(sight) for sight in sights))  # a time to come
        return f"unless there is progress until {until}, {self._next_step()}"

    def _limit(self, sight: Sight) -> float:
        """Seconds that a rank may be without a sign; fewer once the run was asked to stop."""
        if self._stop_at is None:
            return sight.limit_s
        return min(sight.limit_s, max(STOPS_WITHIN_S, 5 * sight.step_s) * sight.patience)

    # --- acting

    def _ask_for_stacks(self, within_s: float) -> None:
        self._guardians.ask_for_stacks(within_s)
        self._looked = time.monotonic()  # it has listened meanwhile

    def _act(self, cause: str, *, end: bool, until: str) -> None:
        """Reports the hang and writes it to the run folder and the journal; ends this start if `end`.

        until: what is said of a hang that ends nothing now.
        """
        self._ask_for_stacks(1.0 if self._ray_died() else STACKS_WITHIN_S)
        self._hangs += 1
        name = f"hang-{self._hangs}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        text = self._text(cause)
        self._notify(f"{text}\n\nwritten to {self._run_dir / name}; {self._next_step() if end else until}")
        everything = hang_report.all_lines(self._guardians.sights())
        self._folder.report(name, f"{text}\n\n{everything}\n")
        self._folder.event("hang", reason=cause, report=name)
        if end:
            self._end_start(cause)

    def _ends_start(self) -> bool:
        return self._compute.workers != 0 and (self._compute.on_hang != "report" or self._stop_at is not None)

    def _next_step(self) -> str:
        if self._compute.on_hang == "stop" or self._stop_at is not None or self._frozen_ray():
            return "the run ends; the same command resumes it from its newest checkpoint"
        return "the ranks are ended, and start again from the newest checkpoint"

    def _end_start(self, cause: str) -> None:
        resume = f"Nothing was saved since the newest checkpoint, from which the same command resumes {self._run_dir}"
        self._ending, self._killed_for = True, f"hang: {cause}"
        if self._stop_at is not None:
            self._end = f"{self._run_dir}: the run was asked to stop, and makes no progress: {cause}. {resume}"
        elif self._compute.on_hang == "stop":
            self._end = f"{self._run_dir}: {cause} (compute.on_hang is stop). {resume}"
        self._guardians.kill_ranks()
        if self._frozen_ray():
            self._end = self._end or f"{self._run_dir}: {cause}. {resume}"
            self.ray_lost = self._ray_died()
            self.error = ResourceError(self._end, key="compute.address", subject=self._run_dir)

    def _text(self, cause: str) -> str:
        remarks = []
        if self._folder.silent_s() > min(STOPS_WITHIN_S, self._compute.hang_after_s / 2):
            remarks.append(f"the run folder {self._run_dir} has not answered since {clock(self._folder.silent_s())}")
        concerned = self._ranks() or self._guardians.sights()
        return hang_report.text(cause, concerned, self._folder.last_event, remarks)

    def _say_that_ray_is_frozen(self, ray: str | None) -> None:
        if ray is not None and ray != self._ray_reported:
            self._notify(f"{ray}: the run ends as soon as its ranks need Ray")
            self._folder.event("ray-frozen", reason=ray)
        self._ray_reported = ray

    def _say_what_a_stop_waits_for(self, now: float) -> None:
        if self._stop_at is None or self._stop_reported or now - self._stop_at < SAYS_WITHIN_S:
            return
        self._stop_reported = True
        ranks = self._ranks()
        what = "; ".join(f"{each.name}: {each.phase} since {each.since(now)}" for each in ranks[:8])
        none = "the workers' processes to end" if self._rank_heard else "the workers, which have not started"
        self._notify(f"the run was asked to stop, and waits for: {what or none}")

    # --- failures of a start

    def _failed(self, failures: Sequence[str]) -> str | None:
        """Notes why a start failed: a hang, else how its processes died, else what Ray Train says."""
        self._failures += 1
        deaths = self._guardians.deaths()
        self.reason = self._killed_for or "; ".join(deaths or dict.fromkeys(failures))
        kind = "restart" if self._failures <= self._compute.max_failures and self._end is None else "failed"
        of = f"{self._failures} of {self._compute.max_failures} (compute.max_failures)"
        self._folder.event(kind, reason=self.reason, failure=of)
        self._guardians.retire(ENDS_WITHIN_S)
        self._slow_reported = False
        self._ending, self._killed_for, self._rank_heard = False, None, self._rank_heard and kind == "failed"
        return self._end

    def _progress(self, now: float) -> RunProgress:
        ranks = self._ranks() or self._guardians.sights()
        wall = time.time()
        if not ranks:
            return RunProgress(phase="starting", moved=wall, written=wall, hang=self._hang)
        last = max(ranks, key=lambda sight: sight.age(now))
        step = max(sight.step for sight in ranks)
        return RunProgress(step=step, phase=last.phase, moved=wall - last.age(now), written=wall, hang=self._hang)


def _stands_still(sight: Sight, now: float, how: str = "stands still") -> str:
    return f"{sight.name} {how} since {sight.since(now)} in {sight.phase}, step {sight.step}"


def _moves(sight: Sight, now: float) -> bool:
    """Whether there was a sign of progress within the limit of a step."""
    return sight.age(now) < sight.short_limit_s
