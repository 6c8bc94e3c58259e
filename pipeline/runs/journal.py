"""The journal of a run: files of JSON lines, each appended to by one process and read by all others.

`run_dir/journal/<name>.jsonl` has one writer at a time: `rank0` has the metrics of training, `driver` the events of the
driver, and one file per node its system metrics. A metric is
{"attempt", "fence", "step", "key", "value", "time"}, an event {"event": kind, "attempt", "fence", "step", "time", ...};
time is in seconds since 1970, steps are optimizer steps (system metrics count their own samples). A process that dies
may leave an incomplete line; the next writer starts a new one, and readers skip it.

Events that other modules use: `started`, `finished` and `stopped` (best: the name of that checkpoint), `checkpoint`
(where), and the driver's `driver-ended` (status FINISHED, STOPPED, FAILED or KILLED).
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ResourceError

Record = dict[str, Any]
CHUNK_BYTES = 1 << 18  # read at once; some two thousand lines
SUFFIX = ".jsonl"


class Journal:
    """Writes one file of the journal. Each call appends all its lines at once, so that others see all or none.

    attempt counts the starts of the run, fence the leases of its folder. Every method raises ResourceError if the file
    cannot be written.
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
        """Appends a line for each of `values`, by metric, at `step`."""
        now = round(time.time(), 3)
        self._append(
            {**self._stamp, "step": step, "key": key, "value": float(value), "time": now}
            for key, value in values.items()
        )

    def event(self, kind: str, step: int | None = None, **details: object) -> None:
        """Appends an event with details that JSON can represent."""
        self._append([{"event": kind, **details, **self._stamp, "step": step, "time": round(time.time(), 3)}])

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _append(self, records: Iterable[Record]) -> None:
        text = "".join(json.dumps(record, default=str) + "\n" for record in records)
        with self._lock:
            data = memoryview((("\n" if self._torn else "") + text).encode())
            self._torn = True  # stays true if the write fails
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
        f"journal {path}: cannot be written ({error.strerror}). Free space or correct the folder's permissions, then "
        "run the same command again: the run resumes from its newest checkpoint",
        key="journal",
        subject=path,
    )


def paths(folder: Path) -> list[Path]:
    """The journals in a folder, by name."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())


def read(path: Path, offset: int = 0) -> tuple[list[Record], int]:
    """The records in about CHUNK_BYTES of complete lines from byte `offset` on, and the offset after them.

    At the end of the file the offset stays the same. Lines that are not records are skipped (`unreadable` counts them).
    """
    if not path.is_file():
        return [], offset
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
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and (_is_event(record) or _is_metric(record)) else None


def _is_event(record: Record) -> bool:
    fence, step = record.get("fence", 0), record.get("step")
    return isinstance(record.get("event"), str) and _is_count(fence) and (step is None or _is_count(step))


def _is_metric(record: Record) -> bool:
    counts = (record.get("step"), record.get("attempt", 0), record.get("fence", 0))
    numbers = (record.get("value"), record.get("time", 0.0))
    of_types = all(map(_is_count, counts)) and all(type(each) in (int, float) for each in numbers)
    return "event" not in record and isinstance(record.get("key"), str) and of_types


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def unreadable(path: Path) -> int:
    """How many complete lines of a journal are no records, and are skipped by all readers."""
    with open(path, "rb") as file:
        return sum(1 for line in file if line.endswith(b"\n") and line.strip() and _parse(line) is None)


def last_records(path: Path) -> list[Record]:
    """The records in about the last CHUNK_BYTES of a journal."""
    return read(path, max(0, path.stat().st_size - CHUNK_BYTES))[0]


def read_all(path: Path) -> Iterator[Record]:
    """Every record of one journal, in the order of writing."""
    offset, moved = 0, True
    while moved:
        records, after = read(path, offset)
        moved, offset = after > offset, after
        yield from records


class Tail:
    """Reads all journals of a folder as they grow, including those that are created later."""

    def __init__(self, folder: Path, *, from_end: bool = False) -> None:
        self._folder = folder
        self._offsets = {path: path.stat().st_size for path in paths(folder)} if from_end else {}

    def read(self) -> list[Record]:
        """The records that were written since the last call, file by file."""
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
    """Selects the first value of each (key, step) in one journal.

    A restarted run repeats the steps after its checkpoint and writes them again, equal or not. A line with a lower
    fence than an earlier line comes from a driver that had lost its lease, and is ignored.
    """

    def __init__(self) -> None:
        self._steps: dict[str, array[int]] = {}  # rising, by key
        self._fence = 0

    def take(self, record: Record) -> bool:
        """Whether this record is a metric, and the first of its key and step."""
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
    """The metrics among the records of one journal; of each (key, step) the first."""
    first = FirstValues()
    return [record for record in records if first.take(record)]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, value)]} over all journals of a folder, steps rising."""
    values: dict[str, dict[int, float]] = {}
    for path in paths(folder):
        for record in first_values(read_all(path)):
            values.setdefault(record["key"], {}).setdefault(record["step"], record["value"])
    return {key: sorted(points.items()) for key, points in values.items()}


class SystemSampler:
    """Records the load of this node every `every_s` seconds in the node's own journal, while its `with` block runs.

    Metrics are `system/<journal's name>/...` with names that trackers know; the step counts samples and
    continues that of the journal. GPUs are read by nvidia-smi: those of `gpus`, by UUID, or all of the node.
    """

    def __init__(self, journal: Journal, every_s: float = 10.0, gpus: Sequence[str] | None = None) -> None:
        self._journal, self._every_s, self._gpus = journal, every_s, gpus
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
            _host_load(self._journal.path)  # psutil measures since the previous call
            while not self._stop.wait(self._every_s):
                values = {**_host_load(self._journal.path), **_gpu_load(self._gpus)}
                self._journal.metrics(step, {f"system/{self._journal.name}/{key}": v for key, v in values.items()})
                step += 1
        except (OSError, ResourceError):  # the folder is full or removed: training reports it at its next line
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


GPU_QUERY = "index,utilization.gpu,memory.used,memory.total"  # columns of nvidia-smi


def _gpu_load(gpus: Sequence[str] | None) -> dict[str, float]:
    """The load of these GPUs by nvidia-smi, which comes with the driver; empty without it.

    It is that of all GPUs of the node if `gpus` is None or nvidia-smi does not know these, e.g. slices of a GPU.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    chosen = _asked([f"--id={','.join(gpus)}"]) if gpus else {}
    return chosen or _asked([])


def _asked(chosen: Sequence[str]) -> dict[str, float]:
    """What nvidia-smi says with these options; empty if it fails."""
    try:
        command = ["nvidia-smi", *chosen, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return gpu_values(done.stdout)


def gpu_values(lines: str) -> dict[str, float]:
    """Metrics from the lines that nvidia-smi prints for GPU_QUERY (memory in MiB); other text is skipped."""
    values: dict[str, float] = {}
    for line in lines.splitlines():
        index, *rest = (word.strip() for word in line.split(","))
        numbers = [float(word) if word.replace(".", "", 1).isdigit() else None for word in rest]
        if len(numbers) != 3:
            continue
        busy, used, total = numbers
        if busy is not None:  # a MIG slice has none
            values[f"gpu_{index}_utilization_percentage"] = busy
        if used is not None and total:
            values[f"gpu_{index}_memory_usage_megabytes"] = used * 1.048576
            values[f"gpu_{index}_memory_usage_percentage"] = used / total * 100
    return values
