"""Tests of `adaptnet jobs`: old and new records, explanations of SLURM's states, jobs that SLURM no longer lists."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import fake_schedulers
import pytest
from raised import fails

from jobs import schedulers
from jobs.cli import main
from jobs.schedulers import JobState, records
from jobs.schedulers.attempts import Attempts, JobAttempt
from jobs.schedulers.profile import SiteProfile
from jobs.schedulers.records import JobRecord
from jobs.schedulers.submission import Resources, WorkerNeeds
from jobs.slurm import queue
from jobs.slurm.node import memory_bytes
from pipeline.errors import ConfigError, ResourceError


@pytest.fixture(autouse=True)
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without SLURM; the folder takes fake commands."""
    monkeypatch.chdir(tmp_path)
    return fake_schedulers.hide_slurm(tmp_path, monkeypatch)


def record(home: Path, job: str, scheduler: str = "slurm", **facts: object) -> JobRecord:
    """A job as it is recorded; `facts` replace what is usual."""
    plain = JobRecord(
        id=job,
        scheduler=scheduler,
        name="x",
        verb="train",
        argv=(),
        home=str(home),
        run_dir=None,
        log=str(home / f"{job}_0_log.out"),
        resources=Resources((1, 1), 0, 1, 10),
        profile=SiteProfile(),
        submitted_at=time.time(),
        host=socket.gethostname(),
    )
    return replace(plain, **facts)  # type: ignore[arg-type]


def state_of(job: JobRecord) -> JobState:
    return schedulers.get(job.scheduler).states([job])[job.id]


# --- records

OLD = """[{
 "id": "4711_1", "where": "slurm", "name": "toy", "verb": "train", "arguments": ["r.yaml", "--run-dir", "/r/toy"],
 "run_dir": "/r/toy", "folder": "/r/jobs/array/slurm", "log": "/r/jobs/array/slurm/4711_1_0_log.out",
 "resources": {"nodes": [2, 4], "gpus_per_node": 2, "cpus_per_task": 6, "minutes": 30, "memory_gb": null},
 "site": {"partition": "main", "time": "30m", "gpus_per_node": 2, "signal_delay_s": 45, "extra": {"licenses": "a"}},
 "submitted": 1764000000.5, "host": "login1", "pid": null, "needs": [4, 3.0, 1.0], "script": "#!/bin/bash"},
 {"id": "adaptnet-toy-1", "where": "ray", "address": "http://a:1", "name": "toy", "verb": "train", "arguments": [],
 "run_dir": null, "folder": "/r/toy/slurm", "log": "/r/toy/slurm/adaptnet-toy-1.log",
 "resources": {"nodes": [1, 1], "gpus_per_node": 0, "cpus_per_task": 1, "minutes": 30, "memory_gb": 1.5},
 "site": {}, "submitted": 1764000001, "host": "login1", "script": "bash"}]"""


