"""`adaptnet report`: accuracy against cost of trained nets, as a page, pictures and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

EXAMPLES = """Writes a page (DIR/index.html, one file that needs no network) about the stored evaluations of trained
nets: accuracy against MACs and against time over all their policies, each policy's figures, accuracy by class, and the
family's own pictures. Beside it lie the pictures as PNG and all numbers as CSV and JSON.

A SOURCE is a run's folder (its best checkpoint), a checkpoint's folder, or a registry version. All must have been
evaluated on the same images; baselines given beside adaptive nets are marked as such.

Examples:

  adaptnet report runs/convnet_aig-toy

  adaptnet report runs/ranet-cifar10 runs/arrn-cifar10 models:/resnet14-cifar10@champion --out cifar10-report

  adaptnet report runs/convnet_aig-imagenet_50 --groups superclasses.yaml --no-track
"""


@app.command(help=EXAMPLES)
def report(
    sources: Annotated[list[str], typer.Argument(help="run folders, checkpoint folders or models:/NAME@ALIAS")],
    out: Annotated[Path, typer.Option(help="folder of the report: new, empty or an earlier report's")] = Path("report"),
    groups: Annotated[
        Path | None, typer.Option(help="YAML or JSON {superclass: [class, ...]} to order classes")
    ] = None,
    track: Annotated[bool, typer.Option("--track/--no-track", help="log it to the nets' MLflow runs too")] = True,
    uri: Annotated[str | None, typer.Option(help="tracking server; default: runs/mlflow.db, each run's own")] = None,
) -> None:
    from pipeline.report import report as make

    made = make(sources, out, groups=groups, uri=uri, track=track)
    typer.echo(f"{made.num_nets} nets, {made.num_policies} policies, {made.num_figures} figures: {made.page}")
    for run in made.sent:
        typer.echo(f"logged to MLflow run {run}, under report/")
    for warning in made.warnings:
        typer.echo(f"adaptnet: warning: {warning}", err=True)
