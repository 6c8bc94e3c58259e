"""`adaptnet runs`: lists runs and sends to MLflow what it does not have yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import AdaptNetError, ConfigError, ResourceError

EXAMPLES = """Lists runs and sends to the tracking server what it does not have yet.

Examples:

  adaptnet runs list

  adaptnet runs sync runs/convnet_aig-toy
"""


app = typer.Typer(
    help=EXAMPLES, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)


@app.command("list", short_help="List runs.")
def list_runs(folder: Annotated[Path, typer.Argument(help="folder that contains run folders")] = Path("runs")) -> None:
    """Prints one line for each run in FOLDER: status, step, best top-1, and how much MLflow does not have yet.

    Examples:

      adaptnet runs list

      adaptnet runs list /scratch/me/runs
    """
    from jobs import tables
    from pipeline import tracking

    runs = tracking.summaries(folder)
    if not runs:
        if not folder.is_dir() and folder != Path("runs"):
            message = f"{folder}: no such folder; give a folder that contains run folders"
            raise ConfigError(message, key="folder", subject=folder)
        typer.echo(f"{folder.absolute()}: no runs here; give the folder that contains the run folders")
        return
    rows = [["run", "status", "step", "best top-1 %", "MLflow run", "unsent bytes"]]
    for run in runs:
        top1 = "-" if run.top1 is None else f"{100 * run.top1:.2f}"
        rows.append([str(run.run_dir), run.status, str(run.step), top1, run.run_id or "-", f"{run.unsent_bytes:,}"])
    typer.echo(tables.align(rows))
    for run in runs:
        if run.stall is not None:
            typer.echo(f"{run.run_dir}: {run.stall}")


@app.command(short_help="Send to MLflow what it does not have yet.")
def sync(
    run_dirs: Annotated[list[Path], typer.Argument(help="run folders")],
    uri: Annotated[str | None, typer.Option(help="tracking server; default: the one in the run's recipe")] = None,
) -> None:
    """Sends the journals and files of runs to MLflow. Use it if the server was unreachable during training, or if only
    the journal could be written. Sending twice duplicates nothing. A finished run whose recipe sets tracking.register
    is also registered, unless it already is.

    Examples:

      adaptnet runs sync runs/convnet_aig-toy

      adaptnet runs sync runs/* --uri http://tracking:5000
    """
    failed = []
    others = [path for path in run_dirs if path.exists() and not (path / "config.yaml").is_file()]
    if len(others) < len(run_dirs):  # `runs/*` also matches files that are no run
        run_dirs = [path for path in run_dirs if path not in others]
        for path in others:
            typer.echo(f"{path}: not a run folder, skipped")
    for run_dir in run_dirs:
        try:
            _sync(run_dir.absolute(), uri)
        except AdaptNetError as error:
            failed.append(f"{run_dir}: {error}")
    if failed:
        raise ResourceError("\n".join(failed), key="run_dirs")


def _sync(run_dir: Path, uri: str | None) -> None:
    from pipeline import tracking
    from pipeline.registry.publishing import register_late

    done = tracking.sync(run_dir, uri)
    typer.echo(f"{run_dir}: MLflow run {done.run_id} is {done.status}; {done.num_metrics:,} metrics sent to {done.uri}")
    version = register_late(run_dir, uri)
    if version is not None:
        typer.echo(f"{run_dir}: registered as {version.reference}")
