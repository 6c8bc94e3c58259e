"""The jobs of each run, recorded in home/slurm/jobs.json when they are submitted, the newest last."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from jobs.schedulers import JobState
from jobs.schedulers.profile import SiteProfile
from jobs.schedulers.submission import FOLDER, Job, Resources, Submission, WorkerNeeds
from pipeline.errors import ConfigError, JsonValue, ResourceError
from pipeline.runs.files import read_json, remark, write_json
from pipeline.runs.records import read_status

FILE = "jobs.json"
FORMAT = 2
ELSEWHERE = Path("jobs") / "elsewhere.json"  # file in the folder of runs that lists homes outside it
USING_RAY = ("train", "sweep")
OUR_ERROR = "adaptnet:"  # begins the first line of an error that a verb prints
OTHERS = ("srun:", "slurmstepd:", "submitit ", "Traceback ")  # begin lines that are printed after it
LONGEST_ERROR = 40  # lines
RUNS = Path("runs")


@dataclass(frozen=True)
class JobRecord:
    """A submitted job: what was submitted, by what scheduler, and where its output is.

    home is the folder that the record is in. log is the first task's. pid is the process of a job that runs within
    `adaptnet submit`. address is that of Ray's job server. submitted_at is in seconds since the epoch; script is the
    text that was submitted.
    """

    id: str
    scheduler: str
    name: str
    verb: str
    argv: tuple[str, ...]
    home: str
    run_dir: str | None
    log: str
    resources: Resources
    profile: SiteProfile
    submitted_at: float
    host: str
    needs: WorkerNeeds | None = None
    pid: int | None = None
    address: str | None = None
    script: str | None = None

    @property
    def folder(self) -> Path:
        """Where submitit keeps pickles and logs."""
        return Path(self.log).parent

    def to_json(self) -> dict[str, JsonValue]:
        """All but `home`, which is where the file is."""
        return {
            "format": FORMAT,
            "id": self.id,
            "scheduler": self.scheduler,
            "name": self.name,
            "verb": self.verb,
            "argv": list(self.argv),
            "run_dir": self.run_dir,
            "log": self.log,
            "resources": {**asdict(self.resources), "nodes": list(self.resources.nodes)},
            "profile": self.profile.model_dump(mode="json"),
            "submitted_at": self.submitted_at,
            "host": self.host,
            "needs": None if self.needs is None else list(self.needs),
            "pid": self.pid,
            "address": self.address,
            "script": self.script,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, JsonValue], home: Path) -> JobRecord:
        """Reads what `to_json` wrote, and entries without a format number, which are of format 1.

        Raises ConfigError for a newer format.
        """
        number = int(str(entry.get("format", 1)))
        if number > FORMAT:
            raise ConfigError(
                f"{home / FOLDER / FILE}: format {number} is newer than this AdaptNet, which reads up to {FORMAT}",
                key=FILE,
                subject=number,
            )
        return cls._of_format_2(entry if number == FORMAT else _as_format_2(entry), home)

    @classmethod
    def _of_format_2(cls, entry: Mapping[str, JsonValue], home: Path) -> JobRecord:
        resources, argv, needs, profile = entry["resources"], entry["argv"], entry.get("needs"), entry["profile"]
        assert isinstance(resources, dict) and isinstance(argv, list) and isinstance(profile, dict)
        return cls(
            id=str(entry["id"]),
            scheduler=str(entry["scheduler"]),
            name=str(entry.get("name", "")),
            verb=str(entry["verb"]),
            argv=tuple(map(str, argv)),
            home=str(home),
            run_dir=_text(entry.get("run_dir")),
            log=str(entry["log"]),
            resources=_resources(resources),
            profile=SiteProfile.stored(profile),
            submitted_at=float(str(entry["submitted_at"])),
            host=str(entry.get("host", "")),
            needs=_needs(needs) if isinstance(needs, list) else None,
            pid=None if entry.get("pid") is None else int(str(entry["pid"])),
            address=_text(entry.get("address")),
            script=_text(entry.get("script")),
        )

    def again(self) -> Submission:
        """A submission of the same job, for `adaptnet jobs resubmit`."""
        job = Job(
            scheduler=self.scheduler,
            verb=self.verb,
            arguments=self.argv,
            home=str(Path(self.home).absolute()),
            run_dir=self.run_dir,
            patience_s=self.profile.patience_s,
            max_requeues=self.profile.max_requeues,
            fewest_nodes=self.resources.nodes[0],
            uses_ray=self.verb in USING_RAY,
            saves_within_s=float(self.profile.signal_delay_s),
            needs=self.needs,
        )
        return Submission(job, self.name, self.resources, self.profile, address=self.address)

    @property
    def finished(self) -> bool:
        """Whether the run or sweep that the job works on has come to its end."""
        return self.run_dir is not None and read_status(Path(self.run_dir)).finished


def record_of(
    submission: Submission,
    job: Job,
    *,
    id: str,
    log: Path,
    pid: int | None = None,
    script: str | None = None,
) -> JobRecord:
    """The record of `job`, submitted now from this machine as a part of `submission`."""
    return JobRecord(
        id=id,
        scheduler=job.scheduler,
        name=submission.name,
        verb=job.verb,
        argv=job.arguments,
        home=job.home,
        run_dir=job.run_dir,
        log=str(log),
        resources=submission.resources,
        profile=submission.profile,
        submitted_at=time.time(),
        host=socket.gethostname(),
        needs=job.needs,
        pid=pid,
        address=submission.address,
        script=script,
    )


def add(record: JobRecord) -> None:
    """Appends a job to the records of its home."""
    home = Path(record.home)
    write_json(home / FOLDER / FILE, [*_entries(home), record.to_json()])


def of_home(home: Path) -> list[JobRecord]:
    """The jobs of a run's folder, the newest last; empty if there are none."""
    return [record for entry in _entries(home) if (record := _record(entry, home)) is not None]