def test_records_without_a_format_number_are_read(tmp_path: Path) -> None:
    """As commit bc067e3 wrote them; the older ones among them have no needs and no pid."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text(OLD)
    first, second = records.of_home(tmp_path)
    assert (first.id, first.scheduler, first.verb, first.submitted_at) == ("4711_1", "slurm", "train", 1764000000.5)
    assert first.argv == ("r.yaml", "--run-dir", "/r/toy") and first.needs == WorkerNeeds(4, 3.0, 1.0)
    assert first.resources == Resources((2, 4), 2, 6, 30) and first.profile.signal_delay_s == 45
    assert first.folder == Path("/r/jobs/array/slurm") and first.home == str(tmp_path)
    assert (second.scheduler, second.address, second.needs) == ("ray", "http://a:1", None)
    records.add(replace(first, id="5000"))
    assert records.of_home(tmp_path) == [first, second, replace(first, id="5000")]


def test_a_record_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    entry = {**record(tmp_path, "7").to_json(), "format": 3}
    with fails(ConfigError, "jobs.json", subject=3):
        JobRecord.from_json(entry, tmp_path)


def test_starts_without_a_format_number_are_read(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    old = [{"job": "7", "restart": 0, "host": "n1", "time": 1764000000.5, "from": 0, "to": 20}]
    old += [{"job": "7", "restart": 1, "host": "n2", "time": 1764000100.5, "from": 20, "to": None}]
    (tmp_path / "slurm" / "starts.json").write_text(json.dumps(old))
    first, second = Attempts(tmp_path).read()
    assert first == JobAttempt("7", 0, "n1", 1764000000.5, 0, 20) and first.progressed and not second.progressed
    with fails(ConfigError, "starts.json", subject=2):
        JobAttempt.from_json({**first.to_json(), "format": 2})


def test_a_home_outside_the_folder_of_runs_is_listed_and_found_by_id(tmp_path: Path) -> None:
    for home in ("elsewhere/deep/run", "runs/bench/deeper", "runs/here", "runs/jobs/there"):
        records.add(record(tmp_path / home, f"job-{Path(home).name}"))
        records.remember_home(tmp_path / home)
        records.remember_home(tmp_path / home)
    far = [str(tmp_path / "elsewhere/deep/run"), str(tmp_path / "runs/bench/deeper")]
    assert json.loads((tmp_path / "runs/jobs/elsewhere.json").read_text()) == far
    assert len(records.list_jobs()) == 4
    assert records.find("job-run").home == str(tmp_path / "elsewhere/deep/run")
    with fails(ConfigError, "job", subject="job-walk"):
        records.find("job-walk")


# --- SLURM


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        (["7|PENDING|Resources||0:00"], [], JobState("PENDING", "the nodes it needs are busy", "", "0:00", True)),
        (
            ["7|PENDING|BeginTime||0:00|2030-01-01T08:00:00"],
            [],
            JobState("PENDING", f"{queue.REASONS['BeginTime']}: not before 2030-01-01T08:00:00", "", "0:00", True),
        ),
        (["7|RUNNING|None|n[1-2]|1:00"], [], JobState("RUNNING", "", "n[1-2]", "1:00", True)),
        ([], ["7|TIMEOUT|0:0|n1|3:00", "7|FAILED|2:0|n1|0:30"], JobState("FAILED", "exit code 2", "n1", "0:30")),
        ([], ["7|CANCELLED by 0|0:0|n1|3:00"], JobState("CANCELLED", "", "n1", "3:00")),
        (["7|FAILED|NonZeroExitCode|n1|0:30"], [], JobState("FAILED", "", "n1", "0:30")),
        (["7|FAILED|NonZeroExitCode|n1|0:30"], ["7|RUNNING|0:0|n1|0:20"], JobState("FAILED", "", "n1", "0:30")),
        (
            ["7|PENDING|ReqNodeNotAvail, UnavailableNodes:n1||0:00"],
            [],
            JobState("PENDING", "the nodes it needs are down, drained or reserved", "", "0:00", True),
        ),
    ],
)
def test_a_jobs_state_is_slurms_with_its_reason_explained(squeue: list[str], sacct: list[str], state: JobState) -> None:
    answers = {"squeue": squeue, "sacct": sacct}
    assert queue.states_of(["7"], lambda *command: answers[command[0]]) == {"7": state}


@pytest.mark.parametrize(
    ("code", "signal"), [("0:9", 9), ("137:0", 9), ("9:0", 9), ("143:0", 15), ("0:0", None), ("2:0", None)]
)
def test_a_signal_is_read_from_any_of_slurms_exit_codes(code: str, signal: int | None) -> None:
    assert (f"signal {signal}" in queue.why_ended(code)) == (signal is not None)


def test_each_command_of_slurm_runs_once_for_all_jobs() -> None:
    """sacct for those only that the queue does not know to be alive; tasks of an array by their own ids."""
    calls: list[tuple[str, ...]] = []
    answers = {
        "squeue": ["5_1|PENDING|Priority||0:00", "5_2|RUNNING|None|n1|1:00", "8|FAILED|NonZeroExitCode|n1|0:30"],
        "sacct": ["8|FAILED|2:0|n1|0:30", "9|TIMEOUT|0:0|n2|3:00"],
    }

    def answer(*command: str) -> list[str]:
        calls.append(command)
        return answers[command[0]]

    states = queue.states_of(["5_1", "5_2", "8", "9", "10"], answer)
    names = {"5_1": "PENDING", "5_2": "RUNNING", "8": "FAILED", "9": "TIMEOUT"}
    assert {job: state.name for job, state in states.items()} == names
    assert [(words[0], words[-1]) for words in calls] == [("squeue", "5_1,5_2,8,9,10"), ("sacct", "8,9,10")]
    assert queue.states_of([], answer) == {} and len(calls) == 2


def test_a_run_that_was_stopped_before_its_end_has_a_reason(tmp_path: Path, tools: Path) -> None:
    fake_schedulers.write_tool(tools, "squeue", "echo '7|COMPLETED|None|n1|0:30'")
    job = record(tmp_path, "7", run_dir=str(tmp_path))
    assert state_of(job).name == "COMPLETED" and state_of(job).reason
    (tmp_path / "status.json").write_text('{"finished": true}')
    assert state_of(job) == JobState("COMPLETED", "", "n1", "0:30")


def test_a_job_that_slurm_has_forgotten_is_judged_by_its_files(tmp_path: Path) -> None:
    """Also by the log of another node than the first."""
    job = record(tmp_path, "7", run_dir=str(tmp_path))
    assert state_of(job).name == "UNKNOWN" and state_of(job).reason.endswith("it had not started")
    (tmp_path / "7_0_log.out").write_text("step 10/20\n")
    assert state_of(job).name == "UNKNOWN" and state_of(job).reason.endswith("its script had started")
    Attempts(tmp_path).begin(0, 1, job="7")
    assert state_of(job).name == "UNKNOWN" and "left nothing of its end" in state_of(job).reason
    Attempts(tmp_path).end(10)
    assert state_of(job).name == "UNKNOWN" and state_of(job).reason.endswith("ended at step 10")
    (tmp_path / "7_1_log.out").write_text("adaptnet: node2: no answer\n")
    (tmp_path / "17_0_log.out").write_text("adaptnet: of another job\n")
    assert state_of(job).name == "FAILED"
    assert records.last_lines(schedulers.get("slurm").logs(job)) == ["adaptnet: node2: no answer"]
    (tmp_path / "status.json").write_text(json.dumps({"finished": True}))
    assert state_of(job).name == "COMPLETED"


@pytest.mark.parametrize("name", ["SQUEUE_PARTITION", "SQUEUE_STATES", "SLURM_CLUSTERS", "SACCT_FORMAT", "SINFO_NODES"])
def test_no_setting_of_the_users_shell_reaches_a_command_of_slurm(
    name: str, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter would hide a job that waits, and a second submission of its run would pass."""
    for tool in ("squeue", "sacct", "scancel", "scontrol", "sinfo"):
        fake_schedulers.write_tool(tools, tool, f'env > "{tmp_path}/{tool}"; echo "7|PENDING|Priority||0:00"')
    monkeypatch.setenv(name, "high")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    job = record(tmp_path, "7")
    assert state_of(job).alive
    schedulers.get("slurm").cancel(job)
    schedulers.get("slurm").requeue(job)
    for tool in ("squeue", "scancel", "scontrol"):
        seen = (tmp_path / tool).read_text().splitlines()
        assert (
            not [line for line in seen if line.startswith(f"{name}=")] and f"SLURM_CONF={tmp_path}/slurm.conf" in seen
        )


