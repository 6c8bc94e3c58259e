"""The run's own record on disk: JSON lines that one process appends to and everything else reads.

`run_dir/journal/<name>.jsonl` has one writer at a time: `rank0` holds training's metrics, `driver` the driver's events,
one file per node its system metrics. A metric is
{"attempt", "fence", "step", "key", "value", "time"}, an event {"event": kind, "attempt", "fence", "step", "time", ...};
time is in seconds since 1970, steps are optimizer steps (system metrics count their own samples). A process that dies
may leave half a line: the next writer starts a new one and readers pass it over.

Events that others build on: `started`, `finished` and `stopped` (best: the name of that checkpoint), `checkpoint`
(where), and the driver's `driver-ended` (status FINISHED, FAILED or KILLED).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ResourceError

Record = dict[str, Any]
CHUNK_BYTES = 1 << 18  # read at once; some two thousand lines
SUFFIX = ".jsonl"


class Journal:
    """The writer. Each call is one write to the end of the file, so other processes see whole calls at once.

    attempt counts the starts of the run, fence the leases of its folder. Raises ResourceError where the file cannot
    be written.
    """

    def __init__(self, folder: Path, name: str = "rank0", *, attempt: int = 0, fence: int = 0) -> None:
        self.name, self.path = name, folder / f"{name}{SUFFIX}"
        self._stamp = {"attempt": attempt, "fence": fence}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._torn = _ends_torn(self._file)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time(), 3)
        self._append(
            {**self._stamp, "step": step, "key": key, "value": float(value), "time": now}
            for key, value in values.items()
        )

    def event(self, kind: str, step: int | None = None, **facts: Any) -> None:
        self._append([{"event": kind, **facts, **self._stamp, "step": step, "time": round(time.time(), 3)}])

    def sync(self) -> None:
        """Until all lines are on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _append(self, records: Iterable[Record]) -> None:
        text = "".join(json.dumps(record, default=str) + "\n" for record in records)
        with self._lock:
            data = memoryview((("\n" if self._torn else "") + text).encode())
            self._torn = True  # until all of it is written
            try:
                while data:
                    data = data[os.write(self._file, data) :]
            except OSError as error:
                raise _unwritable(self.path, error) from None
            self._torn = False


def _ends_torn(file: int) -> bool:
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def _unwritable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"journal {path}: cannot be written ({error.strerror}). Free space or mend the folder's rights, then give the "
        "same command: the run goes on from its newest checkpoint"
    )


def paths(folder: Path) -> list[Path]:
    """The journals in a folder, by name."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def read(path: Path, offset: int = 0) -> tuple[list[Record], int]:
    """Records of the whole lines from byte `offset` on, about CHUNK_BYTES of them, and the offset after them.

    The end is reached when the offset does not move. A line that is not a record is passed over.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(CHUNK_BYTES)
        if not data.endswith(b"\n"):
            data += file.readline()
    whole = data[: data.rfind(b"\n") + 1]
    records = (_parse(line) for line in whole.split(b"\n"))
    return [record for record in records if record is not None], offset + len(whole)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and ("event" in record or "key" in record) else None


def read_all(path: Path) -> Iterator[Record]:
    """Every record of one journal, in the order written."""
    offset, moved = 0, True
    while moved:
        records, after = read(path, offset)
        moved, offset = after > offset, after
        yield from records


class Tail:
    """Follows all journals of a folder, those that appear later included."""

    def __init__(self, folder: Path, *, from_end: bool = False) -> None:
        self._folder = folder
        self._offsets = {path: path.stat().st_size for path in paths(folder)} if from_end else {}

    def read(self) -> list[Record]:
        """What was written since the last call, file by file."""
        new: list[Record] = []
        for path in paths(self._folder):
            moved = True
            while moved:
                before = self._offsets.get(path, 0)
                records, self._offsets[path] = read(path, before)
                moved = self._offsets[path] > before
                new += records
        return new


class FirstValues:
    """Lets each (key, step) of one journal through once, the first time.

    A restarted run trains the steps after its checkpoint again and writes them again, equal or not. A line of a lower
    fence than one before it comes from a driver that lost its lease, and does not count.
    """

    def __init__(self) -> None:
        self._steps: dict[str, array[int]] = {}  # rising, by key
        self._fence = 0

    def take(self, record: Record) -> bool:
        """Whether this metric is the first of its key and step; False for an event."""
        fence = record.get("fence", 0)
        self._fence = max(self._fence, fence)
        if "event" in record or fence < self._fence:
            return False
        steps, step = self._steps.setdefault(record["key"], array("q")), record["step"]
        if not steps or step > steps[-1]:
            steps.append(step)
            return True
        place = bisect_left(steps, step)
        if steps[place] == step:
            return False
        steps.insert(place, step)
        return True


def first_values(records: Iterable[Record]) -> list[Record]:
    """The metrics among the records of one journal, each (key, step) once: the first value wins."""
    first = FirstValues()
    return [record for record in records if first.take(record)]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{key: its (step, value), steps rising} over all journals of a folder."""
    found: dict[str, dict[int, float]] = {}
    for path in paths(folder):
        for record in first_values(read_all(path)):
            found.setdefault(record["key"], {}).setdefault(record["step"], record["value"])
    return {key: sorted(points.items()) for key, points in found.items()}


class SystemSampler:
    """A thread that writes this node's load into the node's own journal, under the names that trackers know.

    `system/<journal's name>/...`; the step counts samples and goes on where the journal ends. Runs between `with` and
    its end. GPUs are read by nvidia-smi.
    """

    def __init__(self, journal: Journal, every_s: float = 10.0) -> None:
        self._journal, self._every_s = journal, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def __enter__(self) -> SystemSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=self._every_s + 5)

    def _run(self) -> None:
        step = 1 + max((r["step"] for r in read_all(self._journal.path) if "event" not in r), default=-1)
        try:
            _host_load(self._journal.path)  # psutil measures from the call before
            while not self._stop.wait(self._every_s):
                values = {**_host_load(self._journal.path), **_gpu_load()}
                self._journal.metrics(step, {f"system/{self._journal.name}/{key}": v for key, v in values.items()})
                step += 1
        except (OSError, ResourceError):  # the folder is full or gone: training meets it, and says so, at its next line
            return


def _host_load(where: Path) -> dict[str, float]:
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(where.parent))
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
    }


GPU_QUERY = "index,utilization.gpu,memory.used,memory.total"


def _gpu_load() -> dict[str, float]:
    """This node's GPUs by nvidia-smi, which comes with the driver; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    try:
        words = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return gpu_values(done.stdout)


def gpu_values(lines: str) -> dict[str, float]:
    """Metrics of the lines that nvidia-smi gives for GPU_QUERY (memory in MiB); what it says in words is left out."""
    values: dict[str, float] = {}
    for line in lines.splitlines():
        index, *rest = (word.strip() for word in line.split(","))
        numbers = [float(word) if word.replace(".", "", 1).isdigit() else None for word in rest]
        if len(numbers) != 3:
            continue
        busy, used, total = numbers
        if busy is not None:  # a MIG slice has no rate
            values[f"gpu_{index}_utilization_percentage"] = busy
        if used is not None and total:
            values[f"gpu_{index}_memory_usage_megabytes"] = used * 1.048576
            values[f"gpu_{index}_memory_usage_percentage"] = used / total * 100
    return values
