"""`adaptnet predict`: what is in these images, at a price."""

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

EXAMPLES = """Says what is in each IMAGE: the likeliest classes and the MACs it took, under the most accurate policy
within the budget. MODEL is a registry version, a run's folder or a checkpoint's; IMAGE a file, a folder, a pattern, or
- for a list of paths on standard input. Images that cannot be read are listed at the end, and the exit status is 1.

Examples:

  adaptnet predict models:/aig-toy@candidate runs/toy-data/val --budget 80%

  adaptnet predict runs/convnet_aig-toy photo.jpg --budget 5ms --json

  adaptnet predict models:/aig-toy@candidate "photos/*.jpg" --policy gates-hard
"""


@app.command(help=EXAMPLES)
def predict(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, run folder or checkpoint folder")],
    images: Annotated[list[str], typer.Argument(help="files, folders, patterns, or - for paths on standard input")],
    budget: Annotated[
        str | None, typer.Option(help="most that an image may cost on average: 0.8G or 300M MACs, 5ms, 50%")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="this policy, instead of a budget")] = None,
    top: Annotated[int, typer.Option(min=1, help="how many classes to name")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="images in one pass")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    uri: Annotated[str | None, typer.Option(help="tracking server of models:/; default runs/mlflow.db")] = None,
) -> None:
    if budget is not None and policy is not None:
        raise ConfigError(f"--budget (={budget}) and --policy (={policy}) both choose a policy: give one of them")
    from pipeline.deploy import predicting
    from pipeline.evaluation.frontier import parse_budget

    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    wanted = parse_budget(budget) if budget is not None else None
    files = list(_files(images))
    found = predicting.load(model, uri, device=device)
    choice = found.choose(wanted, policy, files)
    answers = found.answers(files, choice.policy, top=top, batch_size=batch_size)
    unreadable = (_print_json if as_json else _print_lines)(found, choice, answers, files)
    if unreadable:
        raise typer.Exit(1)


def _files(images: Sequence[str]) -> Iterator[Path]:
    """The image files that the arguments stand for, in their order."""
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
            raise ConfigError(f"{path}: no image in this folder; known are {', '.join(sorted(EXTENSIONS))}")
        return inside
    if any(sign in argument for sign in "*?[") and not path.exists():
        matching = [Path(found) for found in sorted(glob.glob(argument, recursive=True)) if Path(found).is_file()]
        if not matching:
            raise ConfigError(f"{argument}: no file matches this pattern")
        return matching
    return [path]


def _print_lines(
    found: Predictor, choice: Choice, answers: Iterator[Classified | Unreadable], files: Sequence[Path]
) -> bool:
    from pipeline.deploy.predicting import Unreadable, exceeded, full_macs
    from pipeline.evaluation.frontier import macs_text

    typer.echo(f"{found.source}, policy {choice.policy}: {choice.why}")
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
    if remark := exceeded(choice, answered, full_macs(found.reports)) or found.late(choice, files):
        typer.echo(f"adaptnet: {remark}", err=True)
    for each in bad:
        typer.echo(f"adaptnet: {each.file}: no answer: {each.reason}", err=True)
    return bool(bad)


def _print_json(
    found: Predictor, choice: Choice, answers: Iterator[Classified | Unreadable], files: Sequence[Path]
) -> bool:
    from pipeline.deploy.predicting import Classified, as_mapping, exceeded, full_macs

    every = list(answers)
    answered = [each for each in every if isinstance(each, Classified)]
    document = {
        "model": found.source,
        "policy": choice.policy,
        "why": choice.why,
        "images": [as_mapping(each) for each in answered],
        "unreadable": [as_mapping(each) for each in every if not isinstance(each, Classified)],
        "macs_mean": sum(each.macs for each in answered) / len(answered) if answered else None,
        "budget_exceeded": exceeded(choice, answered, full_macs(found.reports)) or found.late(choice, files),
    }
    typer.echo(json.dumps(document, indent=1))
    return len(answered) < len(every)
