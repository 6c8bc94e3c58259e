"""Laws of a whole run under Ray: kills cost the steps since the last checkpoint and change nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline import run_config
from pipeline.data import toy
from pipeline.deploy import evaluations
from pipeline.errors import CheckpointError, ConfigError, DataError, DivergedError, ResourceError
from pipeline.execution import launch
from pipeline.execution.worker import Order
from pipeline.run_config import ComputeConfig, RunConfig
from pipeline.runs import journal
from pipeline.tracking import connect

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small toy set: 320 training images, 80 to validate on."""
    folder = tmp_path_factory.mktemp("toy") / "set"
    toy.make(folder, num_classes=4, train=320, val=80, side_px=32, seed=5)
    return folder


def recipe(images: Path, *overrides: str) -> RunConfig:
    """convnet_aig/toy made small: 40 steps of 32 images in two workers, saved every 5 steps."""
    return run_config.load("convnet_aig/toy", [*settings(images), *overrides])


def settings(images: Path) -> list[str]:
    small = ["family.depth=8", "training.batch_size=32", "training.epochs=4", "checkpoint.every=5 steps"]
    quiet = ["tracking.register=null", "evaluation.latency_repeats=0", "logging.every=5 steps", f"data.root={images}"]
    return [*small, *quiet, "evaluation.every=2 epochs"]


