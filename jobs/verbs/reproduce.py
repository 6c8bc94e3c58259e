"""`adaptnet reproduce`: trains the arms of a published claim with several seeds and judges it, or goes on with that."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import INTERRUPTED, STOPPED, data_home

if TYPE_CHECKING:
    from pipeline.execution.launch import Result
    from pipeline.execution.seeds import SeedRun
    from tuning.reproduce.costs import ArmCost
    from tuning.reproduce.measuring import ClaimFigures
    from tuning.reproduce.running import ClaimOutcome, ClaimRun

SOME_FAILED = 1  # exit status when the training of an arm diverged
HOME = Path("runs") / "claims"

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def _list_claims(requested: bool) -> None:
    from jobs import tables
    from tuning.reproduce import claim

    if requested:
        typer.echo(tables.of_pairs({name: claim.read(name)[1].title for name in claim.names()}))
        raise typer.Exit


@app.command()
def reproduce(
    source: Annotated[str, typer.Argument(metavar="CLAIM", help="a shipped claim's name, or a path ending in .yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, for every arm, e.g. data.root=packed/cifar10")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, max=10_000, help="save and stop after so many hours; --resume goes on")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="seeds of each arm; default: those of the claim's file")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on in the folder that holds runs of this claim")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="folder of the claim; default runs/claims/CLAIM")] = None,
    results: Annotated[
        Path | None, typer.Option(help="also write the claim's section into this file, e.g. tuning/claims/RESULTS.md")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="keep what the verdict needs of each finished run here; do not repeat a run that it has"),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="print what the claim costs here, and exit")] = False,
    listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_claims, help="print every shipped claim and exit")
    ] = False,
) -> None:
    """Tries a published claim. CLAIM is the name of a shipped claim or a path ending in .yaml: its file names the arms
    (recipes), the statements and the rule of the verdict. It prints the cost first, trains every arm with seed 1, then
    with seed 2, and so on, and evaluates each run's last checkpoint on the val split. A statement is confirmed if the
    95 % interval of its difference, over seeds and images, lies wholly on the claimed side, refuted if wholly on the
    other one, else not resolved.

    The SHA-256 of the claim's file is stored before the first run; a changed file is refused. After a kill, or with
    --hours, the same command with --resume goes on: no finished run is repeated. runs/claims/CLAIM holds the runs,
    result.json and the page report/index.html.

    --keep FOLDER keeps of each finished run its reports and answers by image, without weights, so that a claim can go
    on after the runs are gone, or on another machine. A run that is kept is neither trained nor registered again. The
    kept runs from which the results of shipped claims were made are in tuning/claims/kept/CLAIM.

    Examples:

      adaptnet reproduce --list

      adaptnet reproduce aig --plan

      adaptnet reproduce aig --hours 2 --results tuning/claims/RESULTS.md

      adaptnet reproduce aig --resume --seeds 5 data.root=packed/cifar10

      adaptnet reproduce aig --hours 2 --keep kept/aig
    """
    from jobs import environment
    from tuning.reproduce import claim as claims
    from tuning.reproduce import running
    from tuning.reproduce.kept import KeptRuns
    from tuning.reproduce.measuring import ClaimFigures

    layer = environment.recipe_layer()
    claim = claims.load(source, overrides or (), data_home=data_home(), environment=layer)
    folder, count = (run_dir or HOME / claim.name).absolute(), seeds or claim.config.seeds
    claim = claim.tracked(None if run_dir else Path("runs").absolute())
    runs = running.plan(claim, folder, count)
    measured = ClaimFigures(claim, folder, KeptRuns(claim, keep.absolute() if keep else None))
    images = ""
    if not plan:
        claims.check_policies(claim)
        images = _images(measured, runs)
        running.open_folder(claim, folder, images, resume=resume)
    _print_costs(measured, runs)
    if plan:
        return
    received: set[int] = set()
    outcome = running.train(measured, runs, lambda run: _train_one(run, received), running.Deadline(hours), images)
    _print_outcome(measured, outcome, results)
    if outcome.diverged:
        raise typer.Exit(SOME_FAILED)
    if outcome.left:
        raise typer.Exit(INTERRUPTED if signal.SIGINT in received else STOPPED)


def _images(measured: ClaimFigures, runs: Sequence[ClaimRun]) -> str:
    """The identity of the evaluated images; where every run is kept they need not be here."""
    from tuning.reproduce import running

    kept = measured.kept
    all_kept = kept.images and all(kept.find(each.arm, each.run.config.seed) for each in runs)
    images = str(kept.images) if all_kept else running.images_of(measured.claim)
    kept.prepare(images)
    return images


def _train_one(run: SeedRun, received: set[int]) -> Result:
    from jobs.verbs.train import followed

    typer.echo(f"\n{run.config.name}: {run.folder}")
    return followed(run, (), received)


def _print_costs(measured: ClaimFigures, runs: Sequence[ClaimRun]) -> None:
    from tuning.reproduce import costs, running

    claim, left = measured.claim, running.remaining(measured, runs)
    found = {arm: costs.of_arm(claim.arms[arm], count) for arm, count in left.items() if count}
    typer.echo(f"{claim.config.title}\nclaimed: {claim.config.claimed} ({claim.config.source})")
    if measured.kept.folder is not None:
        typer.echo(f"{len(measured.kept)} finished runs are kept in {measured.kept.folder}")
    typer.echo(_of_costs(found) if found else "every run is finished")


def _of_costs(found: Mapping[str, ArmCost]) -> str:
    from jobs import tables

    rows = [["arm", "MMACs", "images", "GMAC a run", "images/s here", "hours a run", "runs left", "hours"]]
    for arm, cost in found.items():
        rate = f"{cost.images_per_s:,.0f} ({cost.precision})"
        row = [arm, f"{cost.macs / 1e6:.2f}", f"{cost.images:,.0f}", f"{cost.gmacs:,.0f}", rate]
        rows.append([*row, f"{cost.hours:.2f}", str(cost.runs), f"{cost.runs * cost.hours:.2f}"])
    gmacs = sum(cost.runs * cost.gmacs for cost in found.values())
    hours = sum(cost.runs * cost.hours for cost in found.values())
    whole = f"in all {gmacs:,.0f} GMAC and {hours:.2f} hours on this machine: 3 x forward MACs x images, by a measured "
    return f"{tables.align(rows)}\n{whole}step of each arm; without evaluations, and without what compiling may save"


def _print_outcome(measured: ClaimFigures, outcome: ClaimOutcome, results: Path | None) -> None:
    from jobs import tables
    from tuning.reproduce import results as tried

    result = tried.read(measured.folder)
    typer.echo("\n" + tables.align(tried.rows(result), left=True))
    typer.echo(f"{measured.claim.name}: {result['verdict']}; {tried.origin(result)}")
    if results is not None:
        tried.update(results, result)
        typer.echo(f"written into {results}")
    page = tried.page(measured, result)
    if page is not None:
        typer.echo(f"page: {page}")
    for name, reason in outcome.diverged.items():
        typer.echo(f"failed: {name}: {reason}")
    if outcome.left:
        typer.echo(f"left: {', '.join(outcome.left)}; the same command with --resume goes on")
