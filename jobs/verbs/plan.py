"""`adaptnet plan`: what a recipe needs on so many nodes, before any of them is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import data_home
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.bench.plan import Images, Measurements, ResourcePlan

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

EXAMPLES = """What RECIPE needs on N nodes of G GPUs: memory, steps, reading, decoding, saving, time. A step is measured
here, on this machine's device, unless --images-per-s says what one worker does where it will run; decoding is measured
where the images are at hand.

Examples:

  adaptnet plan convnet_aig/toy --nodes 2

  adaptnet plan baseline/imagenet_resnet50 --nodes 8 --gpus-per-node 8 --images 1281167 --images-per-s 3000
"""


@app.command(help=EXAMPLES)
def plan(
    recipe: Annotated[str, typer.Argument(help="family/recipe, family/recipe:variant, or a path ending in .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: one worker a node, on its CPUs")] = 0,
    images: Annotated[int | None, typer.Option(min=1, help="training images, where they are not at hand")] = None,
    image_kb: Annotated[float | None, typer.Option(min=0.001, help="mean size of an encoded image in kB")] = None,
    classes: Annotated[int, typer.Option(min=2, help="where the images are not at hand")] = 1000,
    images_per_s: Annotated[float | None, typer.Option(min=0.001, help="that one worker computes there")] = None,
    decoded_per_s: Annotated[float | None, typer.Option(min=0.001, help="that one core decodes there")] = None,
    network_gbs: Annotated[float | None, typer.Option(min=0.001, help="GB/s that each worker sends")] = None,
    measured_rows: Annotated[int, typer.Option(min=1, help="images of the step that is measured here")] = 8,
) -> None:
    from pipeline import run_config
    from pipeline.bench import plan as plans

    home = data_home() or ("nowhere" if images else None)
    config = run_config.load(recipe, overrides or (), data_home=home)
    found = plans.images_of(config)
    if found is None and images is None:
        raise ConfigError(f"data.root (={config.data.root}): not at hand; say how many images there are, by --images")
    known, train = found if found is not None else (plans.Images(images or 0, classes), None)
    known = plans.Images(images or known.count, known.classes, image_kb * 1e3 if image_kb else known.mean_bytes)
    at_hand = train if decoded_per_s is None else None
    cost = plans.measure(config, known.classes, measured_rows, train=at_hand, timed=images_per_s is None)
    where = "where it will run, as given" if images_per_s else None
    cost = plans.given(cost, images_per_s=images_per_s, decoded_per_s=decoded_per_s, device=where)
    workers = nodes * max(1, gpus_per_node)
    bandwidth = network_gbs * 1e9 if network_gbs else None
    _print(config.name, plans.plan(config, workers, known, cost, network_bytes_per_s=bandwidth), known, cost)


def _print(name: str, found: ResourcePlan, images: Images, cost: Measurements) -> None:
    from jobs import tables

    each = "" if found.micro_rows == found.rows else f", {found.micro_rows} in memory at once"
    facts = {
        "run": f"{name}: {found.workers} workers, {images.count:,} images of {images.classes:,} classes",
        "a worker's share of a step": f"{found.rows} images{each}",
        "steps": f"{found.steps:,}",
        "memory of a worker": f"{_bytes(found.memory_bytes)} of tensors ({_bytes(cost.activation_bytes)} an image)",
        "gradients": f"{_bytes(found.gradient_bytes)} sent by each worker in a step",
        "checkpoint": f"{_bytes(found.checkpoint_bytes)}{_every(found.save_every_s)}{_traffic(found.save_bytes_per_s)}",
        "metrics": _known(
            found.metrics_per_s, lambda rate: f"{rate:.3g} values/s to the journal, and to MLflow after it"
        ),
        "index": f"{_bytes(found.index_bytes)}, shared by the workers of a node",
        "a worker computes": _known(cost.images_per_s, lambda rate: f"{rate:,.0f} images/s {cost.device}"),
        "all workers": _known(found.images_per_s, lambda rate: f"{rate:,.0f} images/s at most"),
        "reading": _known(found.read_bytes_per_s, lambda rate: f"{_bytes(rate)}/s from storage"),
        "decoding": _known(
            found.decode_cores,
            lambda cores: f"{cores:.1f} cores for each worker ({cost.decoded_per_s:,.0f} images/s by a core)",
        ),
        "time": _known(found.total_s, lambda seconds: f"{_span(seconds)} at least, evaluations and saves left out"),
    }
    if found.limit:
        facts["limit"] = f"{found.limit}: a step computes {found.step_s:.4f} s and sends {found.communication_s:.4f} s"
    typer.echo(tables.of_pairs(facts))


def _known(value: float | None, say: object) -> str:
    return str(say(value)) if value is not None and callable(say) else "not measured here, and not given"


def _every(seconds: float | None) -> str:
    return f", every {_span(seconds)}" if seconds is not None else ""


def _traffic(rate: float | None) -> str:
    return f": {_bytes(rate)}/s" if rate is not None else ""


def _bytes(count: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
