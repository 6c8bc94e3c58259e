"""Submitting: the script is what the site's profile says, and what cannot work is refused before it is queued."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.slurm import job as slurm
from jobs.slurm import queue, site
from pipeline import run_config
from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import cluster
from pipeline.execution.allocation import JoinedNode
from pipeline.runs import provenance

GOLDEN = Path(__file__).parent / "golden"
TRAIN = ["train", "baseline/imagenet_resnet50", "data.root=/data/imagenet"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of our own, on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name in SLURM else found(name, *a, **k))
    for key in [key for key in os.environ if key.startswith(("SLURM", "SUBMITIT"))]:
        monkeypatch.delenv(key)
    return tmp_path


SLURM = ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel", "sinfo")


@pytest.mark.parametrize("name", sorted(path.stem for path in site.SITES.glob("*.yaml")))
def test_the_batch_script_of_each_profile_is_the_golden_one(
    name: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a difference that is meant: write the printed text over the golden file."""
    assert run("submit", *TRAIN, "--site", name, "--nodes", "2", "--dry-run") == 0
    script, _, config = capsys.readouterr().out.partition("# baseline-imagenet_resnet50\n")
    plain = script.replace(str(desk), "HERE").replace(sys.executable, "PYTHON")
    plain = re.sub(r"code-\w{12}", "code-SHA256", plain)
    assert plain == (GOLDEN / f"sbatch-{name}.sh").read_text(), plain
    Path("resolved.yaml").write_text(config)
    resolved = run_config.load("resolved.yaml")
    profile = site.load(name)
    workers = 2 * max(1, profile.gpus_per_node)
    assert resolved.compute.workers == workers
    assert resolved.compute.cpus_per_worker == 2 * profile.cpus_per_task / workers
    assert not list(desk.glob("runs/*")), "a dry run leaves nothing"


