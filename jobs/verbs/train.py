"""`adaptnet train`: trains a recipe, or resumes the run in its folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import INTERRUPTED, STOPPED, data_home
from pipeline.runs import lease

if TYPE_CHECKING:
    from pipeline.execution.launch import Result

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def _list_recipes(requested: bool) -> None:
    from jobs import tables
    from pipeline import recipes

    if requested:
        typer.echo(tables.of_pairs({name: recipes.title(name) for name in recipes.names()}))
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="family/recipe, family/recipe:variant, or a path ending in .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. training.epochs=3")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="folder of the run; default runs/NAME")] = None,
    allow_changed: Annotated[
        list[str] | None, typer.Option(help="key whose value may differ from that in the run's checkpoints; repeatable")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="print the resolved config and exit")] = False,
    listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_recipes, help="print every shipped recipe and exit")
    ] = False,
) -> None:
    """Trains RECIPE, or resumes the run in its folder: the same command does both.

    Examples:

      adaptnet train convnet_aig/toy

      adaptnet train convnet_aig/cifar10_small training.epochs=3 family.target_rate=0.6

      adaptnet train my_recipe.yaml --run-dir /scratch/me/run7 compute.workers=8

      adaptnet train --list

      adaptnet train baseline/imagenet_resnet50 data.root=/data/imagenet --show
    """
    from jobs import environment
    from pipeline import config as configs
    from pipeline import run_config

    layer = environment.recipe_layer()
    config = run_config.load(recipe, overrides or (), data_home=data_home(), environment=layer)
    if show:
        typer.echo(configs.dump_yaml(configs.as_mapping(config)), nl=False)
        typer.echo("\n".join(environment.origins(config, recipe, overrides or (), layer)))
        return
    from jobs.verbs import progress
    from pipeline.execution import launch

    folder = run_dir or Path("runs") / config.name
    with progress.follow(folder) as view, stop_on_signals(folder) as received:
        result = launch.train(
            config,
            folder,
            allow_changed=allow_changed or (),
            progress=view.index,
            on_start=view.start,
            notify=view.notify,
        )
    _print_result(result)
    if not result.finished:  # a nonzero status, so that a script does not run its next line
        raise typer.Exit(INTERRUPTED if signal.SIGINT in received else STOPPED)


@contextmanager
def stop_on_signals(run_dir: Path) -> Iterator[set[int]]:
    """SIGTERM, or Ctrl-C once, asks the run to save at its next step and stop; a second Ctrl-C quits at once.

    Yields the set of signals received so far. A signal that was ignored before stays ignored, as Ctrl-C is for a
    command that a script starts with `&`.
    """
    run_dir, received = run_dir.absolute(), set[int]()  # absolute: the working directory changes while Ray starts
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def stop(number: int, _: FrameType | None) -> None:
        if not run_dir.is_dir() or lease.is_of_another(run_dir) or (number == signal.SIGINT and number in received):
            raise KeyboardInterrupt  # also while this driver waits for the lease of another one
        (run_dir / "stop").touch()
        received.add(number)
        again = "; press Ctrl-C again to quit without saving" if number == signal.SIGINT else ""
        print(f"stopping at the next save{again}", flush=True)  # rich prints this above a live table

    handled = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_result(result: Result) -> None:
    from jobs import tables

    if not result.finished:
        resumes = (
            f"resumes from {result.checkpoint}" if result.checkpoint else "starts from the beginning: nothing was saved"
        )
        typer.echo(f"stopped at step {result.step}; the same command {resumes}")
        return
    typer.echo(f"finished at step {result.step}; best checkpoint {result.checkpoint}")
    if result.reports:
        typer.echo(tables.of_reports(result.reports))
    if result.run_id:
        typer.echo(f"MLflow run {result.run_id} in {result.tracking_uri}")
    if result.version:
        typer.echo(f"registered as {result.version}, now @candidate")
