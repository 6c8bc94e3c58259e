"""Trainings as jobs of a real SLURM: whatever ends them, they resume in the same run with all that was saved."""

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

import pytest
from real_slurm import RealSlurm, processes, real_slurm, until
from safetensors.torch import load_file

from jobs.schedulers.attempts import Attempts, JobAttempt
from pipeline.data import toy
from pipeline.tracking import connect
from pipeline.tracking.ledger import Ledger

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
STARTS_WITHIN_S = 300  # imports, Ray on two nodes, workers: on two cores that others share
SMALL = ["family.depth=8", "training.batch_size=64", "logging.every=10 steps", "evaluation.latency_repeats=0"]
SMALL += ["evaluation.every=1000 epochs", "training.precision=fp32", "training.compile=false"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "set", num_classes=4, train=640, val=80, side_px=32, seed=5)


@dataclass
class Workspace:
    """A user's place: a folder with runs, and the cluster's commands."""

    cluster: RealSlurm
    home: Path
    images: Path

    def attempt(self, *words: str, seconds: float = 900) -> subprocess.CompletedProcess[str]:
        env = {**self.cluster.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(self.home)}
        line = [sys.executable, "-m", "jobs.cli", *words]
        return subprocess.run(
            line, cwd=self.home, env=env, capture_output=True, text=True, timeout=seconds, check=False
        )

    def adaptnet(self, *words: str, seconds: float = 900) -> str:
        done = self.attempt(*words, seconds=seconds)
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def train(self, name: str, *words: str, nodes: str = "2", time: str = "30m") -> str:
        """Submits a training; returns its job's id."""
        own = [f"name={name}", f"data.root={self.images}", "tracking.register=null", *SMALL, *words]
        printed = self.adaptnet("submit", "train", "convnet_aig/toy", *own, "--nodes", nodes, "--time", time)
        return re.findall(r"^job (\S+):", printed, re.MULTILINE)[0]

    @contextlib.contextmanager
    def training(self, name: str, *words: str) -> Iterator[None]:
        """A training started by hand on this machine, stopped at the end."""
        env = {**self.cluster.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(self.home)}
        line = [sys.executable, "-m", "jobs.cli", "train", "convnet_aig/toy", f"name={name}", *words]
        with open(self.home / f"{name}.log", "w") as log:
            process = subprocess.Popen(line, cwd=self.home, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            process.wait(300)

    def starts(self, name: str) -> list[JobAttempt]:
        return Attempts(self.home / "runs" / name).read()

    def steps(self, name: str) -> list[int]:
        """The steps of the run's complete checkpoints."""
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
        """How often MLflow has each (key, step) of the run, which must be the only one of that name."""
        client = connect(f"sqlite:///{self.home}/runs/mlflow.db")
        experiments = [each.experiment_id for each in client.search_experiments()]
        (run,) = [run for run in client.search_runs(experiments) if run.info.run_name == name]
        return Counter(
            (key, point.step) for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)
        )


@pytest.fixture
def user(netns: RealSlurm, images: Path, tmp_path: Path) -> Iterator[Workspace]:
    found = Workspace(netns, tmp_path, images)
    yield found
    assert netns.attempt("pgrep", "-f", f"gcs_server.*{tmp_path}").stdout == ""


def check_whole(user: Workspace, name: str, total: int) -> None:
    """The run has finished, its last checkpoint is its last step, and MLflow has every logged step once."""
    assert user.finished(name) and user.steps(name)[-1] == total, user.log(name)[-3000:]
    logged = {("train/loss", step) for step in range(10, total + 1, 10)}
    user.until(lambda: logged <= set(user.tracked(name)), name)  # the driver sends the rest after the run's end
    assert set(user.tracked(name).values()) == {1}