def _record(entry: JsonValue, home: Path) -> JobRecord | None:
    """The record of an entry; None, with a remark, if it is damaged. Raises ConfigError for a newer format."""
    try:
        return JobRecord.from_json(cast("dict[str, JsonValue]", entry), home)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError):
        remark(home / FOLDER / FILE, "a job that it should describe is left out")
        return None


def list_jobs(runs: Path = RUNS) -> list[JobRecord]:
    """The newest job of each run and of each folder of jobs, newest first."""
    patterns = (f"*/{FOLDER}/{FILE}", f"jobs/*/{FOLDER}/{FILE}")
    homes = [path.parents[1] for pattern in patterns for path in runs.glob(pattern)]
    homes += [home for home in map(Path, _elsewhere(runs)) if (home / FOLDER / FILE).is_file()]
    newest = [jobs[-1] for home in homes if (jobs := of_home(home))]
    return sorted(newest, key=lambda record: -record.submitted_at)


def remember_home(home: Path, runs: Path = RUNS) -> None:
    """Makes jobs in a folder outside `runs` appear in `list_jobs`, and `find` by their ids."""
    if home.absolute().parent in (runs.absolute(), runs.absolute() / "jobs"):
        return
    known = _elsewhere(runs)
    if str(home) not in known:
        write_json(runs / ELSEWHERE, [*known, str(home)])


