"""`adaptnet bench`: our speed as a ratio to a named peer's, measured in one run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli import data_home

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="""Ratios to a named peer, interleaved A B A B in one run, medians.

Examples:

  adaptnet bench loader /data/imagenet-sample

  adaptnet bench step baseline/cifar10_small

  adaptnet bench inference ranet --threads 1
""",
)


@app.command(
    short_help="Our loader against DALI's and torchvision's.",
    help="""Images/s of our loader, of DALI's own file reader with the same operators, and of torchvision's DataLoader.

Examples:

  adaptnet bench loader /data/imagenet-sample

  adaptnet bench loader /data/imagenet-sample --read-latency 5ms

  adaptnet bench loader --index-only
""",
)
def loader(
    root: Annotated[Path | None, typer.Argument(help="class folders or shards of photographs")] = None,
    read_latency: Annotated[str, typer.Option(help="added to each read, as by a networked store, e.g. 5ms")] = "0ms",
    index_only: Annotated[bool, typer.Option("--index-only", help="time an index of 1,281,167 images")] = False,
    seconds: Annotated[float, typer.Option(help="measured time of each turn")] = 8.0,
    rounds: Annotated[int, typer.Option(help="turns of each loader")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of each loader")] = 2,
) -> None:
    from pipeline.bench import loader as bench
    from pipeline.errors import ConfigError

    if index_only:
        _print(bench.index_only())
        return
    if root is None:
        raise ConfigError("bench loader: give a folder of photographs, or --index-only")
    rows = bench.loader(root, read_latency_s=_seconds(read_latency), seconds=seconds, rounds=rounds, threads=threads)
    _print(rows)


@app.command(
    short_help="Our training step against a bare loop, Ray against torchrun.",
    help="""Training images/s of our loop against a bare PyTorch loop over the same net and tensors, and of two workers
under Ray Train against two processes under torchrun.

Examples:

  adaptnet bench step baseline/cifar10_small

  adaptnet bench step convnet_aig/cifar10_small --no-workers training.batch_size=64
""",
)
def step(
    recipe: Annotated[str, typer.Argument(help="family/recipe whose net is trained on random images")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    classes: Annotated[int, typer.Option(help="number of classes")] = 10,
    steps: Annotated[int, typer.Option(help="timed steps of each turn")] = 60,
    rounds: Annotated[int, typer.Option(help="turns of each loop")] = 5,
    workers: Annotated[bool, typer.Option(help="measure two workers against torchrun too")] = True,
) -> None:
    from pipeline import run_config
    from pipeline.bench import step as bench

    config = run_config.load(recipe, [*(overrides or ()), "data.root=unused"], data_home=data_home())
    rows = bench.loops(config, num_classes=classes, steps=steps, rounds=rounds)
    if workers:
        rows += bench.workers(config, num_classes=classes, steps=steps, rounds=rounds)
    _print(rows)


@app.command(
    short_help="What skipping saves in time, beside what it saves in MACs.",
    help="""Wall time of each family's policies against the same net without skipping, beside the share of MACs; a
quotient of 1 means that time falls as MACs do. Weights are random, gates and thresholds decide as often as published.

Examples:

  adaptnet bench inference

  adaptnet bench inference ranet --threads 1
""",
)
def inference(
    families: Annotated[list[str] | None, typer.Argument(help="convnet_aig, ranet, arrn, shape_adaptor")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each side")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as many as torch takes")] = None,
) -> None:
    from jobs import tables
    from pipeline.bench import inference as bench

    cells = [["policy", "batch", "threads", "% of MACs", "% of time", "quotient", "peer's ms", "peer"]]
    for cut in bench.inference(families, rounds=rounds, threads=threads):
        shares = [f"{100 * cut.macs:.1f}", f"{100 * cut.time:.1f}", f"{cut.quotient:.3f}", f"{cut.peer_ms:.1f}"]
        cells.append([cut.name, str(cut.batch), str(cut.threads), *shares, cut.peer])
    typer.echo(tables.align(cells))


@app.command(
    short_help="Each family's training step against a plain net of the same MACs.",
    help="""Time of a training step per MAC, each family's over that of a plain ResNet of nearly the same MACs, and the
shares of time that either spends on convolutions (and matrix products), norms, pointwise operators, moves of data and
the optimizer.

Examples:

  adaptnet bench training

  adaptnet bench training arrn/cifar10_small --threads 1
""",
)
def training(
    recipes: Annotated[list[str] | None, typer.Argument(help="family/cifar10_small; default: of every family")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="images of a step")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each net")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as many as torch takes")] = None,
) -> None:
    from jobs import tables
    from pipeline.bench import training as bench

    cells: list[list[str]] = []
    for pair in bench.training(recipes, batch_size=batch_size, rounds=rounds, threads=threads):
        for step in (pair.plain, pair.family):
            name = step.name if step.depth is None else f"{step.name}-{step.depth}"
            shares = [f"{100 * share:.0f}" for share in step.shares.values()]
            quotient = "" if step.depth is not None else f"{pair.quotient:.2f}"
            cells.append([name, f"{step.mmacs:.1f}", f"{step.ms:.2f}", quotient, *shares])
            kinds = [f"{kind} %" for kind in step.shares]
    typer.echo(tables.align([["net", "MMACs", "ms an image", "time per MAC", *kinds], *cells]))


@app.command(
    short_help="What a sweep, a job on SLURM, and more workers cost beside a training.",
    help="""Of one of these, in turns: a trial of a sweep against the same training alone (--sweep); a job of SLURM from
