"""Trainings as jobs of a real SLURM: whatever ends them, they go on in the same run and lose nothing that was saved."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from real_slurm import RealSlurm, processes, real_slurm, until
from safetensors.torch import load_file

from pipeline.data import toy
from pipeline.tracking import connect

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
STARTS_WITHIN_S = 300  # imports, Ray on two nodes, workers: on two cores that others share
SMALL = ["family.depth=8", "training.batch_size=64", "logging.every=10 steps", "evaluation.latency_repeats=0"]
SMALL += ["evaluation.every=1000 epochs"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "set", num_classes=4, train=640, val=80, side_px=32, seed=5)


@dataclass
class Desk:
    """Where a user sits: a folder with runs, and the cluster's commands."""

    cluster: RealSlurm
    home: Path
    images: Path

    def attempt(self, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        env = {**self.cluster.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(self.home)}
        line = [sys.executable, "-m", "jobs.cli", *words]
        return subprocess.run(
            line, cwd=self.home, env=env, capture_output=True, text=True, timeout=seconds, check=False
        )

    def adaptnet(self, *words: str, seconds: float = 120) -> str:
        done = self.attempt(*words, seconds=seconds)
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def train(self, name: str, *words: str, nodes: str = "2", time: str = "30m") -> str:
        """Submits a training; its job's id."""
        own = [f"name={name}", f"data.root={self.images}", "tracking.register=null", *SMALL, *words]
        printed = self.adaptnet("submit", "train", "convnet_aig/toy", *own, "--nodes", nodes, "--time", time)
        return re.findall(r"^job (\S+):", printed, re.MULTILINE)[0]

    @contextlib.contextmanager
    def training(self, name: str, *words: str) -> Iterator[None]:
        """A training by hand on this machine, told to stop at the end."""
        env = {**self.cluster.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(self.home)}
        line = [sys.executable, "-m", "jobs.cli", "train", "convnet_aig/toy", f"name={name}", *words]
        with open(self.home / f"{name}.log", "w") as log:
            process = subprocess.Popen(line, cwd=self.home, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            process.wait(300)

    def starts(self, name: str) -> list[dict[str, Any]]:
        path = self.home / "runs" / name / "slurm" / "starts.json"
        found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return found

    def steps(self, name: str) -> list[int]:
        """Of the run's checkpoints."""
        return sorted(
            int(path.parent.name[5:]) for path in self.home.glob(f"runs/{name}/checkpoints/step-*/COMPLETE.json")
        )

    def finished(self, name: str) -> bool:
        path = self.home / "runs" / name / "status.json"
        return path.exists() and bool(json.loads(path.read_text())["finished"])

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(self.home.glob(f"runs/{name}/slurm/*log.out")))

    def until(self, holds: Callable[[], bool], name: str, seconds: float = STARTS_WITHIN_S) -> None:
        try:
            until(holds, seconds)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.attempt('jobs', 'show', name).stdout}\n{self.log(name)[-4000:]}")

    def tracked(self, name: str) -> Counter[tuple[str, int]]:
        """How often MLflow holds each (key, step) of the run; it must be the only run of that name."""
        client = connect(f"sqlite:///{self.home}/runs/mlflow.db")
        experiments = [each.experiment_id for each in client.search_experiments()]
        (run,) = [run for run in client.search_runs(experiments) if run.info.run_name == name]
        return Counter(
            (key, point.step) for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)
        )


@pytest.fixture
def desk(netns: RealSlurm, images: Path, tmp_path: Path) -> Iterator[Desk]:
    found = Desk(netns, tmp_path, images)
    yield found
    assert netns.attempt("pgrep", "-f", f"gcs_server.*{tmp_path}").stdout == ""


def check_whole(desk: Desk, name: str, total: int) -> None:
    """The run is finished, its last checkpoint is its last step, and MLflow holds every logged step once."""
    assert desk.finished(name) and desk.steps(name)[-1] == total, desk.log(name)[-3000:]
    tracked = desk.tracked(name)
    assert set(tracked.values()) == {1}
    assert {step for key, step in tracked if key == "train/loss"} >= set(range(10, total + 1, 10))


