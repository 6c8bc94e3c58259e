"""Trains one recipe with several seeds: each is a run of its own, and their group is the parent run in the tracker.

A group has no driver and no lease. What it records (config.yaml, results.csv, note.md, its journal) is a function of
the folders of its runs, and each run's driver writes it under a lock before and after it trains. So the runs may be
trained one after the other by one command, or at the same time by the jobs of an array, and any of them may be killed.
A seed decides initial weights, order and augmentation, net noise, and which images `data.held_out` takes.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import config as configs
from pipeline import run_config, tracking
from pipeline.data.index import open_index
from pipeline.errors import AdaptNetError, ConfigError, DivergedError, JsonValue
from pipeline.evaluation.evaluate import load_reports
from pipeline.evaluation.from_weights import FINAL
from pipeline.evaluation.over_seeds import Spread, spread
from pipeline.execution import launch
from pipeline.execution.launch import Result
from pipeline.family import Report
from pipeline.run_config import RunConfig
from pipeline.runs import lease, records, seed_runs
from pipeline.runs.files import write_text
from pipeline.runs.journal import Journal
from pipeline.runs.records import Status
from pipeline.tracking.address import locked
from pipeline.tracking.tracker import RunStatus
from pipeline.tracking.uploader import last_status
from pipeline.training import checkpoint

LOCK = "seeds.lock"
MOST_NAME_CHARS = 120
NAME = "seeds"  # name of the group's journal
SENDS_WITHIN_S = 10.0  # how long a run waits for the record of its group to be sent; it can be sent later


@dataclass(frozen=True)
class SeedRun:
    """One seed's run: its recipe and its folder."""

    config: RunConfig
    folder: Path


@dataclass(frozen=True)
class SeedOutcome:
    """The runs of a group that ended, those whose training diverged, and whether all are finished."""

    group: Path
    results: Sequence[Result]
    diverged: Mapping[str, str]  # {name of the run: error}
    finished: bool


@dataclass(frozen=True)
class PolicySpread:
    """A policy over the finished seeds: top-1 in 0..1 and mean MACs."""

    policy: str
    top1: Spread
    macs: Spread


def plan(config: RunConfig, count: int, run_dir: Path) -> list[SeedRun]:
    """The runs of `count` seeds from the recipe's own on: NAME-s1, NAME-s2, ... beside `run_dir`, the folder NAME.

    Raises ConfigError if a run's name becomes too long.
    """
    group = seed_runs.group_of(run_dir).absolute()
    return [_run_of(config, config.seed + number, group) for number in range(count)]


def _run_of(config: RunConfig, seed: int, group: Path) -> SeedRun:
    folder = seed_runs.folder_of(group, seed)
    storage = config.checkpoint.storage
    if storage is not None:
        storage = f"{storage.rstrip('/')}/{folder.name}"
    name = f"{config.name}-s{seed}"
    if len(name) > MOST_NAME_CHARS:
        raise ConfigError(
            f"name (={config.name}): with the seed it has more than {MOST_NAME_CHARS} characters; give a shorter one",
            key="name",
            subject=config.name,
        )
    tracked = config.tracking.model_copy(update={"parent": group})
    saving = config.checkpoint.model_copy(update={"storage": storage})
    changes = {"name": name, "seed": seed, "tracking": tracked, "checkpoint": saving}
    return SeedRun(config.model_copy(update=changes), folder)


def create(runs: Sequence[SeedRun], allow_changed: Sequence[str] = ()) -> Path:
    """Writes the group's config.yaml with these seeds and those that it has; returns its folder.

    Raises CheckpointError if the group is of another recipe.
    """
    first = runs[0].config
    group = launch.make_folder(_parent(first))
    path = group / "config.yaml"
    recipe = configs.as_mapping(first)
    of_group = {"parent": None, "register": None, "upload_checkpoints": False}
    recipe = configs.merge(recipe, {"name": group.name, "tracking": of_group})
    identity = run_config.fingerprint(run_config.with_teacher(first, run_config.TEACHER_BY_RUNS), "")
    with locked(group / LOCK, wait=True):
        if path.exists():
            saved = run_config.translated(configs.section(configs.read_mapping(path), "fingerprint"))
            checkpoint.check_fingerprint({**saved, "seed": identity["seed"]}, identity, allow_changed, str(group))
        seeds = sorted({*seed_runs.seeds_in(group), *(run.config.seed for run in runs)})
        mapping = {"seeds": seeds, "recipe": recipe, "fingerprint": identity}
        write_text(path, configs.dump_yaml(mapping))
    return group


def _parent(config: RunConfig) -> Path:
    assert config.tracking.parent is not None
    return config.tracking.parent


def is_member(config: RunConfig) -> bool:
    """Whether the recipe is that of one run of a group."""
    return config.tracking.parent is not None and config.seed in seed_runs.seeds_in(config.tracking.parent)


def train(runs: Sequence[SeedRun], train_one: Callable[[SeedRun], Result]) -> SeedOutcome:
    """Trains the runs one after the other with `train_one`, which resumes each; a finished one returns at once.

    A run that diverges does not keep the others from training; any other error, and a request to stop, end the whole.
    Raises what `train_one` raises but for that.
    """
    results, diverged = [], {}
    for run in runs:
        try:
            result = member(run, train_one, last=run is runs[-1])
        except DivergedError as error:
            diverged[run.config.name] = str(error)
            continue
        results.append(result)
        if not result.finished:
            break
    if diverged:
        _update(_parent(runs[0].config), "FAILED")
    finished = not diverged and len(results) == len(runs) and results[-1].finished
    return SeedOutcome(_parent(runs[0].config), results, diverged, finished)


