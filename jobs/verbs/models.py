"""`adaptnet models`: looks trained nets up in the registry."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli import data_home
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.deploy.promoting import Promotion
    from pipeline.registry.catalogue import Match, Version

EXAMPLES = """Looks trained nets up in the registry, registers and promotes them, takes them away as folders.

Examples:

  adaptnet models list

  adaptnet models lookup --max-macs 1G --min-top1 70

  adaptnet models promote aig-toy 3 --alias champion
"""

LIST = """One line for each version, newest first: aliases, family, step, and its default policy's accuracy and price.

Examples:

  adaptnet models list

  adaptnet models list aig-toy --uri http://tracking:5000
"""

SHOW = """The card of a version: family, recipe, data, what it came from, licence and note, and the frontier of its
policies, those marked that another beats.

Examples:

  adaptnet models show models:/aig-toy@candidate

  adaptnet models show models:/aig-toy/3 --uri sqlite:////data/runs/mlflow.db
"""

LOOKUP = """Versions and policies of theirs within a budget of MACs and above an accuracy, the best first. Dominated
policies are left out. NAME may be left out: then all models take part.

Examples:

  adaptnet models lookup --max-macs 1G --min-top1 70

  adaptnet models lookup aig-toy --max-macs 300M --dataset cifar10 --json
"""

REGISTER = """Makes a version of a run's best checkpoint, or of one checkpoint's folder, with its stored evaluation. The
run is sent to MLflow first where it has not been. Doing it twice makes one version.

Examples:

  adaptnet models register runs/convnet_aig-toy aig-toy

  adaptnet models register runs/mine mine --licence CC-BY-4.0 --note "flowers of 2026, without the roses"
"""

PROMOTE = """Evaluates a version and the present holder of the alias on the same images, and points the alias at the
version, unless the holder is as accurate and as cheap everywhere. Who, when, why and both reports are kept.

Examples:

  adaptnet models promote aig-toy 3 --alias champion --why "the new augmentation"

  adaptnet models promote aig-toy 4 --data /data/fresh --force --why "the champion was trained on the test set"
"""

ROLLBACK = """Gives an alias back to the version that held it before; done again, to the one before that.

Examples:

  adaptnet models rollback aig-toy --alias champion --why "dark photographs are all cats"
"""

PULL = """Copies a version to a folder that works without MLflow: weights, recipe, card and reports, checked.

Examples:

  adaptnet models pull models:/aig-toy@champion champion

  adaptnet models pull models:/aig-toy/3 aig-toy-3 --uri http://tracking:5000
"""

DIFF = """What sets two versions apart: what their cards say, their recipes key by key, and each policy's figures.

Examples:

  adaptnet models diff models:/aig-toy/2 models:/aig-toy@champion
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
    from pipeline.registry import catalogue

    found = catalogue.versions(catalogue.address(uri), name)
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


@app.command(short_help="The card of a version, and its frontier.", help=SHOW)
def show(
    reference: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")], uri: Uri = None
) -> None:
    from jobs import tables
    from pipeline.registry import cards, catalogue

    found = cards.card(reference, catalogue.address(uri))
    typer.echo(tables.of_pairs(found.facts))
    if found.version.reports:
        typer.echo("")
        typer.echo(tables.align(_frontier(found.version)))


def _frontier(version: Version) -> list[list[str]]:
    rows = [["policy", "images", "top-1 %", "MMACs mean", "MMACs p95", "% of full", "frontier"]]
    for report, beaten in zip(version.reports, version.dominated, strict=True):
        price = [f"{report['macs_mean'] / 1e6:.3f}", f"{report['macs_p95'] / 1e6:.3f}"]
        accuracy = [f"{report['num_images']:,}", f"{100 * report['top1']:.2f}"]
        share = f"{100 * report['full_share']:.1f}"
        rows.append([report["policy"], *accuracy, *price, share, "dominated" if beaten else "yes"])
    return rows


@app.command(short_help="Versions and policies within a budget.", help=LOOKUP)
def lookup(
    name: Annotated[str | None, typer.Argument(help="only versions of this name")] = None,
    max_macs: Annotated[str | None, typer.Option(help="most MACs an image may cost on average: 1G, 300M")] = None,
    min_top1: Annotated[float | None, typer.Option(min=0, max=100, help="least top-1 in %")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="only what was trained or evaluated on this set: its folder's name or identity")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
    uri: Uri = None,
) -> None:
    from jobs import tables
    from pipeline.evaluation.frontier import parse_budget
    from pipeline.registry import catalogue

    budget = parse_budget(max_macs) if max_macs is not None else None
    if budget is not None and budget.unit != "macs":
        raise ConfigError(f"--max-macs (={max_macs}): give MACs, e.g. 1G or 300M")
    found = catalogue.versions(catalogue.address(uri), name)
    if not found:
        raise ConfigError("the registry has no versions yet; `adaptnet models register RUN NAME` makes one")
    share = min_top1 / 100 if min_top1 is not None else None
    matches = catalogue.matching(found, max_macs=budget, min_top1=share, dataset=dataset)
    if as_json:
        typer.echo(json.dumps([_mapping(match) for match in matches], indent=1))
        return
    rows = [["version", "aliases", "family", "dataset", "policy", "top-1 %", "MMACs"]]
    typer.echo(tables.align([*rows, *(_match(match) for match in matches)]))


def _match(match: Match) -> list[str]:
    tags = match.version.tags
    told = [tags.get("adaptnet.family", "-"), tags.get("adaptnet.dataset", "-")]
    figures = [match.policy, f"{100 * match.top1:.2f}", f"{match.macs / 1e6:.3f}"]
    return [match.version.reference, " ".join(match.version.aliases) or "-", *told, *figures]