@pytest.mark.parametrize(
    ("text", "alive", "words"), [("", True, "empty"), (None, True, "no log yet"), (None, False, "no log:")]
)
def test_a_log_without_text_is_described(
    text: str | None, alive: bool, words: str, tmp_path: Path, tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_schedulers.write_tool(tools, "squeue", f"echo '7|{'RUNNING' if alive else 'CANCELLED'}|None|n1|0:30'")
    job = record(tmp_path / "runs" / "x", "7")
    records.add(job)
    if text is not None:
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        Path(job.log).write_text(text)
    with pytest.raises(SystemExit):
        main(["jobs", "logs", "7"])
    assert words in capsys.readouterr().out


def test_a_slurm_that_does_not_answer_is_quoted(tmp_path: Path, tools: Path) -> None:
    for tool in ("squeue", "sacct", "sinfo"):
        fake_schedulers.write_tool(tools, tool, "echo 'Unable to contact slurm controller' >&2; exit 1")
    state = state_of(record(tmp_path, "7", run_dir=str(tmp_path)))
    assert state.name == "UNKNOWN" and "(Unable to contact slurm controller)" in state.reason


@pytest.mark.parametrize("order", [("jobs", "requeue"), ("jobs", "cancel")])
def test_an_order_that_slurm_refuses_exits_with_2(order: tuple[str, str], tmp_path: Path, tools: Path) -> None:
    records.add(record(tmp_path / "runs" / "x", "7"))
    with pytest.raises(SystemExit) as ended:
        main([*order, "7"])
    assert ended.value.code == 2, "no SLURM"
    for tool in ("scontrol", "scancel"):
        fake_schedulers.write_tool(tools, tool, "echo 'Access denied' >&2; exit 1")
    tool = "scontrol" if order[1] == "requeue" else "scancel"
    with fails(ResourceError, tool, subject="7"):
        getattr(schedulers.get("slurm"), order[1])(record(tmp_path, "7"))


@pytest.mark.parametrize(
    ("variables", "gib"),
    [
        ({"SLURM_MEM_PER_NODE": "2048"}, 2),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "4"}, 4),
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_CPUS_ON_NODE": "4"}, None),
        ({}, None),
    ],
)
def test_a_nodes_memory_is_read_per_node_or_per_cpu(variables: dict[str, str], gib: int | None) -> None:
    assert memory_bytes(variables) == (gib << 30 if gib else None)