def test_smoke_a_job_over_two_nodes_is_requeued_and_goes_on_in_the_same_run(desk: Desk) -> None:
    job = desk.train("smoke", "training.epochs=25", "checkpoint.every=10 steps")
    desk.until(lambda: bool(desk.steps("smoke")), "smoke")
    desk.cluster.run("scontrol", "requeue", job)
    assert "Ray at 10.77.0." in desk.log("smoke") and ": 2 of 2 nodes" in desk.log("smoke")
    refused = desk.attempt("submit", "train", "convnet_aig/toy", "name=smoke", "--time", "30m")
    assert refused.returncode == 2 and f"job {job} of this run is" in refused.stderr and "cancel it" in refused.stderr
    desk.until(lambda: desk.cluster.sacct(job)[-1:] == ["COMPLETED"], "smoke", 240)
    first, second = desk.starts("smoke")
    assert 0 == first["from"] < first["to"] == second["from"] < second["to"] == 250
    check_whole(desk, "smoke", 250)
    shown = desk.adaptnet("jobs", "show", "smoke")
    assert "COMPLETED" in shown and f"step 0 to {first['to']}, step {first['to']} to 250" in shown
    assert "smoke" in desk.adaptnet("jobs", "list") and "finished at step 250" in desk.adaptnet("jobs", "logs", job)


def test_a_preempted_job_saves_at_its_very_step_and_comes_back(desk: Desk) -> None:
    job = desk.train("low", "training.epochs=80", "checkpoint.every=100000 steps", "evaluation.every=1000 epochs")
    desk.until(lambda: re.search(r"^step \d+/", desk.log("low"), re.MULTILINE) is not None, "low")
    desk.cluster.run("scontrol", "update", "partitionname=main", "gracetime=60")
    above = desk.cluster.sbatch("sleep 5", "--partition", "high", "--nodes", "2", "--exclusive")
    desk.cluster.wait(above, "COMPLETED", 120)
    desk.until(lambda: len(desk.starts("low")) == 2, "low")
    first = desk.starts("low")[0]
    assert first["to"] > 0 and desk.steps("low")[0] == first["to"], "saved by nothing but the warning"
    desk.until(lambda: f"[resumed] at step {first['to']}" in desk.log("low"), "low")
    assert "SLURM's warning" in desk.log("low")
    desk.cluster.run("scancel", job)


def test_a_lost_agent_costs_the_steps_since_the_last_checkpoint(desk: Desk) -> None:
    """The other node has room for both workers: the run goes on there, in the same start of the job."""
    apart = ["compute.cpus_per_worker=1", "--cpus-per-task", "2"]
    desk.train("agent", "training.epochs=40", "checkpoint.every=20 steps", *apart)
    desk.until(lambda: bool(desk.steps("agent")), "agent")
    (raylet,) = [pid for pid in _pids("raylet", desk.home) if b"--head" not in _command(pid)]
    os.kill(raylet, 9)
    desk.until(lambda: desk.finished("agent"), "agent", 300)
    assert len(desk.starts("agent")) == 1
    check_whole(desk, "agent", 400)


def test_a_dead_head_is_requeued_where_the_start_has_saved_something(desk: Desk) -> None:
    job = desk.train("head", "training.epochs=40", "checkpoint.every=20 steps")
    desk.until(lambda: bool(desk.steps("head")), "head")
    (head,) = _pids("gcs_server", desk.home)
    os.kill(head, 9)
    desk.until(lambda: len(desk.starts("head")) == 2, "head", 240)
    desk.until(lambda: desk.finished("head"), "head", 300)
    assert f"requeueing job {job}" in desk.log("head")
    check_whole(desk, "head", 400)


def test_a_node_that_is_set_down_ends_the_job_and_slurm_starts_it_again(desk: Desk) -> None:
    desk.train("down", "training.epochs=40", "checkpoint.every=20 steps")
    desk.until(lambda: bool(desk.steps("down")), "down")
    node = desk.cluster.nodes[1]
    desk.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(5)
    desk.cluster.attempt("scontrol", "update", f"nodename={node}", "state=resume")  # it may be back by itself
    desk.until(lambda: desk.finished("down"), "down", 300)
    assert len(desk.starts("down")) == 2
    check_whole(desk, "down", 400)


