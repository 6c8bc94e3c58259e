"""The report of a hang: when each rank last made progress, and the Python lines of its threads."""

from __future__ import annotations

import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import JsonValue
from pipeline.execution.guardian import STATES, STOPPED
from pipeline.installation import CODE

THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
MOST_FRAMES = 40
BELOW = "in work"  # what is below is Ray's
STDLIB = sysconfig.get_paths()["stdlib"]


@dataclass
class Sight:
    """What a guardian has reported of its process; rank None is the driver. heard: on the driver's monotonic clock.

    thread: the identity of the thread that trains. age_s: seconds without a sign of progress when it was `heard`.
    limit_s: how long this phase may be without one, `patience` times as long as a step may be. busy: whether it
    computes, as it does while it compiles.
    stacks: the text of faulthandler. ended: how the process died.
    """

    rank: int | None
    node: str
    pid: int
    thread: int
    heard: float
    step: int = 0
    phase: str = "starting"
    age_s: float = 0.0
    limit_s: float = float("inf")
    patience: float = 1.0
    step_s: float = 0.0
    busy: bool = False
    state: str = "S"
    stopped_s: float = 0.0
    stacks: str | None = None
    threads: Sequence[Mapping[str, str]] = field(default_factory=tuple)
    ended: str | None = None

    def note(self, message: Mapping[str, object]) -> None:
        """Takes what the guardian has sent: any of the fields."""
        self.heard = time.monotonic()
        for key, value in message.items():
            setattr(self, key, value)

    def stopped_for(self, now: float) -> float:
        """Seconds that the process has been stopped; 0 if it is not."""
        return self.stopped_s + now - self.heard if self.state in STOPPED else 0.0

    @property
    def name(self) -> str:
        """E.g. "rank 1 on node7"."""
        return f"{'the driver' if self.rank is None else f'rank {self.rank}'} on {self.node}"

    def age(self, now: float) -> float:
        """Seconds without a sign of progress."""
        return self.age_s + now - self.heard

    def since(self, now: float) -> str:
        return clock(self.age(now))

    @property
    def short_limit_s(self) -> float:
        """How long a step may be without a sign; infinite in a phase that something else bounds."""
        return self.limit_s / self.patience if self.limit_s < float("inf") else self.limit_s


def clock(ago_s: float) -> str:
    """The time of day `ago_s` seconds ago: 12:03:10."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() - ago_s))


def text(
    cause: str, sights: Iterable[Sight], last_event: Mapping[str, JsonValue] | None, remarks: Sequence[str]
) -> str:
    """The whole report, one fact a line."""
    now = time.monotonic()
    lines = [f"no progress: {cause}", f"last journal event: {event_text(last_event)}", *remarks]
    for sight in sights:
        lines += ["", *_of_process(sight, now)]
    return "\n".join(lines)


def event_text(event: Mapping[str, JsonValue] | None) -> str:
    """An event of the journal in words, with its time."""
    if event is None:
        return "none since this driver started"
    at = f" at step {event['step']}" if event.get("step") is not None else ""
    when = event.get("time")
    moment = time.strftime("%H:%M:%S ", time.localtime(when)) if isinstance(when, int | float) else ""
    return f"{moment}{event['event']}{at}"


def _of_process(sight: Sight, now: float) -> Iterator[str]:
    step = "" if sight.rank is None and not sight.step else f"step {sight.step}, "
    yield (
        f"{sight.name} (process {sight.pid}): {step}{sight.phase}; no sign of progress since {sight.since(now)} "
        f"({sight.age(now):.0f} s)"
    )
    if sight.ended is not None:
        yield f"  it has died: {sight.ended}"
    elif sight.state in STOPPED:
        yield f"  {STATES[sight.state]} (state {sight.state}) since {clock(sight.stopped_for(now))};"
        yield f"  its Python lines are unknown while it is stopped; `kill -CONT {sight.pid}` on {sight.node} resumes it"
    else:
        yield f"  state {sight.state} ({STATES.get(sight.state, 'unknown')}){_waits(sight)}"
    if sight.stacks:
        yield from _threads(sight)
    elif sight.state not in STOPPED and sight.ended is None:
        yield "  it has not said its Python lines within three seconds"


def fatal_line(stacks: str) -> str:
    """The line at which a fatal signal such as SIGSEGV found the process: ", at File ..."; empty if it was none."""
    fatal = stacks.partition("Fatal Python error")[2].partition("Current thread")[2]
    return next((f", at {_short(line.strip())}" for line in fatal.splitlines() if line.startswith("  File ")), "")


def _waits(sight: Sight) -> str:
    waits = [each for each in sight.threads if each["tid"] == str(sight.pid) and each["waits"] not in ("", "0")]
    return f", its main thread waits in the kernel's {waits[0]['waits']}" if waits else ""


def _threads(sight: Sight) -> Iterator[str]:
    """The thread that trains with all its frames; of each other one the newest outside Python's own library."""
    others: Counter[str] = Counter()
    for ident, frames in _blocks(sight.stacks or ""):
        if ident == sight.thread:
            yield "  the thread that trains:"
            yield from (f"    {frame}" for frame in frames[:MOST_FRAMES])
        else:
            others[next((frame for frame in frames if not _of_python(frame)), "idle")] += 1
    if others:
        yield "  the other threads:"
        yield from (f"    {number} x {frame}" for frame, number in others.most_common())


def all_lines(sights: Iterable[Sight]) -> str:
    """Every frame of every thread, and each thread's name and state in the kernel."""
    parts = []
    for sight in sights:
        kernel = [f"{each['tid']} {each['name']}: {each['state']} {each['waits']}" for each in sight.threads]
        parts.append("\n".join([f"---- {sight.name} (process {sight.pid})", sight.stacks or "", *kernel]))
    return "\n\n".join(parts)


def _blocks(stacks: str) -> Iterator[tuple[int, list[str]]]:
    """(identity of a thread, its frames with the newest first, without those below ours)."""
    ident, frames = 0, list[str]()
    for line in [*stacks.splitlines(), "Thread 0x0"]:
        head = THREAD.match(line)
        if head and frames:
            yield ident, frames
        if head:
            ident, frames = int(head[1], 16), []
        elif line.startswith("  File ") and not any(frame.endswith(BELOW) for frame in frames):
            frames.append(_short(line.strip()))


def _of_python(frame: str) -> bool:
    return f'File "{STDLIB}/' in frame


def _short(frame: str) -> str:
    """A frame without the folder of the installed packages, of Python's own, or of ours."""
    for folder in (*(path for path in sys.path if path.endswith("-packages")), str(CODE)):
        frame = frame.replace(f'"{folder}/', '"')
    return frame