def test_smoke_a_job_over_two_nodes_is_requeued_and_resumes_in_the_same_run(user: Workspace) -> None:
    job = user.train("smoke", "training.epochs=25", "checkpoint.every=10 steps")
    user.until(lambda: bool(user.steps("smoke")), "smoke")
    user.cluster.run("scontrol", "requeue", job)
    assert "Ray at 10.77." in user.log("smoke") and ": 2 of 2 nodes" in user.log("smoke")
    refused = user.attempt("submit", "train", "convnet_aig/toy", "name=smoke", "--time", "30m")
    assert refused.returncode == 2 and job in refused.stderr
    user.until(lambda: user.cluster.sacct(job)[-1:] == ["COMPLETED"], "smoke", 240)
    first, second = user.starts("smoke")
    assert 0 == first.first_step < first.last_step == second.first_step < second.last_step == 250
    check_whole(user, "smoke", 250)
    shown = user.adaptnet("jobs", "show", "smoke")
    assert "COMPLETED" in shown and f"step 0 to {first.last_step}, step {first.last_step} to 250" in shown
    assert "smoke" in user.adaptnet("jobs", "list") and "finished at step 250" in user.adaptnet("jobs", "logs", job)


def test_a_preempted_job_saves_at_its_very_step_and_comes_back(user: Workspace) -> None:
    job = user.train("low", "training.epochs=80", "checkpoint.every=100000 steps", "evaluation.every=1000 epochs")
    user.until(lambda: re.search(r"^step \d+/", user.log("low"), re.MULTILINE) is not None, "low")
    user.cluster.run("scontrol", "update", "partitionname=main", "gracetime=60")
    above = user.cluster.sbatch("sleep 5", "--partition", "high", "--nodes", "2", "--exclusive")
    user.cluster.wait(above, "COMPLETED", 120)
    user.until(lambda: len(user.starts("low")) == 2, "low")
    first = user.starts("low")[0]
    assert first.last_step > 0 and user.steps("low")[0] == first.last_step, "saved by nothing but the warning"
    user.until(lambda: f"[resumed] at step {first.last_step}" in user.log("low"), "low")
    assert "warning from the scheduler" in user.log("low")
    user.cluster.run("scancel", job)


def test_a_lost_raylet_costs_only_the_steps_since_the_last_checkpoint(user: Workspace) -> None:
    """The other node has room for both workers: the run continues there, in the same start of the job."""
    apart = ["compute.cpus_per_worker=1", "--cpus-per-task", "2"]
    user.train("agent", "training.epochs=40", "checkpoint.every=20 steps", *apart)
    user.until(lambda: bool(user.steps("agent")), "agent")
    (raylet,) = [pid for pid in _pids("raylet", user.home) if b"--head" not in _command(pid)]
    os.kill(raylet, 9)
    user.until(lambda: user.finished("agent"), "agent", 300)
    assert len(user.starts("agent")) == 1
    check_whole(user, "agent", 400)


def test_a_job_whose_head_dies_is_requeued_if_it_has_saved_a_step(user: Workspace) -> None:
    job = user.train("head", "training.epochs=40", "checkpoint.every=20 steps")
    user.until(lambda: bool(user.steps("head")), "head")
    (head,) = _pids("gcs_server", user.home)
    os.kill(head, 9)
    user.until(lambda: len(user.starts("head")) == 2, "head", 240)
    user.until(lambda: user.finished("head"), "head", 300)
    assert f"requeueing job {job}" in user.log("head")
    check_whole(user, "head", 400)


def test_slurm_restarts_a_job_whose_node_is_set_down(user: Workspace) -> None:
    user.train("down", "training.epochs=40", "checkpoint.every=20 steps")
    user.until(lambda: bool(user.steps("down")), "down")
    node = user.cluster.nodes[1]
    user.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(5)
    user.cluster.attempt("scontrol", "update", f"nodename={node}", "state=resume")  # it may be back by itself
    user.until(lambda: user.finished("down"), "down", 300)
    assert len(user.starts("down")) == 2
    check_whole(user, "down", 400)


