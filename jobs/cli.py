"""The console command `adaptnet`: one verb a file; each parses, calls one function of the pipeline and prints."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from pipeline.errors import AdaptNetError, ConfigError
from pipeline.training import memory

VERBS = {  # each is the module jobs.verbs.<verb>, imported when it is asked for
    "train": "Train a recipe, or go on with the run in its folder.",
    "evaluate": "Accuracy, MACs and latency of a trained net under each of its policies.",
    "export": "A static policy of a trained net as a .pt2 or ONNX file.",
    "compare": "A paired test of two trained nets on the same images, as they are and at equal cost.",
    "submit": "Run a verb as a job on SLURM, over as many nodes as it is given.",
    "cluster": "Ray clusters outside SLURM: on this machine, on hosts, in a cloud, under Kubernetes.",
    "jobs": "List jobs; show, follow, cancel, requeue or resubmit one.",
    "predict": "What is in these images, under the most accurate policy within a budget.",
    "report": "A page of trained nets: accuracy against cost under all their policies.",
    "data": "Make, pack, check and describe image sets.",
    "models": "Look trained nets up, register, promote and fetch them.",
    "doctor": "What this machine offers, and what is missing for what.",
    "runs": "List runs and send their journals to the tracking server.",
    "plan": "What a recipe needs on so many nodes: memory, steps, reading, decoding, saving, time.",
    "sweep": "Train every draw of a space, or go on with the sweep in its folder.",
    "bench": "Our speed as a ratio to a named peer's, in one run.",
}

INTERRUPTED = 130  # the exit status where Ctrl-C left something unfinished
STOPPED = 75  # where it was asked to save and stop, and the same command goes on

EXAMPLES = """Examples:

  adaptnet data toy runs/toy-data

  adaptnet train convnet_aig/toy

  adaptnet evaluate runs/convnet_aig-toy
"""


class Verbs(TyperGroup):
    """Loads a verb's module when it is used, so that --help need not import torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, name: str) -> Any:
        return _as_typed(get_command(importlib.import_module(f"jobs.verbs.{name}").app)) if name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            close = get_close_matches(args[0], VERBS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{args[0]}: no such verb; known: {', '.join(VERBS)}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _as_typed(command: Any) -> Any:
    """The command, whose help and whose verbs' help show each example on one line, to be copied."""
    paragraphs = (command.help or "").split("\n\n")
    typed = ("\b\n  " + " ".join(p.split()) if p.lstrip().startswith("adaptnet ") else p for p in paragraphs)
    command.help = "\n\n".join(typed)
    for verb in getattr(command, "commands", {}).values():
        _as_typed(verb)
    return command


app = typer.Typer(
    cls=Verbs,
    help=f"Train, compare and ship image classifiers that spend compute only where an image needs it.\n\n{EXAMPLES}",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"adaptnet {version('adaptnet')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Verbs are added by `Verbs`."""


def data_home() -> str | None:
    """The folder that `${data_home}` in a recipe stands for: the environment variable ADAPTNET_DATA."""
    home = os.environ.get("ADAPTNET_DATA")
    return str(Path(home).absolute()) if home else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb. User errors, and memory that is spent, are printed without a traceback and exit with 2."""
    try:
        app(args=arguments, prog_name="adaptnet")
    except AdaptNetError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        words = memory.words_if_spent(error)
        if words is None:
            raise
        fail(f"memory is spent ({words}). Take smaller batches; nothing that was stored before is lost")
    except SystemExit as left:
        if left.code == INTERRUPTED:
            fail("interrupted; what was stored before stays", INTERRUPTED)
        raise


def fail(message: str, code: int = 2) -> Any:
    print(f"adaptnet: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
