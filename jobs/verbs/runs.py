"""`adaptnet runs`: lists runs, and sends what MLflow does not have yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import AdaptNetError, ConfigError, ResourceError

EXAMPLES = """Lists runs, and sends what the tracking server does not have of them.

Examples:

  adaptnet runs list

  adaptnet runs sync runs/convnet_aig-toy
"""

LIST = """One line for each run in FOLDER: how it stands, its step, its best top-1, what MLflow does not have yet.

Examples:

  adaptnet runs list

  adaptnet runs list /scratch/me/runs
"""

SYNC = """Sends the journals and files of runs to MLflow, as often as you like: nothing is doubled. For runs whose
server was away, or that ran where only the journal could be written. A finished run whose recipe names
tracking.register is registered too, if it has not been.

Examples:

  adaptnet runs sync runs/convnet_aig-toy

  adaptnet runs sync runs/* --uri http://tracking:5000
"""

app = typer.Typer(
    help=EXAMPLES, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)


@app.command("list", short_help="How each run stands.", help=LIST)
def list_runs(folder: Annotated[Path, typer.Argument(help="a folder of run folders")] = Path("runs")) -> None:
    from jobs import tables
    from pipeline import tracking

    found = tracking.summaries(folder)
    if not found:
        if not folder.is_dir() and folder != Path("runs"):
            raise ConfigError(f"{folder}: no such folder; give one that holds run folders")
        typer.echo(f"{folder}: no runs here")
        return
    rows = [["run", "status", "step", "best top-1 %", "MLflow run", "unsent bytes"]]
    for run in found:
        top1 = "-" if run.top1 is None else f"{100 * run.top1:.2f}"
        rows.append([str(run.run_dir), run.status, str(run.step), top1, run.run_id or "-", f"{run.unsent_bytes:,}"])
    typer.echo(tables.align(rows))


@app.command(short_help="Send what MLflow does not have yet.", help=SYNC)
def sync(
    run_dirs: Annotated[list[Path], typer.Argument(help="run folders")],
    uri: Annotated[str | None, typer.Option(help="tracking server; default: the one in the run's recipe")] = None,
) -> None:
    failed = []
    others = [path for path in run_dirs if path.exists() and not (path / "config.yaml").is_file()]
    if len(others) < len(run_dirs):  # as of `runs/*`
        run_dirs = [path for path in run_dirs if path not in others]
        for path in others:
            typer.echo(f"{path}: no run folder, passed over")
    for run_dir in run_dirs:
        try:
            _sync(run_dir.absolute(), uri)
        except AdaptNetError as error:
            failed.append(f"{run_dir}: {error}")
    if failed:
        raise ResourceError("\n".join(failed))


def _sync(run_dir: Path, uri: str | None) -> None:
    from pipeline import tracking
    from pipeline.registry.publishing import register_late

    done = tracking.sync(run_dir, uri)
    typer.echo(f"{run_dir}: MLflow run {done.run_id} is {done.status}; {done.num_metrics:,} metrics sent to {done.uri}")
    version = register_late(run_dir, uri)
    if version is not None:
        typer.echo(f"{run_dir}: registered as {version.reference}")
