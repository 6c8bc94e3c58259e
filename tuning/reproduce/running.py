"""Trains the arms of a claim, seed by seed, so that partial results have equally many seeds of each arm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pipeline.data.index import open_splits
from pipeline.deploy import evaluations
from pipeline.errors import CheckpointError, ConfigError, DivergedError
from pipeline.evaluation.robustness import ResolutionSweep
from pipeline.execution import launch, seeds
from pipeline.execution.launch import Result
from pipeline.execution.seeds import SeedRun
from pipeline.runs import records, seed_runs
from pipeline.runs.files import read_json, write_json
from tuning.reproduce import results
from tuning.reproduce.claim import ExtraEvaluation, LoadedClaim, override_texts
from tuning.reproduce.kept import evaluation_of
from tuning.reproduce.measuring import ClaimFigures

CLAIM, CLAIM_FORMAT = "claim.json", 1
ASKED_EVERY_S = 1.0
TrainOne: TypeAlias = Callable[[SeedRun], Result]


class Deadline:
    """Asks the run that trains to save and stop once the time is over; without hours it never is."""

    def __init__(self, hours: float | None) -> None:
        self._ends = None if hours is None else time.monotonic() + 3600 * hours

    @property
    def is_over(self) -> bool:
        return self._ends is not None and time.monotonic() >= self._ends

    @contextmanager
    def over(self, run_dir: Path) -> Iterator[None]:
        """Within the block, a file `stop` appears in the run's folder once the time is over."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(run_dir.absolute(), ended), name="deadline", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, run_dir: Path, ended: threading.Event) -> None:
        while not ended.wait(ASKED_EVERY_S):
            if self.is_over and run_dir.is_dir() and not records.read_status(run_dir).finished:
                (run_dir / "stop").touch()  # again and again: a run that starts removes an old one


@dataclass(frozen=True)
class ClaimRun:
    """One run of a claim."""

    arm: str
    run: SeedRun

    @property
    def name(self) -> str:
        return self.run.folder.name


@dataclass
class ClaimOutcome:
    """How far a claim came. left: the runs that are not done. diverged {run: error}."""

    left: list[str] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)


def images_of(claim: LoadedClaim) -> str:
    """The identity of the images that the arms are evaluated on. Raises DataError if they cannot be read."""
    config = next(iter(claim.arms.values()))
    return open_splits(launch.absolute(config).data, config.seed).val.identity


def open_folder(claim: LoadedClaim, folder: Path, images: str, *, resume: bool) -> Path:
    """The claim's folder, with claim.json written before the first run. images: as of `images_of`.

    Raises ConfigError if runs have begun in it and `resume` is not set, CheckpointError if they were begun by another
    file, with other overrides or images: the rules of a verdict are fixed before its runs.
    """
    folder = launch.make_folder(folder)
    mine = {"format": CLAIM_FORMAT, "claim": claim.name, "sha256": claim.sha256, "overrides": list(claim.learned)}
    mine["images"] = images
    if not any(seed_runs.stem_of(path.parent.name) for path in folder.glob("*/config.yaml")):
        write_json(folder / CLAIM, mine)
        return folder
    if not resume:
        raise ConfigError(
            f"{folder}: holds runs of a claim; go on with --resume, or begin anew in another folder with --run-dir",
            key="--resume",
            subject=folder,
        )
    _check_same(folder, mine)
    return folder


def _check_same(folder: Path, mine: Mapping[str, object]) -> None:
    try:
        found = read_json(folder / CLAIM)
    except (OSError, ValueError):
        found = None
    held = found if isinstance(found, dict) else {}
    changes = {"sha256": "the claim's file has another SHA-256", "overrides": "other overrides were given"}
    for key, what in {**changes, "images": "the evaluated images are others"}.items():
        if held.get(key) != mine[key]:
            raise CheckpointError(
                f"{folder}: {what} than when it was begun ({mine[key]}, not {held.get(key)}), and the rules of a "
                "verdict must not change after its runs; restore them, or begin anew in another folder with --run-dir",
                key=f"claim.{key}",
                subject=folder,
            )


