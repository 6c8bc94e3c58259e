"""What a sweep has come to: a row for each trial, which of them nothing beats, tables, pictures, and the chosen one."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean

from pipeline.errors import ConfigError
from pipeline.evaluation import from_weights
from pipeline.evaluation.evaluate import load_reports
from pipeline.registry.catalogue import Version
from pipeline.registry.publishing import publish_run
from pipeline.run_config import RunConfig
from pipeline.runs import journal, records
from pipeline.runs.files import write_text
from pipeline.runs.records import Status
from tuning import cost, pictures
from tuning.config import Sweep, SweepConfig
from tuning.record import Trial
from tuning.selection import best, frontier
from tuning.space import written

METRICS = ("top1", "top5", "ece", "gmacs", "gmacs_p95", "full_share")  # of an evaluation, by policy
OF_NET = ("mparameters", "memory_mib")  # memory_mib where the sweep measures it
LOW_IS_GOOD = ("ece", "gmacs", "gmacs_p95", "full_share", *OF_NET)
MEAN = "mean"  # over all policies
NOTE_CHARS = 4800  # of the note in MLflow, which takes 5000
CELL_CHARS = 70  # of a cell on a screen; a trial's name is shorter


@dataclass(frozen=True)
class Outcome:
    """How a sweep stands. `rows` are the cells of results.csv, heading first; `frontier` the trials nothing beats."""

    run_dir: Path
    finished: bool  # nothing is left to do
    rows: Sequence[Sequence[str]]
    frontier: Sequence[str]
    best: str | None
    failed: Mapping[str, str]  # trial: why
    tally: str
    run_id: str | None
    tracking_uri: str | None


def reported(num_classes: int) -> list[str]:
    """What an evaluation on so many classes tells of each policy."""
    return [metric for metric in METRICS if metric != "top5" or num_classes > 5]


def check_objectives(config: SweepConfig, policies: Sequence[str], num_classes: int) -> None:
    """Raises ConfigError for an objective that no trial reports, before anything is trained."""
    metrics = reported(num_classes)
    known = [*metrics, *(metric for metric in OF_NET if metric != "memory_mib" or config.memory)]
    known += [f"{policy}/{metric}" for policy in (*policies, MEAN) for metric in metrics]
    for name in (*config.objectives, config.cost_metric):
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"objectives: {name}: no trial reports it; {hint}known: {', '.join(metrics)} and mparameters "
                f"(memory_mib with memory=true), of the first policy as they are, of another as POLICY/top1, of all as "
                f"{MEAN}/top1; policies: {', '.join(policies)}"
            )


# --- what a trial has come to


def final_metrics(sweep: Sweep, folder: Path, config: RunConfig) -> dict[str, float]:
    """All metrics of a finished trial, from its reports: POLICY/metric, the first policy's and the mean as well."""
    reports = load_reports(folder / "evaluations" / from_weights.FINAL)
    metrics = {key.removeprefix("eval/"): value for key, value in from_weights.metrics_of(reports).items()}
    for report in reports:
        metrics |= {f"{report.policy}/{fact}": float(sum(values)) for fact, values in report.facts.items()}
    metrics |= _of_first(metrics, reports[0].policy) if reports else {}
    for name in METRICS:
        values = [metrics[f"{report.policy}/{name}"] for report in reports if f"{report.policy}/{name}" in metrics]
        metrics |= {f"{MEAN}/{name}": fmean(values)} if values else {}
    return metrics | _of_net(sweep, folder, config)


def _of_first(metrics: Mapping[str, float], policy: str) -> dict[str, float]:
    return {name: metrics[f"{policy}/{name}"] for name in METRICS if f"{policy}/{name}" in metrics}


def _of_net(sweep: Sweep, folder: Path, config: RunConfig) -> dict[str, float]:
    """Parameters of the trained net; where the sweep asks for it memory, and the sides along it (side_px/NN)."""
    from pipeline.training import checkpoint

    best = records.read_status(folder).best
    if not best:
        return {}
    where = checkpoint.open_storage(config.checkpoint, folder).fetch(best)
    net = checkpoint.load_net(where)[0]
    found = {"mparameters": sum(p.numel() for p in net.parameters()) / 1e6}
    side = config.data.side_for_eval
    if sweep.config.memory:
        found["memory_mib"] = cost.memory_mib(net, side)
    if sweep.config.profiles:
        found |= {f"side_px/{place:02d}": float(px) for place, px in enumerate(cost.profile(net, side))}
    return found


def metrics_at(folder: Path, step: int) -> dict[str, float]:
    """What a trial that ended early had at `step`: its first policy's metrics, of the newest evaluation up to then."""
    found: dict[str, float] = {}
    for key, points in journal.curves(folder / "journal").items():
        earlier = [value for at, value in points if at <= step]
        if key.startswith("eval/") and earlier:
            found[key.removeprefix("eval/")] = earlier[-1]
    policies = {key.rpartition("/")[0] for key in found}  # one: while it trains no other is evaluated
    return found | {name: value for policy in policies for name, value in _of_first(found, policy).items()}


# --- tables


def rows(config: SweepConfig, trials: Sequence[Trial]) -> list[list[str]]:
    """Cells of results.csv, a heading first: the trial, what was drawn, how it ended, every metric. No times."""
    unbeaten = {trial.name for trial in frontier(config, trials)}
    keys = list(dict.fromkeys(key for trial in trials for key in trial.sample.shown))
    names = list(dict.fromkeys(name for trial in trials for name in trial.metrics if not name.startswith("side_px/")))
    table = [["trial", *keys, "state", "step", "frontier", *names]]
    for trial in trials:
        drawn = [written(trial.sample.values[key]) if key in trial.sample.values else "" for key in keys]
        state = f"{trial.state} ({trial.reason})" if trial.reason else trial.state
        figures = [f"{trial.metrics[name]:.6g}" if name in trial.metrics else "" for name in names]
        table.append([trial.name, *drawn, state, str(trial.step), "*" if trial.name in unbeaten else "", *figures])
    return table