def test_a_lost_head_node_is_replaced_once_its_lease_has_expired(user: Workspace) -> None:
    """The job restarts on the other node within seconds, where it cannot check whether the former driver still runs."""
    job = user.train("moved", "training.epochs=30", "checkpoint.every=20 steps", nodes="1")
    user.until(lambda: bool(user.steps("moved")), "moved")
    node = user.cluster.show(job)["BatchHost"]
    try:
        assert user.cluster.testcluster("node-kill", node.removeprefix("node")).returncode == 0
        user.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        user.until(lambda: user.finished("moved"), "moved", 300)
    finally:
        user.cluster.testcluster("node-start", node.removeprefix("node"))
        user.cluster.attempt("scontrol", "update", f"nodename={node}", "state=resume")
    first, second = user.starts("moved")
    assert first.host != second.host and second.first_step >= 20
    assert "waiting until the lease" in user.log("moved")
    check_whole(user, "moved", 300)
    user.until(lambda: set(user.cluster.run("sinfo", "-h", "-o", "%T").split()) == {"idle"}, "moved", 60)


def test_an_elastic_job_continues_with_the_remaining_nodes(user: Workspace) -> None:
    job = user.train("elastic", "training.epochs=60", "checkpoint.every=20 steps", nodes="1-2")
    user.until(lambda: len(user.steps("elastic")) > 1, "elastic")
    assert "2 of 2 nodes" in user.log("elastic")
    other = next(node for node in user.cluster.nodes if node != user.cluster.show(job)["BatchHost"])
    try:
        assert user.cluster.testcluster("node-kill", other.removeprefix("node")).returncode == 0
        user.until(lambda: user.finished("elastic"), "elastic", 300)
        user.cluster.wait(job, "COMPLETED", 90)
    finally:
        user.cluster.testcluster("node-start", other.removeprefix("node"))
    assert len(user.starts("elastic")) == 1, "the same start of the job"
    assert workers(user, "elastic") == [2, 1]
    check_whole(user, "elastic", 600)
    user.until(lambda: set(user.cluster.run("sinfo", "-h", "-o", "%T").split()) == {"idle"}, "elastic", 90)


def workers(user: Workspace, name: str) -> list[int]:
    """How many workers each start of the run's workers had."""
    path = user.home / "runs" / name / "journal" / "rank0.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [event["workers"] for event in events if event.get("event") == "started"]


def test_an_elastic_job_starts_on_one_free_node_and_grows_at_its_next_start(user: Workspace) -> None:
    other = user.cluster.sbatch("sleep 900", "--nodes", "1", "--exclusive")
    user.cluster.wait(other, "RUNNING")
    job = user.train("grows", "training.epochs=40", "checkpoint.every=20 steps", nodes="1-2")
    user.until(lambda: bool(user.steps("grows")), "grows")
    assert "Ray at" in user.log("grows") and ": 1 of 1 nodes" in user.log("grows")
    user.cluster.run("scancel", other)
    user.until(lambda: other not in user.cluster.squeue(), "grows", 30)
    user.adaptnet("jobs", "requeue", job)
    user.until(lambda: user.finished("grows"), "grows", 300)
    assert ": 2 of 2 nodes" in user.log("grows") and workers(user, "grows") == [1, 2]
    check_whole(user, "grows", 400)


def test_an_elastic_job_waits_for_its_fewest_nodes_at_each_start(user: Workspace) -> None:
    """Of two to three nodes; this cluster has two."""
    other = user.cluster.sbatch("sleep 900", "--nodes", "1", "--exclusive")
    user.cluster.wait(other, "RUNNING")
    job = user.train("waits", "training.epochs=60", "checkpoint.every=20 steps", nodes="2-3")
    user.until(lambda: "the nodes it needs are busy" in user.adaptnet("jobs", "show", "waits"), "waits", 60)
    user.cluster.run("scancel", other)
    user.until(lambda: len(user.steps("waits")) > 1, "waits")
    lost = next(node for node in user.cluster.nodes if node != user.cluster.show(job)["BatchHost"])
    try:
        assert user.cluster.testcluster("node-kill", lost.removeprefix("node")).returncode == 0
        user.until(lambda: f"requeueing job {job}" in user.log("waits"), "waits", 240)
        user.until(lambda: user.cluster.squeue().get(job) == "PENDING", "waits", 60)
        time.sleep(10)
        assert user.cluster.squeue()[job] == "PENDING" and len(user.starts("waits")) == 1
    finally:
        user.cluster.testcluster("node-start", lost.removeprefix("node"))
    user.until(lambda: user.finished("waits"), "waits", 300)
    first, second = user.starts("waits")
    assert first.last_step == second.first_step > 0 and workers(user, "waits") == [2, 2]
    check_whole(user, "waits", 600)
    user.until(lambda: set(user.cluster.run("sinfo", "-h", "-o", "%T").split()) == {"idle"}, "waits", 90)


