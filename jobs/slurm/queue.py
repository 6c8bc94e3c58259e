"""What has become of jobs: from SLURM's queue, its accounting where there is one, and the jobs' own folders."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import psutil

from jobs.slurm import munge
from jobs.slurm.job import FOLDER, RECORD, STARTS, recorded
from pipeline.errors import ConfigError, ResourceError
from pipeline.runs import records
from pipeline.runs.files import write_text

LIVES = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"}
LIVES |= {"RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
ELSEWHERE = Path("jobs") / "elsewhere.json"  # below the folder of runs: the jobs' folders that do not lie in it
FOLLOW_S = 5.0  # how often SLURM is asked whether a job that is followed lives
CLOCKS_S = 30.0  # by which the time that a process began may be off
WHY = {  # SLURM's reasons for waiting, in words
    "Resources": "the nodes it needs are busy",
    "Priority": "jobs of higher priority are before it",
    "BeginTime": "requeued a moment ago, it may start again shortly",
    "Dependency": "the job that it depends on has not ended",
    "DependencyNeverSatisfied": "the job that it depends on failed, so it will never start: cancel it",
    "ReqNodeNotAvail": "the nodes it needs are down, drained or reserved",
    "PartitionDown": "the partition is down",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives to one job",
    "PartitionTimeLimit": "it asks for more time than the partition allows",
    "PartitionConfig": "the partition cannot give what it asks for",
    "QOSMaxCpuPerUserLimit": "you have as many CPUs as your QOS allows",
    "QOSMaxNodePerUserLimit": "you have as many nodes as your QOS allows",
    "AssocMaxJobsLimit": "you have as many jobs running as your account allows",
    "AssocGrpCpuLimit": "the account's CPUs are in use",
    "Licenses": "the licenses it asks for are in use",
    "Reservation": "its reservation has not begun",
    "AssocGrpGRES": "the account's GPUs are in use",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your QOS allows",
    "QOSMaxGRESPerUser": "you have as many GPUs as your QOS allows",
    "QOSGrpGRES": "all GPUs of the QOS are in use",
    "JobHeldUser": "you hold it: scontrol release starts it",
    "JobHeldAdmin": "an administrator holds it",
    "JobArrayTaskLimit": "as many tasks of the array run as it allows at once",
    "launch failed requeued held": "it could not be started and is held: scontrol release starts it",
}


@dataclass(frozen=True)
class State:
    """SLURM's word for a job's state, why it is so, and where and how long it has run."""

    name: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""

    @property
    def lives(self) -> bool:
        return self.name in LIVES


def everything(runs: Path = Path("runs")) -> list[dict[str, Any]]:
    """The newest job of each run and of each folder of jobs, newest first."""
    patterns = (f"*/{FOLDER}/{RECORD}", f"jobs/*/{FOLDER}/{RECORD}")
    homes = [path.parents[1] for pattern in patterns for path in runs.glob(pattern)]
    homes += [Path(each) for each in _json(runs / ELSEWHERE) or () if (Path(each) / FOLDER / RECORD).is_file()]
    found = [recorded(home)[-1] | {"home": str(home)} for home in homes]
    return sorted(found, key=lambda entry: -float(entry["submitted"]))


def know(home: Path, runs: Path = Path("runs")) -> None:
    """Lets jobs in a folder that does not lie among the runs be listed and found by their ids."""
    if home.absolute().parent in (runs.absolute(), runs.absolute() / "jobs"):
        return
    known = list(_json(runs / ELSEWHERE) or ())
    if str(home) not in known:
        (runs / ELSEWHERE).parent.mkdir(parents=True, exist_ok=True)
        write_text(runs / ELSEWHERE, json.dumps([*known, str(home)], indent=1))


def find(wanted: str, runs: Path = Path("runs")) -> dict[str, Any]:
    """A job by its id, or the newest of a run by its name or folder. Raises ConfigError listing what there is."""
    home = next((place for place in (Path(wanted), runs / wanted) if (place / FOLDER / RECORD).is_file()), None)
    if home is not None:
        return recorded(home)[-1] | {"home": str(home)}
    entries = everything(runs)
    homes = [Path(entry["home"]) for entry in entries]
    old = (entry | {"home": str(home)} for home in homes for entry in reversed(recorded(home)))
    for entry in old:
        if str(entry["id"]) == wanted:
            return entry
    names = [Path(entry["home"]).name for entry in entries]
    close = get_close_matches(wanted, [*names, *(str(entry["id"]) for entry in entries)], 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    there = ", ".join(f"{entry['id']} ({name})" for entry, name in zip(entries[:10], names, strict=False)) or "none"
    raise ConfigError(f"{wanted}: no job of that id, run or folder; there are: {there}{hint}")


def state_of(entry: Mapping[str, Any]) -> State:
    """What a job is doing now, or how it ended."""
    return states_of([entry])[0]


def states_of(entries: Sequence[Mapping[str, Any]]) -> list[State]:
    """What each job is doing now, or how it ended. SLURM is asked once for all of them."""
    jobs = [str(entry["id"]) for entry in entries if entry["where"] == "slurm"]
    known = _remembered(jobs)
    ended = _accounted([job for job in jobs if job not in known or not known[job].lives])
    known |= {job: state for job, state in ended.items() if job not in known or not state.lives}  # it may lag behind
    return [_state(entry, known.get(str(entry["id"]))) for entry in entries]


def _state(entry: Mapping[str, Any], known: State | None) -> State:
    """`known` is what SLURM says, None where it has forgotten the job."""
    if entry["where"] == "ray":
        return _on_ray(entry)
    if entry["where"] != "slurm":
        return _local(entry)
    found = known or _by_folder(entry)
    if found.name == "COMPLETED" and entry["run_dir"] and not _finished(entry):
        return replace(found, reason="it was stopped; `adaptnet jobs resubmit` goes on")
    return found


def _on_ray(entry: Mapping[str, Any]) -> State:
    """From the cluster's job server; from what the job left where that is gone."""
    from jobs.ray import jobs as ray_jobs

    try:
        name, reason = ray_jobs.state_of(entry)
    except ResourceError:
        return _by_folder(entry)
    return State(name, reason if name != "COMPLETED" else "")


