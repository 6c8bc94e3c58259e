"""`adaptnet evaluate`: measures accuracy, MACs and latency of a trained net under each of its policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import data_home
from pipeline.errors import ConfigError

if TYPE_CHECKING:  # these import torch, which takes seconds
    from pipeline.deploy.evaluations import Evaluation
    from pipeline.evaluation.robustness import Attack, ResolutionSweep

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="run folder, checkpoint folder, models:/NAME@ALIAS or zoo:NAME")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. data.root=/data/other")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="only this policy; repeatable")] = None,
    facts: Annotated[bool, typer.Option("--facts", help="also print the family's facts by class")] = False,
    attack: Annotated[str | None, typer.Option(help="attack the images first: fgsm")] = None,
    eps: Annotated[
        str | None, typer.Option(help="strength of the attack as a share of the pixel range, e.g. 4/255")
    ] = None,
    jpeg: Annotated[
        int | None, typer.Option(help="first compress the images as JPEG with this quality, 1..100")
    ] = None,
    sides: Annotated[
        str | None, typer.Option(help="run each policy at these sides in pixels, e.g. 224,160,112")
    ] = None,
    down_and_up: Annotated[
        bool,
        typer.Option(
            "--down-and-up", help="with --sides: enlarge the images to their original side again before the net"
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="folder for the reports; default: beside the run")] = None,
    uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="tracking server of models:/; default: runs/mlflow.db"),
    ] = None,
) -> None:
    """Evaluates SOURCE on the val split under each of its policies: accuracy, multiply-accumulates per image, share of
    the full net's MACs, latency on this device, and the family's own facts by class.

    SOURCE is a run's folder (its best checkpoint), a checkpoint's folder, or a registry version. With data.root=FOLDER
    the images are those of another set: of its val split, or all of them if it has none. --attack first moves every
    pixel by eps so as to raise the net's loss (fgsm: along the sign of the gradient); --jpeg first compresses the
    images; --sides runs each policy on images reduced to each side. Their results are stored separately from those of
    the original images.

    Examples:

      adaptnet evaluate runs/convnet_aig-toy

      adaptnet evaluate models:/aig-toy@candidate data.root=/data/other --policy gates-hard

      adaptnet evaluate runs/convnet_aig-cifar10_small/checkpoints/step-00000100 --facts

      adaptnet evaluate runs/convnet_aig-toy --attack fgsm --eps 4/255 --jpeg 75

      adaptnet evaluate runs/convnet_aig-toy --sides 32,24,16 --down-and-up
    """
    from jobs import tables
    from jobs.verbs.data import line_printer
    from pipeline.deploy import evaluations

    done = evaluations.evaluate(
        source,
        overrides or (),
        data_home=data_home(),
        policies=policy or None,
        out=out,
        uri=uri,
        attack=_attack(attack, eps, jpeg),
        sweep=_sweep(sides, down_and_up),
        progress=line_printer(typer.echo),
    )
    typer.echo(f"{done.what} on {done.root} (step {done.step})")
    typer.echo(tables.of_reports(done.reports, done.family))
    for report in done.reports if facts else ():
        typer.echo(tables.of_facts(report, done.classes))
    if (attack or jpeg) and not sides:
        typer.echo("\n" + _against(done))
    typer.echo(f"stored in {done.folder}")


def _attack(kind: str | None, eps: str | None, jpeg: int | None) -> Attack | None:
    from pipeline.evaluation import robustness

    if (kind is None) != (eps is None):
        raise ConfigError("--attack and --eps go together, e.g. --attack fgsm --eps 4/255", key="--eps")
    if kind is None and jpeg is None:
        return None
    return robustness.Attack(kind, robustness.strength(eps) if eps else 0.0, jpeg)  # type: ignore[arg-type]


def _sweep(sides: str | None, up_again: bool) -> ResolutionSweep | None:
    from pipeline.evaluation import robustness

    if sides is None and up_again:
        raise ConfigError("--down-and-up needs --sides, e.g. --sides 160,112 --down-and-up", key="--sides")
    return None if sides is None else robustness.ResolutionSweep(robustness.sides(sides), up_again)


def _against(done: Evaluation) -> str:
    from jobs import tables

    if not done.clean:
        return f"to compare with the original images, evaluate them first: adaptnet evaluate {done.what}"
    return tables.of_attack(done.clean, done.reports)