# --- this machine


def test_a_run_whose_newest_job_is_alive_is_not_resubmitted_by_an_older_id(tmp_path: Path) -> None:
    records.add(record(tmp_path / "runs" / "x", str(1 << 30), "local"))
    records.add(record(tmp_path / "runs" / "x", str(os.getpid()), "local"))
    from jobs.verbs.jobs import resubmit

    with fails(ResourceError, "job", subject=os.getpid()):
        resubmit(str(1 << 30))


@pytest.mark.parametrize("facts", [{"submitted_at": time.time() - 600}, {"host": "elsewhere"}])
def test_a_process_that_only_has_a_jobs_number_is_not_cancelled(tmp_path: Path, facts: dict[str, object]) -> None:
    """After a reboot, or on another machine that sees the same folder."""
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        job = record(tmp_path, str(sleeper.pid), "local", **facts)
        assert not state_of(job).alive and state_of(job).reason
        with fails(ResourceError, "job", subject=sleeper.pid):
            schedulers.get("local").cancel(job)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()


def test_a_job_that_ran_within_submit_is_judged_by_its_run(tmp_path: Path) -> None:
    job = record(tmp_path, "DEBUG_1", "debug", run_dir=str(tmp_path), pid=1 << 30)
    assert state_of(job).name == "UNKNOWN" and state_of(job).reason
    (tmp_path / "status.json").write_text('{"finished": true}')
    assert state_of(job).name == "COMPLETED"


def test_the_last_lines_are_our_error(tmp_path: Path) -> None:
    log = tmp_path / "log.out"
    whole = ["adaptnet: recipe x.yaml:", '  name (="a b"): a run\'s name is up to 120 letters', "  seed (=-1): below 0"]
    log.write_text("step 1\n" + "\n".join(whole) + "\nsrun: error: task 0: Exited with exit code 2\n")
    assert records.last_lines([log]) == whole
    log.write_text("submitit INFO\nTraceback\nValueError: x\nadaptnet: data.root (=/no): no such folder\nsrun: error\n")
    assert records.last_lines([log]) == ["adaptnet: data.root (=/no): no such folder"]
    log.write_text("step 1\nTraceback\nValueError: x\nsrun: error\n")
    assert records.last_lines([log]) == ["ValueError: x", "srun: error"]
    assert records.last_lines([tmp_path / "none"]) == []
