"""`adaptnet predict`: classifies images within a budget of compute."""

from __future__ import annotations

import glob
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.deploy.predicting import Choice, Classified, Predictor, Unreadable

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, zoo:NAME, run folder or checkpoint folder")],
    images: Annotated[list[str], typer.Argument(help="files, folders, patterns, or - for paths on standard input")],
    budget: Annotated[str | None, typer.Option(help="largest mean cost per image: 0.8G or 300M MACs, 5ms, 50%")] = None,
    policy: Annotated[str | None, typer.Option(help="use this policy instead of a budget")] = None,
    top: Annotated[int, typer.Option(min=1, help="number of classes to print")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="images per batch")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="tracking server of models:/; default: runs/mlflow.db"),
    ] = None,
) -> None:
    """Classifies each IMAGE under the most accurate policy within the budget and prints the most probable classes and
    the MACs used. MODEL is a registry version, a net of the zoo, a run's folder or a checkpoint's folder. IMAGE is a
    file, a folder, a pattern, or - for a list of paths on standard input. Images that cannot be read are listed at the
    end; the exit status is then 1, or 2 if no image can be read.

    Examples:

      adaptnet predict models:/aig-toy@candidate runs/toy-data/val --budget 80%

      adaptnet predict runs/convnet_aig-toy photo.jpg --budget 5ms --json

      adaptnet predict models:/aig-toy@candidate "photos/*.jpg" --policy gates-hard
    """
    if budget is not None and policy is not None:
        message = f"--budget (={budget}) and --policy (={policy}) both choose a policy; give only one of them"
        raise ConfigError(message, key="--budget", keys=("--budget", "--policy"), subject=budget)
    from pipeline.deploy import predicting
    from pipeline.evaluation.frontier import parse_budget

    for stream in (sys.stdout, sys.stderr):  # file names need not be valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    wanted = parse_budget(budget) if budget is not None else None
    files = list(_files(images))
    if files and not any(path.exists() for path in files):
        raise ConfigError(f"{files[0]}: no such file or folder", key="images", subject=files[0])
    predictor = predicting.load(model, uri, device=device)
    choice = predictor.choose(wanted, policy, files)
    answers = predictor.answers(files, choice.policy, top=top, batch_size=batch_size)
    answered = (_print_json if as_json else _print_lines)(predictor, choice, answers, files)
    if answered < len(files):
        raise typer.Exit(1 if answered else 2)


def _files(images: Sequence[str]) -> Iterator[Path]:
    """The image files that the arguments denote, in order."""
    for each in images:
        if each == "-":
            yield from (Path(line.strip()) for line in sys.stdin if line.strip())
        else:
            yield from _of(each)


def _of(argument: str) -> list[Path]:
    from pipeline.data.image_headers import EXTENSIONS

    path = Path(argument)
    if path.is_dir():
        inside = [each for each in sorted(path.rglob("*")) if each.suffix.lower() in EXTENSIONS and each.is_file()]
        if not inside:
            message = f"{path}: no image in this folder; known extensions: {', '.join(sorted(EXTENSIONS))}"
            raise ConfigError(message, key="images", subject=path)
        return inside
    if any(sign in argument for sign in "*?[") and not path.exists():
        matching = [path for path in map(Path, sorted(glob.glob(argument, recursive=True))) if path.is_file()]
        if not matching:
            raise ConfigError(f"{argument}: no file matches this pattern", key="images", subject=argument)
        return matching
    return [path]


def _print_lines(
    predictor: Predictor, choice: Choice, answers: Iterator[Classified | Unreadable], files: Sequence[Path]
) -> int:
    """Prints the answers and returns how many there are."""
    from pipeline.deploy.predicting import Unreadable, exceeded, full_macs
    from pipeline.evaluation.frontier import macs_text

    typer.echo(f"{predictor.source}, policy {choice.policy} in {predictor.model.precision}: {choice.why}")
    answered, bad = [], []
    for answer in answers:
        if isinstance(answer, Unreadable):
            bad.append(answer)
            continue
        answered.append(answer)
        pairs = zip(answer.labels, answer.probabilities, strict=True)
        named = ", ".join(f"{label} {100 * probability:.1f} %" for label, probability in pairs)
        typer.echo(f"{answer.file}: {named} ({macs_text(answer.macs)})")
    if len(answered) > 1:
        typer.echo(f"{len(answered):,} images, {macs_text(sum(a.macs for a in answered) / len(answered))} on average")
    if warning := exceeded(choice, answered, full_macs(predictor.reports)) or predictor.late(choice, files):
        typer.echo(f"adaptnet: {warning}", err=True)
    for each in bad:
        typer.echo(f"adaptnet: {each.file}: no answer: {each.reason}", err=True)
    return len(answered)


def _print_json(
    predictor: Predictor, choice: Choice, answers: Iterator[Classified | Unreadable], files: Sequence[Path]
) -> int:
    """Prints the answers as one document and returns how many there are."""
    from pipeline.deploy.predicting import Classified, as_mapping, exceeded, full_macs

    every = list(answers)
    answered = [each for each in every if isinstance(each, Classified)]
    document = {
        "model": predictor.source,
        "policy": choice.policy,
        "why": choice.why,
        "precision": predictor.model.precision,
        "images": [as_mapping(each) for each in answered],
        "unreadable": [as_mapping(each) for each in every if not isinstance(each, Classified)],
        "macs_mean": sum(each.macs for each in answered) / len(answered) if answered else None,
        "budget_exceeded": exceeded(choice, answered, full_macs(predictor.reports)) or predictor.late(choice, files),
    }
    typer.echo(json.dumps(document, indent=1))
    return len(answered)