def test_a_sweep_is_requeued_and_resumes(user: Workspace) -> None:
    small = ["scheduler.kind=none", "concurrency=1", *SMALL]
    own = [f"data.root={user.images}", "training.epochs=6", "checkpoint.every=10 steps", "compute.workers=1"]
    sweep = user.home / "two.yaml"
    sweep.write_text("# Which seed?\nrecipe: convnet_aig/toy\nspace:\n  seed: {grid: [1, 2]}\n")
    printed = user.adaptnet("submit", "sweep", str(sweep), *small, *own, "--nodes", "2", "--time", "30m")
    job = re.findall(r"^job (\S+):", printed, re.MULTILINE)[0]
    refused = user.attempt("submit", "sweep", str(sweep), *small, *own, "--time", "30m")
    assert refused.returncode == 2 and job in refused.stderr
    trials = user.home / "runs" / "two" / "trials"
    user.until(lambda: bool(list(trials.glob("*/checkpoints/*/COMPLETE.json"))), "two")
    user.cluster.run("scancel", "--signal", "USR2", job)
    user.until(lambda: len(user.starts("two")) == 2, "two", 120)
    user.until(lambda: user.finished("two"), "two", 300)
    user.until(lambda: "COMPLETED" in user.adaptnet("jobs", "show", "two"), "two", 60)
    first, second = user.starts("two")
    assert 0 < first.last_step == second.first_step and second.last_step == 120
    steps = {path.parent.name for path in trials.glob("*/checkpoints/step-00000060/COMPLETE.json")}
    assert steps == {"step-00000060"} and len(list(trials.iterdir())) == 2


def test_the_readmes_walk_through_works_from_a_fresh_clone(tmp_path: Path) -> None:
    """Line by line, as a user with an empty home folder."""
    readme = (ROOT / "infra" / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "home").mkdir()
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "adaptnet"], check=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    root.rmdir()
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("RAY", "SLURM", "ADAPTNET"))}
    env = {**plain, "HOME": str(tmp_path / "home"), "PATH": path, "TESTCLUSTER_ROOT": str(root)}
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
    output = transcript.read_text()
    assert done.returncode == 0, output[-5000:]
    for words in ("requeueing job", "finished at step", "COMPLETED", "registered as models:/aig-toy/1", "down: "):
        assert words in output, output[-5000:]
    (shown,) = re.findall(r"^starts +(step .*)$", output, re.MULTILINE)
    assert shown.count("step") == 3, "submitted, preempted, requeued"
    assert "Traceback" not in output and "Broken pipe" not in output, output[-5000:]


def test_the_cost_of_jobs_is_measured(user: Workspace) -> None:
    words = ["bench", "scaling", "--nodes", "2", "--site", "testcluster"]
    printed = user.adaptnet(*words, "--slurm", "convnet_aig/toy", "training.epochs=1")
    assert re.search(r"^job start to first step +\S+ +s +\d+\.\d+ +by hand to first step$", printed, re.MULTILINE)
    printed = user.adaptnet(*words, "--warning")
    (seconds,) = re.findall(r"^warning to all ranks saved +(\S+) +s$", printed.replace("  \n", "\n"), re.MULTILINE)
    assert 0 < float(seconds) < 60
    assert not [path for path in (user.home / "runs").iterdir() if path.name.startswith("bench-")]