def weights(run_dir: Path) -> dict[str, bytes]:
    found = load_file(run_dir / "checkpoints" / "step-00000040" / "net.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def logged(run_dir: Path) -> dict[tuple[str, int], float]:
    """First values of what training logged, times left out."""
    records = journal.first_values(journal.read_all(run_dir / "journal" / "rank0.jsonl"))
    return {(r["key"], r["step"]): r["value"] for r in records if not r["key"].startswith("time/")}


def events(run_dir: Path, kind: str) -> list[journal.Record]:
    written = run_dir / "journal" / "rank0.jsonl"
    return [r for r in journal.read_all(written) if r.get("event") == kind] if written.exists() else []


def tracking_run(run_dir: Path) -> str:
    return str(json.loads((run_dir / "tracking.json").read_text())["run_id"])


def tracked(run_dir: Path, run_id: str) -> list[tuple[str, int]]:
    """Each (key, step) that MLflow holds, as often as it holds it; the tracking file has no other run."""
    client = connect(f"sqlite:///{run_dir.parent}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert [run.info.run_id for run in client.search_runs(experiments)] == [run_id]
    keys = client.get_run(run_id).data.metrics
    return sorted((key, point.step) for key in keys for point in client.get_metric_history(run_id, key))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run's folder."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    result = launch.train(recipe(images), run_dir)
    assert result.finished
    assert result.step == 40
    return run_dir


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder, trained in this process."""
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    launch.train(recipe(images, "compute.workers=0"), run_dir)
    return run_dir


def start(images: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """The same run driven by a process of its own."""
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_launch
config = test_launch.recipe(pathlib.Path({str(images)!r}), *{overrides!r})
test_launch.launch.train(config, pathlib.Path({str(run_dir)!r}))
"""
    log = open(run_dir.parent / f"{run_dir.name}.log", "wb")  # noqa: SIM115
    return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)


def command(images: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """The same by the command, in a session of its own as a terminal's are."""
    adaptnet = str(Path(sys.executable).parent / "adaptnet")
    words = [adaptnet, "train", "convnet_aig/toy", *settings(images), *overrides, "--run-dir", str(run_dir)]
    with open(run_dir.parent / f"{run_dir.name}.log", "wb") as log:
        return subprocess.Popen(
            words,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where these tests run behind `&`
        )


def wait_for(
    done: Callable[[], bool], what: str, seconds: float = 300, process: subprocess.Popen[bytes] | None = None
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


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def test_a_worker_killed_in_mid_epoch_leaves_no_trace_in_the_weights(images: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(images, run_dir)
    wait_for(lambda: passed(run_dir, 5), "the first checkpoint")
    victims = workers_of(process)
    assert len(victims) == 2
    victims[-1].send_signal(signal.SIGKILL)
    assert process.wait(timeout=400) == 0, (tmp_path / "run.log").read_text()[-3000:]
    assert len(events(run_dir, "started")) == 2
    assert events(run_dir, "started")[1]["step"] >= 5
    assert weights(run_dir) == weights(whole)


def test_a_driver_killed_is_succeeded_by_the_same_command_in_the_same_mlflow_run(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(images, run_dir)
    wait_for(lambda: passed(run_dir, 10), "a checkpoint", process=process)
    with pytest.raises(ResourceError, match=f"another driver is training here.*process {process.pid}"):
        launch.train(recipe(images), run_dir)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    first_id = tracking_run(run_dir)
    wait_for(lambda: not any(map(alive, family)), "the orphans of a killed driver to end")

    result = launch.train(recipe(images), run_dir)
    assert result.finished and result.run_id == first_id
    assert events(run_dir, "resumed")[-1]["step"] >= 10
    assert weights(run_dir) == weights(whole)
    assert logged(run_dir) == logged(whole)
    sent = tracked(run_dir, first_id)
    assert {key for key in sent if not key[0].startswith("system/")} >= set(logged(run_dir))
    assert len(sent) == len(set(sent))

    before = (run_dir / "journal" / "rank0.jsonl").read_bytes()
    assert launch.train(recipe(images), run_dir).run_id == first_id  # finished: nothing is done twice
    assert (run_dir / "journal" / "rank0.jsonl").read_bytes() == before
    assert tracked(run_dir, first_id) == sent


def test_two_workers_pass_a_truncated_jpeg_stop_at_ctrl_c_and_one_goes_on(images: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    shutil.copytree(images, damaged)
    victim = sorted((damaged / "train").rglob("*.jpg"))[7]
    victim.write_bytes(victim.read_bytes()[:200])
    run_dir = tmp_path / "run"
    long = ("training.epochs=20", "checkpoint.every=20 steps", "logging.every=2 steps")  # 200 steps
    process = command(damaged, run_dir, *long)
    wait_for(lambda: passed(run_dir, 20), "two full epochs", process=process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the driver and to whatever it started
    assert process.wait(timeout=600) == 130, (tmp_path / "run.log").read_text()[-3000:]
    assert "Ctrl-C again" in (tmp_path / "run.log").read_text()
    assert not events(run_dir, "resumed")  # no worker was lost
    stopped = json.loads((run_dir / "status.json").read_text())
    assert not stopped["finished"] and 20 <= stopped["step"] < 200
    assert [image["file"] for image in json.loads((run_dir / "bad_images.json").read_text())] == [
        str(victim.relative_to(damaged))
    ]
    found = events(run_dir, "bad-image")
    assert {event["file"] for event in found} == {str(victim.relative_to(damaged))}

    result = launch.train(recipe(damaged, "compute.workers=0", *long), run_dir)
    assert result.finished and result.step == 200
    remarks = [event["text"] for event in events(run_dir, "remark")]
    assert any("2 workers before, 1 now: BatchNorm takes its statistics over" in text for text in remarks)
    resumed = events(run_dir, "resumed")[-1]
    assert resumed["step"] == stopped["step"] == events(run_dir, "started")[-1]["step"]
    assert [event["workers"] for event in events(run_dir, "started")] == [2, 1]
    seen = torch.load(run_dir / "checkpoints" / "step-00000200" / "state.pt", weights_only=True)["images_seen"]
    assert seen == 200 * 32


def test_a_driver_that_is_terminated_has_its_workers_save_and_ends_well(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = command(images, run_dir, "training.epochs=20", "checkpoint.every=100 steps", "evaluation.every=20 epochs")
    wait_for(lambda: bool(events(run_dir, "started")), "training", process=process)
    process.terminate()
    assert process.wait(timeout=600) == 75, (tmp_path / "run.log").read_text()[-3000:]
    stopped = json.loads((run_dir / "status.json").read_text())
    assert not stopped["finished"]
    assert (run_dir / "checkpoints" / stopped["last"] / "COMPLETE.json").exists()
    assert not events(run_dir, "resumed")


def test_a_run_starts_from_the_weights_of_another(images: Path, alone: Path, tmp_path: Path) -> None:
    here = ("compute.workers=0", "training.epochs=0.1", "training.optimizer.lr=1e-9")
    launch.train(recipe(images, *here, f"training.start_from={alone}"), tmp_path / "run")  # its best is its last
    theirs = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "net.safetensors")
    for name, value in load_file(alone / "checkpoints" / "step-00000040" / "net.safetensors").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(theirs[name], value)
    gone = f"training.start_from={tmp_path}/gone/{alone.name}"
    assert launch.train(recipe(images, *here, gone), tmp_path / "run").finished  # they were needed at the start alone
    with pytest.raises(ConfigError, match=r"do not fit the net: of another shape: fc\.weight|not used"):
        start = f"training.start_from={alone}/checkpoints/step-00000040/net.safetensors"
        launch.train(recipe(images, *here, start, "family.depth=14"), tmp_path / "other")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match=r"empty\.pt: no weights can be read"):
        launch.train(recipe(images, *here, f"training.start_from={tmp_path}/empty.pt"), tmp_path / "none")
    with pytest.raises(CheckpointError, match="a folder without weights; looked for ema"):
        launch.train(recipe(images, *here, f"training.start_from={images}"), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_more_bad_images_than_the_share_allowed_end_the_run(images: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    shutil.copytree(images, damaged)
    for victim in sorted((damaged / "train").rglob("*.jpg"))[:8]:
        victim.write_bytes(b"")
    with pytest.raises(DataError, match=r"max_bad_share"):
        launch.train(recipe(damaged, "compute.workers=0", "data.max_bad_share=0.01"), tmp_path / "run")


def test_what_a_user_can_get_wrong_is_said_once_and_clearly(images: Path, alone: Path, tmp_path: Path) -> None:
    here = ("compute.workers=0",)
    with pytest.raises(CheckpointError, match=r"training\.optimizer\.lr: 0\.1 there, 0\.2 now"):
        launch.train(recipe(images, "training.optimizer.lr=0.2", *here), alone)
    with pytest.raises(ConfigError, match="is below the 8 workers"):
        launch.train(recipe(images, "compute.workers=8", "training.batch_size=4"), tmp_path / "few")
    with pytest.raises(DataError, match="nowhere"):
        launch.train(recipe(images, f"data.root={tmp_path}/nowhere", *here), tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        launch.train(recipe(images, *here), tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=rf"holds other runs \({alone.name}\); give the run a folder of its own"):
        launch.train(recipe(images, *here), alone.parent)
    with pytest.raises(DivergedError, match="step"):
        hot = ("training.optimizer.lr=1e30", "training.schedule.kind=constant", "training.schedule.warmup_epochs=0")
        launch.train(recipe(images, *hot, *here), tmp_path / "hot")


def test_the_command_prints_user_errors_without_a_traceback_and_exits_2(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "adaptnet"), "train", "convnet_aig/toi", "training.epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
    assert done.returncode == 2
    assert "did you mean convnet_aig/toy?" in done.stderr
    assert "Traceback" not in done.stderr


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
    assert part.folder.parent == whole.folder.parent and part.folder != whole.folder  # nothing is replaced by less
    early = evaluations.evaluate(str(alone / "checkpoints" / "step-00000040"), ["evaluation.latency_repeats=0"])
    assert early.folder.name == f"step-00000040-{whole.folder.name}"  # nor by another checkpoint's
    stored = json.loads((alone / "evaluations" / "final" / "reports.json").read_text())
    assert [report.policy for report in first.reports] == [report["policy"] for report in stored]
    assert first.reports[0].num_images == 80
    assert [report.policy for report in again.reports] == ["gates-hard"]
    with pytest.raises(ConfigError, match="this net has: gates-hard"):
        evaluations.evaluate(str(alone), policies=["gates-soft"], out=tmp_path / "c")
    with pytest.raises(ConfigError, match=r"compute\.device \(=cuda\): torch sees no GPU here"):
        evaluations.evaluate(str(alone), ["compute.device=cuda"], out=tmp_path / "d")


def test_every_size_that_an_elastic_run_may_have_is_looked_at_first(images: Path, tmp_path: Path) -> None:
    sizes = ["compute.workers=[3,5]", "training.batch_size=10", "compute.max_batch_per_worker=1"]
    with pytest.raises(ConfigError, match=r"asks for 4 micro-batches; of a batch over 3 workers one gets 3 images"):
        launch.train(recipe(images, *sizes), tmp_path / "run")


def test_a_run_starts_no_process_for_data_sets_that_it_does_not_have(tmp_path: Path) -> None:
    trainer = launch._trainer(ComputeConfig(device="cpu"), Order({}, str(tmp_path), 1))
    names = {type(each).__name__ for each in trainer._create_default_callbacks()}
    assert "PlacementGroupCleanerCallback" in names and "DatasetsCallback" not in names
