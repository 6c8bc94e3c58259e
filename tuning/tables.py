"""A sweep's trials as tables: results.csv, results.json, the columns that fit a screen, and the note of its run."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline import family as families
from pipeline.runs.files import write_json, write_text
from tuning.config import Sweep
from tuning.metrics import MEAN
from tuning.record import Trial
from tuning.selection import best, frontier
from tuning.space import written

NOTE_CHARS = 4800  # most characters of the note; trackers accept 5000
CELL_CHARS = 70  # most characters of a cell on a screen; a trial's name is shorter
STATES = ("finished", "stopped", "failed", "refused", "running", "planned")
Rows = Sequence[Sequence[str]]


def rows(sweep: Sweep, trials: Sequence[Trial]) -> list[list[str]]:
    """The cells of results.csv, headings first: trial, drawn values, state, step, frontier (*) and every metric.

    Without times, so that an interrupted sweep gives the same table, and without profiles.
    """
    on_frontier = {trial.name for trial in frontier(sweep.config, trials)}
    profile = f"{families.find(sweep.base.family.name).profile.name}/"
    keys = list(dict.fromkeys(key for trial in trials for key in trial.sample.shown))
    names = list(dict.fromkeys(name for trial in trials for name in trial.metrics if not name.startswith(profile)))
    table = [["trial", *keys, "state", "step", "frontier", *names]]
    for trial in trials:
        values = trial.sample.values
        drawn = [written(values[key]) if key in values else "" for key in keys]
        state = f"{trial.state} ({trial.reason})" if trial.reason else trial.state
        metrics = [f"{trial.metrics[name]:.6g}" if name in trial.metrics else "" for name in names]
        table.append([trial.name, *drawn, state, str(trial.step), "*" if trial.name in on_frontier else "", *metrics])
    return table


def tally(trials: Sequence[Trial]) -> str:
    """The number of trials in each state; for stopped and refused ones also by reason."""
    counts = Counter[str](trial.state for trial in trials)
    parts = [f"{counts[state]} {state}{_reasons(state, trials)}" for state in STATES if counts[state]]
    return ", ".join(parts) or "none drawn"


def _reasons(state: str, trials: Sequence[Trial]) -> str:
    if state not in ("stopped", "refused"):
        return ""
    counts = Counter(trial.reason.partition(":")[0] for trial in trials if trial.state == state)
    return f" ({', '.join(f'{count} by {reason}' for reason, count in sorted(counts.items()))})"


def brief(sweep: Sweep, table: Rows) -> list[list[str]]:
    """The columns of `table` that fit a screen: drawn values, state, objectives, top-1 of each policy, family facts."""
    heading = table[0]
    end = heading.index("frontier") + 1
    wanted = [*sweep.config.objectives, sweep.config.cost_metric]
    tops = [name for name in heading[end:] if name.endswith("/top1") and not name.startswith(MEAN)]
    wanted += tops[1:] if "top1" in wanted else tops  # "top1" alone is the first policy's
    facts = families.find(sweep.base.family.name).summary_facts
    wanted += [name for name in heading[end:] if name.rpartition("/")[2] in facts]
    places = list(range(end)) + [heading.index(name) for name in dict.fromkeys(wanted) if name in heading[end:]]
    return [[_cut(row[place]) for place in places] for row in table]


def _cut(cell: str) -> str:
    """Shortens a state with a long reason; results.csv has the reason in full."""
    return cell if len(cell) <= CELL_CHARS else f"{cell[: CELL_CHARS - 1]}…"


def write(run_dir: Path, sweep: Sweep, trials: Sequence[Trial], table: Rows) -> None:
    """Writes results.csv, results.json and note.md into the sweep's folder."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    write_text(run_dir / "results.csv", text.getvalue())
    write_json(run_dir / "results.json", [_entry(trial) for trial in trials])
    write_text(run_dir / "note.md", _note(sweep, trials, brief(sweep, table)) + "\n")


def _entry(trial: Trial) -> dict[str, object]:
    """A trial in results.json."""
    return {
        "trial": trial.name,
        "values": trial.sample.values,
        "state": trial.state,
        "reason": trial.reason,
        "step": trial.step,
        "metrics": trial.metrics,
        "judged": trial.judged,
        "price": asdict(trial.cost) if trial.cost else {},
    }


def _note(sweep: Sweep, trials: Sequence[Trial], shown: Rows) -> str:
    chosen = best(sweep.config, trials)
    lines = [" | ".join(cell.replace("|", "/") for cell in row) for row in shown]
    lines.insert(1, " | ".join("---" for _ in shown[0]))
    summary = f"{tally(trials)}{f'; best: {chosen.name}' if chosen else ''}; plots/frontier.png"
    note = f"{sweep.config.question}\n\n{summary}\n\n" + "\n".join(f"| {line} |" for line in lines)
    return note if len(note) <= NOTE_CHARS else note[: note[:NOTE_CHARS].rfind("\n")] + "\n\n(more in results.csv)"
