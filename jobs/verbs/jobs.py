"""`adaptnet jobs`: what has become of submitted jobs, and orders to them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

HELP = """Jobs by id, or by the name or folder of their run.

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


@app.command("list", help="One line for the newest job of each run.\n\nExamples:\n\n  adaptnet jobs list")
def list_jobs(runs: Runs = RUNS) -> None:
    from jobs import tables
    from jobs.slurm import queue

    entries = queue.everything(runs)
    if not entries:
        typer.echo(f"no jobs in {runs}; `adaptnet submit` makes one")
        return
    rows = [["run", "job", "state", "starts", "nodes", "elapsed", "submitted", "why"]]
    for entry, state in zip(entries, queue.states_of(entries), strict=True):
        when = time.strftime("%m-%d %H:%M", time.localtime(entry["submitted"]))
        facts = [state.name, str(len(_starts(entry))), state.nodes or "-", state.elapsed or "-", when, state.reason]
        rows.append([Path(entry["home"]).name, str(entry["id"]), *facts])
    typer.echo(tables.align(rows))


@app.command(
    help="What a job is, how it goes, why it waits or failed, and which MLflow run it writes.\n\nExamples:\n\n"
    "  adaptnet jobs show convnet_aig-toy"
)
def show(job: Wanted, runs: Runs = RUNS) -> None:
    from jobs import tables
    from jobs.slurm import queue
    from pipeline.registry.resolve import newest_step

    entry = queue.find(job, runs)
    state = queue.state_of(entry)
    facts: dict[str, Any] = {
        "job": f"{entry['id']} ({entry['where']})",
        "command": " ".join(["adaptnet", entry["verb"], *entry["arguments"]]),
        "state": state.name + (f": {state.reason}" if state.reason else ""),
        "nodes": state.nodes or "-",
        "elapsed": state.elapsed or "-",
        "starts": ", ".join(f"step {each['from']} to {_end_of(each)}" for each in _starts(entry)) or "none yet",
        "log": entry["log"],
    }
    if entry["run_dir"]:
        run_dir = Path(entry["run_dir"])
        saved = {} if entry["verb"] == "sweep" else {"newest checkpoint": f"step {newest_step(run_dir)}"}
        facts |= {entry["verb"].replace("train", "run"): run_dir, **saved, "MLflow run": _mlflow(run_dir)}
    typer.echo(tables.of_pairs(facts))
    if not state.lives and state.name != "COMPLETED":
        said = queue.last_words(entry) or [f"no log at {entry['log']}: is that folder seen by the nodes?"]
        typer.echo("\n".join(["", "last words:", *(f"  {line}" for line in said)]))


def _starts(entry: dict[str, Any]) -> list[dict[str, Any]]:
    from jobs.slurm.job import Starts

    found = Starts(Path(entry["home"])).read()
    return [each for each in found if entry["where"] != "slurm" or each["job"] == str(entry["id"])]


def _end_of(start: dict[str, Any]) -> str:
    return "now" if start["to"] is None else str(start["to"])


def _mlflow(run_dir: Path) -> str:
    from pipeline.tracking.ledger import Ledger

    ledger = Ledger.peek(run_dir)
    return f"{ledger.run_id} in {ledger.uri}" if ledger.run_id else "none yet"


@app.command(help="A job's output.\n\nExamples:\n\n  adaptnet jobs logs convnet_aig-toy -f")
def logs(
    job: Wanted,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="as it grows, until the job has ended")] = False,
    runs: Runs = RUNS,
) -> None:
    from jobs.slurm import queue

    entry = queue.find(job, runs)
    if follow:
        for text in queue.follow(entry):
            typer.echo(text, nl=False)
    elif Path(entry["log"]).is_file():
        typer.echo(Path(entry["log"]).read_text(encoding="utf-8", errors="replace"), nl=False)
    else:
        typer.echo(f"no log yet: {queue.state_of(entry).name}")


@app.command(
    help="Ends a job: SLURM's at once, so that a training goes on from its newest checkpoint when it is resubmitted; "
    "others when they have saved.\n\nExamples:\n\n  adaptnet jobs cancel 4711"
)
def cancel(job: Wanted, runs: Runs = RUNS) -> None:
    from jobs.ray import jobs as ray_jobs
    from jobs.slurm import queue
    from pipeline.errors import ResourceError

    entry = queue.find(job, runs)
    if entry["where"] in ("local", "debug") and not (state := queue.state_of(entry)).lives:
        why = f" ({state.reason})" if state.reason else ""
        raise ResourceError(f"job {entry['id']} is {state.name.lower()}{why}; there is nothing to end here")
    if entry["where"] == "slurm":
        queue.tell("scancel", str(entry["id"]))
    elif entry["where"] == "ray":
        ray_jobs.stop(entry)
    else:
        os.kill(queue.process_of(entry), signal.SIGTERM)
    typer.echo(f"job {entry['id']} is asked to end; `adaptnet jobs resubmit {Path(entry['home']).name}` goes on")


@app.command(
    help="Puts a running job back into the queue; it goes on from its newest checkpoint.\n\nExamples:\n\n"
    "  adaptnet jobs requeue 4711"
)
def requeue(job: Wanted, runs: Runs = RUNS) -> None:
    from jobs.slurm import queue
    from pipeline.errors import ResourceError

    entry = queue.find(job, runs)
    if entry["where"] != "slurm":
        raise ResourceError(f"job {entry['id']} is not SLURM's; `adaptnet jobs cancel` and `resubmit` start it anew")
    queue.tell("scontrol", "requeue", str(entry["id"]))
    typer.echo(f"job {entry['id']} is requeued")


@app.command(
    help="Submits a job that has ended anew, with what it was submitted with: the run goes on.\n\nExamples:\n\n"
    "  adaptnet jobs resubmit convnet_aig-toy"
)
def resubmit(job: Wanted, runs: Runs = RUNS) -> None:
    from jobs.ray import jobs as ray_jobs
    from jobs.slurm import job as slurm
    from jobs.slurm import queue
    from jobs.slurm.site import Site
    from pipeline.errors import ResourceError

    entry = queue.find(job, runs)
    newest = queue.find(entry["home"], runs)  # an older job's id may have been given
    state = queue.state_of(newest)
    if state.lives:
        raise ResourceError(
            f"job {newest['id']} of {newest['home']} is {state.name.lower()}; `adaptnet jobs requeue` starts it anew"
        )
    site = Site.model_validate_json(_text(entry["site"]))
    resources = slurm.Resources(**{**entry["resources"], "nodes": tuple(entry["resources"]["nodes"])})
    again = slurm.Job(
        saves_within_s=float(site.signal_delay_s),
        verb=entry["verb"],
        arguments=tuple(entry["arguments"]),
        home=str(Path(entry["home"]).absolute()),
        run_dir=entry["run_dir"],
        patience_s=site.patience_s,
        max_requeues=site.max_requeues,
        fewest_nodes=resources.nodes[0],
        uses_ray=entry["verb"] in ("train", "sweep"),
        needs=slurm.Needs(*entry["needs"]) if entry.get("needs") else None,
    )
    submission = slurm.Submission(again, entry["name"], resources, site)
    on_ray = entry["where"] == "ray"
    (made,) = ray_jobs.submit(submission, entry["address"]) if on_ray else slurm.submit(submission, entry["where"])
    typer.echo(f"job {made} goes on with {entry['home']}")


def _text(site: dict[str, Any]) -> str:
    import json

    return json.dumps(site)
