"""`adaptnet train`: trains a recipe, or resumes the run in its folder."""

from __future__ import annotations

import json
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import shown_recipe
from jobs.cli import INTERRUPTED, STOPPED, data_home
from jobs.run_lines import EvaluationPoint, best_of, duration, evaluations, percent
from jobs.shown_recipe import RecipeSource
from pipeline.errors import ConfigError
from pipeline.runs import journal, lease, records

if TYPE_CHECKING:
    from pipeline.execution.launch import Result
    from pipeline.execution.seeds import PolicySpread, SeedOutcome, SeedRun
    from pipeline.run_config import RunConfig

SOME_FAILED = 1  # exit status when the training of a seed diverged

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="family/recipe, family/recipe:variant, or a path ending in .yaml")
    ] = None,
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
    show: Annotated[
        bool, typer.Option("--show", help="print the resolved recipe and exit; as YAML if not on a terminal")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="print every shipped recipe and exit")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --show or --list: print one JSON document")] = False,
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
    if listed:
        _list_recipes(as_json=as_json)
        return
    if recipe is None:
        raise ConfigError("name a recipe; `adaptnet train --list` shows the shipped ones", key="recipe")
    if as_json and not show:
        raise ConfigError("--json belongs to --show and --list; `adaptnet runs list` shows runs", key="--json")
    config, source = _resolved(recipe, overrides or [], batch_size)
    folder = run_dir or Path("runs") / config.name
    if show:
        shown_recipe.show(config, source, seeds=seeds, as_json=as_json)
    elif seeds is not None:
        _train_seeds(config, seeds, folder, allow_changed or ())
    else:
        _train_one(config, folder, allow_changed or ())


def _resolved(recipe: str, overrides: list[str], batch_size: int | None) -> tuple[RunConfig, RecipeSource]:
    from jobs import environment
    from pipeline import run_config

    layer = environment.recipe_layer()
    if batch_size is not None:
        overrides = run_config.with_batch_size(recipe, overrides, batch_size)
    config = run_config.load(recipe, overrides, data_home=data_home(), environment=layer)
    return config, RecipeSource(recipe, overrides, layer)


def _list_recipes(*, as_json: bool) -> None:
    from jobs import tables
    from pipeline import recipes

    titles = {name: recipes.title(name) for name in recipes.names()}
    if as_json:
        typer.echo(json.dumps([{"recipe": name, "title": title} for name, title in titles.items()], indent=1))
    else:
        typer.echo(tables.align([["recipe", "what it trains"], *map(list, titles.items())], left=True))


def _train_one(config: RunConfig, folder: Path, allow_changed: Sequence[str]) -> None:
    from pipeline.execution import seeds

    received: set[int] = set()
    run, before = seeds.SeedRun(config, folder), records.read_status(folder)
    if seeds.is_member(config):  # a job of an array
        result = seeds.member(run, lambda each: followed(each, allow_changed, received))
    else:
        result = followed(run, allow_changed, received)
    _print_result(result, config.family.name, trained=not before.finished or before.step != result.step)
    _print_next(result)
    if not result.finished:  # a nonzero status, so that a script does not run its next line
        raise _stopped(received)


def _stopped(received: set[int]) -> typer.Exit:
    return typer.Exit(INTERRUPTED if signal.SIGINT in received else STOPPED)


def followed(run: SeedRun, allow_changed: Sequence[str], received: set[int]) -> Result:
    """Trains one run and shows its progress; the signals that asked it to stop are added to `received`."""
    from jobs.verbs import progress
    from pipeline.execution import launch
    from pipeline.tracking import resolve_uri

    uri = resolve_uri(run.config.tracking.uri, run.folder)
    with progress.follow(run.folder, uri) as view, stop_on_signals(run.folder, received) as signals:

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
        _print_result(result, run.config.family.name)
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


def _print_result(result: Result, family: str, *, trained: bool = True) -> None:
    """trained: whether it has just been trained; else it was finished before."""
    from jobs import tables

    if not result.finished:
        resumes = (
            f"resumes from {result.checkpoint}" if result.checkpoint else "starts from the beginning: nothing was saved"
        )
        typer.echo(f"stopped at step {result.step}; the same command {resumes}")
        return
    if not trained:
        typer.echo("this run was finished before; nothing was trained")
    typer.echo(f"finished at step {result.step}{_time_of(result.run_dir)}")
    if result.reports:
        typer.echo(tables.of_reports(result.reports, family))
    typer.echo(tables.of_pairs(_outcome(result)))
    if result.version:
        typer.echo(f"registered as {result.version}" + ", now @candidate" * trained)


def _outcome(result: Result) -> dict[str, str]:
    """The best and the last accuracy while training, and where everything is."""
    from jobs.verbs.progress import look_at, shorter

    evaluated = [each for each in evaluations(_written(result.run_dir)) if each.split == "val"]
    pairs = {}
    if (best := best_of(evaluated)) is not None:
        pairs = {"best top-1": _accuracy(best), "last top-1": _accuracy(evaluated[-1])}
    pairs |= {"run": shorter(result.run_dir), "best checkpoint": shorter(Path(result.checkpoint or "none"))}
    if result.run_id:
        pairs |= {"MLflow run": result.run_id, "to see it": look_at(result.tracking_uri)}
    return pairs


def _accuracy(evaluation: EvaluationPoint) -> str:
    return f"{percent(evaluation.top1)} on val at step {evaluation.step}"


def _written(run_dir: Path) -> list[journal.Record]:
    path = run_dir / "journal" / f"rank0{journal.SUFFIX}"
    return list(journal.read_all(path)) if path.is_file() else []


def _time_of(run_dir: Path) -> str:
    """From the first start of the run to its end, pauses included; "" if the journal does not say."""
    times = [record["time"] for record in _written(run_dir) if record.get("event") in ("started", "finished")]
    return f", {duration(times[-1] - times[0])} after it was started" if len(times) > 1 else ""


def _print_next(result: Result) -> None:
    """The command that a person would use next."""
    from jobs.verbs.progress import shorter

    if result.finished:
        typer.echo(f"next: adaptnet evaluate {shlex.quote(shorter(result.run_dir))}")
