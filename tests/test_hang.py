"""A frozen process is reported with the time and its Python line; the run resumes from its newest checkpoint."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_here import Head
from test_launch import (
    alive,
    alone,
    command,
    end_of,
    events,
    images,
    log_of,
    on,
    passed,
    recipe,
    wait_for,
    weights,
    whole,
)

from pipeline.runs import journal, records
from pipeline.tracking import summaries

__all__ = ["alone", "images", "recipe", "whole"]  # fixtures
CPP_LINE = re.compile(r"^\[[-0-9]+ [:,0-9]+ [DIWEF] [0-9]+ [0-9]+\]|^\*\*\* |^ +@ ", re.MULTILINE)  # of Ray's C++ code


def of_driver(run_dir: Path, kind: str) -> list[journal.Record]:
    written = run_dir / "journal" / "driver.jsonl"
    return [r for r in journal.read_all(written) if r.get("event") == kind] if written.exists() else []


@pytest.mark.faults
@pytest.mark.ray
def test_a_stopped_rank_is_told_and_the_run_restarts_with_the_same_weights(
    images: Path, whole: Path, ray_head: Head, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = command(
        images, run_dir, on(ray_head), "compute.workers=2", "compute.hang_after_s=8", "compute.max_failures=9"
    )
    wait_for(lambda: passed(run_dir, 5), "the first checkpoint", process=process)
    wait_for(lambda: len(ray_head.workers()) == 2, "the end of earlier workers", process=process)
    victim = ray_head.workers()[-1]
    victim.send_signal(signal.SIGSTOP)
    wait_for(lambda: bool(of_driver(run_dir, "hang")), "the report", process=process)
    assert end_of(process) == 0, log_of(run_dir)
    assert not alive(victim)
    hang, restart = of_driver(run_dir, "hang")[0], of_driver(run_dir, "restart")[0]
    assert "is stopped (state T)" in hang["reason"] and hang["reason"] in restart["reason"]
    printed = (run_dir.parent / f"{run_dir.name}.log").read_text()
    report = (run_dir / hang["report"]).read_text()
    for text in (printed, report):
        assert f"process {victim.pid}" in text
        assert re.search(
            r"worker\.py\", line \d+ in (train|save)|in (train_step|agree)", text
        )  # where the other rank waits
        assert "last journal event" in text
    assert "(raylet)" not in printed
    assert events(run_dir, "resumed")
    assert weights(run_dir) == weights(whole)


@pytest.fixture
def file_server(images: Path, tmp_path: Path) -> Iterator[tuple[Path, psutil.Popen]]:
    """A folder that shows the images, and the process that serves it: nothing can be read while that is stopped."""
    if shutil.which("bindfs") is None or not Path("/dev/fuse").exists():
        pytest.skip("needs bindfs (apt-get install bindfs) and /dev/fuse")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    with psutil.Popen(["bindfs", "-f", str(images), str(mounted)], stderr=subprocess.PIPE) as served:
        deadline = time.monotonic() + 30
        while not mounted.is_mount() and served.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if not mounted.is_mount():
            served.kill()
            pytest.skip(f"bindfs cannot mount here: {served.stderr.read().decode().strip()}")
        try:
            yield mounted, served
        finally:
            served.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "--lazy", str(mounted)], check=True)
            served.kill()  # another mount namespace may hold a copy of the mount, for which it would stay


@pytest.mark.faults
@pytest.mark.ray
def test_images_that_cannot_be_read_are_told_and_the_run_goes_on_once_they_can(
    images: Path, alone: Path, file_server: tuple[Path, psutil.Popen], tmp_path: Path
) -> None:
    """First the driver waits for them while it reads the index, then the rank between two steps."""
    (mounted, served), run_dir = file_server, tmp_path / "run"
    served.suspend()
    small = ("compute.workers=1", "compute.hang_after_s=6", "compute.max_failures=9", "data.in_memory=false")
    process = command(mounted, run_dir, *small)
    log = run_dir.parent / f"{run_dir.name}.log"
    wait_for(lambda: "no progress: the driver" in log.read_text(), "the driver's report", process=process)
    assert 'File "pipeline/data/' in log.read_text()
    served.resume()
    wait_for(lambda: passed(run_dir, 5), "the first checkpoint", process=process)
    served.suspend()
    wait_for(lambda: len(of_driver(run_dir, "hang")) == 2, "the rank's report", process=process)
    served.resume()  # until then a process that is being killed may not end, so that Ray starts no other
    assert "rank 0" in of_driver(run_dir, "hang")[1]["reason"] and "waiting for data" in log.read_text()
    assert 'File "pipeline/data/' in log.read_text().partition("rank 0 on")[2]
    assert end_of(process) == 0, log_of(run_dir)
    assert events(run_dir, "resumed")
    assert weights(run_dir) == weights(alone)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which `fsfreeze` can stop."""
    image, mounted = tmp_path / "image", tmp_path / "disk"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(200 << 20)
    made = shutil.which("mkfs.ext4") and shutil.which("fsfreeze")
    if not made or subprocess.run(["mkfs.ext4", "-q", str(image)]).returncode:
        pytest.skip("needs mkfs.ext4 and fsfreeze")
    if subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], capture_output=True).returncode:
        pytest.skip("mounting a file system of its own needs root and a loop device")
    try:
        yield mounted
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(mounted)], capture_output=True)
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.parametrize("when", ["... starting\n", "[started]"])
def test_a_run_folder_that_does_not_answer_is_told_whatever_the_run_does(
    images: Path, alone: Path, disk: Path, tmp_path: Path, when: str
) -> None:
    run_dir = disk / "runs" / "run"
    run_dir.parent.mkdir()
    log = tmp_path / "run.log"
    small = ("compute.workers=1", "compute.hang_after_s=6", "compute.max_failures=9")
    process = command(images, run_dir, *small, log=log)
    wait_for(lambda: when in log.read_text(), when, process=process)
    subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
    wait_for(lambda: "has not answered since" in log.read_text(), "the report", 300, process=process)
    subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)
    assert end_of(process) == 0, log.read_text()
    reason = of_driver(run_dir, "hang")[0]["reason"]
    assert "rank 0" in reason and ("step 0" in reason) == when.startswith("..."), reason
    assert weights(run_dir) == weights(alone)