def plan(claim: LoadedClaim, folder: Path, count: int) -> list[ClaimRun]:
    """All runs of `count` seeds in their order: every arm with the first seed, then with the next one.

    An arm is registered by its first seed alone. Raises ConfigError for a name that is too long.
    """
    by_arm = {arm: seeds.plan(config, count, folder / arm) for arm, config in claim.arms.items()}
    return [ClaimRun(arm, _registered(runs[n], first=n == 0)) for n in range(count) for arm, runs in by_arm.items()]


def _registered(run: SeedRun, *, first: bool) -> SeedRun:
    if first:
        return run
    tracking = run.config.tracking.model_copy(update={"register": None})
    return SeedRun(run.config.model_copy(update={"tracking": tracking}), run.folder)


def train(
    measured: ClaimFigures,
    runs: Sequence[ClaimRun],
    train_one: TrainOne,
    deadline: Deadline,
    images: str,
) -> ClaimOutcome:
    """Trains and evaluates what is left of `runs` one after the other, and writes result.json after each.

    A finished or kept run is not repeated, an unfinished one resumes. Each finished run is kept, those of before too. A
    kept run is no member of its arm's group of runs.
    A run that diverges keeps no other from training. Ends after the run that was asked to stop. images: as of
    `images_of`. Raises what `train_one` raises but for that.
    """
    claim, outcome = measured.claim, ClaimOutcome()
    planned = len(runs) // len(claim.arms)
    for arm in claim.arms:
        own = [each.run for each in runs if each.arm == arm and not measured.kept.find(arm, each.run.config.seed)]
        if own:
            seeds.create(own)
        _keep(measured, arm, images)
    for each in runs:
        if measured.is_done(each.arm, each.run.config.seed):
            continue
        if deadline.is_over or not _train(claim, each, train_one, deadline, outcome):
            break
        _keep(measured, each.arm, images)
        results.write(measured, planned)
    results.write(measured, planned)
    outcome.left = [each.name for each in runs if not measured.is_done(each.arm, each.run.config.seed)]
    return outcome


def _keep(measured: ClaimFigures, arm: str, images: str) -> None:
    """Keeps the finished runs of an arm."""
    for seed in measured.seeds_of(arm):
        measured.kept.add(arm, seed, measured.run_of(arm, seed), images)


def _train(
    claim: LoadedClaim,
    each: ClaimRun,
    train_one: TrainOne,
    deadline: Deadline,
    outcome: ClaimOutcome,
) -> bool:
    """Trains and evaluates one run; False if it was asked to stop."""
    try:
        with deadline.over(each.run.folder):
            result = seeds.member(each.run, train_one)
    except DivergedError as error:
        outcome.diverged[each.name] = str(error)
        return True
    for name, extra in claim.config.evaluations_of(each.arm).items() if result.finished else ():
        _evaluate(each.run.folder, name, extra)
    return result.finished


def _evaluate(run: Path, name: str, extra: ExtraEvaluation) -> None:
    """Makes an evaluation of the run's last checkpoint, if it is not there yet."""
    out = evaluation_of(run, name)
    if (out / records.ABOUT).is_file():
        return
    evaluations.evaluate(
        str(run),
        [*override_texts(extra.overrides), "evaluation.latency_repeats=0"],
        policies=extra.policies,
        out=out,
        sweep=ResolutionSweep(extra.sides_px, extra.up_again) if extra.sides_px else None,
    )


def remaining(measured: ClaimFigures, runs: Sequence[ClaimRun]) -> dict[str, int]:
    """The number of runs of each arm that are not done."""
    left = [each.arm for each in runs if not measured.is_done(each.arm, each.run.config.seed)]
    return {arm: left.count(arm) for arm in measured.claim.arms}
