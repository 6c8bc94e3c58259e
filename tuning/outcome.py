"""The outcome of a sweep: its files when it ends or is interrupted, and the registration of a trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.registry.catalogue import Version
from pipeline.registry.publishing import publish_run
from pipeline.runs import records
from pipeline.runs.records import Status
from tuning import pictures, tables
from tuning.config import Sweep
from tuning.record import ENDED, Trial
from tuning.selection import best, frontier


@dataclass(frozen=True)
class Outcome:
    """A sweep's state when its driver returns.

    finished: nothing is left to train. rows: the cells for a screen, headings first. frontier: the trials that no
    other one beats. failed {trial: reason}. run_id and tracking_uri: the sweep's tracked run, if there is one.
    """

    run_dir: Path
    finished: bool
    rows: Sequence[Sequence[str]] = ()
    frontier: Sequence[str] = ()
    best: str | None = None
    failed: dict[str, str] = field(default_factory=dict)
    tally: str = ""
    run_id: str | None = None
    tracking_uri: str | None = None


def conclude(
    sweep: Sweep, run_dir: Path, trials: Sequence[Trial], *, run_id: str | None = None, uri: str | None = None
) -> Outcome:
    """Writes results.csv, results.json, note.md, status.json and the pictures; returns the sweep's state.

    run_id and uri are those of the sweep's tracked run.
    """
    config, table = sweep.config, tables.rows(sweep, trials)
    chosen = best(config, trials)
    tables.write(run_dir, sweep, trials, table)
    pictures.draw(sweep, run_dir, trials)
    ended = all(trial.state in ENDED for trial in trials)
    finished = ended and (config.search.kind != "optuna" or len(trials) >= config.search.samples)
    best_trial = chosen.name if chosen else None
    status = Status(finished=finished, trials=tables.tally(trials), best_trial=best_trial)
    records.write_status(run_dir, status)
    return Outcome(
        run_dir=run_dir,
        finished=finished,
        rows=tables.brief(sweep, table),
        frontier=[trial.name for trial in frontier(config, trials)],
        best=best_trial,
        failed={trial.name: trial.reason for trial in trials if trial.state == "failed"},
        tally=tables.tally(trials),
        run_id=run_id,
        tracking_uri=uri,
    )


def register(outcome: Outcome, name: str, trial: str | None = None) -> Version:
    """Registers the best trial, or the one called `trial`, as a version of `name` with the alias candidate.

    Raises ConfigError if there is no such trial, it was not trained to completion, or its run was never sent.
    """
    from pipeline.tracking.ledger import Ledger

    chosen = trial or outcome.best
    if chosen is None:
        raise ConfigError(f"{outcome.run_dir}: no trial has finished, so there is none to register", key="--register")
    folder = outcome.run_dir / "trials" / chosen
    if not folder.is_dir():
        names = sorted(path.name for path in (outcome.run_dir / "trials").glob("*"))
        close = get_close_matches(chosen, names, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"--trial (={chosen}): no such trial{hint}", key="--trial", subject=chosen)
    run_id, uri = Ledger.peek(folder).run_id, outcome.tracking_uri
    if run_id is None or uri is None:
        raise ConfigError(
            f"{folder}: the tracking server does not have this run yet; send it: adaptnet runs sync {folder}",
            key="tracking.json",
            subject=folder,
        )
    version = publish_run(folder, name, run_id=run_id, uri=uri)
    if version is None:
        raise ConfigError(
            f"--trial (={chosen}): this trial was not trained to completion; register one that was",
            key="--trial",
            subject=chosen,
        )
    return version
