"""The overhead of a sweep: seconds for one of its trials against the same training alone."""

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
    """Trains TRIALS times in a row, alone and as a sweep, in turns on one Ray; returns the seconds of one training.

    For a toy recipe it draws the images. Raises ResourceError if a trial of the sweep was not trained.
    """
    with tempfile.TemporaryDirectory(prefix="adaptnet-overhead-") as scratch:
        images = toy.make(Path(scratch) / "images")
        settings = [*SMALL, *([f"data.root={images}"] if recipe.endswith("/toy") else []), *overrides]
        compute = run_config.load(recipe, settings, data_home=data_home).compute
        with cluster.cluster(compute) if compute.workers != 0 else nullcontext():
            runs: dict[str, Callable[[], float]] = {
                "training alone": lambda: _alone(Path(tempfile.mkdtemp(dir=scratch)), recipe, settings, data_home),
                "a trial of a sweep": lambda: _swept(Path(tempfile.mkdtemp(dir=scratch)), recipe, settings, data_home),
            }
            _alone(Path(tempfile.mkdtemp(dir=scratch)), recipe, settings, data_home, trials=1)  # warm-up
            seconds = interleave(runs, rounds)
    return _rows(seconds)


def _rows(measured: dict[str, list[float]]) -> list[BenchRow]:
    from statistics import median

    alone, swept = (median(seconds) for seconds in measured.values())
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
    outcome = sweep.run(config.load(str(path), [*overrides, "concurrency=1"], data_home=data_home), folder / "sweep")
    if not outcome.finished or outcome.failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items())
        raise ResourceError(
            f"bench scaling --sweep: not every trial was trained, so there is no result; {reasons or outcome.tally}",
            key="--sweep",
            subject=reasons,
        )
    return (time.perf_counter() - started) / TRIALS
