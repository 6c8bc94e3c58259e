"""Submitting: the script is what the site's profile says, and what cannot work is refused before it is queued."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from jobs import queue, site, slurm
from jobs.cli import main
from pipeline import run_config
from pipeline.errors import ConfigError, ResourceError

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
        found.begin(before)
        found.end(after)
    return found


def test_three_starts_in_a_row_that_save_no_step_are_the_last(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts(desk, monkeypatch, (0, 10), (10, 10), (10, 10)).check("why", 100)
    with pytest.raises(ResourceError, match="the last 3 starts of this job saved no new step"):
        starts(desk, monkeypatch, (10, 10)).check("why", 100)


def test_a_job_is_requeued_as_often_as_it_may(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts(desk, monkeypatch, (0, 10), (10, 20)).check("why", 2)
    with pytest.raises(ResourceError, match="requeued 1 times, as often as --max-requeues"):
        slurm.Starts(desk).check("why", 1)


def test_a_start_that_died_without_a_word_is_closed_by_the_next(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = starts(desk, monkeypatch, (0, 10))
    found.begin(10)
    found.begin(25)
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
    deadline = time.monotonic() + 120
    while queue.state_of(entry).lives and time.monotonic() < deadline:
        time.sleep(0.5)
    assert run("jobs", "show", "here") == 0
    shown = capsys.readouterr().out
    assert "COMPLETED" in shown and "MLflow run" in shown and "step 0 to 2" in shown, shown
    assert run("jobs", "logs", entry["id"]) == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert run("jobs", "logs", "there") == 2
    assert "no job of that id, run or folder; there are: " in capsys.readouterr().err


def test_what_is_edited_after_submission_does_not_change_the_job(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = slurm.Job("train", (), str(desk / "runs" / "x"), None, 1.0, 1)
    submission = slurm.Submission(job, "x", slurm.Resources((1, 1), 0, 1, 10), site.Site())
    before = submission.snapshot
    slurm._snapshot(before)
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


@pytest.mark.parametrize(
    ("squeue", "sacct", "name", "reason"),
    [
        (["PENDING|Resources||0:00"], [], "PENDING", "the nodes it needs are busy"),
        (["RUNNING|None|n[1-2]|1:00"], [], "RUNNING", ""),
        ([], ["TIMEOUT|0:0|n1|3:00", "FAILED|2:0|n1|0:30"], "FAILED", "exit code 2"),
        ([], ["CANCELLED by 0|0:0|n1|3:00"], "CANCELLED", ""),
        (["FAILED|NonZeroExitCode|n1|0:30"], [], "UNKNOWN", "SLURM no longer knows it; it had not started"),
    ],
)
def test_a_jobs_state_is_slurms_in_words(
    monkeypatch: pytest.MonkeyPatch, desk: Path, squeue: list[str], sacct: list[str], name: str, reason: str
) -> None:
    answers = {"squeue": squeue, "sacct": sacct}
    monkeypatch.setattr(queue, "ask", lambda *command: answers[command[0]])
    state = queue.state_of({"id": "7", "where": "slurm", "run_dir": str(desk), "home": str(desk)})
    assert (state.name, state.reason) == (name, reason)


def test_the_last_words_are_the_error(desk: Path) -> None:
    log = desk / "log.out"
    log.write_text("submitit INFO\nTraceback\nValueError: x\nadaptnet: data.root (=/no): nothing there\nsrun: error\n")
    assert queue.last_words({"log": str(log)}) == ["adaptnet: data.root (=/no): nothing there"]
    assert json.dumps(queue.last_words({"log": str(desk / "none")})) == "[]"
