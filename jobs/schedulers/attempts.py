"""How far each start of a job came, and whether another start is worth it."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from jobs.schedulers.submission import FOLDER
from pipeline.errors import ConfigError, JsonValue, ResourceError
from pipeline.runs.files import read_json, remark, write_json

FILE = "starts.json"
FORMAT = 1
FRUITLESS = 3  # starts in a row that saved no step, after which a job ends


@dataclass(frozen=True)
class JobAttempt:
    """One start of a job: its newest saved step when it began, and when it ended (None while it runs).

    job is the scheduler's id, None for a job without one; restart counts the scheduler's restarts of it.
    began_at is in seconds since the epoch.
    """

    job: str | None
    restart: int
    host: str
    began_at: float
    first_step: int
    last_step: int | None = None

    @property
    def progressed(self) -> bool:
        """Whether it has saved a step."""
        return self.last_step is not None and self.last_step > self.first_step

    def to_json(self) -> dict[str, JsonValue]:
        """The attempt as JSON with the format number; `from_json` reads it."""
        return {
            "format": FORMAT,
            "job": self.job,
            "restart": self.restart,
            "host": self.host,
            "time": self.began_at,
            "from": self.first_step,
            "to": self.last_step,
        }

    @classmethod
    def from_json(cls, json: Mapping[str, JsonValue]) -> JobAttempt:
        """Reads what `to_json` wrote; a record without a format number is of format 1.

        Raises ConfigError for a newer format.
        """
        number = json.get("format", 1)
        if number != FORMAT:
            raise ConfigError(
                f"{FILE}: format {number} is newer than this AdaptNet, which reads format {FORMAT}",
                key=FILE,
                subject=number,
            )
        job, last = json.get("job"), json["to"]
        return cls(
            job=None if job is None else str(job),
            restart=int(str(json["restart"])),
            host=str(json["host"]),
            began_at=float(str(json["time"])),
            first_step=int(str(json["from"])),
            last_step=None if last is None else int(str(last)),
        )


@dataclass(frozen=True)
class Attempts:
    """The starts of the jobs of one home, oldest first, in home/slurm/starts.json."""

    home: Path

    @property
    def _path(self) -> Path:
        return self.home / FOLDER / FILE

    def read(self) -> list[JobAttempt]:
        """Returns all attempts; empty if no job of this home has started."""
        try:
            content = read_json(self._path)
            entries = content if isinstance(content, list) else [content]
            return [JobAttempt.from_json(cast("dict[str, JsonValue]", entry)) for entry in entries]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            remark(self._path, "the earlier starts of the job are not counted")
            return []

    def of(self, job: str) -> list[JobAttempt]:
        """Returns the attempts of the job with that id, and those without an id, which may belong to it."""
        return [attempt for attempt in self.read() if attempt.job in (None, job)]

    def begin(self, step: int, max_requeues: int, *, job: str | None = None, restart: int = 0) -> None:
        """Records a start at the saved `step`, which also closes a former start that could not record its end.

        Raises ResourceError if the scheduler has started the job once more than is worth it, or than is allowed.
        """
        attempts = self.read()
        if attempts and attempts[-1].last_step is None:
            attempts[-1] = replace(attempts[-1], last_step=step)
        self._write(attempts)
        self._check_progress(job, "the scheduler has started it again")
        if restart > max_requeues:
            raise self._used_up(restart, max_requeues, "the scheduler has started it again")
        self._write([*attempts, JobAttempt(job, restart, socket.gethostname(), time.time(), step)])

    def end(self, step: int) -> None:
        """Records the newest saved step at the end of the newest start."""
        if attempts := self.read():
            self._write([*attempts[:-1], replace(attempts[-1], last_step=step)])

    @property
    def progressed(self) -> bool:
        """Whether the newest start has saved a step."""
        attempts = self.read()
        return not attempts or attempts[-1].progressed

    def check_progress(self, reason: str) -> None:
        """Raises ResourceError if the newest start has saved nothing: another would lose the same."""
        if not self.progressed:
            raise ResourceError(
                f"{self.home}: {reason}, before this start had saved a step; see {FOLDER}/*-ray*.log there",
                key="ray",
                subject=self.home,
            )

    def check(self, reason: str, max_requeues: int) -> None:
        """Raises ResourceError if another start is not worth it, or not allowed."""
        attempts = self.read()
        if not attempts:
            return
        last = attempts[-1]
        self._check_progress(last.job, reason)
        if last.restart >= max_requeues:
            raise self._used_up(last.restart, max_requeues, reason)

    def _check_progress(self, job: str | None, reason: str) -> None:
        last = [attempt for attempt in self.read() if attempt.job == job and job is not None][-FRUITLESS:]
        if len(last) == FRUITLESS and not any(attempt.progressed for attempt in last):
            raise ResourceError(
                f"{self.home}: the last {FRUITLESS} starts of this job saved no new step, so it is not started again "
                f"({reason}). Request more --time or save more often (checkpoint.every); `adaptnet jobs resubmit` "
                "resumes the run",
                key="--time",
                subject=self.home,
            )

    def _used_up(self, restart: int, max_requeues: int, reason: str) -> ResourceError:
        return ResourceError(
            f"{self.home}: the job was requeued {restart} times and --max-requeues (={max_requeues}) allows no more "
            f"({reason}). `adaptnet jobs resubmit` resumes the run",
            key="--max-requeues",
            subject=max_requeues,
        )

    def _write(self, attempts: Sequence[JobAttempt]) -> None:
        write_json(self._path, [attempt.to_json() for attempt in attempts])
