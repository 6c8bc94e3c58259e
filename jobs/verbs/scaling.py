"""What jobs on SLURM and workers side by side cost: start, warning to saved, throughput of more ranks."""

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
from pathlib import Path
from statistics import median

from jobs.slurm import queue
from jobs.slurm.job import check_slurm
from jobs.slurm.site import Site
from pipeline.bench.rows import BenchRow, compare, interleave
from pipeline.config import as_mapping, dump_yaml
from pipeline.data import toy
from pipeline.errors import ResourceError
from pipeline.runs import journal

PATIENCE_S = 300.0
SMALL = ("tracking.register=null", "evaluation.latency_repeats=0", "logging.every=1 steps")
STATE = "baseline/imagenet_resnet50"  # whose state is saved on a warning: 25.6 million parameters
TINY = ("data.side_px=32", "data.shuffle=full", "training.batch_size=4", "family.resolutions_px=[]")


@contextmanager
def _desk() -> Iterator[Path]:
    """A folder below the runs here, which the nodes see too, with drawn images."""
    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="runs")).absolute()
    try:
        toy.make(folder / "images")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def starts(recipe: str, overrides: Sequence[str], site: Site, *, nodes: int, rounds: int) -> list[BenchRow]:
    """Seconds from the start of a job's script, and of the command by hand with as many workers, to the first step."""
    check_slurm()
    with _desk() as desk:
        asked = [recipe, f"data.root={desk}/images", *SMALL, *overrides]
        runs: dict[str, Callable[[], float]] = {
            "job start to first step": lambda: _job(desk, asked, site, nodes),
            "by hand to first step": lambda: _hand(desk, asked, nodes),
        }
        return compare(interleave(runs, rounds), "job start to first step", "s")


def _hand(desk: Path, asked: Sequence[str], workers: int) -> float:
    run = _new(desk)
    given = [f"compute.workers={workers}", "compute.cpus_per_worker=1", "compute.device=cpu"]
    began = time.time()
    _adaptnet("train", asked[0], *given, *asked[1:], "--run-dir", str(run))
    return _first_step(run) - began


def _job(desk: Path, asked: Sequence[str], site: Site, nodes: int) -> float:
    run = _new(desk)
    stamp = desk / f"{run.name}-began"
    stamped = site.model_copy(update={"setup": (*site.setup, f"date +%s.%N > {shlex.quote(str(stamp))}")})
    _submit(desk, run, asked, stamped, nodes)
    _until(lambda: not queue.state_of(queue.find(str(run))).lives, run)
    return _first_step(run) - float(stamp.read_text())


def warnings(overrides: Sequence[str], site: Site, *, nodes: int, rounds: int) -> list[BenchRow]:
    """Seconds from SLURM's warning signal to a whole checkpoint of all ranks, of a ResNet-50 with its momentum."""
    check_slurm()
    found, size = [], 0
    with _desk() as desk:
        for _ in range(rounds):
            run = _new(desk)
            never = ["checkpoint.every=100000 steps", "evaluation.every=100000 epochs", "training.epochs=100000"]
            asked = [STATE, f"data.root={desk}/images", *SMALL, *TINY, *never, *overrides]
            job = _submit(desk, run, asked, site, nodes)
            _until(lambda run=run: len(_steps(run)) > 1, run)  # type: ignore[misc]
            began = time.time()
            queue.tell("scancel", "--signal", "USR2", job)
            _until(lambda run=run: bool(_whole(run)), run)  # type: ignore[misc]
            found.append(_whole(run)[0].stat().st_mtime - began)
            size = sum(path.stat().st_size for path in _whole(run)[0].parent.iterdir())
            queue.tell("scancel", job)
            _until(lambda run=run: not queue.state_of(queue.find(str(run))).lives, run)  # type: ignore[misc]
    return [BenchRow("warning to all ranks saved", median(found), "s"), BenchRow("a checkpoint", size / 1e6, "MB")]


def ranks(recipe: str, overrides: Sequence[str], *, worlds: Sequence[int], rounds: int) -> list[BenchRow]:
    """Images/s of trainings on so many workers of this machine, which share its CPUs, against one worker's."""
    with _desk() as desk:
        asked = [recipe, f"data.root={desk}/images", *SMALL, "logging.every=10 steps", *overrides]
        runs = {f"{world} workers": lambda world=world: _rate(desk, asked, world) for world in worlds}
        found = interleave(runs, rounds)
    first, *others = found
    rows = [BenchRow(first, median(found[first]))]
    for name in others:
        ratio = median(mine / theirs for mine, theirs in zip(found[name], found[first], strict=True))
        rows.append(BenchRow(name, median(found[name]), peer=first, ratio=ratio))
    return rows


def _rate(desk: Path, asked: Sequence[str], world: int) -> float:
    run = _new(desk)
    share = max(0.1, len(os.sched_getaffinity(0)) / world)
    given = [f"compute.workers={world}", f"compute.cpus_per_worker={min(1.0, share):g}", "compute.device=cpu"]
    _adaptnet("train", asked[0], *given, *asked[1:], "--run-dir", str(run))
    rates = [record["value"] for record in _records(run) if record.get("key") == "time/images_per_s"]
    return median(rates[1:] or rates)


def _new(desk: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="run-", dir=desk))


def _submit(desk: Path, run: Path, asked: Sequence[str], site: Site, nodes: int) -> str:
    profile = desk / f"{run.name}.yaml"
    profile.write_text(dump_yaml(as_mapping(site)))
    given = ["--run-dir", str(run), "--site", str(profile), "--nodes", str(nodes), "--time", "20m"]
    printed = _adaptnet("submit", "train", *asked, *given)
    return re.findall(r"^job (\S+):", printed, re.MULTILINE)[0]


def _adaptnet(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ResourceError(f"adaptnet {' '.join(words[:3])} failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


def _steps(run: Path) -> list[float]:
    """When each logged step was done."""
    return [record["time"] for record in _records(run) if record.get("key") == "train/loss"]


def _records(run: Path) -> list[journal.Record]:
    path = run / "journal" / f"rank0{journal.SUFFIX}"
    return list(journal.read_all(path)) if path.is_file() else []


def _first_step(run: Path) -> float:
    found = _steps(run)
    if not found:
        raise ResourceError(f"{run}: no step was trained; {' / '.join(_log(run)[-3:])}")
    return found[0]


def _whole(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-*/COMPLETE.json"))


def _log(run: Path) -> list[str]:
    return [line for path in run.glob("slurm/*_log.out") for line in path.read_text(errors="replace").splitlines()]


def _until(holds: Callable[[], bool], run: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise ResourceError(f"{run}: not within {PATIENCE_S:g} s; {' / '.join(_log(run)[-3:])}")
        time.sleep(0.2)