def test_two_jobs_on_the_same_nodes_have_clusters_of_their_own(user: Workspace) -> None:
    names = ["one", "two"]
    for name in names:
        user.train(name, "training.epochs=10", "checkpoint.every=20 steps")
    for name in names:
        user.until(lambda name=name: user.finished(name), name, 300)  # type: ignore[misc]
        check_whole(user, name, 100)
    heads = {re.findall(r"Ray at (\S+):", user.log(name))[0] for name in names}
    assert len(heads) == 2


def test_a_cancelled_job_is_not_requeued_and_can_be_resubmitted(user: Workspace) -> None:
    job = user.train("gone", "training.epochs=30", "checkpoint.every=20 steps", nodes="1")
    user.until(lambda: bool(user.steps("gone")), "gone")
    user.cluster.run(
        "scancel", "--signal", "USR2", job
    )  # it would requeue itself, were it not cancelled while it saves
    user.until(lambda: "warning from the scheduler" in user.log("gone"), "gone")
    user.adaptnet("jobs", "cancel", "gone")
    user.until(lambda: user.cluster.sacct(job)[-1:] != ["RUNNING"] and not user.cluster.squeue(), "gone", 60)
    assert "CANCELLED" in user.adaptnet("jobs", "show", "gone") and not user.finished("gone")
    again = re.findall(r"job (\d+) resumes", user.adaptnet("jobs", "resubmit", "gone"))[0]
    user.until(lambda: user.finished("gone"), "gone", 240)
    assert again != job and user.starts("gone")[-1].first_step > 0
    check_whole(user, "gone", 300)


def test_a_job_with_a_user_error_prints_it_and_frees_its_nodes(user: Workspace) -> None:
    job = user.train("wrong", f"data.root={user.home}/nowhere")
    user.until(lambda: "adaptnet: " in user.log("wrong"), "wrong")
    user.until(lambda: not user.cluster.squeue(), "wrong", 30)
    user.until(lambda: user.cluster.sacct(job)[-1].startswith("FAILED"), "wrong", 30)
    shown = user.adaptnet("jobs", "show", "wrong")
    assert "FAILED: exit code 2" in shown and f"adaptnet: {user.home}/nowhere" in shown


def test_a_job_ends_after_three_starts_in_a_row_that_save_nothing(user: Workspace) -> None:
    job = user.train("fruitless", "checkpoint.every=100000 steps", "training.epochs=1000", nodes="1")
    for count in (1, 2, 3):
        user.until(lambda count=count: len(user.starts("fruitless")) == count, "fruitless")  # type: ignore[misc]
        user.cluster.run("scontrol", "requeue", job)  # while Ray starts
    user.until(lambda: not user.cluster.squeue(), "fruitless")
    user.until(lambda: user.cluster.sacct(job)[-1].startswith("FAILED"), "fruitless", 30)
    assert not user.steps("fruitless")
    shown = user.adaptnet("jobs", "show", "fruitless")
    assert "FAILED: exit code 2" in shown and f"adaptnet: {user.home}/runs/fruitless" in shown