def test_a_head_node_that_is_lost_is_replaced_once_its_lease_has_run_out(desk: Desk) -> None:
    """The job comes back on the other node within seconds, where the former driver cannot be asked whether it lives."""
    job = desk.train("moved", "training.epochs=30", "checkpoint.every=20 steps", nodes="1")
    desk.until(lambda: bool(desk.steps("moved")), "moved")
    node = desk.cluster.show(job)["BatchHost"]
    try:
        assert desk.cluster.testcluster("node-kill", node.removeprefix("node")).returncode == 0
        desk.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        desk.until(lambda: desk.finished("moved"), "moved", 300)
    finally:
        desk.cluster.testcluster("node-start", node.removeprefix("node"))
        desk.cluster.attempt("scontrol", "update", f"nodename={node}", "state=resume")
    first, second = desk.starts("moved")
    assert first["host"] != second["host"] and second["from"] >= 20
    assert "waiting until the lease of this run's former driver has run out" in desk.log("moved")
    check_whole(desk, "moved", 300)
    desk.until(lambda: set(desk.cluster.run("sinfo", "-h", "-o", "%T").split()) == {"idle"}, "moved", 60)


def test_an_elastic_job_goes_on_with_the_nodes_that_are_left(desk: Desk) -> None:
    job = desk.train("elastic", "training.epochs=60", "checkpoint.every=20 steps", nodes="1-2")
    desk.until(lambda: len(desk.steps("elastic")) > 1, "elastic")
    assert "2 of 2 nodes" in desk.log("elastic")
    other = next(node for node in desk.cluster.nodes if node != desk.cluster.show(job)["BatchHost"])
    try:
        assert desk.cluster.testcluster("node-kill", other.removeprefix("node")).returncode == 0
        desk.until(lambda: desk.finished("elastic"), "elastic", 300)
        desk.cluster.wait(job, "COMPLETED", 90)
    finally:
        desk.cluster.testcluster("node-start", other.removeprefix("node"))
    assert len(desk.starts("elastic")) == 1, "the same start of the job"
    assert workers(desk, "elastic") == [2, 1]
    check_whole(desk, "elastic", 600)
    desk.until(lambda: set(desk.cluster.run("sinfo", "-h", "-o", "%T").split()) == {"idle"}, "elastic", 90)


def workers(desk: Desk, name: str) -> list[int]:
    """With how many each start of the run's workers began."""
    path = desk.home / "runs" / name / "journal" / "rank0.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [event["workers"] for event in events if event.get("event") == "started"]


def test_an_elastic_job_starts_on_the_node_that_is_free_and_grows_with_its_next_start(desk: Desk) -> None:
    other = desk.cluster.sbatch("sleep 900", "--nodes", "1", "--exclusive")
    desk.cluster.wait(other, "RUNNING")
    job = desk.train("grows", "training.epochs=40", "checkpoint.every=20 steps", nodes="1-2")
    desk.until(lambda: bool(desk.steps("grows")), "grows")
    assert "Ray at" in desk.log("grows") and ": 1 of 1 nodes" in desk.log("grows")
    desk.cluster.run("scancel", other)
    desk.until(lambda: other not in desk.cluster.squeue(), "grows", 30)
    desk.adaptnet("jobs", "requeue", job)
    desk.until(lambda: desk.finished("grows"), "grows", 300)
    assert ": 2 of 2 nodes" in desk.log("grows") and workers(desk, "grows") == [1, 2]
    check_whole(desk, "grows", 400)


