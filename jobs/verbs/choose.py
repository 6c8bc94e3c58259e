"""`adaptnet choose`: recommends recipes for a folder of images and a limit of cost."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import ConfigError

if TYPE_CHECKING:  # these import torch, which takes seconds
    from pipeline.deploy.choosing import ImageFolder, Recommendation
    from pipeline.evaluation.frontier import Budget, Unit

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def choose(
    images: Annotated[Path | None, typer.Option(help="class folders or tar shards")] = None,
    max_macs: Annotated[str | None, typer.Option(help="largest MACs per image: 4G, 300M")] = None,
    latency: Annotated[
        str | None, typer.Option(help="largest time of one image, measured here now, on the CPU: 5ms")
    ] = None,
    max_hours: Annotated[float | None, typer.Option(help="longest training, in hours on this machine", min=0)] = None,
    table: Annotated[bool, typer.Option("--table", help="print all recipes as a Markdown table and exit")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Recommends at most three shipped recipes for a folder of images: those whose nets, or some of their policies,
    are within the limits, with the reasons and the command that trains them. Where a class has few images, recipes that
    start from trained weights come first; recipes that train here for more than an hour come later. Nothing is trained;
    accuracy on your images is not predicted.

    Examples:

      adaptnet choose --images /data/photos --max-macs 300M

      adaptnet choose --images packed/photos --max-macs 4G --latency 50ms --max-hours 2

      adaptnet choose --table
    """
    from pipeline.deploy import choosing

    if table:
        typer.echo(choosing.markdown())
        return
    if images is None:
        raise ConfigError("--images: give a folder of images, or --table for all recipes", key="--images")
    limits = _limit("--max-macs", max_macs, "macs"), _limit("--latency", latency, "ms")
    folder = _folder(images)
    say = partial(typer.echo, err=True)
    found = choosing.recommend(folder, max_macs=limits[0], latency=limits[1], max_hours=max_hours, progress=say)
    typer.echo(json.dumps(_mapping(folder, found), indent=1) if as_json else _text(folder, found))


def _limit(option: str, text: str | None, unit: Unit) -> Budget | None:
    from pipeline.evaluation.frontier import parse_budget

    if text is None:
        return None
    example = {"macs": "MACs an image, e.g. 300M or 4G", "ms": "a time, e.g. 5ms or 0.1s"}[unit]
    try:
        budget = parse_budget(text)
    except ConfigError:
        budget = None
    if budget is None or budget.unit != unit or (unit == "macs" and text.strip().replace(".", "").isdigit()):
        raise ConfigError(f"{option} (={text}): write {example}", key=option, subject=text)
    return budget


def _folder(images: Path) -> ImageFolder:
    from jobs.verbs.data import line_printer
    from pipeline.config import validate
    from pipeline.data.config import DataConfig
    from pipeline.data.index import open_index, open_splits
    from pipeline.deploy.choosing import ImageFolder

    config = validate(DataConfig, {"root": str(images), "max_bad_share": 1}, "data")
    open_index(config.root, progress=line_printer(lambda line: typer.echo(line, err=True)))
    return ImageFolder.of(open_splits(config, 1))


def _text(folder: ImageFolder, found: list[Recommendation]) -> str:
    from jobs import tables

    classes = len(folder.class_counts)
    lines = [
        f"{folder.root}: {folder.images:,} training images of {classes:,} classes, {folder.images_a_class:g} a class "
        f"(median), {folder.side_px:.0f} px (median)\n"
    ]
    rows = [["", "recipe", "side", "M parameters", "MMACs", "policies"]]
    for number, each in enumerate(found, 1):
        net = each.candidate
        figures = [f"{net.cost.side_px}", f"{net.cost.parameters / 1e6:.2f}", f"{net.macs / 1e6:,.1f}"]
        rows.append([f"{number}", net.recipe, *figures, f"{len(net.within)}"])
    lines.append(tables.align(rows, left=True))
    for number, each in enumerate(found, 1):
        lines += [f"\n{number}. {each.candidate.recipe}", *(f"   - {reason}" for reason in each.reasons)]
        lines.append(f"   {each.command}")
    return "\n".join(lines)


def _mapping(folder: ImageFolder, found: list[Recommendation]) -> dict[str, object]:
    return {
        "folder": {
            "root": str(folder.root),
            "images": folder.images,
            "class_counts": list(folder.class_counts),
            "side_px": folder.side_px,
        },
        "recommended": [
            {
                "recipe": each.candidate.recipe,
                "family": each.candidate.family,
                "side_px": each.candidate.cost.side_px,
                "parameters": each.candidate.cost.parameters,
                "macs": each.candidate.macs,
                "policies": list(each.candidate.within),
                "milliseconds": dict(each.candidate.ms),
                "least_hours": each.candidate.hours,
                "reasons": list(each.reasons),
                "command": each.command,
            }
            for each in found
        ],
    }
