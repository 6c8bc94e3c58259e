"""A cluster of infra/slurm/testcluster for tests: brought up, queried, taken down without a trace."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TESTCLUSTER = Path(__file__).parents[1] / "infra" / "slurm" / "testcluster"


@dataclass
class RealSlurm:
    """A running cluster. `env` is the environment in which commands reach it; `nodes` are the names of its nodes."""

    root: Path
    mode: str
    env: dict[str, str]
    nodes: list[str]
    spaces: set[str] = field(default_factory=set)  # the namespaces that it made

    def run(self, *words: str | Path, seconds: float = 300) -> str:
        """What the command prints. The test fails with its output if the command fails."""
        done = self.attempt(*words, seconds=seconds)
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *words: str | Path, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=seconds, check=False)

    def testcluster(self, *words: str) -> subprocess.CompletedProcess[str]:
        return command(*words, root=self.root)

    def sbatch(self, script: str, *options: str) -> str:
        """Submits a bash script and returns the job's id; output is discarded unless an option sets a file."""
        options = ("--output", "/dev/null", *options)
        return self.run("sbatch", "--parsable", *options, "--wrap", script).strip().split(";")[0]

    def squeue(self) -> dict[str, str]:
        """The states of jobs that wait or run, by id."""
        lines = self.run("squeue", "--noheader", "--format", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def show(self, job: str) -> dict[str, str]:
        """SLURM's own record of a job: JobState, Reason, Restarts, BatchHost, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def sacct(self, job: str) -> list[str]:
        """States in the accounting, oldest first, one for each start of the job."""
        return self.run("sacct", "-n", "-X", "--duplicates", "-P", "-o", "State", "-j", job).splitlines()

    def wait(self, job: str, states: str | tuple[str, ...], seconds: float = 20) -> str:
        """Waits until the job is in one of the states, and returns it."""
        wanted = (states,) if isinstance(states, str) else states
        with contextlib.suppress(TimeoutError):
            until(lambda: self.show(job)["JobState"] in wanted, seconds)
        record = self.show(job)
        why = f"job {job} is {record['JobState']} ({record['Reason']}), not {' or '.join(wanted)}, after {seconds} s"
        assert record["JobState"] in wanted, f"{why}\n{self.log()}"
        return record["JobState"]

    def log(self) -> str:
        return "\n".join((self.root / "log" / "slurmctld.log").read_text().splitlines()[-20:])

    def clear(self) -> None:
        """Ends every job, so that the next test finds the cluster empty."""
        if self.squeue():
            self.attempt("scancel", *self.squeue())
            self.attempt("scancel", "--full", "--signal", "KILL", *self.squeue())
        until(lambda: not self.squeue(), 20)


@contextlib.contextmanager
def real_slurm(mode: str, *options: str) -> Iterator[RealSlurm]:
    """A cluster of that mode, in a folder with a short path. Skips without SLURM; fails if `down` leaves anything."""
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    root.chmod(0o755)
    began = command("up", "--mode", mode, *options, root=root)
    if began.returncode == 2:
        root.rmdir()
        pytest.skip(began.stderr.strip())
    assert began.returncode == 0, began.stderr
    cluster = RealSlurm(root, mode, environment(root), [])
    cluster.nodes = cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N").split()
    cluster.spaces = spaces(root)
    try:
        yield cluster
    finally:
        ended = cluster.testcluster("down")
        assert ended.returncode == 0, ended.stderr
        assert not residue(root, cluster.spaces)


def command(*words: str, root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs infra/slurm/testcluster.

    Its mark comes first in the environment, where slurmstepd overwrites it with its title: the hard case.
    """
    marked = {"TESTCLUSTER_PART": "", "SLURM_CONF": "", **os.environ}
    line = [sys.executable, str(TESTCLUSTER), *words, "--root", str(root)]
    return subprocess.run(line, env={**marked, **env}, capture_output=True, text=True, timeout=600, check=False)


def environment(root: Path) -> dict[str, str]:
    """Our environment without another SLURM's variables, with those that `testcluster env` prints."""
    printed = command("env", root=root).stdout
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
    return {**plain, **dict(re.findall(r"^export (\w+)=(.*)$", printed, re.MULTILINE))}


def until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + max(seconds, 300)  # the machine may be busy
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not after {seconds} s")
        time.sleep(0.1)


def processes(words: str) -> list[Path]:
    """Folders in /proc of all processes with `words` in their environment or command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (process / "environ").read_bytes() + b"\0" + (process / "cmdline").read_bytes()
            if words.encode() in text.replace(b"\0", b" ") and process.name != str(os.getpid()):
                found.append(process)
    return found


def spaces(root: Path) -> set[str]:
    """Namespaces of the cluster's processes that are not ours."""
    ours = {os.readlink(link) for link in Path("/proc/self/ns").iterdir()}
    return {space for process in processes(f"{root}/") for space in _spaces(process)} - ours


def _spaces(process: Path) -> set[str]:
    try:
        return {os.readlink(link) for link in (process / "ns").iterdir()}
    except OSError:  # it has ended, or is another user's
        return set()


def residue(root: Path, made: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """What is left of a cluster, searched in other ways than testcluster does."""
    left = [f"process {process.name}: {(process / 'cmdline').read_bytes()!r}" for process in processes(str(root))]
    left += [f"{process} has {opened} open" for process, opened in open_files() if opened.startswith(f"{root}/")]
    left += [f"{process} in a namespace" for process in Path("/proc").glob("[0-9]*") if made & _spaces(process)]
    for table in ("/proc/mounts", "/proc/net/unix"):
        left += [line for line in Path(table).read_text().splitlines() if str(root) in line]
    return left + [str(path) for path in (root, *root.glob("**/*")) if path.exists()]


def open_files() -> Iterator[tuple[Path, str]]:
    """Each process with each file that it has open, and its working directory."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield from ((process, os.readlink(opened)) for opened in [process / "cwd", *(process / "fd").iterdir()])