def test_an_elastic_job_waits_for_its_fewest_nodes_before_it_starts_and_after_it_has_lost_one(desk: Desk) -> None:
    """Two of at most three; this cluster has two."""
    other = desk.cluster.sbatch("sleep 900", "--nodes", "1", "--exclusive")
    desk.cluster.wait(other, "RUNNING")
    job = desk.train("waits", "training.epochs=60", "checkpoint.every=20 steps", nodes="2-3")
    desk.until(lambda: "the nodes it needs are busy" in desk.adaptnet("jobs", "show", "waits"), "waits", 60)
    desk.cluster.run("scancel", other)
    desk.until(lambda: len(desk.steps("waits")) > 1, "waits")
    lost = next(node for node in desk.cluster.nodes if node != desk.cluster.show(job)["BatchHost"])
    try:
        assert desk.cluster.testcluster("node-kill", lost.removeprefix("node")).returncode == 0
        desk.until(lambda: f"requeueing job {job}" in desk.log("waits"), "waits", 240)
        desk.until(lambda: desk.cluster.squeue().get(job) == "PENDING", "waits", 60)
        time.sleep(10)
        assert desk.cluster.squeue()[job] == "PENDING" and len(desk.starts("waits")) == 1
    finally:
        desk.cluster.testcluster("node-start", lost.removeprefix("node"))
    desk.until(lambda: desk.finished("waits"), "waits", 300)
    first, second = desk.starts("waits")
    assert first["to"] == second["from"] > 0 and workers(desk, "waits") == [2, 2]
    check_whole(desk, "waits", 600)
    desk.until(lambda: set(desk.cluster.run("sinfo", "-h", "-o", "%T").split()) == {"idle"}, "waits", 90)


def test_a_sweep_in_an_allocation_is_requeued_and_goes_on(desk: Desk) -> None:
    small = ["scheduler.kind=none", "concurrency=1", *SMALL]
    own = [f"data.root={desk.images}", "training.epochs=6", "checkpoint.every=10 steps", "compute.workers=1"]
    sweep = desk.home / "two.yaml"
    sweep.write_text("# Which seed?\nrecipe: convnet_aig/toy\nspace:\n  seed: {grid: [1, 2]}\n")
    printed = desk.adaptnet("submit", "sweep", str(sweep), *small, *own, "--nodes", "2", "--time", "30m")
    job = re.findall(r"^job (\S+):", printed, re.MULTILINE)[0]
    refused = desk.attempt("submit", "sweep", str(sweep), *small, *own, "--time", "30m")
    assert refused.returncode == 2 and f"job {job} of this run is" in refused.stderr
    trials = desk.home / "runs" / "two" / "trials"
    desk.until(lambda: bool(list(trials.glob("*/checkpoints/*/COMPLETE.json"))), "two")
    desk.cluster.run("scancel", "--signal", "USR2", job)
    desk.until(lambda: len(desk.starts("two")) == 2, "two", 120)
    desk.until(lambda: desk.finished("two"), "two", 300)
    desk.until(lambda: "COMPLETED" in desk.adaptnet("jobs", "show", "two"), "two", 60)
    first, second = desk.starts("two")
    assert 0 < first["to"] == second["from"] and second["to"] == 120
    steps = {path.parent.name for path in trials.glob("*/checkpoints/step-00000060/COMPLETE.json")}
    assert steps == {"step-00000060"} and len(list(trials.iterdir())) == 2


def test_what_the_readme_says_to_try_works_from_a_fresh_clone(tmp_path: Path) -> None:
    """Line by line, as a user who has nothing in the home folder."""
    readme = (ROOT / "infra" / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "home").mkdir()
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "adaptnet"], check=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    root.rmdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY", "SLURM", "ADAPTNET"))}
    env = {**kept, "HOME": str(tmp_path / "home"), "PATH": path, "TESTCLUSTER_ROOT": str(root)}
    env |= {"PYTHONPATH": str(tmp_path / "adaptnet"), "OMP_NUM_THREADS": "1", "PS4": "$ "}
    transcript = tmp_path / "transcript.txt"
    try:
        with open(transcript, "w") as file:
            line = ["bash", "-exc", block]
            done = subprocess.run(
                line, cwd=tmp_path / "adaptnet", env=env, stdout=file, stderr=subprocess.STDOUT, timeout=580
            )
    finally:
        subprocess.run([ROOT / "infra/slurm/testcluster", "down"], env=env, capture_output=True, timeout=300)
    said = transcript.read_text()
    assert done.returncode == 0, said[-5000:]
    for words in ("requeueing job", "finished at step", "COMPLETED", "registered as models:/aig-toy/1", "down: "):
        assert words in said, said[-5000:]
    (shown,) = re.findall(r"^starts +(step .*)$", said, re.MULTILINE)
    assert shown.count("step") == 3, "submitted, preempted, requeued"
    assert "Traceback" not in said and "Broken pipe" not in said, said[-5000:]


