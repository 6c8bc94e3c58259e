"""`adaptnet sweep`: trains every draw of a space, or goes on with the sweep in its folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from jobs.cli import INTERRUPTED, STOPPED, data_home
from jobs.verbs.train import _stop_on_signals
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from tuning.config import SweepConfig
    from tuning.outcome import Outcome
    from tuning.record import Trial

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
MOST_ROWS = 20  # trials in the live table
SOME_FAILED = 1  # the exit status where a trial failed

EXAMPLES = """Trains every draw of a sweep's space, or goes on with the sweep in its folder: the same command does both,
whatever was killed meanwhile. SWEEP is a shipped sweep's name or a path ending in .yaml; a key of the recipe holds for
every trial, search.samples=4 and space.KEY={grid: [1, 2]} change the sweep itself.

Examples:

  adaptnet sweep toy

  adaptnet sweep --list

  adaptnet sweep aig_target_rate data.root=packed/cifar10 training.epochs=3 compute.workers=2

  adaptnet sweep toy search.samples=6 scheduler.kind=none --run-dir runs/toy-6

  adaptnet sweep toy --register aig-toy --retry-failed
"""


def _list_sweeps(asked: bool) -> None:
    from jobs import tables
    from tuning import config

    if asked:
        typer.echo(tables.of_pairs({name: config.title(name) for name in config.names()}))
        raise typer.Exit


@app.command(help=EXAMPLES)
def sweep(
    source: Annotated[str, typer.Argument(metavar="SWEEP", help="a shipped sweep's name, or a path ending in .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. search.samples=4")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="the sweep's folder; default runs/NAME")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="train the failed trials again")] = False,
    register: Annotated[str | None, typer.Option(help="a registry name for the best trial, as @candidate")] = None,
    trial: Annotated[str | None, typer.Option(help="with --register: this trial instead of the best")] = None,
    show: Annotated[bool, typer.Option("--show", help="print the resolved sweep and its draws, and stop")] = False,
    listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_sweeps, help="print every shipped sweep and stop")
    ] = False,
) -> None:
    from pipeline.config import as_mapping, dump_yaml, validate
    from pipeline.tracking import TrackingConfig
    from tuning import config, outcome
    from tuning import sweep as sweeps

    if register is not None:  # a name that the registry would refuse after hours
        validate(TrackingConfig, {"register": register}, "--register")
    loaded = config.load(source, overrides or (), data_home=data_home())
    _check_trial(trial, register, [draw.name for draw in loaded.samples()])
    if show:
        typer.echo(dump_yaml(as_mapping(loaded.config)), nl=False)
        typer.echo("\n".join(f"{draw.name}: {draw.text}" for draw in loaded.samples()))
        return
    folder = run_dir or Path("runs") / loaded.config.name
    with _view(loaded.config) as view, _stop_on_signals(folder) as asked:
        found = sweeps.run(loaded, folder, retry_failed=retry_failed, watcher=view)
    _conclude(found)
    if register is not None and found.finished:
        version = outcome.register(found, register, trial)
        typer.echo(f"registered as {version.reference}, from now on @candidate")
    elif register is not None:
        typer.echo("nothing is registered before the sweep has ended")
    if not found.finished:
        raise typer.Exit(INTERRUPTED if signal.SIGINT in asked else STOPPED)
    if found.failed:
        raise typer.Exit(SOME_FAILED)


def _check_trial(trial: str | None, register: str | None, drawn: Sequence[str]) -> None:
    """Refuses before training what would be refused after; the draws of a study are not known yet."""
    if trial is None:
        return
    if register is None:
        raise ConfigError(f"--trial (={trial}) says which trial --register NAME is to take; give that as well")
    if drawn and trial not in drawn:
        close = get_close_matches(trial, drawn, 1, 0.3)
        raise ConfigError(f"--trial (={trial}): no such trial; did you mean {(close or drawn)[0]}?")


def _conclude(found: Outcome) -> None:
    from jobs import tables

    if found.rows[1:]:
        typer.echo(tables.align(found.rows))
    typer.echo(f"{found.tally}. * marks what nothing beats in accuracy and cost; all in {found.run_dir}/results.csv")
    for name, reason in found.failed.items():
        typer.echo(f"failed: {name}: {reason}")
    if found.failed:
        typer.echo("the same command with --retry-failed trains these again")
    if not found.finished:
        typer.echo("stopped; the same command goes on")
    elif found.best:
        typer.echo(f"best: {found.best} in {found.run_dir}/trials")
    if found.run_id:
        from pipeline.runs.provenance import without_secrets

        typer.echo(f"MLflow run {found.run_id} in {without_secrets(found.tracking_uri or '')}")


class Lines:
    """One line an event, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self.console, self._started = console, time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self._started:7.1f} s  {text}", highlight=False, markup=False)

    def show(self, trials: Sequence[Trial], running: int) -> None: ...

    def close(self) -> None: ...


class Board(Lines):
    """On a terminal: the trials as a table that is kept up to date below the lines."""

    def __init__(self, console: Console, live: Live, config: SweepConfig) -> None:
        super().__init__(console)
        self._live, self._config = live, config

    def show(self, trials: Sequence[Trial], running: int) -> None:
        self._live.update(_table(trials, self._config))

    def close(self) -> None:
        """Gives the terminal its cursor back."""
        self._live.stop()


def _table(trials: Sequence[Trial], config: SweepConfig) -> Table:
    """Those that run and the newest others, at most MOST_ROWS: what the scheduler judges, and the first objective."""
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


def _tally(trials: Sequence[Any]) -> str:
    from tuning import outcome

    return outcome.tally(trials)


@contextmanager
def _view(config: SweepConfig) -> Iterator[Lines]:
    console = Console(stderr=False, soft_wrap=True)
    if not console.is_terminal:
        yield Lines(console)
        return
    with Live(console=console, refresh_per_second=2) as live:
        yield Board(live.console, live, config)
