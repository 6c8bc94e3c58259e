"""The console command `adaptnet`.

Each verb is a module of `jobs.verbs`: it parses its arguments, calls one function of the library, prints the result.
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn, Protocol, TextIO

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from pipeline.errors import AdaptNetError, ConfigError, without_secrets
from pipeline.installation import module
from pipeline.runs.files import DamagedFile
from pipeline.training import memory

VERBS = {  # the module jobs.verbs.<verb> is imported when the verb is used
    "train": "Train a recipe, or resume the run in its folder.",
    "evaluate": "Measure a trained net under each of its policies: accuracy, MACs and latency.",
    "choose": "Recommend recipes for a folder of images and a limit of cost.",
    "export": "Write a static policy of a trained net as a .pt2 or ONNX file.",
    "compare": "Test two trained nets on the same images, as they are and at equal cost.",
    "submit": "Run a verb as a job: on SLURM, on a Ray cluster or as a process of this machine.",
    "cluster": "Start and stop Ray clusters outside SLURM: on this machine, on hosts, in a cloud, under Kubernetes.",
    "jobs": "List jobs; show, follow, cancel, requeue or resubmit one.",
    "predict": "Classify images under the most accurate policy within a budget.",
    "report": "Write a web page about trained nets: accuracy against cost under all their policies.",
    "data": "Make, pack, check and describe image sets.",
    "models": "Look up, register, promote and fetch trained nets.",
    "doctor": "Check this machine: what it offers, and what is missing.",
    "runs": "List runs and send their journals to the tracking server.",
    "plan": "Estimate what a recipe needs on a number of nodes: memory, steps, reading, decoding, saving, time.",
    "reproduce": "Try a published claim: train its arms with several seeds and judge it by fixed rules.",
    "sweep": "Train every sample of a search space, or resume the sweep in its folder.",
    "bench": "Measure our speed as a ratio to that of a named peer, in one run.",
}

Command = TyperCommand | TyperGroup  # Typer annotates its own methods with private classes

INTERRUPTED = 130  # exit status after Ctrl-C, when work is unfinished
STOPPED = 75  # exit status after a save and a stop on request; the same command resumes

EXAMPLES = """Examples:

  adaptnet data toy runs/toy-data

  adaptnet train convnet_aig/toy

  adaptnet evaluate runs/convnet_aig-toy
"""


class HelpFormatter(Protocol):
    """The part of Typer's help formatter that `VerbGroup` uses."""

    def section(self, name: str) -> AbstractContextManager[None]: ...

    def write_dl(self, rows: Sequence[tuple[str, str]]) -> None: ...


class VerbGroup(TyperGroup):
    """Imports a verb's module when the verb is used, so that `adaptnet --help` need not import torch."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The names of the verbs, in the order of VERBS."""
        return list(VERBS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Command | None:  # type: ignore[override]
        """The command of a verb, from its module; None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command = get_command(importlib.import_module(module(f"jobs.verbs.{cmd_name}")).app)
        assert isinstance(command, Command)
        return _with_copyable_examples(command)

    def resolve_command(  # type: ignore[override]
        self, ctx: typer.Context, args: list[str]
    ) -> tuple[str | None, Command | None, list[str]]:
        """Like the base class's method, but an unknown verb raises a ConfigError that suggests the closest one."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            close = get_close_matches(args[0], VERBS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"{args[0]}: no such verb; known: {', '.join(VERBS)}{hint}"
            raise ConfigError(message, key="verb", subject=args[0])
        return super().resolve_command(ctx, args)  # type: ignore[return-value]

    def format_commands(self, ctx: typer.Context, formatter: HelpFormatter) -> None:  # type: ignore[override]
        """Writes the list of verbs without importing their modules."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _with_copyable_examples(command: Command) -> Command:
    """The command; its help, and that of its subcommands, shows each example on one line, ready to be copied."""
    paragraphs = (command.help or "").split("\n\n")
    lines = ("\b\n  " + " ".join(p.split()) if p.lstrip().startswith("adaptnet ") else p for p in paragraphs)
    command.help = "\n\n".join(lines)
    for subcommand in getattr(command, "commands", {}).values():
        _with_copyable_examples(subcommand)
    return command


app = typer.Typer(
    cls=VerbGroup,
    help=f"Train, compare and ship image classifiers that spend compute only where an image needs it.\n\n{EXAMPLES}",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"adaptnet {version('adaptnet')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """`VerbGroup` adds the verbs. Each talks to this machine directly, whatever proxy the environment names."""
    from jobs.environment import spare_loopback

    spare_loopback()


@contextmanager
def importing() -> Iterator[None]:
    """Without garbage collection: an import makes no garbage, and looking for it takes a tenth of torch's import."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def data_home() -> str | None:
    """The absolute path in ADAPTNET_DATA, which `${data_home}` in recipes stands for; None if it is unset."""
    home = os.environ.get("ADAPTNET_DATA")
    return str(Path(home).absolute()) if home else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb. User errors and out-of-memory errors are printed without a traceback and exit with status 2."""
    try:
        _run(arguments)
    except SystemExit as exit_:
        cluster = sys.modules.get(module("pipeline.execution.cluster"))
        if cluster is not None:  # imported by a verb that needs Ray
            cluster.leave_frozen_ray(exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None))
        raise


def _run(arguments: Sequence[str] | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may not be UTF-8
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DamagedFile)
            warnings.showwarning = _show_warning
            app(args=arguments, prog_name="adaptnet")
    except AdaptNetError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        reason = memory.oom_message(error)
        if reason is None:
            _fail_with_traceback()
        fail(f"out of memory ({reason}). Use smaller batches; everything that was saved before is intact")
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED and _by_ctrl_c(exit_):  # a verb that has saved and stopped says so itself
            fail("interrupted; everything that was saved before is intact", INTERRUPTED)
        raise
    except Exception:
        _fail_with_traceback()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning; one about a damaged file as a sentence."""
    ours = issubclass(category, DamagedFile)
    text = f"adaptnet: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    print(text, end="", file=file or sys.stderr)


def _fail_with_traceback() -> NoReturn:
    """Prints the traceback of a fault of ours, without passwords: an error of a database's library may name one."""
    print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
    sys.exit(1)


def _by_ctrl_c(exit_: SystemExit) -> bool:
    """Whether Typer has turned a KeyboardInterrupt into this exit."""
    error = exit_.__context__
    return isinstance(error, KeyboardInterrupt) or isinstance(getattr(error, "__cause__", None), KeyboardInterrupt)


def fail(message: str, code: int = 2) -> NoReturn:
    """Prints the message to standard error and exits with this status."""
    print(f"adaptnet: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
