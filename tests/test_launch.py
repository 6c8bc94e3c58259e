"""Tests of a whole run under Ray: a kill costs the steps since the last checkpoint and changes nothing else.

The runs share the session's Ray cluster, except one that is stopped by Ctrl-C and starts Ray itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from raised import fails
from ray.exceptions import ActorDiedError
from ray.train import RunConfig as RayRunConfig
from ray.train import WorkerGroupError
from ray_here import Head
from safetensors.torch import load_file

from pipeline import run_config
from pipeline.compat import ray_train
from pipeline.data import toy
from pipeline.deploy import evaluations
from pipeline.errors import CheckpointError, ConfigError, DataError, DivergedError, ResourceError
from pipeline.execution import launch
from pipeline.run_config import RunConfig
from pipeline.runs import journal
from pipeline.tracking import connect
from pipeline.tracking.description import is_charted

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small toy set: 320 training images, 80 to validate on."""
    folder = tmp_path_factory.mktemp("toy") / "set"
    toy.make(folder, num_classes=4, train=320, val=80, side_px=32, seed=5)
    return folder


PATIENT = "compute.start_patience_s=900"  # the machine may be busy; without workers the key is refused


def recipe(images: Path, *overrides: str) -> RunConfig:
    """convnet_aig/toy made small: 40 steps of 32 images on two workers, saved every 5 steps."""
    patience = [] if "compute.workers=0" in overrides else [PATIENT]
    return run_config.load("convnet_aig/toy", [*settings(images), *patience, *overrides])


def settings(images: Path) -> list[str]:
    small = ["family.depth=8", "training.batch_size=32", "training.epochs=4", "checkpoint.every=5 steps"]
    quiet = ["tracking.register=null", "evaluation.latency_repeats=0", "logging.every=5 steps", f"data.root={images}"]
    return [*small, *quiet, "evaluation.every=2 epochs"]


def on(head: Head) -> str:
    return f"compute.address={head.address}"


