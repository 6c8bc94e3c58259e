"""`adaptnet jobs`: the state of submitted jobs, their logs, and commands that change them."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import without_secrets

if TYPE_CHECKING:
    from jobs.schedulers import JobState
    from jobs.schedulers.attempts import JobAttempt
    from jobs.schedulers.records import JobRecord
    from pipeline.runs.progress import RunProgress

HELP = """Lists, shows, cancels, requeues and resubmits jobs. A job is named by its id, or by its run's name or folder.

Examples:

  adaptnet jobs list

  adaptnet jobs show convnet_aig-toy

  adaptnet jobs logs convnet_aig-toy -f

  adaptnet jobs cancel 4711
"""

app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)
Wanted = Annotated[str, typer.Argument(help="job id, or name or folder of a run")]
Runs = Annotated[Path, typer.Option(help="folder of runs")]
RUNS = Path("runs")


@app.command("list", short_help="List jobs.")
def list_jobs(runs: Runs = RUNS) -> None:
    """Prints one line for the newest job of each run.

    Examples:

      adaptnet jobs list
    """
    from jobs import schedulers, tables
    from jobs.schedulers import records

    newest = records.list_jobs(runs)
    if not newest:
        typer.echo(f"no jobs in {runs}; `adaptnet submit` makes one")
        return
    rows = [["run", "job", "state", "starts", "nodes", "elapsed", "submitted", "why"]]
    for record, state in zip(newest, schedulers.states(newest), strict=True):
        when = time.strftime("%m-%d %H:%M", time.localtime(record.submitted_at))
        starts = str(len(_attempts(record)))
        why = state.reason or (_stall(record) if state.alive else "")
        facts = [state.name, starts, state.nodes or "-", state.elapsed or "-", when, why]
        rows.append([Path(record.home).name, record.id, *facts])
    typer.echo(tables.align(rows))


@app.command(short_help="Show a job.")
def show(job: Wanted, runs: Runs = RUNS) -> None:
    """Shows a job: its command and state, why it waits or failed, how far each start came, and its MLflow run.

    Examples:

      adaptnet jobs show convnet_aig-toy
    """
    from jobs import schedulers, tables
    from jobs.schedulers import records

    record = records.find(job, runs)
    state = schedulers.state_of(record)
    facts: dict[str, object] = {
        "job": f"{record.id} ({record.scheduler})",
        "command": without_secrets(shlex.join(["adaptnet", record.verb, *record.argv])),
        "state": _described(state),
        "nodes": state.nodes or "-",
        "elapsed": state.elapsed or "-",
        "starts": ", ".join(map(_steps, _attempts(record))) or ("none yet" if state.alive else "none"),
        "log": record.log,
        **_run_facts(record),
        **(_progress(record) if state.alive else {}),
    }
    typer.echo(tables.of_pairs(facts))
    if not state.alive and state.name != "COMPLETED":
        lines = records.last_lines(schedulers.get(record.scheduler).logs(record)) or [_why_silent(record, state)]
        typer.echo("\n".join(["", "last lines:", *(f"  {line}" for line in lines)]))


def _run_facts(record: JobRecord) -> dict[str, object]:
    """Facts about the run or sweep that the job works on; none for another verb."""
    if record.run_dir is None:
        return {}
    from pipeline.registry.resolve import newest_step

    run_dir = Path(record.run_dir)
    saved = {} if record.verb == "sweep" else {"newest checkpoint": f"step {newest_step(run_dir)}"}
    return {record.verb.replace("train", "run"): run_dir, **saved, "MLflow run": _mlflow(run_dir)}


def _progress(record: JobRecord) -> dict[str, object]:
    """Where a living run is, or since when it makes no progress."""
    found = _newest(record)
    return {} if found is None else {"progress": found.sentence()}


def _newest(record: JobRecord) -> RunProgress | None:
    """The progress that the job's driver has written last; None if it has not begun."""
    from pipeline.runs import progress

    found = progress.read(Path(record.run_dir)) if record.run_dir is not None else None
    return found if found is not None and found.written >= record.submitted_at else None


