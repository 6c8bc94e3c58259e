"""Profiles some steps of a training with torch.profiler: a trace to look at, and a table of where the time goes.

The trace is in Chrome's format, which https://ui.perfetto.dev shows. The profiler observes; it changes no number of the
training. Times in a trace are in microseconds.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, record_function, schedule
from torch.profiler import profile as torch_profile

from pipeline.errors import JsonValue
from pipeline.runs.beats import LONG, Beats
from pipeline.runs.files import write_bytes, write_text
from pipeline.training.plan import TrainingPlan
from pipeline.training.state import TrainState
from pipeline.training.step import Meter, MicroBatch, StepFunction

T = TypeVar("T")
FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "table.txt"  # in the run folder
UNRECORDED, WARMING = 3, 2  # steps before those that are recorded: without the profiler, and with it
STEP, WAITING, TRAINING = "ProfilerStep#", "waiting for data", "training step"  # annotations of a trace
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
OF_HOST = ("cuda_runtime", "cuda_driver")
MOST_ROWS, NAME_LENGTH = 12, 60  # of a table

Event = Mapping[str, JsonValue]  # of a trace


@dataclass(frozen=True)
class TraceSpan:
    """An event of a trace: what ran, where (process and thread), and when, in microseconds."""

    name: str
    category: str
    place: tuple[str, str]
    start: float
    length: float

    @property
    def end(self) -> float:
        return self.start + self.length


@dataclass(frozen=True)
class Usage:
    """What a kernel or an operator took over all recorded steps. microseconds: without what it called."""

    name: str
    microseconds: float
    calls: int


@dataclass(frozen=True)
class StepProfile:
    """What a trace says of its steps. All counts are means of a step; shares are of the whole recorded time.

    kernels: on a GPU, the longest first; empty on a CPU. operators: of the host. launches: of kernels. waits: how often
    the host waits for the GPU. idle_share: without a kernel on the GPU, or on a CPU without an operator.
    """

    steps: int
    step_s: float
    training_share: float
    data_share: float
    idle_share: float
    launches: float
    waits: float
    kernels: Sequence[Usage]
    operators: Sequence[Usage]

    @property
    def num_operators(self) -> float:
        """Operators that run in a step, with those that others call."""
        return sum(each.calls for each in self.operators) / self.steps

    def text(self, busy_cores: float | None = None) -> str:
        """The table for people. busy_cores: cores that the process has used on average."""
        rest = max(0.0, 1 - self.training_share - self.data_share)
        idle = "the GPU is idle" if self.kernels else "no operator runs"
        lines = [
            f"{self.steps} steps of {1e3 * self.step_s:.2f} ms",
            f"time: {self.training_share:.1%} in training steps, {self.data_share:.1%} waiting for data, {rest:.1%} "
            f"between them (metrics, evaluations, saves); {idle} {self.idle_share:.1%} of the time",
            f"a step: {self.num_operators:,.0f} operators, {self.launches:,.0f} kernel launches, {self.waits:.1f} "
            "waits of the host for the GPU",
            f"threads: {torch.get_num_threads()} of torch"
            + ("" if busy_cores is None else f"; the process used {busy_cores:.2f} cores"),
        ]
        for title, usages in (("kernels", self.kernels), ("operators, by their own time", self.operators)):
            lines += _table(title, usages, self.steps) if usages else []
        return "\n".join(lines)


def read_trace(path: Path) -> StepProfile:
    """The profile in a trace of torch.profiler, JSON or gzipped JSON. Raises ValueError if it has no recorded step."""
    data = path.read_bytes()
    content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    spans = [_span(each) for each in content["traceEvents"] if each.get("ph") == "X"]
    return summary(spans)


def _span(event: Event) -> TraceSpan:
    place = str(event.get("pid")), str(event.get("tid"))
    times = float(str(event["ts"])), float(str(event.get("dur", 0)))
    return TraceSpan(str(event["name"]), str(event.get("cat", "")), place, *times)


def summary(spans: Sequence[TraceSpan]) -> StepProfile:
    """The profile of these spans. Raises ValueError without a recorded step."""
    steps = [each for each in spans if each.category == "user_annotation" and each.name.startswith(STEP)]
    if not steps:
        raise ValueError("the trace has no recorded step")
    start, end = min(each.start for each in steps), max(each.end for each in steps)
    inside = [each for each in spans if start <= each.start < end]
    by_category: dict[str, list[TraceSpan]] = defaultdict(list)
    for each in inside:
        by_category[each.category].append(each)
    kernels = [each for category in ON_DEVICE for each in by_category[category]]
    host, whole = [each for category in OF_HOST for each in by_category[category]], end - start
    notes = by_category["user_annotation"]
    return StepProfile(
        steps=len(steps),
        step_s=whole / len(steps) / 1e6,
        training_share=sum(each.length for each in notes if each.name == TRAINING) / whole,
        data_share=sum(each.length for each in notes if each.name == WAITING) / whole,
        idle_share=max(0.0, 1 - _covered(kernels or by_category["cpu_op"], end) / whole),
        launches=sum("Launch" in each.name for each in host) / len(steps),
        waits=sum("Synchronize" in each.name for each in host) / len(steps),
        kernels=_usages((each, each.length) for each in kernels),
        operators=_usages(_own_times(by_category["cpu_op"])),
    )


def _covered(spans: Sequence[TraceSpan], end: float) -> float:
    """Microseconds before `end` in which at least one of the spans runs."""
    covered, until = 0.0, float("-inf")
    for each in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, min(each.end, end) - max(each.start, until))
        until = max(until, each.end)
    return covered


def _own_times(spans: Sequence[TraceSpan]) -> Iterator[tuple[TraceSpan, float]]:
    """Each span with its microseconds without those of the spans within it on its thread."""
    inner: dict[int, float] = defaultdict(float)
    for place in {each.place for each in spans}:
        open_spans: list[TraceSpan] = []
        for each in sorted((s for s in spans if s.place == place), key=lambda span: (span.start, -span.length)):
            while open_spans and open_spans[-1].end <= each.start:
                open_spans.pop()
            if open_spans:
                inner[id(open_spans[-1])] += each.length
            open_spans.append(each)
    yield from ((each, max(0.0, each.length - inner[id(each)])) for each in spans)


def _usages(timed: Iterable[tuple[TraceSpan, float]]) -> Sequence[Usage]:
    """By name, the longest first."""
    times, calls = defaultdict[str, float](float), defaultdict[str, int](int)
    for span, microseconds in timed:
        times[span.name] += microseconds
        calls[span.name] += 1
    return sorted((Usage(name, times[name], calls[name]) for name in times), key=lambda each: -each.microseconds)


def _table(title: str, usages: Sequence[Usage], steps: int) -> list[str]:
    total = sum(each.microseconds for each in usages) or 1.0
    lines = ["", f"{title:<{NAME_LENGTH}} {'ms a step':>10} {'share':>7} {'calls a step':>13}"]
    for each in usages[:MOST_ROWS]:
        milliseconds, share = each.microseconds / steps / 1e3, each.microseconds / total
        name = f"{each.name[:NAME_LENGTH]:<{NAME_LENGTH}}"
        lines.append(f"{name} {milliseconds:>10.3f} {share:>7.1%} {each.calls / steps:>13,.1f}")
    return lines


class StepProfiler:
    """Records `steps` steps of a training after a warm-up, and writes `profile/` into the run folder.

    `batches` and `around` are given to `loop.train`; the files are written at the end of the last recorded step, or
    on leaving the `with` block. `done` then gets the table; it gets None if the training ended within the warm-up.
    """

    def __init__(
        self,
        steps: int,
        device: torch.device,
        run_dir: Path,
        done: Callable[[int, str | None], None],
        beats: Beats | None = None,
    ) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        phases = schedule(wait=UNRECORDED, warmup=WARMING, active=steps, repeat=1)
        self._profiler = torch_profile(activities=activities, schedule=phases, on_trace_ready=self._ready)
        self._folder, self._done, self._beats = run_dir / FOLDER, done, beats or Beats()
        self._written, self._step = False, 0
        self._taken, self._cpu_s, self._wall_s = 0, time.process_time(), time.perf_counter()

    def __enter__(self) -> StepProfiler:
        self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._profiler.stop()
        if not self._written:
            self._done(self._step, None)

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the wait for each is annotated in the trace."""
        source = iter(batches)
        while True:
            with record_function(WAITING):
                batch = next(source, None)
            if batch is None:
                return
            yield batch

    def around(self, take_step: StepFunction) -> StepFunction:
        """`take_step`, which is annotated in the trace."""

        def step(plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch], meter: Meter, /) -> float:
            lr = self._annotated(take_step, plan, state, micros, meter)
            self._step, self._taken = state.step, self._taken + 1
            if self._taken == UNRECORDED + WARMING:
                self._cpu_s, self._wall_s = time.process_time(), time.perf_counter()
            self._profiler.step()
            return lr

        return step

    @staticmethod
    def _annotated(
        step: StepFunction, plan: TrainingPlan, state: TrainState, micros: Sequence[MicroBatch], meter: Meter
    ) -> float:
        with record_function(TRAINING):
            return step(plan, state, micros, meter)

    def _ready(self, profiler: torch_profile) -> None:
        """Writes the files. A profile that cannot be written ends no training; the table then says why."""
        try:
            with self._beats.during("writing the profile", LONG):
                table = self._write(profiler)
        except (OSError, ValueError, MemoryError) as error:
            table = f"the profile could not be written: {type(error).__name__}: {error}"
        self._written = True
        self._done(self._step, table)

    def _write(self, profiler: torch_profile) -> str:
        """Writes the trace and the table, which is returned."""
        cores = (time.process_time() - self._cpu_s) / max(time.perf_counter() - self._wall_s, 1e-9)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="adaptnet-profile-") as scratch:
            raw = Path(scratch) / "trace.json"
            profiler.export_chrome_trace(str(raw))
            table = read_trace(raw).text(cores)
            write_bytes(self._folder / TRACE, gzip.compress(raw.read_bytes(), compresslevel=6))
        write_text(self._folder / TABLE, table + "\n")
        return table
