"""`adaptnet train`: trains a recipe, or goes on with the run in its folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli import INTERRUPTED, STOPPED, data_home

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

EXAMPLES = """Trains RECIPE, or goes on with the run in its folder: the same command does both.

Examples:

  adaptnet train convnet_aig/toy

  adaptnet train convnet_aig/cifar10_small training.epochs=3 family.target_rate=0.6

  adaptnet train my_recipe.yaml --run-dir /scratch/me/run7 compute.workers=8

  adaptnet train --list

  adaptnet train baseline/imagenet_resnet50 data.root=/data/imagenet --show
"""


def _list_recipes(asked: bool) -> None:
    from jobs import tables
    from pipeline import run_config

    if asked:
        typer.echo(tables.of_pairs({name: run_config.title(name) for name in run_config.recipes()}))
        raise typer.Exit


@app.command(help=EXAMPLES)
def train(
    recipe: Annotated[str, typer.Argument(help="family/recipe, or a path ending in .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. training.epochs=3")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="the run's folder; default runs/NAME")] = None,
    allow_changed: Annotated[
        list[str] | None, typer.Option(help="a key that may differ from the run's checkpoints; repeatable")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="print the resolved config and stop")] = False,
    listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_recipes, help="print every shipped recipe and stop")
    ] = False,
) -> None:
    from pipeline import config as configs
    from pipeline import run_config

    config = run_config.load(recipe, overrides or (), data_home=data_home())
    if show:
        typer.echo(configs.dump_yaml(configs.as_mapping(config)), nl=False)
        return
    from jobs.verbs import progress
    from pipeline.execution import launch

    folder = run_dir or Path("runs") / config.name
    with progress.follow(folder) as shown, _stop_on_signals(folder) as asked:
        result = launch.train(
            config, folder, allow_changed=allow_changed or (), progress=shown.index, on_start=shown.start
        )
    _conclude(result)
    if not result.finished:  # so that a script does not go on to its next line
        raise typer.Exit(INTERRUPTED if signal.SIGINT in asked else STOPPED)


@contextmanager
def _stop_on_signals(run_dir: Path) -> Iterator[set[int]]:
    """SIGTERM, and Ctrl-C once, ask the run to save at its next step and end; a second Ctrl-C ends it at once.

    Gives the signals that came. Ctrl-C stays ignored where it is, as behind `&` in a script.
    """
    asked: set[int] = set()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def stop(number: int, _: Any) -> None:
        if not run_dir.is_dir() or (number == signal.SIGINT and number in asked):
            raise KeyboardInterrupt
        (run_dir / "stop").touch()
        asked.add(number)
        if number == signal.SIGINT:
            print("stopping at the next save; Ctrl-C again leaves without it", flush=True)  # rich puts it above a table

    heeded = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(result: Any) -> None:
    from jobs import tables

    if not result.finished:
        typer.echo(f"stopped at step {result.step}; the same command goes on from {result.checkpoint}")
        return
    typer.echo(f"finished at step {result.step}; best checkpoint {result.checkpoint}")
    if result.reports:
        typer.echo(tables.of_reports(result.reports))
    if result.run_id:
        typer.echo(f"MLflow run {result.run_id} in {result.tracking_uri}")
    if result.version:
        typer.echo(f"registered as {result.version}, from now on @candidate")