def test_a_driver_that_is_killed_frees_its_nodes(user: Workspace) -> None:
    """As by the kernel if memory runs out; Ray's head would keep the other node's task for the rest of its time."""
    job = user.train("killed")
    user.until(lambda: "2 of 2 nodes" in user.log("killed"), "killed")
    tasks = [pid for pid in _pids("python", user.home) if b"submitit.core._submit" in _command(pid)]
    (driver,) = [pid for pid in tasks if b"SLURM_NODEID=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(driver, 9)
    user.until(lambda: not user.cluster.squeue(), "killed", 30)
    user.until(lambda: user.cluster.sacct(job)[-1].startswith("FAILED"), "killed", 30)
    shown = user.adaptnet("jobs", "show", "killed")
    assert "FAILED: killed by signal 9" in shown and "Killed" in shown
    folders = f"adaptnet-{os.getuid()}-{job}-*"
    assert list(Path("/tmp").glob(folders)), "no process was left to remove it"
    user.train("next")
    user.until(lambda: "2 of 2 nodes" in user.log("next"), "next")
    assert not list(Path("/tmp").glob(folders))
    user.adaptnet("jobs", "cancel", "next")
    user.until(lambda: not user.cluster.squeue(), "next", 60)


def test_a_folder_that_the_nodes_do_not_share_is_named(user: Workspace) -> None:
    """/tmp/ray is each node's own here."""
    unshared = Path("/tmp/ray") / user.home.name
    job = user.train("apart", "--run-dir", str(unshared), nodes="1")
    user.until(lambda: not user.cluster.squeue(), "apart")
    shown = user.adaptnet("jobs", "show", job)
    assert "FAILED" in shown and f"no log at {unshared}" in shown


def test_a_folder_that_one_of_two_nodes_does_not_see_is_named_with_the_node(user: Workspace) -> None:
    """As if a node had not mounted the file system: it has another folder of that name."""
    apart = user.home / "runs" / "half"
    apart.mkdir(parents=True)
    slurmd = _slurmd(user.cluster, user.cluster.nodes[1])
    inside = ["nsenter", "--target", str(slurmd), "--mount", "--pid"]
    user.cluster.run(*inside, "mount", "-t", "tmpfs", "none", apart)
    try:
        job = user.train("half", "--site", str(_impatient(user)))
        user.until(lambda: "adaptnet: " in user.log("half"), "half")
        user.until(lambda: not user.cluster.squeue(), "half", 30)
    finally:
        user.cluster.run(*inside, "umount", "--lazy", apart)
    user.until(lambda: user.cluster.sacct(job)[-1].startswith("FAILED"), "half", 30)
    shown = user.adaptnet("jobs", "show", job)
    assert f"adaptnet: {user.cluster.nodes[1]}: " in shown and f"{apart}/slurm" in shown
    assert not user.steps("half") and "[started]" not in user.log("half")


def test_a_job_out_of_memory_reports_it_and_frees_its_nodes(user: Workspace) -> None:
    """Killed by the kernel, as on a cluster with limits: the second node's processes may use 1.5 GB."""
    group = Path("/sys/fs/cgroup/memory") / f"adaptnet-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(1500 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here ({error})")
    slurmd = _slurmd(user.cluster, user.cluster.nodes[1])
    try:
        (group / "cgroup.procs").write_text(str(slurmd))
        own = ["training.batch_size=16384", "training.epochs=1000", "compute.max_failures=1"]
        job = user.train("large", *own)
        user.until(lambda: "adaptnet: " in user.log("large"), "large")
        user.until(lambda: not user.cluster.squeue(), "large", 30)
    finally:
        for process in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(process)
        group.rmdir()
    user.until(lambda: user.cluster.sacct(job)[-1].startswith("FAILED"), "large", 30)
    shown = user.adaptnet("jobs", "show", job)
    assert "FAILED: exit code 2" in shown, shown
    assert "training.batch_size (=16384)" in shown, shown


def test_a_sweep_whose_head_is_killed_is_requeued_if_it_has_saved_a_step(user: Workspace) -> None:
    sweep = user.home / "headless.yaml"
    sweep.write_text("# Which seed?\nrecipe: convnet_aig/toy\nspace:\n  seed: {grid: [1, 2]}\n")
    own = [f"data.root={user.images}", "training.epochs=10", "checkpoint.every=10 steps", "compute.workers=1"]
    own += ["scheduler.kind=none", "concurrency=1", *SMALL]
    printed = user.adaptnet("submit", "sweep", str(sweep), *own, "--nodes", "1", "--time", "30m")
    job = re.findall(r"^job (\S+):", printed, re.MULTILINE)[0]
    trials = user.home / "runs" / "headless" / "trials"
    user.until(lambda: bool(list(trials.glob("*/checkpoints/*/COMPLETE.json"))), "headless")
    (head,) = _pids("gcs_server", user.home)
    os.kill(head, 9)
    user.until(lambda: f"requeueing job {job}" in user.log("headless"), "headless", 120)
    user.until(lambda: user.finished("headless"), "headless", 300)
    user.until(lambda: "COMPLETED" in user.adaptnet("jobs", "show", "headless"), "headless", 60)
    first, second = user.starts("headless")
    assert 0 < first.last_step <= second.first_step and second.last_step == 200


