"""`adaptnet report`: accuracy against cost of trained nets, as a web page, pictures and tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

PLURALS = {"net": "nets", "policy": "policies", "figure": "figures"}

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="run folders, checkpoint folders, models:/NAME@ALIAS, zoo:NAME, or seeds: NAME-seeds, 'NAME-s*'"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder of the report: new, empty or that of an earlier report")] = Path(
        "report"
    ),
    groups: Annotated[
        Path | None, typer.Option(help="YAML or JSON file {superclass: [class, ...]} that orders the classes")
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(
            help="data set of the images, whose published points are drawn too: imagenet-1k, cifar10, none; default: "
            "by the name of the evaluated folder"
        ),
    ] = None,
    track: Annotated[
        bool, typer.Option("--track/--no-track", help="also upload it to the MLflow runs of the nets")
    ] = True,
    uri: Annotated[
        str | None,
        typer.Option(
            help="tracking server; default: that of each run; of versions MLFLOW_TRACKING_URI, or runs/mlflow.db"
        ),
    ] = None,
) -> None:
    """Writes a web page (DIR/index.html, one file that needs no network) about the stored evaluations of trained nets:
    accuracy against MACs and against time for all their policies, the figures of each policy, accuracy by class, and
    the family's own pictures. The folder also holds the pictures as PNG and all numbers as CSV and JSON.

    A SOURCE is a run's folder (its best checkpoint), a checkpoint's folder, or a registry version. All must have been
    evaluated on the same images. Baselines among adaptive nets are marked as such.

    Several seeds of a recipe (`adaptnet train RECIPE --seeds 3`) are one SOURCE: the folder NAME-seeds, or a quoted
    pattern. Every figure is then a mean with its standard deviation, 95 % interval and n, the points have error bars,
    and of every two groups the page says which is better, or that the difference is below what the seeds resolve.

    Of ImageNet and CIFAR-10, what others have published for the same images is drawn as grey marks, with its sources,
    if the evaluated folder is called imagenet or cifar10 or --published says that it is this set.

    Examples:

      adaptnet report runs/convnet_aig-toy

      adaptnet report runs/ranet-cifar10 runs/arrn-cifar10 models:/resnet14-cifar10@champion --out cifar10-report

      adaptnet report runs/aig-seeds 'runs/resnet-s*' --out seeds-report

      adaptnet report runs/convnet_aig-imagenet_50 --groups superclasses.yaml --no-track
    """
    from pipeline.report import report as make

    registry = uri or os.environ.get("MLFLOW_TRACKING_URI")
    written = make(sources, out, groups=groups, uri=uri, registry=registry, track=track, data_set=published)
    counts = {"net": written.num_nets, "policy": written.num_policies, "figure": written.num_figures}
    found = ", ".join(f"{count} {name if count == 1 else PLURALS[name]}" for name, count in counts.items())
    typer.echo(f"{found}: {written.page}")
    for verdict in written.verdicts:
        typer.echo(verdict)
    for run in written.sent:
        typer.echo(f"uploaded to MLflow run {run}, under report/")
    for warning in written.warnings:
        typer.echo(f"adaptnet: warning: {warning}", err=True)