def test_what_jobs_cost_is_measured(desk: Desk) -> None:
    words = ["bench", "scaling", "--nodes", "2", "--site", "testcluster"]
    printed = desk.adaptnet(*words, "--slurm", "convnet_aig/toy", "training.epochs=1", seconds=300)
    assert re.search(r"^job start to first step +\S+ +s +\d+\.\d+ +by hand to first step$", printed, re.MULTILINE)
    printed = desk.adaptnet(*words, "--warning", seconds=300)
    (seconds,) = re.findall(r"^warning to all ranks saved +(\S+) +s$", printed.replace("  \n", "\n"), re.MULTILINE)
    assert 0 < float(seconds) < 10
    assert not [path for path in (desk.home / "runs").iterdir() if path.name.startswith("bench-")]


def test_two_jobs_on_the_same_nodes_do_not_meet(desk: Desk) -> None:
    names = ["one", "two"]
    for name in names:
        desk.train(name, "training.epochs=10", "checkpoint.every=20 steps")
    for name in names:
        desk.until(lambda name=name: desk.finished(name), name, 300)  # type: ignore[misc]
        check_whole(desk, name, 100)
    heads = {re.findall(r"Ray at (\S+):", desk.log(name))[0] for name in names}
    assert len(heads) == 2


def test_a_cancelled_job_stays_away_and_is_resubmitted_on_demand(desk: Desk) -> None:
    job = desk.train("gone", "training.epochs=30", "checkpoint.every=20 steps", nodes="1")
    desk.until(lambda: bool(desk.steps("gone")), "gone")
    desk.cluster.run(
        "scancel", "--signal", "USR2", job
    )  # it would requeue itself, were it not cancelled while it saves
    desk.until(lambda: "SLURM's warning" in desk.log("gone"), "gone")
    desk.adaptnet("jobs", "cancel", "gone")
    desk.until(lambda: desk.cluster.sacct(job)[-1:] != ["RUNNING"] and not desk.cluster.squeue(), "gone", 60)
    assert "CANCELLED" in desk.adaptnet("jobs", "show", "gone") and not desk.finished("gone")
    again = re.findall(r"job (\d+) goes on", desk.adaptnet("jobs", "resubmit", "gone"))[0]
    desk.until(lambda: desk.finished("gone"), "gone", 240)
    assert again != job and desk.starts("gone")[-1]["from"] > 0
    check_whole(desk, "gone", 300)


def test_a_job_that_cannot_work_says_so_and_frees_its_nodes(desk: Desk) -> None:
    job = desk.train("wrong", f"data.root={desk.home}/nowhere")
    desk.until(lambda: "adaptnet: " in desk.log("wrong"), "wrong")
    desk.until(lambda: not desk.cluster.squeue(), "wrong", 30)
    desk.until(lambda: desk.cluster.sacct(job)[-1].startswith("FAILED"), "wrong", 30)
    shown = desk.adaptnet("jobs", "show", "wrong")
    assert "FAILED: exit code 2" in shown and f"adaptnet: {desk.home}/nowhere: no such folder" in shown


def test_the_third_start_in_a_row_that_saves_nothing_is_the_last(desk: Desk) -> None:
    job = desk.train("fruitless", "checkpoint.every=100000 steps", "training.epochs=1000", nodes="1")
    for count in (1, 2, 3):
        desk.until(lambda count=count: len(desk.starts("fruitless")) == count, "fruitless")  # type: ignore[misc]
        desk.cluster.run("scontrol", "requeue", job)  # while Ray starts
    desk.until(lambda: not desk.cluster.squeue(), "fruitless")
    desk.until(lambda: desk.cluster.sacct(job)[-1].startswith("FAILED"), "fruitless", 30)
    assert not desk.steps("fruitless")
    shown = desk.adaptnet("jobs", "show", "fruitless")
    assert "FAILED: exit code 2" in shown and "the last 3 starts of this job saved no new step" in shown


