"""`adaptnet sweep`: trains every sample of a search space, or resumes the sweep in its folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from jobs.cli import INTERRUPTED, STOPPED, data_home
from jobs.verbs.train import stop_on_signals
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from tuning.config import SweepConfig
    from tuning.outcome import Outcome
    from tuning.record import Trial

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
MOST_ROWS = 20  # trials in the live table
SOME_FAILED = 1  # exit status when a trial failed


def _list_sweeps(requested: bool) -> None:
    from jobs import tables
    from tuning import config

    if requested:
        typer.echo(tables.of_pairs({name: config.title(name) for name in config.names()}))
        raise typer.Exit


@app.command()
def sweep(
    source: Annotated[str, typer.Argument(metavar="SWEEP", help="a shipped sweep's name, or a path ending in .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. search.samples=4")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="folder of the sweep; default runs/NAME")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="train the failed trials again")] = False,
    register: Annotated[str | None, typer.Option(help="register the best trial under this name, as @candidate")] = None,
    trial: Annotated[str | None, typer.Option(help="with --register: register this trial instead of the best")] = None,
    show: Annotated[bool, typer.Option("--show", help="print the resolved sweep and its samples, and exit")] = False,
    listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_sweeps, help="print every shipped sweep and exit")
    ] = False,
) -> None:
    """Trains every sample of a sweep's search space, or resumes the sweep in its folder: the same command does both,
    whatever was killed in between. SWEEP is the name of a shipped sweep or a path ending in .yaml. A key of the recipe
    applies to every trial; search.samples=4 and space.KEY={grid: [1, 2]} change the sweep itself.

    Examples:

      adaptnet sweep toy

      adaptnet sweep --list

      adaptnet sweep aig_target_rate data.root=packed/cifar10 training.epochs=3 compute.workers=2

      adaptnet sweep toy search.samples=6 scheduler.kind=none --run-dir runs/toy-6

      adaptnet sweep toy --register aig-toy --retry-failed
    """
    from jobs import environment
    from pipeline.config import as_mapping, dump_yaml, validate
    from pipeline.tracking import TrackingConfig
    from tuning import config, outcome
    from tuning import sweep as sweeps

    if register is not None:  # check the name now, not after hours of training
        validate(TrackingConfig, {"register": register}, "--register")
    layer = environment.recipe_layer()
    loaded = config.load(source, overrides or (), data_home=data_home(), environment=layer)
    _check_trial(trial, register, [draw.name for draw in loaded.samples()])
    if show:
        typer.echo(dump_yaml(as_mapping(loaded.config)), nl=False)
        typer.echo("\n".join(f"{draw.name}: {draw.text}" for draw in loaded.samples()))
        return
    folder = run_dir or Path("runs") / loaded.config.name
    with _view(loaded.config) as view, stop_on_signals(folder) as received:
        outcome_ = sweeps.run(loaded, folder, retry_failed=retry_failed, watcher=view)
    _print_outcome(outcome_)
    if register is not None and outcome_.finished:
        version = outcome.register(outcome_, register, trial)
        typer.echo(f"registered as {version.reference}, now @candidate")
    elif register is not None:
        typer.echo("nothing is registered until the sweep has finished")
    if not outcome_.finished:
        raise typer.Exit(INTERRUPTED if signal.SIGINT in received else STOPPED)
    if outcome_.failed:
        raise typer.Exit(SOME_FAILED)


def _check_trial(trial: str | None, register: str | None, drawn: Sequence[str]) -> None:
    """Rejects a wrong --trial before training; the samples of an Optuna study are not known in advance."""
    if trial is None:
        return
    if register is None:
        raise ConfigError(
            f"--trial (={trial}) selects the trial that --register NAME registers; pass --register as well",
            key="--trial",
            subject=trial,
        )
    if drawn and trial not in drawn:
        close = get_close_matches(trial, drawn, 1, 0.3)
        message = f"--trial (={trial}): no such trial; did you mean {(close or drawn)[0]}?"
        raise ConfigError(message, key="--trial", subject=trial)


def _print_outcome(outcome: Outcome) -> None:
    from jobs import tables

    if outcome.rows[1:]:
        typer.echo(tables.align(outcome.rows))
    legend = "* marks trials that no other beats in both accuracy and cost"
    typer.echo(f"{outcome.tally}. {legend}; all results are in {outcome.run_dir}/results.csv")
    for name, reason in outcome.failed.items():
        typer.echo(f"failed: {name}: {reason}")
    if outcome.failed:
        typer.echo("the same command with --retry-failed trains these again")
    if not outcome.finished:
        typer.echo("stopped; the same command resumes")
    elif outcome.best:
        typer.echo(f"best: {outcome.best} in {outcome.run_dir}/trials")
    if outcome.run_id:
        from pipeline.errors import without_secrets

        typer.echo(f"MLflow run {outcome.run_id} in {without_secrets(outcome.tracking_uri or '')}")


class LinePrinter:
    """Prints one line for each event, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self.console, self._started = console, time.monotonic()

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(f"{time.monotonic() - self._started:7.1f} s  {text}", highlight=False, markup=False)

    def show(self, trials: Sequence[Trial], running: int) -> None:
        """Does nothing: lines have no table."""

    def close(self) -> None:
        """Does nothing: lines need no cleanup."""


class LiveTable(LinePrinter):
    """On a terminal: the lines, and below them a live table of the trials."""

    def __init__(self, console: Console, live: Live, config: SweepConfig) -> None:
        super().__init__(console)
        self._live, self._config = live, config

    def show(self, trials: Sequence[Trial], running: int) -> None:
        """Updates the table."""
        self._live.update(_table(trials, self._config))

    def close(self) -> None:
        """Stops the live display, so that the terminal's cursor is visible again."""
        self._live.stop()


def _table(trials: Sequence[Trial], config: SweepConfig) -> Table:
    """A table of at most MOST_ROWS trials, running ones first, then the newest, with metric and accuracy."""
    table = Table(title=_tally(trials), title_justify="left", box=None)
    for heading in ("trial", "state", "step", f"newest {config.scheduler.metric}", config.accuracy_metric):
        table.add_column(heading, justify="left" if heading in ("trial", "state") else "right")
    running = [trial for trial in trials if trial.state == "running"]
    others = [trial for trial in trials if trial.state not in ("running", "planned", "refused")]
    for trial in [*others[-max(1, MOST_ROWS - len(running)) :], *running[:MOST_ROWS]]:
        newest = "" if trial.newest is None else f"{trial.newest:.4g}"
        result = f"{trial.metrics[config.accuracy_metric]:.4g}" if config.accuracy_metric in trial.metrics else ""
        table.add_row(trial.name, trial.state, f"{trial.step}/{trial.total_steps or '?'}", newest, result)
    return table


def _tally(trials: Sequence[Trial]) -> str:
    from tuning import tables

    return tables.tally(trials)


@contextmanager
def _view(config: SweepConfig) -> Iterator[LinePrinter]:
    console = Console(stderr=False, soft_wrap=True)
    if not console.is_terminal:
        yield LinePrinter(console)
        return
    with Live(console=console, refresh_per_second=2) as live:
        yield LiveTable(live.console, live, config)