def test_the_command_line_goes_before_the_profile_and_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--partition", "big", "--time", "1-00:30:00", "--nodes", "2-8", "--gpus-per-node", "2", "--qos", "high"]
    assert run("submit", *TRAIN, "compute.cpus_per_worker=3", "--site", "example", *options, "--dry-run") == 0
    printed = capsys.readouterr().out
    for line in ("--partition=big", "--time=1470", "--nodes=2-8", "--no-kill", "--gpus-per-node=2", "--qos=high"):
        assert f"#SBATCH {line}\n" in printed
    assert "#SBATCH --ntasks" not in printed, "SLURM would give the fewest nodes"
    assert " --ntasks-per-node=1 --no-kill " in printed, "a node that is given whole would get a task for each CPU"
    assert "workers: [4, 16]" in printed and "cpus_per_worker: 3.0" in printed


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90m", 90), ("24h", 1440), ("2d", 2880), ("1:30:00", 90), ("0:00:30", 1), ("1-12:00:00", 2160), ("45", 45),
     ("1.5h", 90), ("2:05", 125)],
)  # fmt: skip
def test_times_are_read_as_people_write_them(text: str, minutes: int) -> None:
    assert slurm.minutes_of(text) == minutes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time", "soon"], "--time (=soon): write 90m"),
        (["--time", "0h"], "--time (=0h): write 90m"),
        (["--time", "3m"], "is below 210 s: 90 s to save"),
        (["--time", "30m", "--nodes", "0"], "--nodes (=0)"),
        (["--time", "30m", "--nodes", "4-2"], "--nodes (=4-2)"),
        (["--site", "mars"], "known: container, example, testcluster"),
        (["--site", "odd.yaml"], "partitoin: no such key"),
        (["--array", "seed"], "write KEY=VALUE"),
        (["--array", "seed=1,1"], "each value once"),
        (["--after", "7", "--where", "local"], "only SLURM waits for another job"),
        (["--where", "moon"], "slurm, ray, local or debug"),
        (["training.epoch=3"], "did you mean training.epochs?"),
        ([], "this machine has no SLURM. --dry-run shows the script, --where local"),
    ],
)
def test_what_cannot_be_submitted_is_refused(
    words: list[str], said: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "odd.yaml").write_text("partitoin: gpu\n")
    assert run("submit", *TRAIN, *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("what", ["--slurm", "--warning"])
def test_a_measurement_of_jobs_says_what_it_lacks(what: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "scaling", what, "--site", "testcluster") == 2
    assert "this machine has no SLURM" in capsys.readouterr().err and not list(desk.iterdir())
    assert run("bench", "scaling", what, "--sweep") == 2
    assert "say what is measured: --sweep, --slurm, --warning or --workers N" in capsys.readouterr().err


def test_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("submit", "dance") == 2
    assert "known: train, sweep, evaluate, report" in capsys.readouterr().err


def test_the_shortest_time_that_is_taken_is_signal_delay_start_up_and_slurms_haste() -> None:
    slurm.check_time(3, 45)
    with pytest.raises(ConfigError, match="below 181 s"):
        slurm.check_time(3, 61)


# --- starts


def starts(home: Path, monkeypatch: pytest.MonkeyPatch, *pairs: tuple[int, int]) -> slurm.Starts:
    found = slurm.Starts(home)
    for number, (before, after) in enumerate(pairs):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        found.begin(before, 100)
        found.end(after)
    return found


def test_three_starts_in_a_row_that_save_no_step_are_the_last(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = starts(desk, monkeypatch, (0, 10), (10, 10), (10, 10))
    found.check("why", 100)
    found.begin(10, 100)  # SLURM itself has requeued it
    with pytest.raises(ResourceError, match=r"the last 3 starts of this job saved no new step.*SLURM has started"):
        found.begin(10, 100)
    assert found.read()[-1]["to"] == 10
    with pytest.raises(ResourceError, match=r"the last 3 starts of this job saved no new step.*why"):
        found.check("why", 100)


def test_a_job_is_requeued_as_often_as_it_may(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts(desk, monkeypatch, (0, 10), (10, 20)).check("why", 2)
    with pytest.raises(ResourceError, match=r"requeued 1 times; --max-requeues \(=1\) allows no more \(why\)"):
        slurm.Starts(desk).check("why", 1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(ResourceError, match=r"allows no more \(SLURM has started it again\)"):
        slurm.Starts(desk).begin(20, 1)


@pytest.mark.parametrize(("state", "told"), [("RUNNING", "requeue 7\n"), ("COMPLETING", "")])
def test_a_job_that_is_cancelled_while_it_saves_is_not_requeued(
    desk: Path, monkeypatch: pytest.MonkeyPatch, state: str, told: str
) -> None:
    (desk / "squeue").write_text(f"#!/bin/sh\necho {state}\n")
    (desk / "scontrol").write_text(f'#!/bin/sh\necho "$@" >{desk}/told\n')
    for tool in ("squeue", "scontrol"):
        (desk / tool).chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(desk / name))
    monkeypatch.setenv("PATH", f"{desk}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    slurm.requeue("asked to save before its end")
    assert ((desk / "told").read_text() if (desk / "told").exists() else "") == told


def test_an_arrays_task_is_known_by_the_id_that_it_was_given(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert [each["job"] for each in starts(desk, monkeypatch, (0, 10)).read()] == ["5_1"]


def test_a_start_that_died_without_a_word_is_closed_by_the_next(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = starts(desk, monkeypatch, (0, 10))
    found.begin(10, 100)
    found.begin(25, 100)
    assert [(each["from"], each["to"]) for each in found.read()] == [(0, 10), (10, 25), (25, None)]


# --- without SLURM


def test_a_job_in_a_process_here_trains_and_is_listed(
    finished: dict[str, Path], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = finished["ranet"].parents[1] / "images5"
    small = [f"data.root={images}", "name=here", "family.depth=8", "training.epochs=1", "tracking.register=null"]
    words = ["submit", "train", "convnet_aig/toy", *small, "evaluation.latency_repeats=0", "compute.workers=0"]
    assert run(*words, "--time", "20m", "--where", "local") == 0
    entry = queue.find("here")
    assert run("jobs", "list") == 0
    assert re.search(r"here\s+\d+\s+(RUNNING|COMPLETED)", capsys.readouterr().out)
    deadline = time.monotonic() + 300
    while queue.state_of(entry).lives and time.monotonic() < deadline:
        time.sleep(0.5)
    assert run("jobs", "show", "here") == 0
    shown = capsys.readouterr().out
    assert "COMPLETED" in shown and "MLflow run" in shown and "step 0 to 2" in shown, shown
    assert run("jobs", "logs", entry["id"]) == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert run("jobs", "logs", "there") == 2
    assert "no job of that id, run or folder; there are: " in capsys.readouterr().err


def test_a_job_in_this_very_process_shows_what_it_does_and_is_listed(
    finished: dict[str, Path], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = finished["ranet"].parents[1] / "images5"
    small = [f"data.root={images}", "name=very", "family.depth=8", "training.epochs=1", "tracking.register=null"]
    words = ["submit", "train", "convnet_aig/toy", *small, "evaluation.latency_repeats=0", "compute.workers=0"]
    assert run(*words, "--time", "20m", "--where", "debug") == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert run("jobs", "list") == 0
    assert re.search(r"very\s+DEBUG_\d+\s+RUNNING", capsys.readouterr().out)
    assert queue.state_of({**queue.find("very"), "pid": 1 << 30}).name == "COMPLETED"
    assert run("submit", "report", "runs/none", "--time", "20m", "--where", "debug") == 2
    assert "runs/none: no such folder" in capsys.readouterr().out
    (entry,) = [each for each in queue.everything() if each["verb"] == "report"]
    assert entry["pid"] == os.getpid() and queue.state_of(entry).name == "RUNNING", "the tests' own process lives"
    other = {**entry, "pid": 1 << 30}
    assert queue.state_of(other).reason.startswith("it ran in the process that submitted it")


@pytest.mark.parametrize(
    ("given", "gib"),
    [
        ({"SLURM_MEM_PER_NODE": "2048"}, 2),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "4"}, 4),
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_CPUS_ON_NODE": "4"}, None),
        ({}, None),
    ],
)
def test_a_nodes_memory_is_what_slurm_gives_the_job_there(given: dict[str, str], gib: int | None) -> None:
    assert slurm._memory_bytes(given) == (gib << 30 if gib else None)


def test_what_is_edited_after_submission_does_not_change_the_job(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = slurm.Job("train", (), str(desk / "runs" / "x"), None, 1.0, 1)
    submission = slurm.Submission(job, "x", slurm.Resources((1, 1), 0, 1, 10), site.Site())
    before = submission.snapshot
    slurm._snapshot(before)
    provenance.record(desk, ["adaptnet", "train"])
    of_checkout = provenance.read(desk)["git"]
    assert json.loads((before / "git.json").read_text()) == of_checkout
    assert (before / "pipeline" / "families" / "ranet" / "recipes" / "toy.yaml").is_file()
    sources = slurm._sources()
    edited = desk / "loop.py"
    edited.write_text("# edited\n")
    monkeypatch.setattr(slurm, "_sources", lambda: {**sources, "pipeline/training/loop.py": edited})
    assert submission.snapshot != before and "# edited" not in (before / "pipeline/training/loop.py").read_text()


def test_slurms_refusals_carry_its_words_and_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_ask", lambda *command: "main, high")
    refused = slurm._refused(RuntimeError("sbatch: error: invalid partition specified: nope"))
    assert "invalid partition specified: nope. Known partitions: main, high" in str(refused)
    words = "Batch job submission failed: Invalid account or account/partition combination specified"
    assert "Your accounts: main, high" in str(slurm._refused(RuntimeError(words)))
    words = "sbatch: error: If munged is up, restart with --num-threads=10\nsbatch: error: Munge encode failed: Failed "
    words += 'to access "munge.socket.2"\nsbatch: error: Batch job submission failed: Protocol authentication error'
    assert str(slurm._refused(RuntimeError(words))).endswith("Is munged running on this machine?")


@pytest.mark.parametrize(
    ("squeue", "sacct", "name", "reason"),
    [
        (["7|PENDING|Resources||0:00"], [], "PENDING", "the nodes it needs are busy"),
        (["7|RUNNING|None|n[1-2]|1:00"], [], "RUNNING", ""),
        ([], ["7|TIMEOUT|0:0|n1|3:00", "7|FAILED|2:0|n1|0:30"], "FAILED", "exit code 2"),
        ([], ["7|CANCELLED by 0|0:0|n1|3:00"], "CANCELLED", ""),
        ([], ["7|FAILED|0:9|n1|0:30"], "FAILED", "killed by signal 9 (was memory short?)"),
        ([], ["7|FAILED|137:0|n1|0:30"], "FAILED", "killed by signal 9 (was memory short?)"),
        (
            ["7|PENDING|ReqNodeNotAvail, UnavailableNodes:n1||0:00"],
            [],
            "PENDING",
            "the nodes it needs are down, drained or",
        ),
        (["7|FAILED|NonZeroExitCode|n1|0:30"], [], "FAILED", ""),
        (["7|FAILED|NonZeroExitCode|n1|0:30"], ["7|RUNNING|0:0|n1|0:30"], "FAILED", ""),
        ([], ["7|FAILED|9:0|n1|0:30"], "FAILED", "killed by signal 9 (was memory short?)"),
        (["7|COMPLETED|None|n1|0:30"], [], "COMPLETED", "it was stopped; `adaptnet jobs resubmit` goes on"),
        ([], [], "UNKNOWN", "SLURM no longer knows it; it had not started"),
    ],
)
def test_a_jobs_state_is_slurms_in_words(
    monkeypatch: pytest.MonkeyPatch, desk: Path, squeue: list[str], sacct: list[str], name: str, reason: str
) -> None:
    answers = {"squeue": squeue, "sacct": sacct}
    monkeypatch.setattr(queue, "ask", lambda *command: answers[command[0]])
    entry = {"id": "7", "where": "slurm", "run_dir": str(desk), "home": str(desk), "log": str(desk / "7_0_log.out")}
    state = queue.state_of(entry)
    assert state.name == name and state.reason.startswith(reason) and bool(state.reason) == bool(reason)


def test_slurm_is_asked_once_for_all_jobs_of_a_list(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whom the queue knows those that live, and the accounting the others; each once, arrays' tasks by their own."""
    asked: list[tuple[str, ...]] = []
    answers = {
        "squeue": ["5_1|PENDING|Priority||0:00", "5_2|RUNNING|None|n1|1:00", "8|FAILED|NonZeroExitCode|n1|0:30"],
        "sacct": ["8|FAILED|2:0|n1|0:30", "9|TIMEOUT|0:0|n2|3:00"],
    }

    def answer(*command: str) -> list[str]:
        asked.append(command)
        return answers[command[0]]

    monkeypatch.setattr(queue, "ask", answer)
    for number, job in enumerate(("5_1", "5_2", "8", "9", "10")):
        where = {"where": "slurm", "log": str(desk / "none"), "run_dir": None, "submitted": float(-number)}
        slurm.remember(desk / "runs" / f"run{number}", {"id": job, **where})
    assert run("jobs", "list") == 0
    rows = [line.split()[1:3] for line in capsys.readouterr().out.splitlines()[2:]]
    states = ["PENDING", "RUNNING", "FAILED", "TIMEOUT", "UNKNOWN"]
    assert rows == [[job, state] for job, state in zip(("5_1", "5_2", "8", "9", "10"), states, strict=True)]
    assert [(words[0], words[-1]) for words in asked] == [("squeue", "5_1,5_2,8,9,10"), ("sacct", "8,9,10")]


def test_where_slurm_has_forgotten_a_job_its_own_words_tell(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of another node than the first."""
    monkeypatch.setattr(queue, "ask", lambda *command: [])
    entry = {"id": "7", "where": "slurm", "run_dir": str(desk), "home": str(desk), "log": str(desk / "7_0_log.out")}
    (desk / "7_0_log.out").write_text("step 10/20\n")
    assert queue.state_of(entry).name == "UNKNOWN"
    (desk / "7_1_log.out").write_text("adaptnet: node2: nothing was heard of the head\n")
    (desk / "17_0_log.out").write_text("adaptnet: of another job\n")
    assert queue.state_of(entry).name == "FAILED"
    assert queue.last_words(entry) == ["adaptnet: node2: nothing was heard of the head"]
    (desk / "status.json").write_text(json.dumps({"finished": True}))
    assert queue.state_of(entry).name == "COMPLETED"


def test_where_slurm_does_not_answer_its_words_are_told(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("squeue", "sacct", "sinfo"):
        (desk / tool).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        (desk / tool).chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(desk / name))
    monkeypatch.setenv("PATH", f"{desk}:/usr/bin:/bin")
    entry = {"id": "7", "where": "slurm", "run_dir": str(desk), "home": str(desk), "log": str(desk / "none")}
    said = queue.state_of(entry)
    assert said.name == "UNKNOWN" and "SLURM does not answer (Unable to contact slurm controller)" in said.reason


def test_a_job_outside_the_folder_of_runs_is_listed_and_found_by_its_id(desk: Path) -> None:
    for home in ("elsewhere/deep/run", "runs/bench/deeper", "runs/here", "runs/jobs/there"):
        slurm.remember(desk / home, {"id": f"job-{Path(home).name}", "where": "slurm", "submitted": 1.0})
        queue.know(desk / home)
        queue.know(desk / home)
    far = [str(desk / "elsewhere/deep/run"), str(desk / "runs/bench/deeper")]
    assert json.loads((desk / "runs/jobs/elsewhere.json").read_text()) == far
    assert len(queue.everything()) == 4
    assert queue.find("job-run")["home"] == str(desk / "elsewhere/deep/run")


def local(home: Path, pid: int, **facts: object) -> None:
    """A job of this machine, as it is written down."""
    entry = {"id": str(pid), "where": "local", "run_dir": None, "folder": str(home), "log": str(home / "log")}
    slurm.remember(home, {**entry, "host": socket.gethostname(), "submitted": time.time(), **facts})


def test_a_run_whose_newest_job_lives_is_not_resubmitted_by_an_older_ones_id(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local(desk / "runs" / "x", 1 << 30)
    local(desk / "runs" / "x", os.getpid())
    assert run("jobs", "resubmit", 1 << 30) == 2
    assert f"job {os.getpid()} of runs/x is running" in capsys.readouterr().err


def test_a_process_that_only_has_a_jobs_number_is_left_alone(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a restart of the machine, or on another one that sees the same folder."""
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        local(desk / "runs" / "before", sleeper.pid, submitted=time.time() - 600)
        local(desk / "runs" / "elsewhere", sleeper.pid, host="elsewhere")
        for name, said in (("before", "is failed (its process has ended"), ("elsewhere", "was started on elsewhere")):
            assert run("jobs", "cancel", name) == 2
            assert said in capsys.readouterr().err
        assert sleeper.poll() is None
        local(desk / "runs" / "mine", sleeper.pid)
        assert run("jobs", "cancel", "mine") == 0
        assert sleeper.wait(300) == -signal.SIGTERM
    finally:
        sleeper.kill()


def test_the_last_words_are_the_error(desk: Path) -> None:
    log = desk / "log.out"
    log.write_text("submitit INFO\nTraceback\nValueError: x\nadaptnet: data.root (=/no): nothing there\nsrun: error\n")
    assert queue.last_words({"log": str(log), "where": "local"}) == ["adaptnet: data.root (=/no): nothing there"]
    assert json.dumps(queue.last_words({"log": str(desk / "none"), "where": "local"})) == "[]"


def test_a_job_runs_the_code_that_was_kept_wherever_it_was_submitted(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from the checkout itself, the usual place: what is edited there after submission would go first."""
    for package in slurm.PACKAGES:
        (desk / package).mkdir()
        (desk / package / "__init__.py").write_text("raise AssertionError('edited')\n")
    assert run("submit", "report", "runs/none", "--time", "20m", "--where", "local") == 0
    (entry,) = queue.everything()
    deadline = time.monotonic() + 300
    while queue.state_of(entry).lives and time.monotonic() < deadline:
        time.sleep(0.5)
    log = Path(entry["log"]).read_text() + Path(entry["log"]).with_suffix(".err").read_text()
    assert "adaptnet: runs/none" in log and "edited" not in log, log


def test_warned_before_the_verb_listens_it_is_told_again(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning that comes while Ray starts or torch is imported; and one to a verb that cannot stop in time."""
    monkeypatch.setattr(slurm, "in_slurm", lambda: True)
    monkeypatch.setattr(slurm, "requeue", lambda why: requeued.append(why))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    requeued: list[str] = []
    told: list[int] = []
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    job = slurm.Job("train", (), str(desk), str(desk), 1.0, 100, saves_within_s=8.0)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    starts(desk, monkeypatch).begin(0, 100)
    warned = slurm.Warned(job)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(1)
        assert warned.came and warned.terminated and not told
        signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
        time.sleep(2)
        assert told and not requeued
        (desk / "stop").touch()
        told.clear()
        time.sleep(1.5)
        assert not told, "it has heard"
        time.sleep(3)
        assert requeued == ["not stopped 6 s after SLURM's warning"] and left == [0]
        assert [(each["from"], each["to"]) for each in slurm.Starts(desk).read()] == [(0, 0)]
    finally:
        warned.over = True
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("saved", "code"), [(0, 2), (40, 0)])
def test_a_verb_that_waits_for_a_head_that_is_gone_is_left(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: int, code: int
) -> None:
    """With another start where this one has saved something. Ray would end the process without a word."""

    class Left(Exception): ...

    def leave(status: int) -> None:
        left.append(status)
        warned.over = True  # as the end of the process would
        raise Left

    left: list[int] = []
    asked: list[str] = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(slurm, "requeue", asked.append)
    monkeypatch.setattr(slurm, "LOST_LOOKS", 2)
    monkeypatch.setattr(slurm, "INSIST_S", 0.2)
    (desk / "config.yaml").write_text("recipe: {}\n")
    (desk / f"checkpoints/step-{saved:08d}").mkdir(parents=True)
    if saved:
        (desk / f"checkpoints/step-{saved:08d}" / "COMPLETE.json").write_text("{}")
    starts(desk, monkeypatch).begin(0, 100)
    job, warned = slurm.Job("sweep", (), str(desk), str(desk), 1.0, 100), slurm.Warned.__new__(slurm.Warned)
    warned.over = False
    with socket.create_server(("127.0.0.1", 0)) as head:
        member = JoinedNode(None, f"127.0.0.1:{head.getsockname()[1]}", None)  # type: ignore[arg-type]

        def look() -> None:
            with contextlib.suppress(Left):
                job._watch(slurm.head_is_there(member), warned)

        watch = threading.Thread(target=look, daemon=True)
        watch.start()
        time.sleep(1)
        assert watch.is_alive() and not left
    watch.join(300)
    assert left == [code] and asked == [f"Ray's head at {member.address} is gone"] * (code == 0)
    assert ("before this start had saved a step" in capsys.readouterr().out) == (code == 2)


def test_nodes_are_lost_where_the_workers_have_had_room_and_have_it_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the cluster comes up, and not where nobody is connected to it."""
    rooms: list[int | None] = [None, 1, 2, None, 4, 1, 2]
    monkeypatch.setattr(slurm.cluster, "room", lambda each: rooms.pop(0))
    look = slurm.room_is_there(slurm.Needs(2, 1.5, 0.0))
    told = [look() for _ in range(7)]
    assert told[:5] == [""] * 5 and told[6] == ""
    assert told[5] == "nodes are lost: those that are left have room for 1 of the 2 workers that it needs"


def test_room_is_counted_by_node() -> None:
    """Three nodes of 4 CPUs have 12 of them, and room for three workers of 2.5."""
    assert sum(cluster.fitting({"CPU": 4.0}, {"CPU": 2.5, "GPU": 0.0}) for _ in range(3)) == 3
    assert cluster.fitting({"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}) == 2
    assert cluster.room({"CPU": 1.0}) is None, "no cluster is connected"


def test_what_a_run_needs_is_known_to_its_job_and_to_the_one_that_goes_on(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[slurm.Submission] = []

    def submit(submission: slurm.Submission, where: str) -> list[str]:
        made.append(submission)
        paths = types.SimpleNamespace(stdout=desk / "none.log")
        one = types.SimpleNamespace(job_id="7", paths=paths)
        slurm.remember(Path(submission.job.home), slurm._entry(submission, submission.job, one, "debug"))
        return ["7"]

    monkeypatch.setattr(slurm, "submit", submit)
    words = ["submit", "train", "convnet_aig/toy", f"data.root={desk}", "--time", "30m", "--nodes", "2-4"]
    assert run(*words, "--gpus-per-node", "2", "--cpus-per-task", "6") == 0
    monkeypatch.setattr(queue, "state_of", lambda entry: queue.State("FAILED"))
    assert run("jobs", "resubmit", "convnet_aig-toy") == 0
    assert [each.job.needs for each in made] == [slurm.Needs(4, 3.0, 1.0)] * 2
    assert run("submit", "sweep", "toy", f"data.root={desk}", "--time", "30m", "--gpus-per-node", "2") == 0
    assert made[2].job.needs == slurm.Needs(2, 1.0, 1.0), "the sweep's device is auto, and its nodes have GPUs"
    assert run(*words[:4], "--time", "30m", "compute.workers=0", "name=here") == 0
    assert made[3].job.needs is None


def test_a_job_whose_verb_has_no_memory_left_ends_with_that_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import cli

    def spend(args: object, prog_name: str) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(cli, "app", spend)
    with pytest.raises(slurm.Ended, match=r"adaptnet evaluate: memory is spent \(CUDA out of memory. Tried"):
        slurm.run_verb("evaluate", [])


def test_an_exit_code_is_a_verdict_and_a_lost_cluster_is_not(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of which a trial failed ends with 1: to start it again would change nothing."""
    from jobs import cli

    def leave(code: int) -> None:
        raise SystemExit(code)

    for code, said in ((0, True), (75, False)):
        monkeypatch.setattr(cli, "app", lambda args, prog_name, code=code: leave(code))
        assert slurm.run_verb("sweep", []) is said
    monkeypatch.setattr(cli, "app", lambda args, prog_name: leave(1))
    with pytest.raises(slurm.Ended, match="adaptnet sweep ended with exit code 1"):
        slurm.run_verb("sweep", [])


def test_a_sweeps_job_lies_in_its_folder_where_its_trials_steps_count(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("submit", "sweep", "toy", f"data.root={desk}", "--nodes", "2", "--dry-run") == 0
    assert f"{desk}/runs/toy/slurm" in capsys.readouterr().out
    assert run("submit", "sweep", "tyo", "--dry-run") == 2
    assert "toy" in capsys.readouterr().err
    assert run("submit", "evaluate", "runs/x", "--nodes", "2", "--dry-run") == 2
    assert "evaluate runs on one node" in capsys.readouterr().err
    folder = desk / "runs" / "toy"
    for number, step in enumerate((20, 0, 35)):
        trial = folder / "trials" / f"{number}"
        (trial / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (trial / "config.yaml").write_text("recipe: {}\n")
        if step:
            (trial / "checkpoints" / f"step-{step:08d}" / "COMPLETE.json").write_text("{}")
    assert slurm.Job("sweep", (), str(folder), str(folder), 1.0, 1).steps() == 55


def test_in_a_container_the_batch_script_requeues(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no scontrol inside; the folder's name has what a shell would take for its own."""
    home = desk / "a 'run' & more"
    job = slurm.Job("train", (), str(home), str(home), 1.0, 1)
    submission = slurm.Submission(job, "x", slurm.Resources((1, 1), 0, 1, 10), site.load("container"))
    submission.folder.mkdir(parents=True)
    script = submission.script()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(submission.folder))
    tools = desk / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text('#!/bin/sh\necho scontrol "$@"\n')
    (tools / "srun").write_text("#!/bin/sh\nexit 3\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}

    def end() -> str:
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
        assert done.returncode == 3, f"the job's own exit code; {done.stderr}"
        return done.stdout

    assert end() == ""
    slurm.requeue("asked to save before its end")
    assert [end(), end()] == ["scontrol requeue 7\n", ""]