def test_a_driver_that_is_killed_frees_its_nodes(desk: Desk) -> None:
    """As by the kernel where memory is short; Ray's head would keep the other node's task for the rest of its time."""
    job = desk.train("killed")
    desk.until(lambda: "2 of 2 nodes" in desk.log("killed"), "killed")
    tasks = [pid for pid in _pids("python", desk.home) if b"submitit.core._submit" in _command(pid)]
    (driver,) = [pid for pid in tasks if b"SLURM_NODEID=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(driver, 9)
    desk.until(lambda: not desk.cluster.squeue(), "killed", 30)
    desk.until(lambda: desk.cluster.sacct(job)[-1].startswith("FAILED"), "killed", 30)
    shown = desk.adaptnet("jobs", "show", "killed")
    assert "FAILED: killed by signal 9 (was memory short?)" in shown and "Killed" in shown
    folders = f"adaptnet-{os.getuid()}-{job}-*"
    assert list(Path("/tmp").glob(folders)), "nobody was left to remove it"
    desk.train("next")
    desk.until(lambda: "2 of 2 nodes" in desk.log("next"), "next")
    assert not list(Path("/tmp").glob(folders))
    desk.adaptnet("jobs", "cancel", "next")
    desk.until(lambda: not desk.cluster.squeue(), "next", 60)


def test_a_folder_that_the_nodes_do_not_share_is_named(desk: Desk) -> None:
    """/tmp/ray is each node's own here."""
    unshared = Path("/tmp/ray") / desk.home.name
    job = desk.train("apart", "--run-dir", str(unshared), nodes="1")
    desk.until(lambda: not desk.cluster.squeue(), "apart")
    shown = desk.adaptnet("jobs", "show", job)
    assert "FAILED" in shown and f"no log at {unshared}" in shown and "is that folder seen by the nodes?" in shown


def test_a_folder_that_one_of_two_nodes_does_not_see_is_named_with_the_node(desk: Desk) -> None:
    """As where a node has not mounted the file system: what lies there is another folder of that name."""
    apart = desk.home / "runs" / "half"
    apart.mkdir(parents=True)
    slurmd = _slurmd(desk.cluster, desk.cluster.nodes[1])
    inside = ["nsenter", "--target", str(slurmd), "--mount", "--pid"]
    desk.cluster.run(*inside, "mount", "-t", "tmpfs", "none", apart)
    try:
        job = desk.train("half", "--site", str(_impatient(desk)))
        desk.until(lambda: "adaptnet: " in desk.log("half"), "half")
        desk.until(lambda: not desk.cluster.squeue(), "half", 30)
    finally:
        desk.cluster.run(*inside, "umount", "--lazy", apart)
    desk.until(lambda: desk.cluster.sacct(job)[-1].startswith("FAILED"), "half", 30)
    shown = desk.adaptnet("jobs", "show", job)
    assert f"{desk.cluster.nodes[1]}: nothing was heard of these nodes in {apart}/slurm within 20 s" in shown
    assert "on a file system that every node sees? Give a run folder that is, by --run-dir" in shown
    assert not desk.steps("half") and "[started]" not in desk.log("half")


def test_a_job_whose_memory_is_spent_says_so_and_frees_its_nodes(desk: Desk) -> None:
    """By the kernel, as on a cluster that bounds it: the second node's processes may have 1.5 GB."""
    group = Path("/sys/fs/cgroup/memory") / f"adaptnet-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(1500 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here ({error})")
    slurmd = _slurmd(desk.cluster, desk.cluster.nodes[1])
    try:
        (group / "cgroup.procs").write_text(str(slurmd))
        own = ["training.batch_size=16384", "training.epochs=1000", "compute.max_failures=1"]
        job = desk.train("large", *own)
        desk.until(lambda: "adaptnet: " in desk.log("large"), "large")
        desk.until(lambda: not desk.cluster.squeue(), "large", 30)
    finally:
        for process in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(process)
        group.rmdir()
    desk.until(lambda: desk.cluster.sacct(job)[-1].startswith("FAILED"), "large", 30)
    shown = desk.adaptnet("jobs", "show", job)
    assert "FAILED: exit code 2" in shown, shown
    assert "If it was killed because memory was short, make training.batch_size (=16384)" in shown, shown


