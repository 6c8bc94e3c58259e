"""`adaptnet train`: trains a recipe, or resumes the run in its folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import INTERRUPTED, STOPPED, data_home
from pipeline.runs import lease

if TYPE_CHECKING:
    from pipeline.execution.launch import Result
    from pipeline.execution.seeds import PolicySpread, SeedOutcome, SeedRun
    from pipeline.run_config import RunConfig

SOME_FAILED = 1  # exit status when the training of a seed diverged

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
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="train so many seeds, from the recipe's on, as runs NAME-s1, NAME-s2, ..."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="training.batch_size; with training.scale_lr the learning rates follow from the recipe's"
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="print the resolved config and exit")] = False,
    listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_recipes, help="print every shipped recipe and exit")
    ] = False,
) -> None:
    """Trains RECIPE, or resumes the run in its folder: the same command does both. With --seeds it trains one run after
    the other, each in a folder of its own; finished ones are not trained again. They are the children of one MLflow
    run, whose folder is NAME-seeds. Compare recipes with `adaptnet compare NAME-seeds OTHER-seeds`.

    Examples:

      adaptnet train convnet_aig/toy

      adaptnet train convnet_aig/cifar10_small training.epochs=3 family.target_rate=0.6

      adaptnet train my_recipe.yaml --run-dir /scratch/me/run7 compute.workers=8

      adaptnet train convnet_aig/toy --seeds 3

      adaptnet train baseline/imagenet_resnet50 --batch-size 1024 training.scale_lr=linear

      adaptnet train --list

      adaptnet train baseline/imagenet_resnet50 data.root=/data/imagenet --show
    """
    from jobs import environment
    from pipeline import config as configs
    from pipeline import run_config

    layer = environment.recipe_layer()
    overrides = overrides or []
    if batch_size is not None:
        overrides = run_config.with_batch_size(recipe, overrides, batch_size)
    config = run_config.load(recipe, overrides, data_home=data_home(), environment=layer)
    if show:
        typer.echo(configs.dump_yaml(configs.as_mapping(config)), nl=False)
        typer.echo("\n".join(environment.origins(config, recipe, overrides, layer)))
        if config.training.scaling is not None:
            typer.echo(f"# {config.training.scaling}")
        if seeds is not None:
            typer.echo(
                f"# seeds: {config.seed} to {config.seed + seeds - 1}, as runs {config.name}-s{config.seed}, ..."
            )
        return
    folder = run_dir or Path("runs") / config.name
    if seeds is not None:
        _train_seeds(config, seeds, folder, allow_changed or ())
    else:
        _train_one(config, folder, allow_changed or ())


def _train_one(config: RunConfig, folder: Path, allow_changed: Sequence[str]) -> None:
    from pipeline.execution import seeds

    received: set[int] = set()
    if seeds.is_member(config):  # a job of an array
        run = seeds.SeedRun(config, folder)
        result = seeds.member(run, lambda each: followed(each, allow_changed, received))
    else:
        result = followed(seeds.SeedRun(config, folder), allow_changed, received)
    _print_result(result)
    if not result.finished:  # a nonzero status, so that a script does not run its next line
        raise _stopped(received)


def _stopped(received: set[int]) -> typer.Exit:
    return typer.Exit(INTERRUPTED if signal.SIGINT in received else STOPPED)


def followed(run: SeedRun, allow_changed: Sequence[str], received: set[int]) -> Result:
    """Trains one run and shows its progress; the signals that asked it to stop are added to `received`."""
    from jobs.verbs import progress
    from pipeline.execution import launch

    with progress.follow(run.folder) as view, stop_on_signals(run.folder, received) as signals:

        def start() -> None:
            view.start()
            if signals:  # received before, when the run's start removed an old request to stop
                (run.folder / "stop").touch()

        return launch.train(
            run.config,
            run.folder,
            allow_changed=allow_changed,
            progress=view.index,
            on_start=start,
            notify=view.notify,
        )


def _train_seeds(config: RunConfig, count: int, folder: Path, allow_changed: Sequence[str]) -> None:
    from pipeline.execution import seeds

    runs, received = seeds.plan(config, count, folder), set[int]()
    seeds.create(runs, allow_changed)

    def train_one(run: SeedRun) -> Result:
        typer.echo(f"seed {run.config.seed}: {run.folder}")
        result = followed(run, allow_changed, received)
        _print_result(result)
        return result

    outcome = seeds.train(runs, train_one)
    _print_group(outcome)
    if outcome.diverged:
        raise typer.Exit(SOME_FAILED)
    if not outcome.finished:
        raise _stopped(received)


def _print_group(outcome: SeedOutcome) -> None:
    from pipeline.execution import seeds
    from pipeline.tracking.ledger import Ledger

    done = seeds.finished_runs(outcome.group)
    typer.echo(f"\n{outcome.group}: {len(done)} seeds finished: {', '.join(map(str, done)) or 'none'}")
    if found := seeds.spreads(done):
        typer.echo(_of_spreads(found))
    for name, reason in outcome.diverged.items():
        typer.echo(f"failed: {name}: {reason}")
    if not outcome.finished and not outcome.diverged:
        typer.echo("stopped; the same command resumes, and trains no finished seed again")
    if run_id := Ledger.peek(outcome.group).run_id:
        typer.echo(f"MLflow run {run_id} is the parent of these runs")


def _of_spreads(found: Sequence[PolicySpread]) -> str:
    from jobs import tables

    rows = [["policy", "top-1 %", "sd", "95 % from", "to", "MMACs", "sd", "n"]]
    for each in found:
        top1 = tables.of_spread(each.top1, 100, 2)
        rows.append([each.policy, *top1, *tables.of_spread(each.macs, 1e-6, 3)[:2], str(each.top1.n)])
    return tables.align(rows)


@contextmanager
def stop_on_signals(run_dir: Path, received: set[int] | None = None) -> Iterator[set[int]]:
    """SIGTERM, or Ctrl-C once, asks the run to save at its next step and stop; a second Ctrl-C quits at once.

    Yields the set of signals received so far, which is `received` if given. A signal that was ignored before stays
    ignored, as Ctrl-C is for a command that a script starts with `&`.
    """
    run_dir = run_dir.absolute()  # the working directory changes while Ray starts
    received = set() if received is None else received
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
