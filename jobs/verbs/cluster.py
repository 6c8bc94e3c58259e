"""`adaptnet cluster`: Ray clusters outside SLURM, on this machine, on hosts, in a cloud or under Kubernetes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.ray import site as ray_site
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from jobs.ray.local import Local

HELP = """Starts, describes and stops Ray clusters outside SLURM. SITE is the name of a file of infra/ray/sites or a
path ending in .yaml. With --local N instead, the N nodes are processes on this machine.

Examples:

  adaptnet cluster up --local 2 --cpus 2

  adaptnet cluster status

  adaptnet cluster down

  adaptnet cluster render kubernetes
"""

app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)
Option = typer.Option
Site = Annotated[str | None, typer.Argument(help="name of a file of infra/ray/sites, or a path ending in .yaml")]
Folder = Annotated[Path, Option(help="folder of the records of started clusters")]
Name = Annotated[str, Option(help="name of a cluster on this machine")]
CLUSTERS = Path("runs") / "clusters"


@app.command()
def up(
    site: Site = None,
    local: Annotated[int | None, Option(help="start N nodes on this machine, as processes", metavar="N")] = None,
    cpus: Annotated[int | None, Option(min=1, help="CPUs of each node of --local; default: an equal share")] = None,
    gpus: Annotated[bool, Option(help="divide this machine's GPUs among the nodes of --local")] = False,
    patience: Annotated[float, Option(min=1, help="seconds within which all nodes of --local must join")] = 60.0,
    name: Name = "local",
    folder: Folder = CLUSTERS,
) -> None:
    """Starts a cluster and prints how to train on it.

    Examples:

      adaptnet cluster up --local 2

      adaptnet cluster up hosts
    """
    if (site is None) == (local is None):
        raise ConfigError("cluster up: give either SITE or --local N", key="--local")
    if site is not None:
        from jobs.ray import launch as ray_launch

        typer.echo(ray_launch.up(ray_site.load(site), folder))
        return
    assert local is not None
    from jobs.ray import local as ray_local

    cluster = _local(folder, name)
    shared = cpus or max(1, len(os.sched_getaffinity(0)) // max(1, local))
    address = cluster.up(local, cpus=shared, gpus=ray_local.gpus_here(local) if gpus else [], patience_s=patience)
    typer.echo(f"started {local} nodes with {shared} CPUs each; to train on them from this machine:\n")
    typer.echo(f"  export RAY_AUTH_TOKEN_PATH={cluster.token}")
    typer.echo(f"  adaptnet train convnet_aig/toy compute.address={address}")


@app.command()
def down(site: Site = None, name: Name = "local", folder: Folder = CLUSTERS) -> None:
    """Stops a cluster that `up` started, and no other Ray.

    Examples:

      adaptnet cluster down

      adaptnet cluster down hosts
    """
    if site is not None:
        from jobs.ray import launch as ray_launch

        typer.echo(ray_launch.down(ray_site.load(site), folder))
        return
    cluster = _local(folder, name)
    stopped = cluster.down()
    typer.echo(f"stopped {stopped} nodes" if stopped else f"{cluster.folder}: no cluster runs here")


@app.command()
def status(
    site: Site = None,
    address: Annotated[
        str | None, Option(help="HOST:PORT of any running Ray cluster that this machine belongs to")
    ] = None,
    name: Name = "local",
    folder: Folder = CLUSTERS,
) -> None:
    """Lists the nodes of a cluster and their resources.

    Examples:

      adaptnet cluster status

      adaptnet cluster status --address 10.0.0.1:6379

      adaptnet cluster status hosts
    """
    if site is not None:
        from jobs.ray import launch as ray_launch

        typer.echo(ray_launch.status(ray_site.load(site), folder))
        return
    if address is None:
        cluster = _local(folder, name)
        record = cluster.read()
        address = record["address"] if record is not None else None
        if address is None or not cluster.is_running:
            typer.echo(f"{cluster.folder}: no cluster runs here; `adaptnet cluster up --local N` starts one")
            raise typer.Exit(1)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(cluster.token)
    _show(address)


def _show(address: str) -> None:
    from jobs import tables
    from pipeline.execution import cluster

    rows = [["node", "state", "CPUs", "GPUs", "memory"]]
    for node in cluster.members(address):
        gib = node.resources.get("memory", 0) / 2**30
        amounts = [f"{node.resources.get(kind, 0):g}" for kind in ("CPU", "GPU")]
        rows.append([node.ip, "alive" if node.alive else "lost", *amounts, f"{gib:.1f} GiB"])
    typer.echo(f"compute.address={address}\n")
    typer.echo(tables.align(rows))


@app.command()
def render(
    site: Annotated[str, typer.Argument(help="name of a file of infra/ray/sites, or a path ending in .yaml")],
    out: Annotated[Path | None, Option(help="folder to write to")] = None,
    job: Annotated[
        str, Option(help="a verb with its arguments: write a RayJob that runs it on a cluster of its own")
    ] = "",
) -> None:
    """Writes the files that `up` would pass to Ray's launcher or to kubectl; without --out it prints them.

    Examples:

      adaptnet cluster render hosts

      adaptnet cluster render kubernetes --out rendered

      adaptnet cluster render kubernetes --job 'train convnet_aig/toy --run-dir /shared/runs/toy'
    """
    import shlex

    from jobs.ray import render as ray_render
    from pipeline.runs.files import write_text

    for filename, text in ray_render.render(ray_site.load(site), shlex.split(job)).items():
        if out is None:
            typer.echo(text, nl=False)
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / filename, text)
            typer.echo(str(out / filename))


def _local(folder: Path, name: str) -> Local:
    from jobs.ray.local import Local

    return Local(folder / name)