def test_a_sweep_whose_head_is_killed_is_requeued_where_it_has_saved_something(desk: Desk) -> None:
    sweep = desk.home / "headless.yaml"
    sweep.write_text("# Which seed?\nrecipe: convnet_aig/toy\nspace:\n  seed: {grid: [1, 2]}\n")
    own = [f"data.root={desk.images}", "training.epochs=10", "checkpoint.every=10 steps", "compute.workers=1"]
    own += ["scheduler.kind=none", "concurrency=1", *SMALL]
    printed = desk.adaptnet("submit", "sweep", str(sweep), *own, "--nodes", "1", "--time", "30m")
    job = re.findall(r"^job (\S+):", printed, re.MULTILINE)[0]
    trials = desk.home / "runs" / "headless" / "trials"
    desk.until(lambda: bool(list(trials.glob("*/checkpoints/*/COMPLETE.json"))), "headless")
    (head,) = _pids("gcs_server", desk.home)
    os.kill(head, 9)
    desk.until(lambda: f"requeueing job {job}" in desk.log("headless"), "headless", 120)
    desk.until(lambda: desk.finished("headless"), "headless", 300)
    desk.until(lambda: "COMPLETED" in desk.adaptnet("jobs", "show", "headless"), "headless", 60)
    first, second = desk.starts("headless")
    assert 0 < first["to"] <= second["from"] and second["to"] == 200


def test_without_munge_nothing_is_submitted_and_that_is_said_at_once(images: Path, tmp_path: Path) -> None:
    """SLURM's own commands try for 49 s."""
    with real_slurm("lo") as cluster:
        desk = Desk(cluster, tmp_path, images)
        (munged,) = [path for path in processes(f"{cluster.root}/") if (path / "comm").read_text() == "munged\n"]
        job = desk.train("before", nodes="1")
        desk.adaptnet("jobs", "cancel", job)
        os.kill(int(munged.name), 9)
        began = time.monotonic()
        said = desk.attempt("submit", "train", "convnet_aig/toy", f"data.root={images}", "--time", "30m")
        assert said.returncode == 2 and re.match(r"adaptnet: sbatch: munged does not run on this", said.stderr), said
        assert "munge.sock: Connection refused), and SLURM takes no job without it. Start it (" in said.stderr
        said = desk.attempt("jobs", "requeue", job)
        assert said.returncode == 2 and said.stderr.startswith(f"adaptnet: scontrol requeue {job}: munged does not run")
        assert "SLURM does not answer (munged does not run" in desk.adaptnet("jobs", "show", job)
        assert time.monotonic() - began < 3 * 40, "each asks SLURM itself for 10 s"


def _impatient(desk: Desk) -> Path:
    """A profile as the test cluster's, whose nodes wait 20 s for one another."""
    path = desk.home / "impatient.yaml"
    path.write_text((ROOT / "infra/slurm/sites/testcluster.yaml").read_text() + "patience_s: 20\n")
    return path


def _slurmd(cluster: RealSlurm, node: str) -> int:
    """SLURM's daemon on a node, as this machine numbers it."""
    found = [path for path in processes(f"{cluster.root}/{node}") if (path / "comm").read_text() == "slurmd\n"]
    return int(found[0].name)


def test_a_job_after_another_waits_for_it_and_says_why(desk: Desk) -> None:
    first = desk.train("first", nodes="1")
    second = desk.train("second", "--after", "first", nodes="1")
    assert desk.cluster.show(second)["Dependency"].startswith(f"afterok:{first}")
    assert "the job that it depends on has not ended" in desk.adaptnet("jobs", "show", "second")
    desk.adaptnet("jobs", "cancel", "first")
    desk.until(lambda: "it will never start: cancel it" in desk.adaptnet("jobs", "show", "second"), "second", 60)