def _mapping(match: Match) -> dict[str, Any]:
    tags = match.version.tags
    return {
        "version": match.version.reference,
        "aliases": list(match.version.aliases),
        "family": tags.get("adaptnet.family"),
        "dataset": tags.get("adaptnet.dataset"),
        "data": tags.get("adaptnet.data"),
        "policy": match.policy,
        "top1": match.top1,
        "macs_mean": match.macs,
        "num_images": match.num_images,
    }


@app.command(short_help="Make a version of a run.", help=REGISTER)
def register(
    source: Annotated[str, typer.Argument(help="a run's folder, or the folder of one of its checkpoints")],
    name: Annotated[str, typer.Argument(help="of the model")],
    alias: Annotated[str, typer.Option(help="points at it, unless a newer version has it")] = "candidate",
    licence: Annotated[str | None, typer.Option(help="under which the weights may be used")] = None,
    note: Annotated[str | None, typer.Option(help="what people should know of it")] = None,
    uri: Uri = None,
) -> None:
    from pipeline.deploy import promoting
    from pipeline.tracking.address import registered_name

    remarks = {key: text for key, text in (("licence", licence), ("note", note)) if text is not None}
    version = promoting.register(source, registered_name(name), uri, alias=alias, remarks=remarks)
    typer.echo(f"{source} is {version.reference}")


@app.command(short_help="Point an alias at a version, through a gate.", help=PROMOTE)
def promote(
    name: Annotated[str, typer.Argument(help="of the model")],
    version: Annotated[int, typer.Argument(help="its number")],
    alias: Annotated[str, typer.Option(help="what is promoted to")] = "champion",
    data: Annotated[Path | None, typer.Option(help="a set of images; default: the one it was trained on")] = None,
    why: Annotated[str, typer.Option(help="the reason, for those who come later")] = "",
    force: Annotated[bool, typer.Option("--force", help="also where the holder dominates it; needs --why")] = False,
    uri: Uri = None,
) -> None:
    from pipeline.deploy import promoting

    done = promoting.promote(
        name, version, alias=alias, root=data, why=why, force=force, uri=uri, data_home=data_home()
    )
    _print_promotion(done, alias)


def _print_promotion(done: Promotion, alias: str) -> None:
    from jobs import tables

    if done.entry is None:
        typer.echo(f"{done.version.reference} is the {alias} already")
        return
    for version, reports in ((done.version, done.reports), (done.before, done.champion_reports)):
        if version is not None and reports:
            typer.echo(f"{version.reference} on {done.data}\n{tables.of_reports(reports)}\n")
    if done.overruled:
        typer.echo(f"forced, although {done.overruled}")
    former = f", which {done.before.reference} held" if done.before else ""
    typer.echo(f"{done.version.reference} is the {alias}{former}: {done.entry.why or 'no reason given'}")


@app.command(short_help="Give an alias back to its holder before.", help=ROLLBACK)
def rollback(
    name: Annotated[str, typer.Argument(help="of the model")],
    alias: Annotated[str, typer.Option(help="what is given back")] = "champion",
    why: Annotated[str, typer.Option(help="the reason, for those who come later")] = "",
    uri: Uri = None,
) -> None:
    from pipeline.deploy import promoting

    now, former = promoting.rollback(name, alias=alias, why=why, uri=uri)
    typer.echo(f"{now.reference} is the {alias} again, which {former.reference} held")


@app.command(short_help="Copy a version to a folder that needs no MLflow.", help=PULL)
def pull(
    reference: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    uri: Uri = None,
) -> None:
    from pipeline.registry.resolve import pull_version

    version = pull_version(reference, folder, uri)
    typer.echo(f"{version.reference} is in {folder}; `adaptnet predict {folder} IMAGE` works without MLflow")


@app.command(short_help="What sets two versions apart.", help=DIFF)
def diff(
    a: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    b: Annotated[str, typer.Argument(help="another")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
    uri: Uri = None,
) -> None:
    from pipeline.registry import cards, catalogue
    from pipeline.registry.model import describe
    from pipeline.registry.resolve import resolve

    place = catalogue.address(uri)
    versions = [catalogue.lookup(reference, place) for reference in (a, b)]
    recipes = [describe(resolve(version.reference, uri)).recipe for version in versions]
    found = cards.differences(*versions, *recipes)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    elif not found:
        typer.echo(f"{a} and {b} say the same of themselves")
    else:
        rows = [["", *(version.reference for version in versions)], *([e.what, e.a, e.b] for e in found)]
        typer.echo(_side_by_side(rows))


def _side_by_side(rows: Sequence[Sequence[str]], most: int = 60) -> str:
    """As a table of texts, long ones shortened."""
    short = [[cell if len(cell) <= most else f"{cell[: most - 4]} ..." for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in short) for column in range(3)]
    return "\n".join("  ".join(_padded(row, widths)).rstrip() for row in short)


def _padded(row: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    return (cell.ljust(width) for cell, width in zip(row, widths, strict=True))


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
    from pipeline import run_config
    from pipeline.deploy import importing

    home = data_home() or ("nowhere" if classes else None)
    config = run_config.load(family, overrides or (), data_home=home)
    folder = run_dir or Path("runs") / f"{config.name}-imported"
    done = importing.import_weights(config, file, folder, classes=_names(classes))
    kept = f"; {len(done.missing)} keep their initial values: {', '.join(done.missing[:4])} ..." if done.missing else ""
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


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