def _remembered(jobs: Sequence[str]) -> dict[str, State]:
    """From squeue, by job or ARRAY_TASK; it knows a job for some minutes after its end."""
    found = {}
    for job, name, reason, nodes, elapsed in _rows(jobs, "squeue", "-hr", "-t", "all", "-o", "%i|%T|%r|%N|%M"):
        text = WHY.get(reason.partition(",")[0], reason) if name == "PENDING" and reason != "None" else ""
        found[job] = State(name, text, nodes, elapsed)
    return found


def _accounted(jobs: Sequence[str]) -> dict[str, State]:
    """From sacct: the last start of each job."""
    rows = _rows(jobs, "sacct", "-nPX", "-o", "JobID,State,ExitCode,NodeList,Elapsed")
    return {job: State(name.split()[0], _why_ended(code), nodes, elapsed) for job, name, code, nodes, elapsed in rows}


def _rows(jobs: Sequence[str], *command: str) -> list[list[str]]:
    """The five fields of each line that such a command prints of these jobs; it is not asked about none."""
    lines = ask(*command, "-j", ",".join(jobs)) if jobs else []
    rows = [line.split("|") for line in lines]
    return [fields for fields in rows if len(fields) == 5 and fields[1]]


def _why_ended(code: str) -> str:
    """SLURM's CODE:SIGNAL in words; srun gives 128 + SIGNAL as a code, or 9 alone, which no verb of ours ends with."""
    status, _, number = code.partition(":")
    if status == "9":
        number = status
    elif status.isdigit() and int(status) > 128:
        number = str(int(status) - 128)
    if number not in ("0", ""):
        return f"killed by signal {number}" + " (was memory short?)" * (number == "9")
    return f"exit code {status}" if status not in ("0", "") else ""