def test_an_array_trains_a_run_for_each_value(desk: Desk) -> None:
    own = ["name=seeds", f"data.root={desk.images}", "tracking.register=null", *SMALL, "training.epochs=2"]
    desk.adaptnet("submit", "train", "convnet_aig/toy", *own, "--array", "seed=1,2", "--nodes", "1", "--time", "20m")
    for seed in (1, 2):
        desk.until(lambda seed=seed: desk.finished(f"seeds-seed{seed}"), f"seeds-seed{seed}", 240)  # type: ignore[misc]
    one, two = (load_file(desk.home / f"runs/seeds-seed{s}/checkpoints/step-00000020/net.safetensors") for s in (1, 2))
    assert any(not one[name].equal(two[name]) for name in one)
    rows = [rf"^seeds-seed{seed} +\d+_{seed - 1} +COMPL" for seed in (1, 2)]

    def listed() -> bool:
        printed = desk.adaptnet("jobs", "list")
        return all(re.search(row, printed, re.MULTILINE) for row in rows)

    desk.until(listed, "seeds-seed1", 60)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "nope"], "Known partitions: main, high"),
        (["--account", "nope"], "Your accounts: "),
        (["--qos", "nope"], "Known QOS: normal"),
        (["--gpus-per-node", "9"], "The nodes have: "),
        (["--time", "soon"], "write 90m, 24h"),
        (["--time", "2m"], "is below 210 s: 90 s to save"),
        (["--nodes", "3-2"], "FEWEST-MOST"),
        (["--dependency", "afterok:none"], "SLURM refused the job"),
    ],
)
def test_what_slurm_cannot_give_is_refused_in_its_words(desk: Desk, words: list[str], said: str) -> None:
    done = desk.attempt("submit", "train", "convnet_aig/toy", f"data.root={desk.images}", *words)
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_limits_in_time_cost_nothing_and_change_nothing(desk: Desk) -> None:
    """Three minutes a start, 45 s to save, over three starts: what is saved then is what an uninterrupted run saves."""
    own = [f"data.root={desk.images}", "tracking.register=null", *SMALL, "training.epochs=100000"]
    own += ["evaluation.every=100000 epochs", "checkpoint.every=50 steps", "checkpoint.keep_last=100000"]
    two = ["compute.workers=2", "compute.cpus_per_worker=1", "compute.device=cpu"]
    limits = ["--cpus-per-task", "2", "--time", "3m", "--signal-delay", "45"]
    desk.adaptnet("submit", "train", "convnet_aig/toy", "name=limited", *own, *two, *limits)

    def regular() -> int:
        return max([step for step in desk.steps("limited") if step % 50 == 0], default=0)

    def three_have_saved() -> bool:
        """On a busy machine a start may be warned before its first step."""
        ends = [(each["from"], regular() if each["to"] is None else each["to"]) for each in desk.starts("limited")]
        return sum(end > begin for begin, end in ends) >= 3 and ends[-1][1] > ends[-1][0]

    desk.until(three_have_saved, "limited", 600)
    desk.adaptnet("jobs", "cancel", "limited")
    desk.until(lambda: not desk.cluster.squeue(), "limited")
    starts, last = desk.starts("limited"), regular()
    assert [each["to"] for each in starts[:-1]] == [each["from"] for each in starts[1:]], desk.log("limited")
    desk.adaptnet("runs", "sync", str(desk.home / "runs" / "limited"))
    tracked = desk.tracked("limited")
    assert set(tracked.values()) == {1}
    assert {step for key, step in tracked if key == "train/loss"} >= set(range(10, last + 1, 10))
    with desk.training("straight", *own, *two):
        desk.until(lambda: last in desk.steps("straight"), "straight", 300)
    one, other = (
        load_file(desk.home / f"runs/{name}/checkpoints/step-{last:08d}/net.safetensors")
        for name in ("limited", "straight")
    )
    assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in other)


def _pids(name: str, home: Path) -> list[int]:
    """Processes called so that a job in this folder started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            mine = str(home).encode() in (path / "environ").read_bytes()
            if mine and (path / "comm").read_text().strip() == name:
                found.append(int(path.name))
        except OSError:
            continue
    return found


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
