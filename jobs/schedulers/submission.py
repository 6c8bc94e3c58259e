"""What is submitted: a verb of `adaptnet` with its arguments, the resources it needs and the site's profile."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from jobs.schedulers import snapshot
from jobs.schedulers.profile import SiteProfile
from pipeline.errors import ConfigError, ResourceError

FOLDER = "slurm"  # folder in a job's home for records, logs, pickles and code, whichever scheduler runs it
START_UP_S = 60  # imports, Ray, workers: nothing is saved before these are done
SPLIT = re.compile("[:%]")  # PYTHONPATH is split at ":"; SLURM and submitit replace %j and others in names of logs
WARNED_EARLY_S = 60  # SLURM's warning may come this much before its time


@dataclass(frozen=True)
class Resources:
    """What a job requests of each node; nodes is (fewest, most)."""

    nodes: tuple[int, int]
    gpus_per_node: int
    cpus_per_task: int
    minutes: int
    memory_gb: float | None = None

    @property
    def elastic(self) -> bool:
        """Whether the job runs on fewer nodes than it would like to have."""
        return self.nodes[0] < self.nodes[1]


class WorkerNeeds(NamedTuple):
    """The least that a run continues with: a number of workers, and the CPUs and GPUs that each takes."""

    workers: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Job:
    """A verb of `adaptnet` and its arguments, to be run over a job's nodes. Every node sees the folder `home`.

    run_dir is the folder of a training or a sweep, whose steps count as progress; None for a verb that starts from
    its beginning each time. saves_within_s is how long before its end the scheduler warns it. needs is None for a verb
    without workers. patience_s is how long the nodes wait for one another.
    """

    scheduler: str
    verb: str
    arguments: tuple[str, ...]
    home: str
    run_dir: str | None
    patience_s: float
    max_requeues: int
    fewest_nodes: int = 1
    uses_ray: bool = True
    saves_within_s: float = 90.0
    needs: WorkerNeeds | None = None

    @property
    def folder(self) -> Path:
        """The folder of the job's record, logs and code."""
        return Path(self.home) / FOLDER

    @property
    def stopping(self) -> bool:
        """Whether the verb has reacted to a request to stop."""
        return self.run_dir is not None and (Path(self.run_dir) / "stop").exists()

    def saved_steps(self) -> int:
        """Steps that are saved: those of the newest checkpoint; of a sweep, the sum over its trials."""
        if self.run_dir is None:
            return 0
        from pipeline.registry.resolve import newest_step

        folder = Path(self.run_dir)
        return sum(newest_step(each) for each in (folder, *folder.glob("trials/*")))


@dataclass(frozen=True)
class Submission:
    """Jobs that are submitted together.

    job is the only one, or, for an array, the one whose home holds the files that all share. address is a job
    server's; after is the id of a job that must have ended well before; dependency is a condition in the scheduler's
    own syntax; throttle is how many jobs of an array may run at once, None for all.
    """

    job: Job
    name: str
    resources: Resources
    profile: SiteProfile
    array: tuple[Job, ...] = ()
    dependency: str | None = None
    after: str | None = None
    address: str | None = None
    throttle: int | None = None

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs to queue, one for each run."""
        return self.array or (self.job,)

    @property
    def folder(self) -> Path:
        """Where submitit keeps pickles and logs: the job's folder, or a link to it if its path has SPLIT characters."""
        folder = self.job.folder
        above = next(path for path in (folder, *folder.parents) if not SPLIT.search(str(path)))
        return folder if above == folder else above / f".slurm-{sha256(bytes(folder)).hexdigest()[:12]}"

    @property
    def snapshot(self) -> Path:
        """The folder of the jobs' code snapshot; it is named by its content, so equal code is stored once."""
        return self.folder / snapshot.name()

    def prepare(self) -> None:
        """Makes the folder and the snapshot. Raises ResourceError if a folder cannot be written."""
        folder = self.job.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.folder != folder and not self.folder.is_symlink():
                self.folder.symlink_to(folder)
            snapshot.save(self.snapshot)
        except OSError as error:
            raise ResourceError(
                f"{error.filename2 or error.filename or folder}: cannot be written ({error.strerror}). Choose another "
                "folder for the run with --run-dir",
                key="--run-dir",
                subject=folder,
            ) from None


def refuse_options(submission: Submission, *options: str) -> None:
    """Raises ConfigError for the first of `options` ("after", "address", ...) that the submission sets."""
    for option in options:
        value = getattr(submission, option)
        if value is not None:
            where = submission.job.scheduler
            option = {"throttle": "array KEY=V,V%N"}.get(option, option)
            raise ConfigError(
                f"--{option} (={value}): not available with --where {where}; leave it out",
                key=f"--{option.partition(' ')[0]}",
                subject=value,
            )


def minutes_of(text: str) -> int:
    """Minutes in "24h", "90m", "2d", "1:30:00", "1-12:00:00" or a plain number. Raises ConfigError for other text."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(m|min|h|d)?", text.strip()):
        factor = {"m": 1, "min": 1, "h": 60, "d": 1440, None: 1}[match[2]]
        minutes = math.ceil(float(match[1]) * factor)
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text.strip()):
        days, hours, minute, seconds = (int(part or 0) for part in match.groups())
        minutes = days * 1440 + hours * 60 + minute + math.ceil(seconds / 60)
    else:
        minutes = 0
    if minutes == 0:
        raise ConfigError(f"--time (={text}): write 90m, 24h, 2d, 1:30:00 or 1-12:00:00", key="--time", subject=text)
    return minutes


def check_time(minutes: int, signal_delay_s: int) -> None:
    """Raises ConfigError for a time in which a job cannot start and save before its end."""
    least = signal_delay_s + START_UP_S + WARNED_EARLY_S
    if minutes * 60 < least:
        raise ConfigError(
            f"--time (={minutes} min): below the minimum of {least} s, which is {signal_delay_s} s to save before the "
            f"end (--signal-delay), {START_UP_S} s to start up, and {WARNED_EARLY_S} s by which SLURM may warn early. "
            "Request more time or a shorter --signal-delay",
            key="--time",
            subject=minutes,
        )
