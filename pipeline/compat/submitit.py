"""submitit: its parts that have no public name, and the names of the files that it writes.

Importing this module checks that they exist.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import submitit
from submitit.core import submission
from submitit.core.utils import JobPaths
from submitit.slurm import slurm

from pipeline.compat import require
from pipeline.errors import ResourceError

TRIED = "1.5.4"
RUNNER = "submitit.core._submit"  # `python -m` this runs a pickled job
SCRIPT_ARGUMENTS = {"command", "folder", "map_count", "setup", "teardown", "srun_args", "additional_parameters"}


ID_OF_ANSWER = "SlurmExecutor._get_job_id_from_submission_command"
require("submitit", slurm, ["_make_sbatch_string", "SlurmJobEnvironment.hostnames", ID_OF_ANSWER], tried=TRIED)
require("submitit", JobPaths, ["stdout", "result_pickle"], tried=TRIED)
require("submitit", submission, ["submitit_main"], tried=TRIED)
_lacking = sorted(SCRIPT_ARGUMENTS - set(inspect.signature(slurm._make_sbatch_string).parameters))
if _lacking or find_spec(RUNNER) is None:
    raise ResourceError(
        f"submitit {submitit.__version__}: no module {RUNNER}, or _make_sbatch_string lacks the arguments "
        f"{', '.join(_lacking)}, which AdaptNet uses. It was tried with submitit {TRIED}; install that version",
        key="submitit",
        subject=submitit.__version__,
    )


class UnknownAnswer(Exception):
    """sbatch has succeeded with an answer in which no job is named."""


class SlurmExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's, whose search for "job NUMBER" also takes a number from a site's greeting, and misses --parsable's."""

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        return id_in_answer(string.decode(errors="replace") if isinstance(string, bytes) else string)


def id_in_answer(answer: str) -> str:
    """The job that sbatch's answer names: "Submitted batch job 7", else the last line that is "7" or "7;CLUSTER".

    Sites wrap sbatch, and print more. Raises UnknownAnswer.
    """
    sentences = re.findall(r"^\s*Submitted batch job (\d+)\b", answer, re.MULTILINE)
    numbers = re.findall(r"^\s*(\d+)(?:;[\w.-]+)?\s*$", answer, re.MULTILINE)
    if not (sentences or numbers):
        raise UnknownAnswer(answer.strip()[-300:])
    return str((sentences or numbers)[-1])


class Executor(Protocol):
    """The public part of submitit's executors that we use."""

    def submit(self, function: Callable[[], object]) -> object:
        """Queues or starts a job that calls `function`."""


@dataclass(frozen=True)
class Submitted:
    """A job that submitit has queued or started: its id and the log of its first task."""

    id: str
    log: Path
    result: Callable[[], object]  # waits for the job; a job in this process runs only then


@dataclass(frozen=True)
class SlurmTask:
    """This process as a task of a SLURM job; raw_job is the id of an array's task among all jobs."""

    node: int
    hosts: tuple[str, ...]
    raw_job: str


def submit_all(executor: Executor, functions: Sequence[Callable[[], object]]) -> list[Submitted]:
    """Submits one job, or several as an array."""
    if len(functions) == 1:
        made = [executor.submit(functions[0])]
    else:
        with executor.batch():  # type: ignore[attr-defined]
            made = [executor.submit(function) for function in functions]
    return [Submitted(str(each.job_id), Path(each.paths.stdout), each.result) for each in made]  # type: ignore[attr-defined]


def run_command(python: str, folder: Path) -> str:
    """The shell words by which a task runs the job whose pickle is in `folder`; python is shell words as well."""
    return f"{python} -u -m {RUNNER} {shlex.quote(str(folder))}"


def sbatch_script(command: str, folder: Path, parameters: Mapping[str, object], num_jobs: int) -> str:
    """The batch script that SlurmExecutor would submit; parameters are those of its `update_parameters`."""
    array = {"map_count": num_jobs} if num_jobs > 1 else {}
    return str(slurm._make_sbatch_string(command=command, folder=folder, **parameters, **array))


def slurm_task() -> SlurmTask:
    """This process's task, from SLURM's environment variables."""
    job = slurm.SlurmJobEnvironment()
    return SlurmTask(job.node, tuple(job.hostnames), job.raw_job_id)


def result_file(folder: Path, job: str) -> Path:
    """Where the result of a job's first task is pickled."""
    return Path(JobPaths(folder, job_id=job).result_pickle)


def task_logs(folder: Path, job: str) -> list[Path]:
    """The existing logs of a job's tasks."""
    pattern = Path(JobPaths(folder).stdout).name.replace("%j", job).replace("%t", "*")
    return sorted(folder.glob(pattern))
