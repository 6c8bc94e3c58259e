"""Measures jobs on SLURM and several workers: time to start, time from warning to saved, throughput by ranks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from jobs import schedulers
from jobs.schedulers import records
from jobs.schedulers.profile import SiteProfile
from jobs.slurm.commands import check_slurm, run_slurm
from pipeline.bench.rows import BenchRow, compare, interleave
from pipeline.config import as_mapping, dump_yaml
from pipeline.data import toy
from pipeline.errors import ResourceError
from pipeline.installation import module
from pipeline.runs import journal

PATIENCE_S = 300.0
SMALL = ("tracking.register=null", "evaluation.latency_repeats=0", "logging.every=1 steps")
SAVED = "baseline/imagenet_resnet50"  # the net that is saved on a warning: 25.6 million parameters
LASTING = (  # trains until it is cancelled; with the recipe's learning rate four images diverge within some steps
    *("checkpoint.every=100000 steps", "evaluation.every=100000 epochs", "training.epochs=100000"),
    "training.optimizer.lr=1e-6",
)
TINY = ("data.side_px=32", "data.shuffle=full", "training.batch_size=4", "family.resolutions_px=[]")


@contextmanager
def _workspace() -> Iterator[Path]:
    """A folder with drawn images below `runs` here, which the nodes see as well."""
    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="runs")).absolute()
    try:
        toy.make(folder / "images")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def starts(recipe: str, overrides: Sequence[str], site: SiteProfile, *, nodes: int, rounds: int) -> list[BenchRow]:
    """Seconds to the first step, from the start of a job's script and of the command by hand, on `nodes` workers each.

    Raises ResourceError without SLURM, or if a run trains no step.
    """
    check_slurm()
    with _workspace() as workspace:
        arguments = [recipe, f"data.root={workspace}/images", *SMALL, *overrides]
        runs: dict[str, Callable[[], float]] = {
            "job start to first step": lambda: _job(workspace, arguments, site, nodes),
            "by hand to first step": lambda: _hand(workspace, arguments, nodes),
        }
        return compare(interleave(runs, rounds), "job start to first step", "s")


def _hand(workspace: Path, arguments: Sequence[str], workers: int) -> float:
    run = _new(workspace)
    given = [f"compute.workers={workers}", "compute.cpus_per_worker=1", "compute.device=cpu"]
    began = time.time()
    _adaptnet("train", arguments[0], *given, *arguments[1:], "--run-dir", str(run))
    return _first_step(run) - began


def _job(workspace: Path, arguments: Sequence[str], site: SiteProfile, nodes: int) -> float:
    run = _new(workspace)
    stamp = workspace / f"{run.name}-began"
    stamped = site.model_copy(update={"setup": (*site.setup, f"date +%s.%N > {shlex.quote(str(stamp))}")})
    _submit(workspace, run, arguments, stamped, nodes)
    _until(lambda: _ended(run), run)
    return _first_step(run) - float(stamp.read_text())


def warnings(overrides: Sequence[str], site: SiteProfile, *, nodes: int, rounds: int) -> list[BenchRow]:
    """Seconds from SLURM's warning signal to a complete checkpoint of a ResNet-50 with momentum, and the MB saved."""
    check_slurm()
    times, size = [], 0
    with _workspace() as workspace:
        for _ in range(rounds):
            run = _new(workspace)
            arguments = [SAVED, f"data.root={workspace}/images", *SMALL, *TINY, *LASTING, *overrides]
            job = _submit(workspace, run, arguments, site, nodes)
            _until(lambda run=run: len(_steps(run)) > 1, run)  # type: ignore[misc]
            began = time.time()
            run_slurm("scancel", "--signal", "USR2", job)
            _until(lambda run=run: bool(_complete(run)), run)  # type: ignore[misc]
            times.append(_complete(run)[0].stat().st_mtime - began)
            size = sum(path.stat().st_size for path in _complete(run)[0].parent.iterdir())
            run_slurm("scancel", job)
            _until(lambda run=run: _ended(run), run)  # type: ignore[misc]
    return [BenchRow("warning to all ranks saved", median(times), "s"), BenchRow("a checkpoint", size / 1e6, "MB")]