def find(wanted: str, runs: Path = RUNS) -> JobRecord:
    """A job by its id, or the newest of a run by its name or folder. Raises ConfigError listing those that exist."""
    for home in (Path(wanted), runs / wanted):
        if found := of_home(home):
            return found[-1]
    newest = list_jobs(runs)
    for record in (each for one in newest for each in reversed(of_home(Path(one.home)))):
        if record.id == wanted:
            return record
    names = [Path(record.home).name for record in newest]
    close = get_close_matches(wanted, [*names, *(record.id for record in newest)], 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    known = ", ".join(f"{record.id} ({name})" for record, name in zip(newest[:10], names, strict=False)) or "none"
    raise ConfigError(
        f"{wanted}: no job has that id, run or folder; the newest jobs: {known}{hint}", key="job", subject=wanted
    )


def not_queued(record: JobRecord) -> ResourceError:
    """The error for a requeue where no queue exists."""
    return ResourceError(
        f"job {record.id} is not in a queue; use `adaptnet jobs cancel`, then `resubmit`", key="job", subject=record.id
    )


def state_from_files(record: JobRecord, logs: Sequence[Path]) -> JobState | None:
    """What the files of a job that its scheduler no longer knows show of its end; None if nothing."""
    if record.finished:
        return JobState("COMPLETED")
    if any(line.startswith(OUR_ERROR) for line in last_lines(logs)):
        return JobState("FAILED")
    return None


def last_lines(logs: Sequence[Path], most: int = 12) -> list[str]:
    """The lines of a job's logs that matter: our last error, else from the last error on, else the last ones."""
    texts = [_lines(path) for path in logs]
    if errors := [error for lines in texts for error in _errors(lines)]:
        return [line for error in errors[-3:] for line in error]
    lines = [line for text in texts for line in text]
    numbers = [number for number, line in enumerate(lines) if "Error" in line]
    return lines[numbers[-1] :][:most] if numbers else lines[-most:]


def _errors(lines: Sequence[str]) -> list[list[str]]:
    """The errors of ours in a log, each with the lines that continue it: what comes next begins otherwise."""
    errors: list[list[str]] = []
    within = False
    for line in lines:
        if line.startswith(OUR_ERROR):
            errors.append([])
        within = line.startswith(OUR_ERROR) or (within and not line.startswith(OTHERS))
        if within and len(errors[-1]) < LONGEST_ERROR:
            errors[-1].append(line)
    return errors


def _lines(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def follow(record: JobRecord, *, every_s: float = 5.0) -> Iterator[str]:
    """The log's text as it grows, until the job has ended; waits for the log to appear.

    every_s is how often the scheduler is queried for the job's state.
    """
    from jobs import schedulers

    path, offset, alive, ask_at = Path(record.log), 0, True, 0.0
    while alive:
        if time.monotonic() >= ask_at:
            alive, ask_at = schedulers.state_of(record).alive, time.monotonic() + every_s
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                file.seek(offset)
                text = file.read()
                offset = file.tell()
            if text:
                yield text
        if alive:
            time.sleep(1)


def _entries(home: Path) -> list[JsonValue]:
    path = home / FOLDER / FILE
    try:
        content = read_json(path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        content = None
    if not isinstance(content, list):
        remark(path, "the jobs that were submitted from this folder are left out")
    return content if isinstance(content, list) else []


def _elsewhere(runs: Path) -> list[str]:
    homes = _read(runs / ELSEWHERE)
    return [str(home) for home in homes] if isinstance(homes, list) else []


def _as_format_2(entry: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """An entry of format 1, whose keys had other names."""
    renamed = {"where": "scheduler", "arguments": "argv", "site": "profile", "submitted": "submitted_at"}
    return {renamed.get(key, key): value for key, value in entry.items()}


def _resources(entry: Mapping[str, JsonValue]) -> Resources:
    nodes, memory_gb = entry["nodes"], entry.get("memory_gb")
    assert isinstance(nodes, list)
    fewest, most = (int(str(count)) for count in nodes)
    return Resources(
        nodes=(fewest, most),
        gpus_per_node=int(str(entry["gpus_per_node"])),
        cpus_per_task=int(str(entry["cpus_per_task"])),
        minutes=int(str(entry["minutes"])),
        memory_gb=None if memory_gb is None else float(str(memory_gb)),
    )


def _needs(entry: Sequence[JsonValue]) -> WorkerNeeds:
    workers, cpus, gpus = entry
    return WorkerNeeds(int(str(workers)), float(str(cpus)), float(str(gpus)))


def _text(value: JsonValue) -> str | None:
    return None if value is None else str(value)


def _read(path: Path) -> JsonValue:
    """The JSON in a file; None if it is missing or unreadable."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