def _stall(record: JobRecord) -> str:
    found = _newest(record)
    return (found.stall() or "") if found is not None else ""


def _why_silent(record: JobRecord, state: JobState) -> str:
    if Path(record.log).is_file():
        return f"the log {record.log} is empty"
    if state.name == "CANCELLED" and not _attempts(record):
        return "none: it was cancelled before it started"
    return f"no log at {record.log}: do the nodes see that folder?"


def _described(state: JobState) -> str:
    return state.name + (f": {state.reason}" if state.reason else "")


def _text_of(path: Path) -> str:
    """The text of a file; empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _attempts(record: JobRecord) -> list[JobAttempt]:
    from jobs.schedulers.attempts import Attempts

    return Attempts(Path(record.home)).of(record.id)


def _steps(attempt: JobAttempt) -> str:
    end = "now" if attempt.last_step is None else str(attempt.last_step)
    return f"step {attempt.first_step} to {end}"


def _mlflow(run_dir: Path) -> str:
    from pipeline.tracking.ledger import Ledger

    ledger = Ledger.peek(run_dir)
    return f"{ledger.run_id} in {ledger.uri}" if ledger.run_id else "none yet"


@app.command(short_help="Print a job's output.")
def logs(
    job: Wanted,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="follow the output until the job has ended")] = False,
    runs: Runs = RUNS,
) -> None:
    """Prints a job's output.

    Examples:

      adaptnet jobs logs convnet_aig-toy -f
    """
    from jobs import schedulers
    from jobs.schedulers import records

    record = records.find(job, runs)
    if follow:
        for text in records.follow(record):
            typer.echo(text, nl=False)
    elif text := _text_of(Path(record.log)):
        typer.echo(text, nl=False)
    else:
        state = schedulers.state_of(record)
        what = "the log is empty" if Path(record.log).is_file() else "no log yet" if state.alive else "no log"
        typer.echo(f"{what}: {_described(state)}")


@app.command(short_help="End a job.")
def cancel(job: Wanted, runs: Runs = RUNS) -> None:
    """Ends a job. SLURM ends it at once, so that a training resumes from its newest checkpoint when it is resubmitted;
    elsewhere a training saves first.

    Examples:

      adaptnet jobs cancel 4711
    """
    from jobs import schedulers
    from jobs.schedulers import records

    record = records.find(job, runs)
    schedulers.get(record.scheduler).cancel(record)
    typer.echo(f"job {record.id} was asked to end; `adaptnet jobs resubmit {Path(record.home).name}` resumes it")


@app.command(short_help="Put a running job back into the queue.")
def requeue(job: Wanted, runs: Runs = RUNS) -> None:
    """Puts a running job back into the queue; a training resumes from its newest checkpoint.

    Examples:

      adaptnet jobs requeue 4711
    """
    from jobs import schedulers
    from jobs.schedulers import records

    record = records.find(job, runs)
    schedulers.get(record.scheduler).requeue(record)
    typer.echo(f"job {record.id} is requeued")


@app.command(short_help="Submit a job that has ended again.")
def resubmit(job: Wanted, runs: Runs = RUNS) -> None:
    """Submits a job that has ended again, with the same arguments; the run resumes.

    Examples:

      adaptnet jobs resubmit convnet_aig-toy
    """
    from jobs import schedulers
    from jobs.schedulers import records
    from pipeline.errors import ResourceError

    record = records.find(job, runs)
    newest = records.find(record.home, runs)  # `job` may be the id of an older one
    state = schedulers.state_of(newest)
    if state.alive:
        raise ResourceError(
            f"job {newest.id} of {newest.home} is {state.name.lower()}; `adaptnet jobs requeue` starts it again",
            key="job",
            subject=newest.id,
        )
    (made,) = schedulers.get(record.scheduler).submit(record.again())
    typer.echo(f"job {made.id} resumes {made.home}")
