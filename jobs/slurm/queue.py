"""The states of jobs, from SLURM's queue and, if it has one, its accounting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jobs.schedulers import JobState
from jobs.slurm.commands import query

Query = Callable[..., list[str]]
ALIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"}
ALIVE |= {"RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
REASONS = {  # SLURM's codes for why a job waits, explained
    "Resources": "the nodes it needs are busy",
    "Priority": "jobs of higher priority come first",
    "BeginTime": "it may not start yet, because of --begin or because it was requeued a moment ago",
    "Dependency": "the job that it depends on has not ended",
    "DependencyNeverSatisfied": "the job that it depends on failed, so it will never start: cancel it",
    "ReqNodeNotAvail": "the nodes it needs are down, drained or reserved",
    "PartitionDown": "the partition is down",
    "PartitionNodeLimit": "it requests more nodes than the partition gives to one job",
    "PartitionTimeLimit": "it requests more time than the partition allows",
    "PartitionConfig": "the partition cannot provide what it requests",
    "QOSMaxCpuPerUserLimit": "you use as many CPUs as your QOS allows",
    "QOSMaxNodePerUserLimit": "you use as many nodes as your QOS allows",
    "AssocMaxJobsLimit": "you have as many jobs running as your account allows",
    "AssocGrpCpuLimit": "the account's CPUs are in use",
    "Licenses": "the licenses it needs are in use",
    "Reservation": "its reservation has not begun",
    "AssocGrpGRES": "the account's GPUs are in use",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your QOS allows",
    "QOSMaxGRESPerUser": "you use as many GPUs as your QOS allows",
    "QOSGrpGRES": "all GPUs of the QOS are in use",
    "JobHeldUser": "you hold it: scontrol release starts it",
    "JobHeldAdmin": "an administrator holds it",
    "JobArrayTaskLimit": "as many tasks of the array run as it allows at once",
    "launch failed requeued held": "it could not be started and is held: scontrol release starts it",
}


def states_of(ids: Sequence[str], run: Query = query) -> dict[str, JobState]:
    """The states of the jobs that SLURM knows, by id or ARRAY_TASK. Each command runs once for all of them.

    run(*command) returns the lines that a command of SLURM prints.
    """
    queued = _from_squeue(ids, run)
    ended = _from_sacct([job for job in ids if job not in queued or not queued[job].alive], run)
    # the accounting may lag behind the queue: it must not mark an ended job as running
    return queued | {job: state for job, state in ended.items() if job not in queued or not state.alive}


def _from_squeue(ids: Sequence[str], run: Query) -> dict[str, JobState]:
    """SLURM's queue knows a job for some minutes after its end."""
    states = {}
    command = ("squeue", "-hr", "-t", "all", "-o", "%i|%T|%r|%N|%M|%S")
    for job, name, code, nodes, elapsed, *start in _rows(ids, run, *command):
        waits = name == "PENDING" and code != "None"
        reason = REASONS.get(code.partition(",")[0], code) if waits else ""
        if waits and code == "BeginTime" and start:
            reason = f"{reason}: not before {start[0]}"
        states[job] = JobState(name, reason, nodes, elapsed, name in ALIVE)
    return states


def _from_sacct(ids: Sequence[str], run: Query) -> dict[str, JobState]:
    """The accounting prints one row for each start of a job; the last counts."""
    states = {}
    for job, text, code, nodes, elapsed in _rows(
        ids, run, "sacct", "-nPX", "-o", "JobID,State,ExitCode,NodeList,Elapsed"
    ):
        name = text.split()[0]
        states[job] = JobState(name, why_ended(code), nodes, elapsed, name in ALIVE)
    return states


def _rows(ids: Sequence[str], run: Query, *command: str) -> list[list[str]]:
    """The fields, five or more, of each line that `command` prints about these jobs; no command runs for no jobs."""
    lines = run(*command, "-j", ",".join(ids)) if ids else []
    rows = [line.split("|") for line in lines]
    return [fields for fields in rows if len(fields) >= 5 and fields[1]]


def why_ended(code: str) -> str:
    """Explains SLURM's CODE:SIGNAL; "" for success.

    srun reports a signal as the code 128 + SIGNAL, or as the code 9, which no verb of ours exits with.
    """
    status, _, number = code.partition(":")
    if status == "9":
        number = status
    elif status.isdigit() and int(status) > 128:
        number = str(int(status) - 128)
    if number not in ("0", ""):
        return f"killed by signal {number}" + " (out of memory?)" * (number == "9")
    return f"exit code {status}" if status not in ("0", "") else ""