def member(run: SeedRun, train_one: Callable[[SeedRun], Result], *, last: bool = True) -> Result:
    """`train_one(run)`, with the group's record updated before and after. Raises what `train_one` raises.

    last: this process trains no other run of the group after it. Raises ConfigError if the seeds would be evaluated on
    different images.
    """
    _check(run.config)
    group = _parent(run.config)
    _update(group, None)
    ending: RunStatus | None = "KILLED"
    try:
        result = train_one(run)
        ending = "STOPPED" if last or not result.finished else None
        return result
    except AdaptNetError:
        ending = "FAILED"
        raise
    finally:
        _update(group, ending)


def _check(config: RunConfig) -> None:
    data = config.data
    if not open_index(data.root.absolute(), data.index).meta.has_splits:
        raise ConfigError(
            f"data.root (={data.root}): has no val split, so each seed would draw its own and no two seeds could be "
            "compared; give a root with train and val, or train one seed",
            key="data.root",
            subject=data.root,
        )


# ---- the group's own record


def finished_runs(group: Path) -> dict[int, Sequence[Report]]:
    """The reports after training of each finished seed."""
    folders = {seed: seed_runs.folder_of(group, seed) for seed in seed_runs.seeds_in(group)}
    done = {seed: folder for seed, folder in folders.items() if records.read_status(folder).finished}
    return {seed: load_reports(folder / "evaluations" / FINAL) for seed, folder in done.items()}


def spreads(reports: Mapping[int, Sequence[Report]]) -> list[PolicySpread]:
    """The spread of each policy that all these seeds were evaluated under, in the order of the first."""
    by_seed = [{report.policy: report for report in each} for each in reports.values()]
    names = [name for name in by_seed[0] if all(name in each for each in by_seed)] if by_seed else []
    return [
        PolicySpread(
            name,
            spread([each[name].top1 for each in by_seed]),
            spread([each[name].macs_mean for each in by_seed]),
        )
        for name in names
    ]


def _update(group: Path, ending: RunStatus | None) -> None:
    """Writes the group's record and sends it. ending: how the run of one seed ended, if it did not finish."""
    with locked(group / LOCK, wait=True):
        seeds, done = seed_runs.seeds_in(group), finished_runs(group)
        status = _status(group, len(done) == len(seeds), ending)
        _write(group, done)
        records.write_status(group, Status(finished=status == "FINISHED", trials=f"{len(done)} of {len(seeds)} seeds"))
        _note(group, status)
        _send(group, final=status is not None)


def _status(group: Path, complete: bool, ending: RunStatus | None) -> RunStatus | None:
    """How the group ended; None while a run of it trains."""
    if complete:
        return "FINISHED"
    live = any(lease.is_live(seed_runs.folder_of(group, seed)) for seed in seed_runs.seeds_in(group))
    return None if live else ending


def _note(group: Path, status: RunStatus | None) -> None:
    """Writes the group's start or end into its journal, if it is not there yet."""
    last = last_status(group) or {"event": None}
    if (last["event"], last.get("status")) == ("driver-started" if status is None else "driver-ended", status):
        return
    writer = Journal(group / "journal", "driver")
    if status is None:
        writer.event("driver-started", command=[])
    else:
        writer.event("driver-ended", status=status, error=None)
    writer.close()


def _write(group: Path, done: Mapping[int, Sequence[Report]]) -> None:
    """Writes results.csv, the note, and metrics at the step that is the number of finished seeds."""
    found = spreads(done)
    if not found:
        return
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(_rows(done))
    write_text(group / "results.csv", file.getvalue())
    write_text(group / "note.md", "".join(_markdown(found, done)))
    values = {"seeds/finished": float(len(done))}
    for each in found:
        values |= {f"seeds/{each.policy}/top1_mean": each.top1.mean, f"seeds/{each.policy}/macs_mean": each.macs.mean}
        values |= {f"seeds/{each.policy}/top1_sd": each.top1.sd} if each.top1.sd is not None else {}
    writer = Journal(group / "journal", NAME)
    writer.metrics(len(done), values)
    writer.close()


def _rows(done: Mapping[int, Sequence[Report]]) -> Iterator[Sequence[object]]:
    yield ("seed", "policy", "images", "top1", "macs_mean")
    for seed, reports in done.items():
        yield from ((seed, r.policy, r.num_images, r.top1, r.macs_mean) for r in reports)


def _markdown(found: Sequence[PolicySpread], done: Mapping[int, Sequence[Report]]) -> Iterator[str]:
    yield f"Seeds {', '.join(map(str, done))}: mean and standard deviation (over n - 1).\n\n"
    yield "| policy | top-1 % | MMACs | n |\n|---|---|---|---|\n"
    for each in found:
        top1, macs = ([value.mean, *([] if value.sd is None else [value.sd])] for value in (each.top1, each.macs))
        cells = (" ± ".join(f"{100 * v:.2f}" for v in top1), " ± ".join(f"{v / 1e6:.3f}" for v in macs))
        yield f"| {each.policy} | {cells[0]} | {cells[1]} | {each.top1.n} |\n"


def _send(group: Path, *, final: bool) -> None:
    """Sends the record to the trackers, for at most SENDS_WITHIN_S; `adaptnet runs sync` sends what is left."""
    config = tracking.tracking_config(group)
    recipe: dict[str, JsonValue] = {**tracking.recipe_of(group), "seeds": list(seed_runs.seeds_in(group))}
    thread = threading.Thread(
        target=lambda: tracking.send_once(group, config, recipe, final=final), name="group", daemon=True
    )
    thread.start()
    thread.join(SENDS_WITHIN_S)