def _by_folder(entry: Mapping[str, Any]) -> State:
    """Where SLURM has forgotten the job: from what it left."""
    if entry["run_dir"] and _finished(entry):
        return State("COMPLETED")
    starts = _json(Path(entry.get("home") or entry["run_dir"]) / FOLDER / STARTS) or []
    started = any(str(each["job"]) == str(entry["id"]) for each in starts)
    if any(line.startswith("adaptnet:") for line in last_words(entry)):
        return State("FAILED")
    started = started or (entry["where"] == "ray" and Path(entry["log"]).is_file())
    who = "its cluster is gone" if entry["where"] == "ray" else _silence() or "SLURM no longer knows it"
    return State("UNKNOWN", f"{who}; it had " + ("started" if started else "not started"))


def _silence() -> str:
    """Why SLURM answers nothing at all, in its words; empty where it does."""
    if shutil.which("sinfo") is None:
        return ""
    why = munge.absent()
    if not why:
        done = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=60)
        why = " ".join(done.stderr.split())[:300] if done.returncode else ""
    return f"SLURM does not answer ({why})" if why else ""


def _local(entry: Mapping[str, Any]) -> State:
    results = Path(entry["folder"]) / f"{entry['id']}_0_result.pkl"
    if results.is_file():
        finished = not entry["run_dir"] or _finished(entry)
        return State("COMPLETED" if finished else "FAILED")
    if entry["host"] != socket.gethostname():
        return State("UNKNOWN", f"it was started on {entry['host']}: ask there")
    if _runs(entry):
        return State("RUNNING")
    if entry["where"] == "debug":  # it leaves no result
        finished = entry["run_dir"] and _finished(entry)
        why = "it ran in the process that submitted it, which said how it went"
        return State("COMPLETED") if finished else State("UNKNOWN", why)
    return State("FAILED", "its process has ended without a result")


def process_of(entry: Mapping[str, Any]) -> int:
    """The number of the process that does a job of this machine."""
    return int(entry.get("pid") or entry["id"])


def _runs(entry: Mapping[str, Any]) -> bool:
    """Whether the process that was started lives; one that began later has only got its number."""
    try:
        process = psutil.Process(process_of(entry))
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= entry["submitted"] + CLOCKS_S
    except (ValueError, psutil.Error):
        return False


def _finished(entry: Mapping[str, Any]) -> bool:
    return records.read_status(Path(entry["run_dir"])).finished


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def ask(*command: str) -> list[str]:
    """The lines that a command of SLURM's prints; none where it fails or is not there."""
    if shutil.which(command[0]) is None or munge.absent():
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.SubprocessError:
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def tell(*command: str) -> None:
    """Gives SLURM an order. Raises ResourceError with its words where it is refused."""
    if shutil.which(command[0]) is None:
        raise ResourceError(f"{command[0]}: this machine has no SLURM; give the command where the job was submitted")
    if why := munge.absent():
        raise ResourceError(f"{' '.join(command)}: {why}; start it (systemctl start munge), or ask who runs SLURM here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise ResourceError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")


def last_words(entry: Mapping[str, Any], most: int = 12) -> list[str]:
    """The lines of a job's log that matter: from its last error on, or the last ones."""
    log = Path(entry["log"])
    others = sorted(log.parent.glob(f"{entry['id']}_*_log.out")) if entry["where"] == "slurm" else []  # other nodes'
    lines = [line for path in (*(each for each in others if each != log), log) for line in _lines(path)]
    marks = [n for n, line in enumerate(lines) if line.startswith("adaptnet:") or "Error" in line]
    mine = [line for line in lines if line.startswith("adaptnet:")]
    if mine:
        return mine[-3:]
    return lines[marks[-1] :][:most] if marks else lines[-most:]


def _lines(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def follow(entry: Mapping[str, Any]) -> Iterator[str]:
    """The log's text as it grows, until the job has ended; waits for it to begin."""
    import time

    path, offset, alive, ask_at = Path(entry["log"]), 0, True, 0.0
    while alive:
        if time.monotonic() >= ask_at:
            alive, ask_at = state_of(entry).lives, time.monotonic() + FOLLOW_S
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                file.seek(offset)
                text = file.read()
                offset = file.tell()
            if text:
                yield text
        if alive:
            time.sleep(1)