def name_of(process: psutil.Process) -> str:
    """Its name; "" once it has ended."""
    try:
        return process.name()
    except psutil.Error:
        return ""


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_ray_ends_the_run_with_one_sentence_and_the_same_command_resumes(
    images: Path, alone: Path, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    """Of a Ray that the run has started itself; none of its processes is left, and its dumps are in ray.log."""
    run_dir, small = tmp_path / "run", ("compute.workers=1", "compute.hang_after_s=8")
    process = command(images, run_dir, *small)
    wait_for(lambda: passed(run_dir, 5), "the first checkpoint", process=process)
    family = psutil.Process(process.pid).children(recursive=True)
    (victim,) = (each for each in family if each.name() == name)
    victim.send_signal(number)
    assert end_of(process) in (0, 2), log_of(run_dir)  # 0 if it was done before it needed Ray
    wait_for(lambda: not any(map(alive, family)), "the end of Ray's processes")
    printed = (run_dir.parent / f"{run_dir.name}.log").read_text()
    assert "Traceback" not in printed and not CPP_LINE.search(printed), printed[-3000:]
    assert process.returncode == 0 or of_driver(run_dir, "hang") or of_driver(run_dir, "ray-frozen"), printed[-3000:]
    again = command(images, run_dir, *small)
    assert end_of(again) == 0, log_of(run_dir)
    assert weights(run_dir) == weights(alone)


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "number", "after_s"),
    [
        ("gcs_server", signal.SIGKILL, 0.5),
        ("raylet", signal.SIGKILL, 3.0),
        ("raylet", signal.SIGSTOP, 3.0),
    ],
)
def test_a_ray_that_is_lost_before_its_workers_start_ends_the_run_with_one_sentence(
    images: Path, tmp_path: Path, name: str, number: signal.Signals, after_s: float
) -> None:
    """While Ray starts, while it is asked for its resources, or while the workers are started; by default limits."""
    run_dir = tmp_path / "run"
    process = command(images, run_dir, "compute.workers=1", "training.epochs=1")
    wait_for(lambda: name in map(name_of, psutil.Process(process.pid).children()), name, process=process)
    time.sleep(after_s)
    family = psutil.Process(process.pid).children(recursive=True)
    for victim in (each for each in family if name_of(each) == name):
        victim.send_signal(number)
    printed = tmp_path / "run.log"
    code = end_of(process)
    if code == 1:  # by Ray's own code, at once; the guardian says so a moment later
        wait_for(lambda: "ended with exit code 1" in printed.read_text(), "what the guardian says")
    text = printed.read_text()
    assert code in (1, 2), text[-3000:]
    assert re.search(f"Ray's {name}|Ray could not be started|see ray.log", text), text[-3000:]
    wait_for(lambda: not any(map(alive, family)), "the end of Ray's processes")
    assert "Traceback" not in text and not CPP_LINE.search(text)
    if number == signal.SIGSTOP:
        assert end_of(command(images, run_dir, "compute.workers=1", "training.epochs=1")) == 0, log_of(run_dir)


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.parametrize("ready", ["lease.json", "config.yaml", "ray"])
def test_a_stop_while_ray_starts_ends_the_run_before_its_workers_start(
    images: Path, alone: Path, tmp_path: Path, ready: str
) -> None:
    run_dir = tmp_path / "run"
    process = command(images, run_dir, "compute.workers=1")
    wait_for(lambda: (run_dir / ready).exists(), ready, process=process)
    process.terminate()
    began = time.monotonic()
    assert end_of(process) == 75, log_of(run_dir)
    print(f"ended {time.monotonic() - began:.1f} s after the signal at {ready}")
    status = records.read_status(run_dir)
    assert not status.finished and status.step == 0 and not events(run_dir, "started")
    assert summaries(run_dir)[0].status == "STOPPED"
    assert end_of(command(images, run_dir, "compute.workers=1")) == 0, log_of(run_dir)
    assert weights(run_dir) == weights(alone)
