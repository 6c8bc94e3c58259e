"""`adaptnet plan`: estimates what a recipe needs on a number of nodes, before a job is submitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import data_home, importing
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.bench.plan import Images, MachineProfile, ResourcePlan
    from pipeline.data.index import ImageIndex
    from pipeline.run_config import RunConfig

UNTIMED_ROWS = 2  # images of a step whose time does not matter

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="family/recipe, family/recipe:variant, or a path ending in .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="training.batch_size; with training.scale_lr as for `adaptnet train`")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(min=0, help="GPUs of each node; 0: one worker on each node, on its CPUs")
    ] = 0,
    images: Annotated[
        int | None, typer.Option(min=1, help="number of training images, if they are not available here")
    ] = None,
    image_kb: Annotated[float | None, typer.Option(min=0.001, help="mean size of an encoded image in kB")] = None,
    classes: Annotated[int, typer.Option(min=2, help="number of classes, if the images are not available here")] = 1000,
    images_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="images/s of one worker on the target machine")
    ] = None,
    decoded_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="images/s decoded by one core on the target machine")
    ] = None,
    network_gbs: Annotated[float | None, typer.Option(min=0.001, help="GB/s that each worker can send")] = None,
    measured_rows: Annotated[int, typer.Option(min=1, help="number of images in the step measured here")] = 8,
    anew: Annotated[bool, typer.Option("--anew", help="measure again what an earlier plan has measured")] = False,
) -> None:
    """Estimates what RECIPE needs on N nodes of G GPUs: memory, steps, reading, decoding, saving, time. A step is
    measured on this machine's device, unless --images-per-s gives the speed of one worker on the target machine.
    Decoding is measured if the images are available here. Measurements are remembered for the next plan. Below the
    table it says what to change: the batch and its learning rate, the threads that decode, the network.

    Examples:

      adaptnet plan convnet_aig/toy --nodes 2

      adaptnet plan baseline/imagenet_resnet50 --nodes 8 --gpus-per-node 8 --images 1281167 --images-per-s 3000
    """
    with importing():
        from pipeline import run_config
        from pipeline.bench import advice
        from pipeline.bench import plan as plans

    home = data_home() or ("nowhere" if images else None)
    given = list(overrides or ())
    if batch_size is not None:
        given = run_config.with_batch_size(recipe, given, batch_size)
    config = run_config.load(recipe, given, data_home=home)
    available = plans.images_of(config)
    if available is None and images is None:
        message = f"data.root (={config.data.root}) does not exist here; give the number of images with --images"
        raise ConfigError(message, key="data.root", subject=config.data.root)
    known, train = available if available is not None else (plans.Images(images or 0, classes), None)
    known = plans.Images(images or known.count, known.classes, image_kb * 1e3 if image_kb else known.mean_bytes)
    to_decode = train if decoded_per_s is None else None
    cost = _measured(config, known.classes, measured_rows, to_decode, timed=images_per_s is None, anew=anew)
    where = "on the target machine, as given" if images_per_s else None
    cost = plans.given(cost, images_per_s=images_per_s, decoded_per_s=decoded_per_s, device=where)
    workers = nodes * max(1, gpus_per_node)
    bandwidth = network_gbs * 1e9 if network_gbs else None
    estimate = plans.plan(config, workers, known, cost, network_bytes_per_s=bandwidth)
    _print(config.name, estimate, known, cost)
    for line in advice.advise(config, estimate, gpus_per_node=gpus_per_node):
        typer.echo(f"- {line}")


def _measured(
    config: RunConfig, classes: int, rows: int, train: ImageIndex | None, *, timed: bool, anew: bool
) -> MachineProfile:
    """The measurement of an earlier plan, or one that is made now; says which."""
    from pipeline.bench import plan as plans
    from pipeline.bench.measured import MeasuredProfiles
    from pipeline.runs.progress import clock

    rows = rows if timed else min(rows, UNTIMED_ROWS)
    what = {"classes": classes, "rows": rows, "timed": timed, "images": None if train is None else train.identity}
    profiles = MeasuredProfiles(config, what)
    known = None if anew else profiles.find()
    if known is not None:
        typer.echo(f"measured {clock(known.at)}; --anew measures again", err=True)
        return known.profile
    decoding = "" if train is None else ", then decoding on one thread"
    typer.echo(f"measuring a step of {rows} images of {config.data.side_px} px{decoding} ...", err=True)
    profile = plans.measure(config, classes, rows, train=train, timed=timed)
    profiles.put(profile)
    return profile


def _print(name: str, estimate: ResourcePlan, images: Images, cost: MachineProfile) -> None:
    from jobs import tables
    from jobs.tables import byte_size as size

    at_once = "" if estimate.micro_rows == estimate.rows else f", {estimate.micro_rows} in memory at once"
    saving = f"{_every(estimate.save_every_s)}{_traffic(estimate.save_bytes_per_s)}"
    facts = {
        "run": f"{name}: {estimate.workers} workers, {images.count:,} images of {images.classes:,} classes",
        "images per worker and step": f"{estimate.rows} images{at_once}",
        "steps": f"{estimate.steps:,}",
        "memory of a worker": f"{size(estimate.memory_bytes)} of tensors ({size(cost.activation_bytes)} per image)",
        "gradients": f"{size(estimate.gradient_bytes)} sent by each worker in a step",
        "checkpoint": f"{size(estimate.checkpoint_bytes)}{saving}",
        "metrics": _known(
            estimate.metrics_per_s, lambda rate: f"{rate:.3g} values/s to the journal and then to MLflow"
        ),
        "index": f"{size(estimate.index_bytes)}, shared by the workers of a node",
        "speed of a worker": _known(
            cost.images_per_s, lambda rate: f"{rate:,.0f} images/s {cost.device}", "--images-per-s"
        ),
        "speed of all workers": _known(estimate.images_per_s, lambda rate: f"{rate:,.0f} images/s at most"),
        "reading": _known(estimate.read_bytes_per_s, lambda rate: f"{size(rate)}/s from storage"),
        "decoding": _known(
            estimate.decode_cores,
            lambda cores: f"{cores:.1f} cores for each worker ({cost.decoded_per_s:,.0f} images/s per core)",
            "--decoded-per-s",
        ),
        "time": _known(estimate.total_s, lambda seconds: f"{_span(seconds)} at least, without evaluations and saves"),
    }
    if estimate.limit:
        facts["limit"] = (
            f"{estimate.limit}: a step computes {estimate.step_s:.4f} s and sends {estimate.communication_s:.4f} s"
        )
    typer.echo(tables.of_pairs(facts))


def _known(value: float | None, as_text: Callable[[float], str], option: str = "") -> str:
    if value is not None:
        return as_text(value)
    return "neither measured nor given" + (f" ({option})" if option else "")


def _every(seconds: float | None) -> str:
    return f", every {_span(seconds)}" if seconds is not None else ""


def _traffic(rate: float | None) -> str:
    from jobs.tables import byte_size as size

    return f": {size(rate)}/s" if rate is not None else ""


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