its start to its first step against the same training started by hand (--slurm); the time from SLURM's warning until all
ranks have saved a ResNet-50 (--warning); images/s of so many workers of this machine against one (--workers).

Examples:

  adaptnet bench scaling --sweep

  adaptnet bench scaling convnet_aig/toy training.epochs=4 --sweep --rounds 3

  adaptnet bench scaling --slurm --nodes 2 --site testcluster

  adaptnet bench scaling --warning --nodes 2 --site testcluster

  adaptnet bench scaling baseline/toy --workers 1 --workers 2 --workers 4
""",
)
def scaling(
    recipe: Annotated[str, typer.Argument(help="family/recipe that is trained")] = "convnet_aig/toy",
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="a trial of a sweep against the training alone")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="a job's start against the command by hand")] = False,
    warning: Annotated[bool, typer.Option("--warning", help="from SLURM's warning to all ranks saved")] = False,
    workers: Annotated[list[int] | None, typer.Option(min=1, help="images/s of so many; repeatable")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="of the job")] = 1,
    site: Annotated[str | None, typer.Option(help="profile of the job, as `adaptnet submit` takes it")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each side")] = 1,
) -> None:
    from pipeline.errors import ConfigError

    if sum((sweep, slurm, warning, bool(workers))) != 1:
        raise ConfigError("bench scaling: say what is measured: --sweep, --slurm, --warning or --workers N")
    if sweep:
        from tuning.overhead import overhead

        _print(overhead(recipe, overrides or (), rounds=rounds, data_home=data_home()))
        return
    from jobs.schedulers import profile as profiles
    from jobs.verbs import scaling as bench

    if slurm:
        _print(bench.starts(recipe, overrides or (), profiles.load(site), nodes=nodes, rounds=rounds))
    elif warning:
        _print(bench.warnings(overrides or (), profiles.load(site), nodes=nodes, rounds=rounds))
    else:
        _print(bench.ranks(recipe, overrides or (), worlds=workers or (), rounds=rounds))


def _seconds(text: str) -> float:
    from pipeline.errors import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text.strip())
    if match is None:
        raise ConfigError(f"--read-latency (={text}): a time is a number with ms or s, e.g. 5ms")
    return float(match[1]) / (1e3 if match[2] == "ms" else 1)


@app.command(
    short_help="Servers of a registered net under many clients.",
    help="""MLflow's pyfunc against the bare net at one batch, then requests/s and latency of `mlflow models serve` and
of Ray Serve (infra/ray/serve.yaml) for so many clients at once, each sending one image at a time.

Examples:

  adaptnet bench serve models:/aig-toy@champion photo.jpg

  adaptnet bench serve models:/aig-toy@champion photo.jpg --server mlflow --clients 1 --clients 8
""",
)
def serve(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    image: Annotated[Path, typer.Argument(help="an image to send, or a folder of them for the first part")],
    clients: Annotated[list[int] | None, typer.Option(min=1, help="at once; repeatable; default 1, 8, 64")] = None,
    server: Annotated[list[str] | None, typer.Option(help="mlflow or ray; repeatable; default both")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="for each number of clients")] = 10.0,
    batch: Annotated[int, typer.Option(min=1, help="images of the first part")] = 64,
    uri: Annotated[str | None, typer.Option(help="tracking server; default runs/mlflow.db")] = None,
) -> None:
    from jobs import tables
    from pipeline.bench import serving
    from pipeline.bench.rows import chosen

    names = chosen("serve", server, ("mlflow", "ray"))
    serving.check_servers(names)
    pictures = _pictures(image, batch)
    _print(serving.in_process(model, pictures, uri))
    rows = [["server", "clients", "requests/s", "p50 ms", "p99 ms", "refused"]]
    for found in serving.servers(model, pictures[0], uri, clients=clients or (1, 8, 64), seconds=seconds, names=names):
        times = [f"{found.requests_per_s:.1f}", f"{found.p50_ms:.1f}", f"{found.p99_ms:.1f}"]
        rows.append([found.server, str(found.clients), *times, str(found.refused)])
    typer.echo("\n" + tables.align(rows))


def _pictures(path: Path, count: int) -> list[bytes]:
    """That many images: a file's again and again, or a folder's in turn."""
    from itertools import cycle, islice

    from pipeline.data.image_headers import EXTENSIONS
    from pipeline.errors import ConfigError

    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [each.read_bytes() for each in files if each.suffix.lower() in EXTENSIONS and each.is_file()]
    if not found:
        raise ConfigError(f"{path}: no image here")
    return list(islice(cycle(found), count))


def _print(rows: Sequence[Any]) -> None:
    from jobs import tables

    cells = [["what", "rate", "unit", "ratio", "to"]]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        rate = f"{row.rate:,.4g}" if row.rate < 10 else f"{row.rate:,.0f}"
        cells.append([row.name, rate, row.unit, ratio, row.peer or ""])
    typer.echo(tables.align(cells))
