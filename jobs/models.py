"""`adaptnet models`: looks trained nets up in the registry."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli import data_home
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.registry import Version

EXAMPLES = """Looks trained nets up in the registry.

Examples:

  adaptnet models list

  adaptnet models show models:/aig-toy@candidate
"""

LIST = """One line for each version, newest first: aliases, family, step, and its default policy's accuracy and price.

Examples:

  adaptnet models list

  adaptnet models list aig-toy --uri http://tracking:5000
"""

SHOW = """What a version is: family, recipe, data, where it came from, and each policy's accuracy and price.

Examples:

  adaptnet models show models:/aig-toy@candidate

  adaptnet models show models:/aig-toy/3 --uri sqlite:////data/runs/mlflow.db
"""

IMPORT = """Makes a run of weights that were trained elsewhere: a checkpoint of the released code of ConvNet-AIG, RANet
or Shape Adaptor, or torchvision's of ResNets, MobileNets, VGG and its like. Every tensor is used, or an error lists
those that fit nowhere. The run is evaluated on the recipe's val split, and registered where tracking.register names it.

Examples:

  adaptnet models import resnet50.pth --family baseline/imagenet_resnet50

  adaptnet models import best.pth.tar --family ranet/cifar10_b1 --classes names.txt
"""

app = typer.Typer(
    help=EXAMPLES, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)
Uri = Annotated[str | None, typer.Option(help="tracking server; default runs/mlflow.db")]


@app.command("list", short_help="One line for each version.", help=LIST)
def list_models(
    name: Annotated[str | None, typer.Argument(help="only versions of this name")] = None, uri: Uri = None
) -> None:
    from jobs import tables
    from pipeline import registry

    found = registry.versions(registry.address(uri), name)
    if not found:
        typer.echo("the registry has no versions yet")
        return
    rows = [["version", "aliases", "family", "step", "policy", "top-1 %", "MMACs", "made"]]
    typer.echo(tables.align([*rows, *(_row(version) for version in found)]))


def _row(version: Version) -> list[str]:
    tags = version.tags
    first = version.reports[0] if version.reports else None
    figures = [first["policy"], f"{100 * first['top1']:.2f}", f"{first['macs_mean'] / 1e6:.3f}"] if first else ["-"] * 3
    origin = [tags.get("adaptnet.family", "-"), tags.get("adaptnet.step", "-")]
    return [version.reference, " ".join(version.aliases) or "-", *origin, *figures, _date(version.created)]


@app.command(short_help="What a version is, and its frontier.", help=SHOW)
def show(
    reference: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")], uri: Uri = None
) -> None:
    from jobs import tables
    from pipeline import registry

    version = registry.lookup(reference, registry.address(uri))
    hidden = ("adaptnet.reports",)
    facts: dict[str, Any] = {"version": version.reference, "aliases": " ".join(version.aliases) or "-"}
    facts |= {key.removeprefix("adaptnet."): value for key, value in version.tags.items() if key not in hidden}
    facts |= {"MLflow run": version.run_id or "-", "made": _date(version.created)}
    typer.echo(tables.of_pairs(facts))
    if version.reports:
        typer.echo("")
        typer.echo(tables.align(_frontier(version)))


@app.command("import", short_help="Make a run of weights that were trained elsewhere.", help=IMPORT)
def import_weights(
    file: Annotated[Path, typer.Argument(help=".pth, .pt, .tar or .safetensors, or a checkpoint's folder")],
    family: Annotated[str, typer.Option(help="family/recipe whose net takes them, or a path ending in .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. data.root=DIR")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="class names by label, one a line; default: those of data.root")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="the new run's folder; default runs/NAME-imported")] = None,
) -> None:
    from jobs import tables
    from pipeline import importing, run_config

    home = data_home() or ("nowhere" if classes else None)
    config = run_config.load(family, overrides or (), data_home=home)
    folder = run_dir or Path("runs") / f"{config.name}-imported"
    done = importing.import_weights(config, file, folder, classes=_names(classes))
    kept = f"; {len(done.kept)} keep their initial values: {', '.join(done.kept[:4])} ..." if done.kept else ""
    typer.echo(f"{file}: {done.num_tensors:,} tensors taken{kept}")
    if done.result.reports:
        typer.echo(tables.of_reports(done.result.reports))
    typer.echo(f"run {folder}" + (f", registered as {done.result.version}" if done.result.version else ""))


def _names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    if not path.is_file():
        raise ConfigError(f"--classes (={path}): no such file; give one class name a line")
    names = path.read_text(encoding="utf-8").split("\n")
    return [name.strip() for name in names if name.strip()]


def _frontier(version: Version) -> list[list[str]]:
    rows = [["policy", "images", "top-1 %", "MMACs mean", "MMACs p95", "% of full"]]
    for report in version.reports:
        price = [f"{report['macs_mean'] / 1e6:.3f}", f"{report['macs_p95'] / 1e6:.3f}"]
        accuracy = [f"{report['num_images']:,}", f"{100 * report['top1']:.2f}"]
        rows.append([report["policy"], *accuracy, *price, f"{100 * report['full_share']:.1f}"])
    return rows


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
