"""`adaptnet models`: looks up, registers and promotes trained nets in the registry."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import data_home
from pipeline.errors import ConfigError, JsonValue

if TYPE_CHECKING:
    from pipeline.deploy.importing import Imported
    from pipeline.deploy.promoting import Promotion
    from pipeline.registry.catalogue import Match, Version

EXAMPLES = """Looks up, registers and promotes trained nets in the registry, and copies them to folders.

Examples:

  adaptnet models list

  adaptnet models lookup --max-macs 1G --min-top1 70

  adaptnet models promote aig-toy 3 --alias champion
"""


app = typer.Typer(
    help=EXAMPLES, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)
Uri = Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="tracking server; default: runs/mlflow.db")]
Licence = Annotated[str | None, typer.Option(help="licence of the weights; default: the registered one")]
Note = Annotated[str | None, typer.Option(help="note for users; default: the registered one")]


@app.command("list", short_help="List versions.")
def list_models(
    name: Annotated[str | None, typer.Argument(help="only versions of this name")] = None,
    uri: Uri = None,
    zoo: Annotated[bool, typer.Option("--zoo", help="list the nets that are shipped with adaptnet instead")] = False,
) -> None:
    """Prints one line for each version, newest first: aliases, family, step, and accuracy and MACs of its default
    policy. With --zoo it lists the nets that are shipped, which are called zoo:NAME.

    Examples:

      adaptnet models list

      adaptnet models list --zoo

      adaptnet models list aig-toy --uri http://tracking:5000
    """
    from jobs import tables
    from pipeline.registry import catalogue

    if zoo:
        _list_zoo(name, uri)
        return
    versions = catalogue.versions(catalogue.address(uri), name)
    if not versions:
        typer.echo("the registry has no versions yet")
        return
    rows = [["version", "aliases", "family", "step", "policy", "top-1 %", "MMACs", "created"]]
    typer.echo(tables.align([*rows, *(_row(version) for version in versions)]))


def _list_zoo(name: str | None, uri: str | None) -> None:
    from jobs import tables
    from pipeline import zoo

    if name is not None or uri != os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError("--zoo lists all shipped nets; omit NAME and --uri", key="--zoo", subject=name or uri)
    names = zoo.names()
    if not names:
        typer.echo("the zoo has no nets yet")
        return
    rows = [["net", "family", "classes", "policies", "policy", "top-1 %", "MMACs"]]
    typer.echo(tables.align([*rows, *(_zoo_row(each) for each in names)]))


def _zoo_row(name: str) -> list[str]:
    from pipeline import zoo
    from pipeline.registry.model import describe

    model = describe(zoo.folder(name))
    reports = model.stored_reports
    figures = [str(reports[0]["policy"]), *_figures(reports[0])] if reports else ["-"] * 3
    family = str(model.section("family")["name"])
    return [f"{zoo.SCHEME}{name}", family, str(len(model.classes)), str(len(reports)), *figures]


def _figures(report: Mapping[str, JsonValue]) -> list[str]:
    top1, macs = report["top1"], report["macs_mean"]
    assert isinstance(top1, int | float) and isinstance(macs, int | float)
    return [f"{100 * top1:.2f}", f"{macs / 1e6:.3f}"]


def _row(version: Version) -> list[str]:
    tags = version.tags
    first = version.reports[0] if version.reports else None
    figures = [first["policy"], f"{100 * first['top1']:.2f}", f"{first['macs_mean'] / 1e6:.3f}"] if first else ["-"] * 3
    origin = [tags.get("adaptnet.family", "-"), tags.get("adaptnet.step", "-")]
    return [version.reference, " ".join(version.aliases) or "-", *origin, *figures, _date(version.created)]


@app.command(short_help="Show the card and the policies of a version.")
def show(
    reference: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")], uri: Uri = None
) -> None:
    """Prints the card of a version (family, recipe, data, origin, licence and note) and a table of its policies, with
    those marked that another policy dominates.

    Examples:

      adaptnet models show models:/aig-toy@candidate

      adaptnet models show models:/aig-toy/3 --uri sqlite:////data/runs/mlflow.db
    """
    from jobs import tables
    from pipeline.registry import cards, catalogue

    card = cards.card(reference, catalogue.address(uri))
    typer.echo(tables.of_pairs(card.facts))
    if card.version.reports:
        typer.echo("")
        typer.echo(tables.align(_frontier(card.version)))


def _frontier(version: Version) -> list[list[str]]:
    rows = [["policy", "images", "top-1 %", "MMACs mean", "MMACs p95", "% of full", "frontier"]]
    for report, dominated in zip(version.reports, version.dominated, strict=True):
        macs = [f"{report['macs_mean'] / 1e6:.3f}", f"{report['macs_p95'] / 1e6:.3f}"]
        accuracy = [f"{report['num_images']:,}", f"{100 * report['top1']:.2f}"]
        share = f"{100 * report['full_share']:.1f}"
        rows.append([report["policy"], *accuracy, *macs, share, "dominated" if dominated else "yes"])
    return rows


@app.command(short_help="Find versions and policies within a budget.")
def lookup(
    name: Annotated[str | None, typer.Argument(help="only versions of this name")] = None,
    max_macs: Annotated[str | None, typer.Option(help="largest mean MACs per image: 1G, 300M")] = None,
    min_top1: Annotated[float | None, typer.Option(min=0, max=100, help="smallest top-1 accuracy in %")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="only versions trained or evaluated on this set: its folder's name or its identity"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
    uri: Uri = None,
) -> None:
    """Lists policies of registered versions within a budget of MACs and above an accuracy, the best first. Dominated
    policies are left out. Without NAME all models are searched.

    Examples:

      adaptnet models lookup --max-macs 1G --min-top1 70

      adaptnet models lookup aig-toy --max-macs 300M --dataset cifar10 --json
    """
    from jobs import tables
    from pipeline.evaluation.frontier import parse_budget
    from pipeline.registry import catalogue

    budget = parse_budget(max_macs) if max_macs is not None else None
    if budget is not None and budget.unit != "macs":
        raise ConfigError(
            f"--max-macs (={max_macs}) must be in MACs, e.g. 1G or 300M", key="--max-macs", subject=max_macs
        )
    versions = catalogue.versions(catalogue.address(uri), name)
    if not versions:
        message = "the registry has no versions yet; `adaptnet models register RUN NAME` creates one"
        raise ConfigError(message, key="registry")
    share = min_top1 / 100 if min_top1 is not None else None
    matches = catalogue.matching(versions, max_macs=budget, min_top1=share, dataset=dataset)
    if as_json:
        typer.echo(json.dumps([_mapping(match) for match in matches], indent=1))
        return
    rows = [["version", "aliases", "family", "dataset", "policy", "top-1 %", "MMACs"]]
    typer.echo(tables.align([*rows, *(_match(match) for match in matches)]))


def _match(match: Match) -> list[str]:
    tags = match.version.tags
    origin = [tags.get("adaptnet.family", "-"), tags.get("adaptnet.dataset", "-")]
    figures = [match.policy, f"{100 * match.top1:.2f}", f"{match.macs / 1e6:.3f}"]
    return [match.version.reference, " ".join(match.version.aliases) or "-", *origin, *figures]


def _mapping(match: Match) -> dict[str, object]:
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


@app.command(short_help="Register a run as a version.")
def register(
    source: Annotated[str, typer.Argument(help="a run's folder, or the folder of one of its checkpoints")],
    name: Annotated[str, typer.Argument(help="name of the registered model")],
    alias: Annotated[str, typer.Option(help="alias of the version, unless a newer version holds it")] = "candidate",
    licence: Annotated[str | None, typer.Option(help="licence of the weights")] = None,
    note: Annotated[str | None, typer.Option(help="note for users of the version")] = None,
    uri: Uri = None,
) -> None:
    """Registers a run's best checkpoint, or the checkpoint in a given folder, as a new version with its stored
    evaluation. If the run is not in MLflow yet, it is sent first. Registering the same checkpoint again makes no new
    version.

    Examples:

      adaptnet models register runs/convnet_aig-toy aig-toy

      adaptnet models register runs/mine mine --licence CC-BY-4.0 --note "flowers of 2026, without the roses"
    """
    from pipeline.deploy import promoting
    from pipeline.tracking.address import registered_name

    remarks = {key: text for key, text in (("licence", licence), ("note", note)) if text is not None}
    version = promoting.register(source, registered_name(name), uri, alias=alias, remarks=remarks)
    typer.echo(f"{source} is registered as {version.reference}")


@app.command(short_help="Move an alias to a version, if it is better.")
def promote(
    name: Annotated[str, typer.Argument(help="name of the registered model")],
    version: Annotated[int, typer.Argument(help="number of the version")],
    alias: Annotated[str, typer.Option(help="alias to move")] = "champion",
    data: Annotated[Path | None, typer.Option(help="image set to compare on; default: that of the training")] = None,
    why: Annotated[str, typer.Option(help="reason, for the promotion log")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="move the alias even if the holder dominates; needs --why")
    ] = False,
    uri: Uri = None,
) -> None:
    """Evaluates a version and the current holder of the alias on the same images and moves the alias to the version,
    unless the holder is at least as accurate at every cost. Who did it, when and why, and both reports are recorded.

    Examples:

      adaptnet models promote aig-toy 3 --alias champion --why "the new augmentation"

      adaptnet models promote aig-toy 4 --data /data/fresh --force --why "the champion was trained on the test set"
    """
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


@app.command(short_help="Move an alias back to its previous holder.")
def rollback(
    name: Annotated[str, typer.Argument(help="name of the registered model")],
    alias: Annotated[str, typer.Option(help="alias to move back")] = "champion",
    why: Annotated[str, typer.Option(help="reason, for the promotion log")] = "",
    uri: Uri = None,
) -> None:
    """Moves an alias back to the version that held it before; repeated, to the one before that.

    Examples:

      adaptnet models rollback aig-toy --alias champion --why "dark photographs are all cats"
    """
    from pipeline.deploy import promoting

    now, former = promoting.rollback(name, alias=alias, why=why, uri=uri)
    typer.echo(f"{now.reference} is the {alias} again, which {former.reference} held")


@app.command(short_help="Copy a version to a folder that needs no MLflow.")
def pull(
    reference: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    uri: Uri = None,
) -> None:
    """Copies a version (weights, recipe, card and reports) to a folder that works without MLflow, and verifies it.

    Examples:

      adaptnet models pull models:/aig-toy@champion champion

      adaptnet models pull models:/aig-toy/3 aig-toy-3 --uri http://tracking:5000
    """
    from pipeline.registry.resolve import pull_version

    version = pull_version(reference, folder, uri)
    typer.echo(f"{version.reference} is in {folder}; `adaptnet predict {folder} IMAGE` works without MLflow")


@app.command("card", short_help="Print the model card of a net, in Hugging Face's form.")
def show_card(
    source: Annotated[
        str, typer.Argument(help="name of a registered model, models:/NAME@ALIAS, a run's or a model's folder")
    ],
    licence: Licence = None,
    note: Note = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default: print it")] = None,
    uri: Uri = None,
) -> None:
    """Prints the model card of a net as Markdown with YAML front matter: what it is, its data, the figures of each
    policy, its limits, how to load it, its licence, recipe, seed and commit. Figures are those of stored evaluations.

    Examples:

      adaptnet models card aig-toy

      adaptnet models card runs/convnet_aig-toy --licence CC-BY-4.0 --out README.md
    """
    from pipeline.deploy import model_card
    from pipeline.runs.files import write_text

    text = model_card.card(source, uri, licence=licence, note=note)
    if out is None:
        typer.echo(text)
        return
    write_text(out, text)
    typer.echo(f"written to {out}")


@app.command(short_help="Write a net as a folder for Hugging Face's Hub.")
def push(
    source: Annotated[
        str, typer.Argument(help="name of a registered model, models:/NAME@ALIAS, a run's or a model's folder")
    ],
    to: Annotated[Path, typer.Option(help="a new folder")],
    licence: Licence = None,
    note: Note = None,
    uri: Uri = None,
) -> None:
    """Writes a net to a folder in the layout that huggingface_hub.upload_folder takes: README.md (its model card),
    model.safetensors, recipe.yaml and config.json. Nothing is uploaded. All commands that take a model's folder take
    this one: predict, evaluate, export.

    Examples:

      adaptnet models push aig-toy --to aig-toy-hub --licence CC-BY-4.0

      adaptnet models push runs/convnet_aig-toy --to upload
    """
    from pipeline.deploy import model_card

    folder = model_card.push(source, to, uri, licence=licence, note=note)
    typer.echo(f"written to {folder}; `adaptnet predict {folder} IMAGE` works, and to upload it:")
    typer.echo(
        f'python -c \'from huggingface_hub import upload_folder; upload_folder(repo_id="USER/NAME", '
        f'folder_path="{folder}")\''
    )


@app.command(short_help="Show how two versions differ.")
def diff(
    a: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    b: Annotated[str, typer.Argument(help="the other version")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
    uri: Uri = None,
) -> None:
    """Shows how two versions differ: in their cards, in their recipes key by key, and in the figures of each policy.

    Examples:

      adaptnet models diff models:/aig-toy/2 models:/aig-toy@champion
    """
    from jobs import tables
    from pipeline.registry import cards, catalogue
    from pipeline.registry.model import describe
    from pipeline.registry.resolve import resolve

    place = catalogue.address(uri)
    left, right = (catalogue.lookup(reference, place) for reference in (a, b))
    recipes = [describe(resolve(version.reference, uri)).recipe for version in (left, right)]
    differences = cards.differences(left, right, *recipes)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in differences], indent=1))
    elif not differences:
        typer.echo(f"{a} and {b} do not differ in cards, recipes or figures")
    else:
        rows = [["", *(version.reference for version in (left, right))], *([e.what, e.a, e.b] for e in differences)]
        typer.echo(tables.align([[_shortened(cell) for cell in row] for row in rows], left=True))


def _shortened(cell: str, most: int = 60) -> str:
    return cell if len(cell) <= most else f"{cell[: most - 4]} ..."


@app.command("import", short_help="Create a run from weights that were trained elsewhere.")
def import_weights(
    file: Annotated[
        Path, typer.Argument(help=".pth, .pt or .safetensors file, a folder of ours, torchvision:NAME/WEIGHTS")
    ],
    family: Annotated[str, typer.Option(help="family/recipe of the net, or a path ending in .yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. data.root=DIR")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="file of class names by label, one on each line; default: those of data.root")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="folder of the new run; default: runs/NAME-imported")] = None,
    new_head: Annotated[
        bool, typer.Option("--new-head", help="leave out a head for other classes; the new one is untrained")
    ] = False,
) -> None:
    """Creates a run from weights that were trained elsewhere: a checkpoint of the released code of ConvNet-AIG, RANet
    or Shape Adaptor, a file of torchvision's or timm's, or torchvision:NAME/WEIGHTS, which is downloaded. Every tensor
    is used, or an error lists those that do not fit. A head for another number of classes is left out with --new-head
    only. The run is evaluated on the recipe's val split, and registered if the recipe sets tracking.register.

    Examples:

      adaptnet models import resnet50.pth --family baseline/imagenet_resnet50 --classes names.txt

      adaptnet models import resnet50.pth --family baseline/imagenet_resnet50 data.root=/data/imagenet

      adaptnet models import best.pth.tar --family ranet/cifar10_b1 --classes names.txt
    """
    from jobs import tables
    from pipeline import run_config
    from pipeline.deploy import importing

    home = data_home() or ("nowhere" if classes else None)
    config = run_config.load(family, overrides or (), data_home=home)
    folder = run_dir or Path("runs") / f"{config.name}-imported"
    done = importing.import_weights(config, file, folder, classes=_names(classes), new_head=new_head)
    typer.echo(f"{file}: {_account(done)}")
    if done.remark:
        typer.echo(done.remark)
    if done.result.reports:
        typer.echo(tables.of_reports(done.result.reports, config.family.name))
    typer.echo(f"run {folder}" + (f", registered as {done.result.version}" if done.result.version else ""))


def _account(done: Imported) -> str:
    """What became of the file's tensors, e.g. "320 tensors used; 2 left out: fc.weight, fc.bias"."""
    found, loaded = done.file, done.loaded
    parts = [f"{done.num_tensors:,} tensors used" + (f" of {found.entry}" if found.entry else "")]
    for what, names in (
        ("left out", loaded.left_out),
        ("of the net keep their initial values", loaded.initial),
        ("other entries of the file not read", found.others),
    ):
        more = ", ..." if len(names) > 4 else ""
        parts += [f"{len(names):,} {what}: {', '.join(names[:4])}{more}"] if names else []
    return "; ".join(parts)


def _names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    if not path.is_file():
        message = f"--classes (={path}): no such file; give a file with one class name on each line"
        raise ConfigError(message, key="--classes", subject=path)
    names = path.read_text(encoding="utf-8").split("\n")
    return [name.strip() for name in names if name.strip()]


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
