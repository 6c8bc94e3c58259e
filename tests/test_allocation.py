"""Ray over a job's nodes: what fails on one is heard by the others, and nothing outlives the task that started it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.errors import ResourceError
from pipeline.execution import allocation
from pipeline.execution.allocation import Node


def node(folder: Path, rank: int, ip: str, key: str = "7-0", patience_s: float = 300.0) -> Node:
    return Node(rank, ("first", "second"), ip, key, folder, cpus=1, gpus=0, patience_s=patience_s)


def test_a_head_that_does_not_start_is_told_to_the_others_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=r"no port at 192\.0\.2\.1"),
        allocation.joined(node(tmp_path, 0, "192.0.2.1")),
    ):
        raise AssertionError("that address is nobody's")
    began = time.monotonic()
    with (
        pytest.raises(ResourceError, match=r"first, the head, did not start: .*no port at 192\.0\.2\.1"),
        allocation.joined(node(tmp_path, 1, "127.0.0.3")),
    ):
        raise AssertionError("there is no head")
    assert time.monotonic() - began < 200  # the patience of this node is 300 s
    assert {path.name for path in tmp_path.iterdir()} == {"7-0-head.json"}, "for a node that comes later still"


def test_a_head_that_is_not_heard_of_is_waited_for_as_long_as_there_is_patience(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=r"nothing was heard of the head, first, in .* within 1 s"),
        allocation.joined(node(tmp_path, 1, "127.0.0.3", patience_s=1.0)),
    ):
        raise AssertionError("there is no head")


def test_nodes_that_are_missing_are_named_and_why(tmp_path: Path) -> None:
    """One that has left no answer does not see the folder, or has not begun; one that has did not reach Ray."""
    head = node(tmp_path, 0, "127.0.0.2")
    member = allocation.JoinedNode(head, "127.0.0.2:1", subprocess.Popen(["true"]))
    member.ray.wait()
    said = str(member._missing(1))
    assert f"second: nothing was heard of these nodes in {tmp_path} within 300 s" in said and "--run-dir" in said
    head.answer(1).write_text('{"name": "second"}')
    member._check_answers()
    assert "1 of 2 nodes joined Ray at 127.0.0.2:1 within 300 s" in str(member._missing(1))
    head.answer(1).write_text('{"error": "second: Ray ended with exit code 1"}')
    with pytest.raises(ResourceError, match="second: Ray ended with exit code 1"):
        member._check_answers()


HOLDS_A_FOLDER = """
import sys, time
from pathlib import Path
from pipeline.execution import allocation
allocation.SCRATCH = Path(sys.argv[1])
with allocation._scratch(allocation.Node(0, ("first",), "127.0.0.2", sys.argv[2], Path("."), cpus=1, gpus=0)):
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_task_left_on_the_node_is_removed_and_what_a_living_one_holds_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "SCRATCH", tmp_path)
    prefix = f"adaptnet-{os.getuid()}-"
    foreign = [tmp_path / name for name in (f"{prefix}notes", f"adaptnet-{os.getuid() + 1}-7-0-0")]
    for folder in foreign:
        folder.mkdir()
    (foreign[1] / "held").touch()
    env = {**os.environ, "PYTHONPATH": str(Path(allocation.__file__).parents[2])}
    tasks = {}
    for key in ("5-0", "6-0"):
        line = [sys.executable, "-c", HOLDS_A_FOLDER, str(tmp_path), key]
        tasks[key] = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert [task.stdout and task.stdout.readline() for task in tasks.values()] == ["held\n"] * 2
        tasks["5-0"].kill()
        tasks["5-0"].wait()
        assert (tmp_path / f"{prefix}5-0-0").is_dir()
        with allocation._scratch(node(tmp_path, 1, "127.0.0.3")) as mine:
            names = {f"{prefix}6-0-0", f"{prefix}7-0-1", *(folder.name for folder in foreign)}
            assert {path.name for path in tmp_path.iterdir()} == names and mine.name in names
        assert not mine.exists() and (tmp_path / f"{prefix}6-0-0").is_dir()
    finally:
        for task in tasks.values():
            task.kill()
            task.wait()


HOLD = """
import json, sys, time
from pathlib import Path
from pipeline.execution.allocation import Node, joined
with joined(Node(0, ("first", "second"), "127.0.0.2", sys.argv[1], Path(sys.argv[2]), cpus=1, gpus=0)) as member:
    print(member.address, flush=True)
    time.sleep(300)
"""


def test_rays_environment_is_without_the_batch_systems_bindings_and_other_clusters(tmp_path: Path) -> None:
    node = Node(0, ("first",), "127.0.0.2", "7-0", tmp_path, cpus=1, gpus=0)
    slow = {
        "SLURM_CPU_BIND": "map",
        "SBATCH_X": "1",
        "OMP_NUM_THREADS": "1",
        "PMIX_RANK": "0",
        "SUBMITIT_EXECUTOR": "s",
    }
    other = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "theirs"}
    kept = {"HOME": "/home/me", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "first", "CUDA_VISIBLE_DEVICES": "0,1"}
    found = allocation._environment({**slow, **other, **kept}, node)
    assert not {*slow, *other} & set(found) and kept.items() <= found.items()
    assert found["RAY_AUTH_TOKEN_PATH"] == str(node.token)


DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "300.25"])  # as what Ray starts
print("there", flush=True)
time.sleep(300)
"""


def test_what_does_not_end_when_it_is_told_is_killed_with_all_that_it_started() -> None:
    line = ["sh", "-c", allocation.SUPERVISED, "sh", sys.executable, "-c", DEAF]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout and process.stdout.readline() == "there\n"
        group = [each for each in psutil.process_iter() if each.is_running() and _group(each) == process.pid]
        assert len(group) == 3
        process.terminate()
        time.sleep(2)
        assert process.poll() is None
        process.terminate()  # a second time changes nothing
        process.wait(300)
    _, alive = psutil.wait_procs(group, timeout=300)
    assert not alive


def test_how_ray_ends_by_itself_is_known() -> None:
    line = ["sh", "-c", allocation.SUPERVISED, "sh", "sh", "-c", "exit 7"]
    assert subprocess.run(line, start_new_session=True).returncode == 7


def _group(process: psutil.Process) -> int | None:
    with contextlib.suppress(OSError):
        return os.getpgid(process.pid)
    return None


def ours(key: str) -> list[psutil.Process]:
    sign = f"/tmp/adaptnet-{os.getuid()}-{key}-"
    return [each for each in psutil.process_iter(["cmdline"]) if sign in " ".join(each.info["cmdline"] or ())]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A task that holds a head, as the first node's does; and its key."""
    key = secrets.token_hex(4)
    env = {**os.environ, "PYTHONPATH": str(Path(allocation.__file__).parents[2])}
    line = [sys.executable, "-c", HOLD, key, str(tmp_path)]
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True)
    try:
        yield process, key
    finally:
        process.kill()
        for left in ours(key):
            left.kill()


@pytest.mark.ray
def test_rays_head_ends_with_the_task_that_holds_it_even_where_that_is_killed(
    holder: tuple[subprocess.Popen[str], str],
) -> None:
    """Else the other nodes would stay with it, and the job would hold its nodes to the end of its time."""
    process, key = holder
    assert process.stdout
    host, port = process.stdout.readline().strip().split(":")
    assert allocation._listens(host, int(port)) and ours(key)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 300
    while (ours(key) or allocation._listens(host, int(port))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ours(key) and not allocation._listens(host, int(port))
