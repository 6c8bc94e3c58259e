"""`adaptnet bench`: our speed as a ratio to a named peer's, measured in one run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import data_home

if TYPE_CHECKING:
    from pipeline.bench.rows import BenchRow

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="""Measures our speed as a ratio to that of a named peer. Both take turns (A B A B) in one run; results are
medians.

Examples:

  adaptnet bench loader /data/imagenet-sample

  adaptnet bench step baseline/cifar10_small

  adaptnet bench inference ranet --threads 1

  adaptnet bench cifar10 packed/cifar10
""",
)


@app.command(short_help="Compare our loader with DALI's and torchvision's.")
def loader(
    root: Annotated[Path | None, typer.Argument(help="class folders or tar shards of photographs")] = None,
    read_latency: Annotated[
        str, typer.Option(help="delay added to each read, as on networked storage, e.g. 5ms")
    ] = "0ms",
    index_only: Annotated[bool, typer.Option("--index-only", help="only time an index of 1,281,167 images")] = False,
    seconds: Annotated[float, typer.Option(help="measured seconds of each turn")] = 8.0,
    rounds: Annotated[int, typer.Option(help="number of turns of each loader")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of each loader")] = 2,
) -> None:
    """Measures images/s of our loader, of DALI's file reader with the same operators, and of torch's DataLoader with
    torchvision's transforms.

    Examples:

      adaptnet bench loader /data/imagenet-sample

      adaptnet bench loader /data/imagenet-sample --read-latency 5ms

      adaptnet bench loader --index-only
    """
    from pipeline.bench import loader as bench
    from pipeline.errors import ConfigError

    if index_only:
        _print(bench.index_only())
        return
    if root is None:
        raise ConfigError("bench loader: give a folder of photographs, or --index-only", key="root")
    rows = bench.loader(root, read_latency_s=_seconds(read_latency), seconds=seconds, rounds=rounds, threads=threads)
    _print(rows)


@app.command(short_help="Compare our training step with a bare loop, and Ray with torchrun.")
def step(
    recipe: Annotated[str, typer.Argument(help="family/recipe; its net is trained on random images")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    classes: Annotated[int, typer.Option(help="number of classes")] = 10,
    steps: Annotated[int, typer.Option(help="number of timed steps in each turn")] = 60,
    rounds: Annotated[int, typer.Option(help="number of turns of each loop")] = 5,
    workers: Annotated[bool, typer.Option(help="also measure two workers against torchrun")] = True,
) -> None:
    """Measures training images/s of our loop against a bare PyTorch loop over the same net and tensors, and of two
    workers of Ray Train against two processes of torchrun.

    Examples:

      adaptnet bench step baseline/cifar10_small

      adaptnet bench step convnet_aig/cifar10_small --no-workers training.batch_size=64
    """
    from pipeline import run_config
    from pipeline.bench import step as bench

    config = run_config.load(recipe, [*(overrides or ()), "data.root=unused"], data_home=data_home())
    rows = bench.loops(config, num_classes=classes, steps=steps, rounds=rounds)
    if workers:
        rows += bench.workers(config, num_classes=classes, steps=steps, rounds=rounds)
    _print(rows)
    _print_precision(config.compute.device, config.training.precision)


@app.command(short_help="Compare the time that skipping saves with the MACs that it saves.")
def inference(
    families: Annotated[list[str] | None, typer.Argument(help="convnet_aig, ranet, arrn, shape_adaptor")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="number of turns of each side")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's default")] = None,
) -> None:
    """Measures the time of each family's policies as a share of the time of the same net without skipping, and the
    share of MACs. A quotient of 1 means that time falls as much as MACs do. Weights are random; gates and thresholds
    skip as often as published.

    Examples:

      adaptnet bench inference

      adaptnet bench inference ranet --threads 1
    """
    from jobs import tables
    from pipeline.bench import inference as bench

    cells = [["policy", "batch", "threads", "% of MACs", "% of time", "quotient", "peer's ms", "peer"]]
    for cut in bench.inference(families, rounds=rounds, threads=threads):
        shares = [f"{100 * cut.macs:.1f}", f"{100 * cut.time:.1f}", f"{cut.quotient:.3f}", f"{cut.peer_ms:.1f}"]
        cells.append([cut.name, str(cut.batch), str(cut.threads), *shares, cut.peer])
    typer.echo(tables.align(cells))
    _print_precision("cpu")


@app.command(short_help="Compare each family's training step with that of a plain net of the same MACs.")
def training(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="family/cifar10_small; default: that of every family")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="images in a step")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="number of turns of each net")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's default")] = None,
) -> None:
    """Measures the time of a training step per MAC of each family, as a ratio to that of a plain ResNet of nearly the
    same MACs, and the shares of time that both spend on convolutions (with matrix products), norms, pointwise
    operators, data movement and the optimizer.

    Examples:

      adaptnet bench training

      adaptnet bench training arrn/cifar10_small --threads 1
    """
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
    _print_precision("cpu")


@app.command(short_help="Measure what a sweep, a job on SLURM and more workers cost.")
def scaling(
    recipe: Annotated[str, typer.Argument(help="family/recipe to train")] = "convnet_aig/toy",
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="compare a trial of a sweep with the training alone")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="compare the start of a job with that of the command by hand")
    ] = False,
    warning: Annotated[
        bool, typer.Option("--warning", help="time from SLURM's warning until all ranks have saved")
    ] = False,
    workers: Annotated[
        list[int] | None, typer.Option(min=1, help="measure images/s of this number of workers; repeatable")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of the job")] = 1,
    site: Annotated[str | None, typer.Option(help="site profile of the job, as for `adaptnet submit`")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="number of turns of each side")] = 1,
) -> None:
    """Measures one of these, in turns: a trial of a sweep against the same training alone (--sweep); the time from the
    start of a SLURM job to its first step against the same training started by hand (--slurm); the time from SLURM's
    warning until all ranks have saved a ResNet-50 (--warning); images/s of several workers on this machine against one
    (--workers).

    Examples:

      adaptnet bench scaling --sweep

      adaptnet bench scaling convnet_aig/toy training.epochs=4 --sweep --rounds 3

      adaptnet bench scaling --slurm --nodes 2 --site testcluster

      adaptnet bench scaling --warning --nodes 2 --site testcluster

      adaptnet bench scaling baseline/toy --workers 1 --workers 2 --workers 4
    """
    from pipeline.errors import ConfigError

    if sum((sweep, slurm, warning, bool(workers))) != 1:
        raise ConfigError("bench scaling: give one of --sweep, --slurm, --warning and --workers N", key="--sweep")
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


@app.command(short_help="Measure the CPU time in which a small net learns CIFAR-10.")
def cifar10(
    root: Annotated[Path, typer.Argument(help="CIFAR-10, as `adaptnet data import cifar10` writes it")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    runs: Annotated[int, typer.Option(min=1, max=100, help="number of trainings, each with another seed")] = 3,
) -> None:
    """Trains baseline/cifar10_speedrun:record from random weights, several times, and prints top-1 of the test images
    with the CPU time and the wall time of each training. Everything from its start to its evaluation counts, also of
    Ray's processes. The net sees the test images once, at its end.

    Examples:

      adaptnet bench cifar10 packed/cifar10

      adaptnet bench cifar10 packed/cifar10 --runs 1 training.epochs=10
    """
    from jobs import tables
    from pipeline import run_config
    from pipeline.bench import record
    from pipeline.evaluation.over_seeds import spread

    config = run_config.load(record.RECIPE, [*record.OVERRIDES, *(overrides or ()), f"data.root={root}"])
    found, cells = [], list[list[str]]()
    for each in record.trained(config, runs):
        found.append(each)
        figures = [f"{100 * value:.2f}" for value in each.top1.values()]
        cells.append([str(each.seed), *figures, f"{each.cpu_s:,.0f}", f"{each.wall_s:,.0f}"])
        typer.echo(f"seed {each.seed}: {each.cpu_s:,.0f} s of CPU time, {each.wall_s:,.0f} s", err=True)
    columns = [[100 * each.top1[policy] for each in found] for policy in found[0].top1]
    columns += [[each.cpu_s for each in found], [each.wall_s for each in found]]
    spreads = [spread(column) for column in columns]
    cells.append(["mean", *(f"{each.mean:,.2f}" for each in spreads)])
    if runs > 1:
        cells.append(["sd", *(f"{each.sd:,.2f}" for each in spreads)])
    head = ["seed", *(f"{policy} top-1 %" for policy in found[0].top1), "CPU s", "wall s"]
    typer.echo(tables.align([head, *cells]))
    _print_precision(config.compute.device, config.training.precision)


def _seconds(text: str) -> float:
    from pipeline.errors import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text.strip())
    if match is None:
        message = f"--read-latency (={text}) must be a number with the unit ms or s, e.g. 5ms"
        raise ConfigError(message, key="--read-latency", subject=text)
    return float(match[1]) / (1e3 if match[2] == "ms" else 1)


@app.command(short_help="Measure servers of a registered net under many clients.")
def serve(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    image: Annotated[
        Path, typer.Argument(help="image to send; a folder gives several images to the first measurement")
    ],
    clients: Annotated[
        list[int] | None, typer.Option(min=1, help="number of concurrent clients; repeatable; default 1, 8, 64")
    ] = None,
    server: Annotated[list[str] | None, typer.Option(help="mlflow or ray; repeatable; default: both")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="measured seconds for each number of clients")] = 10.0,
    batch: Annotated[int, typer.Option(min=1, help="batch size of the first measurement")] = 64,
    uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="tracking server; default runs/mlflow.db")
    ] = None,
) -> None:
    """Measures MLflow's pyfunc model against the bare net on one batch, then requests/s and latency of `mlflow models
    serve` and of Ray Serve (infra/ray/serve.yaml) for several numbers of concurrent clients that send one image at a
    time.

    Examples:

      adaptnet bench serve models:/aig-toy@champion photo.jpg

      adaptnet bench serve models:/aig-toy@champion photo.jpg --server mlflow --clients 1 --clients 8
    """
    from jobs import tables
    from pipeline.bench import serving
    from pipeline.bench.rows import chosen

    names = chosen("serve", server, ("mlflow", "ray"))
    serving.check_servers(names)
    pictures = _pictures(image, batch)
    _print(serving.in_process(model, pictures, uri))
    rows = [["server", "clients", "requests/s", "p50 ms", "p99 ms", "refused"]]
    for load in serving.servers(model, pictures[0], uri, clients=clients or (1, 8, 64), seconds=seconds, names=names):
        times = [f"{load.requests_per_s:.1f}", f"{load.p50_ms:.1f}", f"{load.p99_ms:.1f}"]
        rows.append([load.server, str(load.clients), *times, str(load.refused)])
    typer.echo("\n" + tables.align(rows))
    _print_precision("auto")


def _pictures(path: Path, count: int) -> list[bytes]:
    """`count` encoded images: one file repeated, or the files of a folder in turn."""
    from itertools import cycle, islice

    from pipeline.data.image_headers import EXTENSIONS
    from pipeline.errors import ConfigError

    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    images = [each.read_bytes() for each in files if each.suffix.lower() in EXTENSIONS and each.is_file()]
    if not images:
        raise ConfigError(f"{path}: no image here", key="image", subject=path)
    return list(islice(cycle(images), count))


def _print_precision(device: str, precision: str = "fp32") -> None:
    """Names the precision of the arithmetic that was measured on `device` (auto, cpu or cuda)."""
    from pipeline.training.loop import device_of
    from pipeline.training.plan import precision_of, use_bf16

    place = device_of(device)
    typer.echo(f"precision: {precision_of(place, autocast=use_bf16(precision, place))}")


def _print(rows: Sequence[BenchRow]) -> None:
    from jobs import tables

    cells = [["what", "rate", "unit", "ratio", "to"]]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        rate = f"{row.rate:,.4g}" if row.rate < 10 else f"{row.rate:,.0f}"
        cells.append([row.name, rate, row.unit, ratio, row.peer or ""])
    typer.echo(tables.align(cells))