def test_without_munge_a_submission_fails_with_the_name_of_its_socket(images: Path, tmp_path: Path) -> None:
    """With our message: SLURM's own commands hang for 49 s and then print theirs."""
    with real_slurm("lo") as cluster:
        user = Workspace(cluster, tmp_path, images)
        (munged,) = [path for path in processes(f"{cluster.root}/") if (path / "comm").read_text() == "munged\n"]
        job = user.train("before", nodes="1")
        user.adaptnet("jobs", "cancel", job)
        os.kill(int(munged.name), 9)
        output = user.attempt("submit", "train", "convnet_aig/toy", f"data.root={images}", "--time", "30m")
        assert output.returncode == 2 and "munge.sock: Connection refused)" in output.stderr, output
        output = user.attempt("jobs", "requeue", job)
        assert output.returncode == 2 and "munge.sock: Connection refused)" in output.stderr, output
        assert "munge.sock: Connection refused)" in user.adaptnet("jobs", "show", job)


def _impatient(user: Workspace) -> Path:
    """The test cluster's profile, with nodes that wait 20 s for one another."""
    path = user.home / "impatient.yaml"
    path.write_text((ROOT / "infra/slurm/sites/testcluster.yaml").read_text() + "patience_s: 20\n")
    return path


def _slurmd(cluster: RealSlurm, node: str) -> int:
    """SLURM's daemon on a node, as this machine numbers it."""
    found = [path for path in processes(f"{cluster.root}/{node}") if (path / "comm").read_text() == "slurmd\n"]
    return int(found[0].name)


def test_a_job_after_another_waits_for_it_and_shows_why(user: Workspace) -> None:
    first = user.train("first", "training.epochs=5000", nodes="1")  # it has not ended when it is cancelled
    second = user.train("second", "--after", "first", nodes="1")
    assert user.cluster.show(second)["Dependency"].startswith(f"afterok:{first}")
    assert "the job that it depends on has not ended" in user.adaptnet("jobs", "show", "second")
    user.adaptnet("jobs", "cancel", "first")
    user.until(lambda: "it will never start: cancel it" in user.adaptnet("jobs", "show", "second"), "second", 60)


def test_an_array_trains_a_run_for_each_value(user: Workspace) -> None:
    own = ["name=seeds", f"data.root={user.images}", "tracking.register=null", *SMALL, "training.epochs=2"]
    user.adaptnet("submit", "train", "convnet_aig/toy", *own, "--array", "seed=1,2", "--nodes", "1", "--time", "20m")
    for seed in (1, 2):
        user.until(lambda seed=seed: user.finished(f"seeds-seed{seed}"), f"seeds-seed{seed}", 240)  # type: ignore[misc]
    one, two = (load_file(user.home / f"runs/seeds-seed{s}/checkpoints/step-00000020/net.safetensors") for s in (1, 2))
    assert any(not one[name].equal(two[name]) for name in one)
    rows = [rf"^seeds-seed{seed} +\d+_{seed - 1} +COMPL" for seed in (1, 2)]

    def listed() -> bool:
        printed = user.adaptnet("jobs", "list")
        return all(re.search(row, printed, re.MULTILINE) for row in rows)

    user.until(listed, "seeds-seed1", 60)


