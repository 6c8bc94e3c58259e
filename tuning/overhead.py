"""What a sweep costs beside its trainings: seconds of a trial of it against the same training alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from pipeline import run_config
from pipeline.bench.rows import BenchRow, interleave
from pipeline.data import toy
from pipeline.errors import ResourceError
from pipeline.execution import cluster, launch
from tuning import config, sweep

TRIALS = 3
SMALL = ("tracking.register=null", "evaluation.latency_repeats=0")


def overhead(
    recipe: str, overrides: Sequence[str] = (), *, rounds: int = 1, data_home: str | None = None
) -> list[BenchRow]:
    """TRIALS trainings one after another, alone and as a sweep, on one connected Ray, in turns; seconds of one.

    Images are drawn where the recipe's are the toy set's.
    """
    with tempfile.TemporaryDirectory(prefix="adaptnet-overhead-") as scratch:
        images = toy.make(Path(scratch) / "images")
        asked = [*SMALL, *([f"data.root={images}"] if recipe.endswith("/toy") else []), *overrides]
        compute = run_config.load(recipe, asked, data_home=data_home).compute
        with cluster.cluster(compute) if compute.workers != 0 else nullcontext():
            runs: dict[str, Callable[[], float]] = {
                "training alone": lambda: _alone(Path(tempfile.mkdtemp(dir=scratch)), recipe, asked, data_home),
                "a trial of a sweep": lambda: _swept(Path(tempfile.mkdtemp(dir=scratch)), recipe, asked, data_home),
            }
            _alone(Path(tempfile.mkdtemp(dir=scratch)), recipe, asked, data_home, trials=1)  # warms up
            found = interleave(runs, rounds)
    return _rows(found)


def _rows(found: dict[str, list[float]]) -> list[BenchRow]:
    from statistics import median

    alone, swept = (median(seconds) for seconds in found.values())
    return [
        BenchRow("training alone", alone, "s"),
        BenchRow("a trial of a sweep", swept, "s", "training alone", swept / alone),
    ]


def _alone(folder: Path, recipe: str, overrides: Sequence[str], data_home: str | None, trials: int = TRIALS) -> float:
    started = time.perf_counter()
    for seed in range(1, trials + 1):
        launch.train(run_config.load(recipe, [*overrides, f"seed={seed}"], data_home=data_home), folder / f"{seed}")
    return (time.perf_counter() - started) / trials


def _swept(folder: Path, recipe: str, overrides: Sequence[str], data_home: str | None) -> float:
    path = folder / "seeds.yaml"
    seeds = ", ".join(map(str, range(1, TRIALS + 1)))
    path.write_text(f"# Seeds?\nrecipe: {recipe}\nspace:\n  seed: {{grid: [{seeds}]}}\n", encoding="utf-8")
    started = time.perf_counter()
    found = sweep.run(config.load(str(path), [*overrides, "concurrency=1"], data_home=data_home), folder / "sweep")
    if not found.finished or found.failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.failed.items())
        raise ResourceError(
            f"bench scaling --sweep: not every trial was trained, so nothing is told; {reasons or found.tally}"
        )
    return (time.perf_counter() - started) / TRIALS
