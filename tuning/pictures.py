"""A sweep's pictures as PNG: frontier, parallel coordinates, curves over one another, memory, and profiles of nets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline import family as families
from pipeline.family import Profile
from pipeline.runs import journal
from tuning.config import Sweep
from tuning.record import Trial
from tuning.selection import frontier
from tuning.space import written

if TYPE_CHECKING:  # Matplotlib takes a second to import
    from matplotlib.axes import Axes

DPI = 120
MOST_NAMED = 12  # points or curves with a label
NAME_CHARS = 40  # most characters of a trial's label
TICK_CHARS = 24  # most characters of a tick's label
Column: TypeAlias = "Sequence[object]"  # a value for each trial, None if it has none
Heights: TypeAlias = "Sequence[float | None]"  # positions on an axis from 0 to 1


def draw(sweep: Sweep, run_dir: Path, trials: Sequence[Trial]) -> None:
    """Draws the pictures for which there is data into RUN/plots."""
    config = sweep.config
    done = [trial for trial in trials if config.accuracy_metric in trial.metrics]
    profile = families.find(sweep.base.family.name).profile
    pictures: dict[str, Callable[[Axes], None]] = {}
    if any(config.cost_metric in trial.metrics for trial in done):
        pictures["frontier"] = partial(_frontier, sweep=sweep, trials=done, cost=config.cost_metric)
    if len(_varying(done)) and len(done) > 1:
        pictures["parallel"] = partial(_parallel, sweep=sweep, trials=done)
    if config.memory and any("memory_mib" in trial.metrics for trial in done):
        pictures["memory"] = partial(_frontier, sweep=sweep, trials=done, cost="memory_mib")
    if config.profiles and any(_along(trial, profile) for trial in done):
        pictures["profiles"] = partial(_profiles, sweep=sweep, trials=done, profile=profile)
    for number, pattern in enumerate(config.curves):
        pictures[f"curves-{number}"] = partial(_curves, run_dir=run_dir, trials=trials, pattern=pattern)
    (run_dir / "plots").mkdir(exist_ok=True)
    for name, fill in pictures.items():
        _save(run_dir / "plots" / f"{name}.png", fill, title=f"{config.name}: {name}")


def _save(path: Path, fill: Callable[[Axes], None], *, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    fill(figure.add_subplot(title=title))
    figure.savefig(path, dpi=DPI)


def _frontier(axes: Axes, sweep: Sweep, trials: Sequence[Trial], cost: str) -> None:
    """Accuracy against cost, with a line through the frontier; trials that stopped early are hollow."""
    accuracy = sweep.config.accuracy_metric
    shown = [trial for trial in trials if cost in trial.metrics]
    best = frontier(sweep.config, shown) if cost == sweep.config.cost_metric else []
    for state, face in (("finished", "tab:blue"), ("stopped", "none")):
        chosen = [trial for trial in shown if trial.state == state]
        if chosen:
            axes.scatter(*_points(chosen, cost, accuracy), facecolors=face, edgecolors="tab:blue", label=state)
    if best:
        axes.plot(*_points(best, cost, accuracy), color="tab:orange", label="frontier")
    for trial in (best or shown)[:MOST_NAMED]:
        place = (trial.metrics[cost], trial.metrics[accuracy])
        axes.annotate(_label(trial), place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel=cost, ylabel=accuracy)
    axes.margins(x=0.12)  # room for the label of the rightmost point
    axes.grid(alpha=0.3)
    axes.legend()


def _points(trials: Sequence[Trial], x: str, y: str) -> tuple[list[float], list[float]]:
    return [trial.metrics[x] for trial in trials], [trial.metrics[y] for trial in trials]


def _label(trial: Trial) -> str:
    return ", ".join(written(value) for value in trial.sample.shown.values())[:NAME_CHARS]


def _varying(trials: Sequence[Trial]) -> dict[str, Column]:
    """{key: its value in each trial} of the drawn keys that do not have the same value in all of them."""
    keys = dict.fromkeys(key for trial in trials for key in trial.sample.shown)
    columns = {key: [trial.sample.values.get(key) for trial in trials] for key in keys}
    return {key: values for key, values in columns.items() if len({written(value) for value in values}) > 1}


def _parallel(axes: Axes, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """A line for each trial through its drawn values to its metrics, coloured by the first objective."""
    from matplotlib import colormaps

    accuracy = sweep.config.accuracy_metric
    columns = _varying(trials)
    for name in (sweep.config.cost_metric, accuracy):
        columns[name] = [trial.metrics.get(name) for trial in trials]
    scaled = {key: _scaled(values) for key, values in columns.items()}
    colours = scaled[accuracy][0]
    for number in range(len(trials)):
        line = [float("nan") if height is None else height for height in (scaled[key][0][number] for key in columns)]
        axes.plot(range(len(columns)), line, color=colormaps["viridis"](colours[number] or 0.0), alpha=0.8)
    for place, key in enumerate(columns):
        axes.axvline(place, color="grey", linewidth=0.6)
        for height, text in scaled[key][1]:
            axes.annotate(text, (place, height), fontsize=7, xytext=(3, 0), textcoords="offset points")
    axes.set_xticks(range(len(columns)), [key.rpartition("family.")[2] for key in columns], fontsize=8)
    axes.set_yticks([])


def _scaled(values: Column) -> tuple[Heights, list[tuple[float, str]]]:
    """The values' positions on an axis from 0 to 1, and the texts beside the axis with theirs."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == sum(value is not None for value in values):
        low, high = min(numbers), max(numbers)
        span = (high - low) or 1
        heights = [(value - low) / span if isinstance(value, int | float) else None for value in values]
        return heights, [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if high > low else [(0.0, f"{low:.4g}")]
    texts = list(dict.fromkeys(written(value) for value in values if value is not None))
    step = 1 / max(1, len(texts) - 1)
    places = [None if value is None else texts.index(written(value)) * step for value in values]
    return places, [(number * step, text[:TICK_CHARS]) for number, text in enumerate(texts[:MOST_NAMED])]


def _curves(axes: Axes, run_dir: Path, trials: Sequence[Trial], pattern: str) -> None:
    """Every metric that `pattern` matches, in one colour for each trial."""
    for number, trial in enumerate(trial for trial in trials if (run_dir / "trials" / trial.name).is_dir()):
        curves = journal.curves(run_dir / "trials" / trial.name / "journal")
        chosen = [points for key, points in curves.items() if re.fullmatch(pattern, key)]
        for place, points in enumerate(chosen):
            label = (_label(trial) or trial.name) if place == 0 and number < MOST_NAMED else None
            axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", alpha=0.8, label=label)
    axes.set(xlabel="step", ylabel=pattern)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _along(trial: Trial, profile: Profile) -> list[float]:
    """The profile of the trial's net; empty if it was not measured."""
    return [trial.metrics[name] for name in sorted(trial.metrics) if name.startswith(f"{profile.name}/")]


def _profiles(axes: Axes, sweep: Sweep, trials: Sequence[Trial], profile: Profile) -> None:
    """The profiles of the best and the worst random sample, and of every case without randomness."""
    accuracy, sign = sweep.config.accuracy_metric, sweep.config.sign(sweep.config.accuracy_metric)
    done = [trial for trial in trials if trial.state == "finished" and _along(trial, profile)]
    random = [trial for trial in done if any(each.kind != "fixed" for each in sweep.cases[trial.sample.case])]
    named = [(trial, _label(trial)) for trial in done if trial not in random]
    random.sort(key=lambda trial: sign * trial.metrics[accuracy])
    named += [(random[-1], "best drawn"), (random[0], "worst drawn")] if random else []
    for trial, text in named:
        axes.plot(_along(trial, profile), marker=".", label=f"{text}: {_metric(trial.metrics, accuracy)}")
    axes.set(xlabel=profile.x_label, ylabel=profile.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _metric(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.4g}"
