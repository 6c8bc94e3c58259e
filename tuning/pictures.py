"""A sweep's pictures as PNG: frontier, parallel coordinates, curves over one another, memory and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.runs import journal
from tuning.config import Sweep
from tuning.record import Trial
from tuning.selection import frontier
from tuning.space import written

DPI = 120
MOST_NAMED = 12  # points or curves that are named in a picture
Axes = Any


def draw(sweep: Sweep, run_dir: Path, trials: Sequence[Trial]) -> None:
    """Draws what there is to draw into RUN/plots."""
    done = [trial for trial in trials if sweep.config.accuracy_metric in trial.metrics]
    pictures: dict[str, Callable[[Axes], None]] = {}
    if any(sweep.config.cost_metric in trial.metrics for trial in done):
        pictures["frontier"] = lambda axes: _frontier(axes, sweep, done, sweep.config.cost_metric)
    if len(_columns(done)) and len(done) > 1:
        pictures["parallel"] = lambda axes: _parallel(axes, sweep, done)
    if sweep.config.memory and any("memory_mib" in trial.metrics for trial in done):
        pictures["memory"] = lambda axes: _frontier(axes, sweep, done, "memory_mib")
    if sweep.config.profiles and any(_profile(trial) for trial in done):
        pictures["profiles"] = lambda axes: _profiles(axes, sweep, done)
    for number, wanted in enumerate(sweep.config.curves):
        pictures[f"curves-{number}"] = partial(_curves, run_dir=run_dir, trials=trials, wanted=wanted)
    (run_dir / "plots").mkdir(exist_ok=True)
    for name, fill in pictures.items():
        _save(run_dir / "plots" / f"{name}.png", fill, title=f"{sweep.config.name}: {name}")


def _save(path: Path, fill: Callable[[Axes], None], *, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    fill(axes)
    figure.savefig(path, dpi=DPI)


def _frontier(axes: Axes, sweep: Sweep, trials: Sequence[Trial], cost: str) -> None:
    """Accuracy against cost; a line through what nothing beats, hollow what ended early."""
    config = sweep.config
    found = [trial for trial in trials if cost in trial.metrics]
    unbeaten = [trial for trial in frontier(config, found) if cost == config.cost_metric]
    for state, face in (("finished", "tab:blue"), ("stopped", "none")):
        chosen = [trial for trial in found if trial.state == state]
        points = [[trial.metrics[name] for trial in chosen] for name in (cost, config.accuracy_metric)]
        if chosen:
            axes.scatter(*points, facecolors=face, edgecolors="tab:blue", label=state)
    if unbeaten:
        line = [[trial.metrics[name] for trial in unbeaten] for name in (cost, config.accuracy_metric)]
        axes.plot(*line, color="tab:orange", label="nothing beats these")
    for trial in (unbeaten or found)[:MOST_NAMED]:
        where = (trial.metrics[cost], trial.metrics[config.accuracy_metric])
        axes.annotate(_short(trial), where, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel=cost, ylabel=config.accuracy_metric)
    axes.margins(x=0.12)  # for the words beside the rightmost
    axes.grid(alpha=0.3)
    axes.legend()


def _short(trial: Trial) -> str:
    return ", ".join(written(value) for value in trial.sample.shown.values())[:40]


def _columns(trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """Drawn keys with more than one value among the trials."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.sample.shown))
    found = {key: [trial.sample.values.get(key) for trial in trials] for key in keys}
    return {key: values for key, values in found.items() if len({written(value) for value in values}) > 1}


def _parallel(axes: Axes, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """One line a trial through what was drawn to what came out, coloured by the first objective."""
    config = sweep.config
    columns: dict[str, list[Any]] = _columns(trials)
    for name in (config.cost_metric, config.accuracy_metric):
        columns[name] = [trial.metrics.get(name) for trial in trials]
    heights = {key: _heights(values) for key, values in columns.items()}
    colour = _heights(columns[config.accuracy_metric])[0]
    from matplotlib import colormaps

    for number in range(len(trials)):
        line = [heights[key][0][number] for key in columns]
        axes.plot(range(len(columns)), line, color=colormaps["viridis"](colour[number] or 0.0), alpha=0.8)
    for place, key in enumerate(columns):
        axes.axvline(place, color="grey", linewidth=0.6)
        for height, text in heights[key][1]:
            axes.annotate(text, (place, height), fontsize=7, xytext=(3, 0), textcoords="offset points")
    axes.set_xticks(range(len(columns)), [key.rpartition("family.")[2] for key in columns], fontsize=8)
    axes.set_yticks([])


def _heights(values: Sequence[Any]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Places on an axis from 0 to 1, None where there is no value, and what stands beside the axis."""
    there = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        low, high = min(there), max(there)
        span = (high - low) or 1
        places = [None if value is None else (value - low) / span for value in values]
        return places, [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if high > low else [(0.0, f"{low:.4g}")]
    texts = list(dict.fromkeys(written(value) for value in there))
    span = max(1, len(texts) - 1)
    places = [None if value is None else texts.index(written(value)) / span for value in values]
    return places, [(number / span, text[:24]) for number, text in enumerate(texts[:MOST_NAMED])]


def _curves(axes: Axes, run_dir: Path, trials: Sequence[Trial], wanted: str) -> None:
    """Every metric that `wanted` matches, trial by trial in one colour each."""
    for number, trial in enumerate(trial for trial in trials if (run_dir / "trials" / trial.name).is_dir()):
        found = journal.curves(run_dir / "trials" / trial.name / "journal")
        chosen = {key: points for key, points in found.items() if re.fullmatch(wanted, key)}
        for place, points in enumerate(chosen.values()):
            label = (_short(trial) or trial.name) if place == 0 and number < MOST_NAMED else None
            axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", alpha=0.8, label=label)
    axes.set(xlabel="step", ylabel=wanted)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _profile(trial: Trial) -> list[float]:
    return [trial.metrics[name] for name in sorted(trial.metrics) if name.startswith("side_px/")]


def _profiles(axes: Axes, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Sides along the net: the best and the worst that were drawn, and every net with nothing random in it."""
    config = sweep.config
    done = [trial for trial in trials if trial.state == "finished" and _profile(trial)]
    random = [trial for trial in done if any(e.kind != "fixed" for e in sweep.cases[trial.sample.case])]
    merits = {trial.name: config.sign(config.accuracy_metric) * trial.metrics[config.accuracy_metric] for trial in done}
    random.sort(key=lambda trial: merits[trial.name])
    named = [(trial, _short(trial)) for trial in done if trial not in random]
    named += [(random[-1], "best drawn"), (random[0], "worst drawn")] if random else []
    for trial, text in named:
        axes.plot(_profile(trial), marker=".", label=f"{text}: {trial.metrics[config.accuracy_metric]:.4g}")
    axes.set(xlabel="convolution", ylabel="side, px")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