def weights(run_dir: Path) -> dict[str, bytes]:
    found = load_file(run_dir / "checkpoints" / "step-00000040" / "net.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def logged(run_dir: Path) -> dict[tuple[str, int], float]:
    """The first value of each key and step that training logged, without times and memory."""
    records = journal.first_values(journal.read_all(run_dir / "journal" / "rank0.jsonl"))
    return {(r["key"], r["step"]): r["value"] for r in records if not r["key"].startswith(("time/", "memory/"))}


def events(run_dir: Path, kind: str) -> list[journal.Record]:
    written = run_dir / "journal" / "rank0.jsonl"
    return [r for r in journal.read_all(written) if r.get("event") == kind] if written.exists() else []


def tracking_run(run_dir: Path) -> str:
    return str(json.loads((run_dir / "tracking.json").read_text())["run_id"])


def tracked(run_dir: Path, run_id: str) -> list[tuple[str, int]]:
    """The (key, step) of each metric in MLflow, repeated ones included; asserts that there is no other run."""
    client = connect(f"sqlite:///{run_dir.parent}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert [run.info.run_id for run in client.search_runs(experiments)] == [run_id]
    keys = client.get_run(run_id).data.metrics
    return sorted((key, point.step) for key in keys for point in client.get_metric_history(run_id, key))


@pytest.fixture(scope="module")
def whole(images: Path, ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    result = launch.train(recipe(images, on(ray_head)), run_dir)
    assert result.finished
    assert result.step == 40
    return run_dir


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that was trained in this process."""
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    launch.train(recipe(images, "compute.workers=0"), run_dir)
    return run_dir


def start(images: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """The same run with a driver in a process of its own."""
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_launch
config = test_launch.recipe(pathlib.Path({str(images)!r}), *{overrides!r})
test_launch.launch.train(config, pathlib.Path({str(run_dir)!r}))
"""
    log = open(run_dir.parent / f"{run_dir.name}.log", "wb")  # noqa: SIM115
    return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)


def command(images: Path, run_dir: Path, *overrides: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    """The same run by the command, in a session of its own as from a terminal; what it prints goes to `log`."""
    adaptnet = str(Path(sys.executable).parent / "adaptnet")
    line = [adaptnet, "train", "convnet_aig/toy", *settings(images), PATIENT, *overrides, "--run-dir", str(run_dir)]
    with open(log or run_dir.parent / f"{run_dir.name}.log", "wb") as printed:
        return subprocess.Popen(
            line,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # if these tests run behind `&`
        )


def wait_for(
    done: Callable[[], bool], what: str, seconds: float = 1800, process: subprocess.Popen[bytes] | None = None
) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        assert process is None or process.poll() is None, f"the driver ended before {what}"
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def passed(run_dir: Path, step: int) -> bool:
    return any((run_dir / "checkpoints" / f"step-{s:08d}" / "COMPLETE.json").exists() for s in range(step, 41))


def end_of(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a driver that is about to end, however busy the machine is."""
    return process.wait(timeout=1800)


def log_of(run_dir: Path) -> str:
    return (run_dir.parent / f"{run_dir.name}.log").read_text()[-3000:]


@pytest.mark.faults
def test_a_worker_killed_in_mid_epoch_leaves_no_trace_in_the_weights(
    images: Path, whole: Path, ray_head: Head, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(images, run_dir, on(ray_head))
    wait_for(lambda: passed(run_dir, 5), "the first checkpoint", process=process)
    victims = ray_head.workers()
    assert len(victims) == 2
    victims[-1].send_signal(signal.SIGKILL)
    assert end_of(process) == 0, log_of(run_dir)
    assert len(events(run_dir, "started")) == 2
    assert events(run_dir, "started")[1]["step"] >= 5
    assert weights(run_dir) == weights(whole)


@pytest.mark.faults
def test_a_killed_driver_is_succeeded_by_the_same_command_in_the_same_mlflow_run(
    images: Path, whole: Path, ray_head: Head, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(images, run_dir, on(ray_head))
    wait_for(lambda: passed(run_dir, 10), "a checkpoint", process=process)
    wait_for((run_dir / "tracking.json").exists, "the tracker's run", process=process)
    with fails(ResourceError, "lease.json", run_dir):  # its lease is held
        launch.train(recipe(images, on(ray_head)), run_dir)
    process.kill()
    process.wait()
    first_id = tracking_run(run_dir)
    wait_for(ray_head.is_idle, "the workers of a killed driver to end")

    result = launch.train(recipe(images, on(ray_head)), run_dir)
    assert result.finished and result.run_id == first_id
    assert events(run_dir, "resumed")[-1]["step"] >= 10
    assert weights(run_dir) == weights(whole)
    assert logged(run_dir) == logged(whole)
    sent = tracked(run_dir, first_id)
    assert {key for key in sent if not key[0].startswith("system/")} >= {
        key for key in logged(run_dir) if is_charted(key[0])
    }
    assert len(sent) == len(set(sent))

    before = (run_dir / "journal" / "rank0.jsonl").read_bytes()
    assert launch.train(recipe(images), run_dir).run_id == first_id  # the run is finished: nothing is repeated
    assert (run_dir / "journal" / "rank0.jsonl").read_bytes() == before
    assert tracked(run_dir, first_id) == sent


@pytest.mark.faults
def test_two_workers_replace_a_truncated_jpeg_stop_at_ctrl_c_and_one_resumes(images: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    shutil.copytree(images, damaged)
    victim = sorted((damaged / "train").rglob("*.jpg"))[7]
    victim.write_bytes(victim.read_bytes()[:200])
    run_dir = tmp_path / "run"
    long = ("training.epochs=20", "checkpoint.every=20 steps", "logging.every=2 steps")  # 200 steps
    process = command(damaged, run_dir, *long)
    wait_for(lambda: passed(run_dir, 20), "two full epochs", process=process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the driver and to its child processes
    assert end_of(process) == 130, log_of(run_dir)
    assert not events(run_dir, "resumed")  # no worker was lost
    stopped = json.loads((run_dir / "status.json").read_text())
    assert not stopped["finished"] and 20 <= stopped["step"] < 200
    assert [image["file"] for image in json.loads((run_dir / "bad_images.json").read_text())] == [
        str(victim.relative_to(damaged))
    ]
    assert {event["file"] for event in events(run_dir, "bad-image")} == {str(victim.relative_to(damaged))}

    result = launch.train(recipe(damaged, "compute.workers=0", *long), run_dir)
    assert result.finished and result.step == 200
    warnings = [event["text"] for event in [*events(run_dir, "remark"), *events(run_dir, "warning")]]
    assert any(text.startswith("2 workers before, 1 now") for text in warnings)
    resumed = events(run_dir, "resumed")[-1]
    assert resumed["step"] == stopped["step"] == events(run_dir, "started")[-1]["step"]
    assert [event["workers"] for event in events(run_dir, "started")] == [2, 1]
    seen = torch.load(run_dir / "checkpoints" / "step-00000200" / "state.pt", weights_only=True)["images_seen"]
    assert seen == 200 * 32


@pytest.mark.faults
def test_a_driver_on_sigterm_has_its_workers_save_and_exits_with_75(
    images: Path, ray_head: Head, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    long = ("training.epochs=20", "checkpoint.every=100 steps", "evaluation.every=20 epochs")
    process = command(images, run_dir, *long, on(ray_head))
    wait_for(lambda: bool(events(run_dir, "started")), "training", process=process)
    process.terminate()
    assert end_of(process) == 75, log_of(run_dir)
    stopped = json.loads((run_dir / "status.json").read_text())
    assert not stopped["finished"]
    assert (run_dir / "checkpoints" / stopped["last"] / "COMPLETE.json").exists()
    assert not events(run_dir, "resumed")


@pytest.mark.long
def test_a_run_starts_from_the_weights_of_another(images: Path, alone: Path, tmp_path: Path) -> None:
    here = (
        "compute.workers=0",
        "training.epochs=0.1",
        "training.schedule.warmup_epochs=0",
        "training.optimizer.lr=1e-9",
    )
    launch.train(recipe(images, *here, f"training.start_from={alone}"), tmp_path / "run")  # its best is its last
    theirs = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "net.safetensors")
    for name, value in load_file(alone / "checkpoints" / "step-00000040" / "net.safetensors").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(theirs[name], value)
    gone = f"training.start_from={tmp_path}/gone/{alone.name}"
    assert launch.train(recipe(images, *here, gone), tmp_path / "run").finished  # weights are read at step 0 only
    with fails(ConfigError, "weights"):  # they do not fit the net
        start = f"training.start_from={alone}/checkpoints/step-00000040/net.safetensors"
        launch.train(recipe(images, *here, start, "family.depth=14"), tmp_path / "other")
    (tmp_path / "empty.pt").touch()
    with fails(CheckpointError, "weights", tmp_path / "empty.pt"):
        launch.train(recipe(images, *here, f"training.start_from={tmp_path}/empty.pt"), tmp_path / "none")
    with fails(CheckpointError, "weights", images):  # a folder without weights
        launch.train(recipe(images, *here, f"training.start_from={images}"), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_more_bad_images_than_the_share_allowed_end_the_run(images: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    shutil.copytree(images, damaged)
    for victim in sorted((damaged / "train").rglob("*.jpg"))[:8]:
        victim.write_bytes(b"")
    with fails(DataError, "data.max_bad_share"):
        launch.train(recipe(damaged, "compute.workers=0", "data.max_bad_share=0.01"), tmp_path / "run")


def test_a_users_mistakes_are_errors_of_their_kind(images: Path, alone: Path, tmp_path: Path) -> None:
    here = ("compute.workers=0",)
    with fails(CheckpointError, "training.optimizer.lr"):
        launch.train(recipe(images, "training.optimizer.lr=0.2", *here), alone)
    with fails(ConfigError, "training.batch_size"):  # a worker would get no image
        launch.train(recipe(images, "compute.workers=8", "training.batch_size=4"), tmp_path / "few")
    with fails(DataError, "data.root", tmp_path / "nowhere"):
        launch.train(recipe(images, f"data.root={tmp_path}/nowhere", *here), tmp_path / "none")
    (tmp_path / "file").touch()
    with fails(ResourceError, "--run-dir", tmp_path / "file" / "run"):
        launch.train(recipe(images, *here), tmp_path / "file" / "run")
    with fails(ConfigError, "--run-dir", alone.parent):  # it holds other runs
        launch.train(recipe(images, *here), alone.parent)
    with fails(DivergedError, "training.optimizer.lr"):
        flat = ("training.schedule.kind=constant", "training.schedule.warmup_epochs=0")
        config = recipe(images, *flat, *here)
        optimizer = config.training.optimizer.model_copy(update={"lr": 1e30})  # no recipe may say so
        hot = config.training.model_copy(update={"optimizer": optimizer})
        launch.train(config.model_copy(update={"training": hot}), tmp_path / "hot")


def test_the_command_prints_user_errors_without_a_traceback_and_exits_2(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "adaptnet"), "train", "convnet_aig/toi", "training.epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
    assert done.returncode == 2
    assert done.stderr.startswith("adaptnet: ") and "Traceback" not in done.stderr


def test_a_run_is_evaluated_from_its_folder_and_from_a_checkpoint(alone: Path, tmp_path: Path) -> None:
    first = evaluations.evaluate(str(alone), ["evaluation.latency_repeats=0"], out=tmp_path / "a")
    again = evaluations.evaluate(
        str(alone / "checkpoints" / "step-00000040"),
        ["evaluation.batch_size=7"],
        policies=["gates-hard"],
        out=tmp_path / "b",
    )
    part = evaluations.evaluate(str(alone), ["evaluation.latency_repeats=0"], policies=["gates-hard"])
    whole = evaluations.evaluate(str(alone), ["evaluation.latency_repeats=0"])
    assert part.folder.parent == whole.folder.parent and part.folder != whole.folder  # a part replaces nothing
    early = evaluations.evaluate(str(alone / "checkpoints" / "step-00000040"), ["evaluation.latency_repeats=0"])
    assert early.folder.name == f"step-00000040-{whole.folder.name}"  # nor does another checkpoint
    stored = json.loads((alone / "evaluations" / "final" / "reports.json").read_text())
    assert [report.policy for report in first.reports] == [report["policy"] for report in stored]
    assert first.reports[0].num_images == 80
    assert [report.policy for report in again.reports] == ["gates-hard"]
    with fails(ConfigError, "evaluation.policies", "gates-soft"):
        evaluations.evaluate(str(alone), policies=["gates-soft"], out=tmp_path / "c")
    with fails(ConfigError, "compute.device", "cuda"):
        evaluations.evaluate(str(alone), ["compute.device=cuda"], out=tmp_path / "d")


def test_every_world_size_of_an_elastic_run_is_checked_before_it_starts(images: Path, tmp_path: Path) -> None:
    sizes = ["compute.workers=[3,5]", "training.batch_size=10", "compute.max_batch_per_worker=1"]
    with fails(ConfigError, "compute.max_batch_per_worker"):  # one of 3 workers gets 3 images for 4 micro-batches
        launch.train(recipe(images, *sizes), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "key", "names"),
    [
        (["compute.max_batch_per_worker=1"], "compute.max_batch_per_worker", "BatchNorm"),
        (["training.batch_size=33", "compute.max_batch_per_worker=2"], "compute.max_batch_per_worker", "BatchNorm"),
        (["training.batch_size=1"], "training.batch_size", "BatchNorm"),
        (["training.batch_size=1", "data.augment.mixup_alpha=0.2"], "training.batch_size", "mixup and BatchNorm"),
        (
            ["training.batch_size=1", "family.gate_batchnorm=false", "data.augment.cutmix_alpha=1"],
            "training.batch_size",
            "cutmix",
        ),
    ],
)
def test_single_images_where_something_needs_several_are_refused_before_the_start(
    images: Path, tmp_path: Path, overrides: list[str], key: str, names: str
) -> None:
    with fails(ConfigError, key) as caught:
        launch.train(recipe(images, "compute.workers=0", *overrides), tmp_path / "refused")
    assert names in str(caught.value)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.compile=true"],
        ["compute.max_batch_per_worker=8"],
        ["data.side_schedule=[[1,24]]"],
        ["data.side_choices=[24,32]"],
    ],
)
def test_steps_that_differ_in_shape_are_not_recorded_as_graphs(
    images: Path, tmp_path: Path, overrides: list[str]
) -> None:
    with fails(ConfigError, "training.cuda_graphs"):
        launch.train(recipe(images, "compute.workers=0", "training.cuda_graphs=true", *overrides), tmp_path / "refused")
    with fails(ConfigError, "training.cuda_graphs"):
        random = [f"data.root={images}", "compute.workers=0", "training.cuda_graphs=true"]
        launch.train(run_config.load("arrn/toy", random), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_trainer_starts_no_process_for_ray_data(tmp_path: Path) -> None:
    trainer = ray_train.Trainer(lambda: None, run_config=RayRunConfig(storage_path=str(tmp_path)))
    names = {type(each).__name__ for each in trainer._create_default_callbacks()}
    assert "PlacementGroupCleanerCallback" in names and "DatasetsCallback" not in names


def test_the_first_failure_is_that_of_a_lost_process() -> None:
    """The other workers' errors, that its connection closed, are only a consequence."""
    peer, killed = RuntimeError("Connection closed by peer"), ActorDiedError()
    failures = ray_train.worker_failures(WorkerGroupError("two", {0: peer, 1: killed}))
    assert failures == [killed, peer]
    assert [ray_train.process_lost(each) for each in failures] == [True, False]
    assert ray_train.peer_lost(peer) and not ray_train.peer_lost(ValueError("closed"))
    (other,) = ray_train.worker_failures(TimeoutError("no workers"))
    assert isinstance(other, TimeoutError)


@dataclass
class Fitting:
    """A trainer whose fit lasts so long, or until `over` is set, and then fails if it has an error."""

    lasts_s: float
    error: Exception | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def fit(self) -> None:
        self.over.wait(self.lasts_s)
        if self.error is not None:
            raise self.error


def test_a_stop_ends_a_start_that_lasts_and_hides_no_failure() -> None:
    class Stopping:
        error, stops_unstarted = None, True

    class StoppingAtItsEnd:
        error = None

        @property
        def stops_unstarted(self) -> bool:
            wait_for(lambda: not any(thread.name == "fit" for thread in threading.enumerate()), "the end of fit", 60)
            return True

    lasting, failing = Fitting(60), Fitting(0.1, ResourceError("the disk is full", key="disk"))
    assert not launch._fit(lasting.fit, Stopping())  # type: ignore[arg-type]
    lasting.over.set()
    with fails(ResourceError, "disk"):
        launch._fit(failing.fit, StoppingAtItsEnd())  # type: ignore[arg-type]


def test_that_the_machine_ran_out_of_memory_is_told_without_rays_advice() -> None:
    """Ray 2.60's text, as its raylet puts it together."""
    error = RuntimeError(
        "1 worker(s) were killed due to the node running low on memory.\n"
        "Memory on the node (IP: 10.77.0.1, ID: 5f) was 22.91GB used / 23.54GB limit (0.973), which exceeds 0.95; "
        "Ray killed 1 worker(s) based on the killing policy\n"
        "Refer to the documentation on how to address the out of memory issue: somewhere. To disable it, set the"
    )
    told = launch._last_line(error)
    assert "22.91GB used / 23.54GB limit" in told and "documentation" not in told
    assert launch._last_line(ValueError("first\nlast.")) == "last"