def test_seeds_are_tasks_of_one_array_below_one_parent(user: Workspace) -> None:
    own = ["name=spread", f"data.root={user.images}", "tracking.register=null", *SMALL, "training.epochs=1"]
    words = ["--seeds", "2", "--nodes", "1", "--time", "20m"]
    printed = user.adaptnet("submit", "train", "convnet_aig/toy", *own, *words)
    assert re.findall(r"^job \d+_(\d)", printed, re.MULTILINE) == ["0", "1"]
    for seed in (1, 2):
        user.until(lambda seed=seed: user.finished(f"spread-s{seed}"), f"spread-s{seed}", 240)  # type: ignore[misc]
    user.until(lambda: user.finished("spread-seeds"), "spread-s2", 60)
    ids = {name: Ledger.peek(user.home / f"runs/spread-{name}").run_id for name in ("s1", "s2", "seeds")}
    client = connect(f"sqlite:///{user.home}/runs/mlflow.db")
    parents = {client.get_run(str(ids[name])).data.tags["mlflow.parentRunId"] for name in ("s1", "s2")}
    assert parents == {ids["seeds"]}
    user.adaptnet("report", "runs/spread-seeds", "--out", "report")
    assert "over 2 seeds" in (user.home / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--partition", "nope"], "main, high"),
        (["--account", "nope"], "account"),
        (["--qos", "nope"], "normal"),
        (["--gpus-per-node", "9"], "gpu"),
        (["--time", "soon"], "--time (=soon)"),
        (["--time", "2m"], "--time (=2 min)"),
        (["--nodes", "3-2"], "--nodes (=3-2)"),
        (["--dependency", "afterok:none"], "SLURM"),
    ],
)
def test_a_request_that_slurm_cannot_fulfil_is_refused_with_what_it_has(
    user: Workspace, words: list[str], named: str
) -> None:
    done = user.attempt("submit", "train", "convnet_aig/toy", f"data.root={user.images}", *words)
    ours = [line for line in done.stderr.splitlines() if line.startswith("adaptnet: ")]  # sbatch prints its own as well
    assert done.returncode == 2 and len(ours) == 1 and named in ours[0], done.stderr


def test_time_limits_lose_no_step_and_change_no_result(user: Workspace) -> None:
    """Three starts of three minutes, 45 s to save: the checkpoints are those of an uninterrupted run, bit by bit."""
    own = [f"data.root={user.images}", "tracking.register=null", *SMALL, "training.epochs=100000"]
    own += ["evaluation.every=100000 epochs", "checkpoint.every=50 steps", "checkpoint.keep_last=100000"]
    two = ["compute.workers=2", "compute.cpus_per_worker=1", "compute.device=cpu"]
    limits = ["--cpus-per-task", "2", "--time", "3m", "--signal-delay", "45"]
    user.adaptnet("submit", "train", "convnet_aig/toy", "name=limited", *own, *two, *limits)

    def regular() -> int:
        return max([step for step in user.steps("limited") if step % 50 == 0], default=0)

    def three_have_saved() -> bool:
        """On a busy machine a start may be warned before its first step."""
        ends = [
            (each.first_step, regular() if each.last_step is None else each.last_step)
            for each in user.starts("limited")
        ]
        return sum(end > begin for begin, end in ends) >= 3 and ends[-1][1] > ends[-1][0]

    user.until(three_have_saved, "limited", 600)
    user.adaptnet("jobs", "cancel", "limited")
    user.until(lambda: not user.cluster.squeue(), "limited")
    starts, last = user.starts("limited"), regular()
    assert [each.last_step for each in starts[:-1]] == [each.first_step for each in starts[1:]], user.log("limited")
    user.adaptnet("runs", "sync", str(user.home / "runs" / "limited"))
    tracked = user.tracked("limited")
    assert set(tracked.values()) == {1}
    assert {step for key, step in tracked if key == "train/loss"} >= set(range(10, last + 1, 10))
    with user.training("straight", *own, *two):
        user.until(lambda: last in user.steps("straight"), "straight", 900)
    one, other = (
        load_file(user.home / f"runs/{name}/checkpoints/step-{last:08d}/net.safetensors")
        for name in ("limited", "straight")
    )
    assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in other)


def _pids(name: str, home: Path) -> list[int]:
    """Processes of that name that were started by a job in this folder."""
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