def tally(trials: Sequence[Trial]) -> str:
    """How many trials are in which state; of the stopped and the refused, by what."""
    counts = Counter[str](trial.state for trial in trials)
    states = ("finished", "stopped", "failed", "refused", "running", "planned")
    return (
        ", ".join(f"{counts[state]} {state}{_why(state, trials)}" for state in states if counts[state]) or "none drawn"
    )


def _why(state: str, trials: Sequence[Trial]) -> str:
    if state not in ("stopped", "refused"):
        return ""
    why = Counter(trial.reason.partition(":")[0] for trial in trials if trial.state == state)
    return f" ({', '.join(f'{count} by {reason}' for reason, count in sorted(why.items()))})"


def brief(config: SweepConfig, table: Sequence[Sequence[str]]) -> list[list[str]]:
    """The columns of `table` that fit a screen: what was drawn, the state, and what the sweep is about."""
    heading = table[0]
    end = heading.index("frontier") + 1
    wanted = [*config.objectives, config.cost_metric]
    tops = [name for name in heading[end:] if name.endswith("/top1") and not name.startswith(MEAN)]
    wanted += tops[1:] if "top1" in wanted else tops  # the first policy's goes without its name
    wanted += [name for name in heading[end:] if name.endswith("/layers")]
    places = list(range(end)) + [heading.index(name) for name in dict.fromkeys(wanted) if name in heading[end:]]
    return [[_cut(row[place]) for place in places] for row in table]


def _cut(cell: str) -> str:
    """A state with a long reason leaves the table its width; the reason in full is in results.csv."""
    return cell if len(cell) <= CELL_CHARS else f"{cell[: CELL_CHARS - 1]}…"


def conclude(sweep: Sweep, run_dir: Path, trials: Sequence[Trial], *, tracked: Mapping[str, str | None]) -> Outcome:
    """Writes results.csv, results.json, note.md, status.json and the pictures; says what has come out."""
    config, table = sweep.config, rows(sweep.config, trials)
    chosen, unbeaten = best(config, trials), frontier(config, trials)
    _write_tables(run_dir, config, trials, table)
    pictures.draw(sweep, run_dir, trials)
    ended = all(trial.state in ("finished", "stopped", "failed", "refused") for trial in trials)
    whole = ended and (config.search.kind != "optuna" or len(trials) >= config.search.samples)
    status = Status(finished=whole, trials=tally(trials), best_trial=chosen.name if chosen else None)
    records.write_status(run_dir, status)
    uri = tracked["uri"]
    return Outcome(
        run_dir=run_dir,
        finished=whole,
        rows=brief(config, table),
        frontier=[trial.name for trial in unbeaten],
        best=chosen.name if chosen else None,
        failed={trial.name: trial.reason for trial in trials if trial.state == "failed"},
        tally=tally(trials),
        run_id=tracked["run_id"],
        tracking_uri=uri,
    )


def _write_tables(run_dir: Path, config: SweepConfig, trials: Sequence[Trial], table: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    write_text(run_dir / "results.csv", text.getvalue())
    entries = [
        {"trial": t.name, "values": t.sample.values, "state": t.state, "reason": t.reason, "step": t.step}
        | {"metrics": t.metrics, "judged": t.judged, "price": t.cost}
        for t in trials
    ]
    write_text(run_dir / "results.json", json.dumps(entries, indent=1))
    shown, chosen = brief(config, table), best(config, trials)
    lines = [" | ".join(cell.replace("|", "/") for cell in row) for row in shown]
    lines.insert(1, " | ".join("---" for _ in shown[0]))
    found = f"{tally(trials)}{f'; best: {chosen.name}' if chosen else ''}; plots/frontier.png"
    note = f"{config.question}\n\n{found}\n\n" + "\n".join(f"| {line} |" for line in lines)
    cut = note if len(note) <= NOTE_CHARS else note[: note[:NOTE_CHARS].rfind("\n")] + "\n\n(more in results.csv)"
    write_text(run_dir / "note.md", cut + "\n")


# --- the registry


def register(found: Outcome, name: str, trial: str | None = None) -> Version:
    """Makes the best trial, or the one called `trial`, a version of `name` with the alias candidate."""
    from pipeline.tracking.ledger import Ledger

    chosen = trial or found.best
    if chosen is None:
        raise ConfigError(f"{found.run_dir}: no trial has finished, so there is none to register")
    folder = found.run_dir / "trials" / chosen
    if not folder.is_dir():
        there = sorted(path.name for path in (found.run_dir / "trials").glob("*"))
        close = get_close_matches(chosen, there, 1)
        raise ConfigError(f"--trial (={chosen}): no such trial{f'; did you mean {close[0]}?' if close else ''}")
    run_id, uri = Ledger.peek(folder).run_id, found.tracking_uri
    if run_id is None or uri is None:
        raise ConfigError(f"{folder}: MLflow does not have this run yet; send it: adaptnet runs sync {folder}")
    version = publish_run(folder, name, run_id=run_id, uri=uri)
    if version is None:
        raise ConfigError(f"--trial (={chosen}): this trial was not trained to its end; register one that was")
    return version