def ranks(recipe: str, overrides: Sequence[str], *, worlds: Sequence[int], rounds: int) -> list[BenchRow]:
    """Images/s of trainings on `worlds` workers of this machine, which share its CPUs, as ratios to the first."""
    with _workspace() as workspace:
        arguments = [recipe, f"data.root={workspace}/images", *SMALL, "logging.every=10 steps", *overrides]
        runs: dict[str, Callable[[], float]] = {
            f"{world} workers": partial(_rate, workspace, arguments, world) for world in worlds
        }
        rates = interleave(runs, rounds)
    first, *others = rates
    rows = [BenchRow(first, median(rates[first]))]
    for name in others:
        ratio = median(mine / theirs for mine, theirs in zip(rates[name], rates[first], strict=True))
        rows.append(BenchRow(name, median(rates[name]), peer=first, ratio=ratio))
    return rows


def _rate(workspace: Path, arguments: Sequence[str], world: int) -> float:
    run = _new(workspace)
    share = max(0.1, len(os.sched_getaffinity(0)) / world)
    given = [f"compute.workers={world}", f"compute.cpus_per_worker={min(1.0, share):g}", "compute.device=cpu"]
    _adaptnet("train", arguments[0], *given, *arguments[1:], "--run-dir", str(run))
    rates = [record["value"] for record in _records(run) if record.get("key") == "time/images_per_s"]
    return float(median(rates[1:] or rates))


def _ended(run: Path) -> bool:
    return not schedulers.state_of(records.find(str(run))).alive


def _new(workspace: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="run-", dir=workspace))


def _submit(workspace: Path, run: Path, arguments: Sequence[str], site: SiteProfile, nodes: int) -> str:
    profile = workspace / f"{run.name}.yaml"
    profile.write_text(dump_yaml(as_mapping(site)))
    given = ["--run-dir", str(run), "--site", str(profile), "--nodes", str(nodes), "--time", "20m"]
    printed = _adaptnet("submit", "train", *arguments, *given)
    return str(re.findall(r"^job (\S+):", printed, re.MULTILINE)[0])


def _adaptnet(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module("jobs.cli"), *words], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        command = f"adaptnet {' '.join(words[:3])}"
        raise ResourceError(
            f"{command} failed: {(done.stderr or done.stdout).strip()[-600:]}", key=words[0], subject=command
        )
    return done.stdout


def _steps(run: Path) -> list[float]:
    """The time of each logged step, in seconds since the epoch."""
    return [record["time"] for record in _records(run) if record.get("key") == "train/loss"]


def _records(run: Path) -> list[journal.Record]:
    path = run / "journal" / f"rank0{journal.SUFFIX}"
    return list(journal.read_all(path)) if path.is_file() else []


def _first_step(run: Path) -> float:
    steps = _steps(run)
    if not steps:
        raise ResourceError(f"{run}: no step was trained; {' / '.join(_log(run)[-3:])}", key="train", subject=run)
    return steps[0]


def _complete(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-*/COMPLETE.json"))


def _log(run: Path) -> list[str]:
    return [line for path in run.glob("slurm/*_log.out") for line in path.read_text(errors="replace").splitlines()]


def _until(holds: Callable[[], bool], run: Path) -> None:
    """Waits for it. Raises ResourceError if the run's job has ended without it, or after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        over = _ended(run)
        if over and holds():
            return
        if over or time.monotonic() > deadline:
            what = "its job has ended" if over else f"timed out after {PATIENCE_S:g} s"
            raise ResourceError(f"{run}: {what}; {' / '.join(_log(run)[-3:])}", key="slurm", subject=run)
        time.sleep(1)
