"""`adaptnet evaluate`: accuracy, MACs and latency of a trained net under each of its policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli import data_home

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

EXAMPLES = """Evaluates SOURCE on the val split under each of its policies: accuracy, multiply-accumulates per image,
share of the full network, latency on this device, and the family's own facts by class.

SOURCE is a run's folder (its best checkpoint), a checkpoint's folder, or a registry version.

Examples:

  adaptnet evaluate runs/convnet_aig-toy

  adaptnet evaluate models:/aig-toy@candidate data.root=/data/other --policy gates-hard

  adaptnet evaluate runs/convnet_aig-cifar10_small/checkpoints/step-00000100 --facts
"""


@app.command(help=EXAMPLES)
def evaluate(
    source: Annotated[str, typer.Argument(help="run folder, checkpoint folder or models:/NAME@ALIAS")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. data.root=/data/other")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="only this policy; repeatable")] = None,
    facts: Annotated[bool, typer.Option("--facts", help="print the family's facts by class too")] = False,
    out: Annotated[Path | None, typer.Option(help="where reports are stored; default beside the run")] = None,
    uri: Annotated[str | None, typer.Option(help="tracking server of models:/; default runs/mlflow.db")] = None,
) -> None:
    from jobs import tables
    from pipeline import evaluations

    done = evaluations.evaluate(
        source, overrides or (), data_home=data_home(), policies=policy or None, out=out, uri=uri
    )
    typer.echo(f"{done.what} on {done.root} (step {done.step})")
    typer.echo(tables.of_reports(done.reports))
    for report in done.reports if facts else ():
        typer.echo(tables.of_facts(report, done.classes))
    typer.echo(f"stored in {done.folder}")
