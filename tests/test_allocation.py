"""Ray over a job's nodes: one node's failure reaches the others, and no process outlives the task that started it."""

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
from raised import fails

from pipeline.errors import ResourceError
from pipeline.execution import allocation, sockets
from pipeline.execution.allocation import Node


def node(folder: Path, rank: int, ip: str, key: str = "7-0", patience_s: float = 300.0) -> Node:
    return Node(rank, ("first", "second"), ip, key, folder, cpus=1, gpus=0, patience_s=patience_s)


def test_other_nodes_fail_at_once_where_the_head_does_not_start(tmp_path: Path) -> None:
    with (
        fails(ResourceError, "NodeAddr", "192.0.2.1"),
        allocation.joined(node(tmp_path, 0, "192.0.2.1")),
    ):
        raise AssertionError("no machine has that address")
    began = time.monotonic()
    with (
        fails(ResourceError, "--nodes", "first"),
        allocation.joined(node(tmp_path, 1, "127.0.0.3")),
    ):
        raise AssertionError("there is no head")
    assert time.monotonic() - began < 200  # the patience of this node is 300 s
    assert {path.name for path in tmp_path.iterdir()} == {"7-0-head.json"}, "for a node that comes later still"


def test_a_node_without_a_head_fails_after_patience_s(tmp_path: Path) -> None:
    with (
        fails(ResourceError, "--run-dir", "first"),
        allocation.joined(node(tmp_path, 1, "127.0.0.3", patience_s=1.0)),
    ):
        raise AssertionError("there is no head")


def test_missing_nodes_are_named_with_the_reason(tmp_path: Path) -> None:
    """A node without an answer does not see the folder or has not started; one with an answer did not reach Ray."""
    head = node(tmp_path, 0, "127.0.0.2")
    member = allocation.JoinedNode(head, "127.0.0.2:1", subprocess.Popen(["true"]))
    member.ray.wait()
    error = member.missing(1)
    assert (error.key, error.subject) == ("--run-dir", "second")
    head.answer(1).write_text('{"name": "second"}')
    member.check_answers()
    error = member.missing(1)
    assert (error.key, error.subject) == ("patience_s", "127.0.0.2:1")
    head.answer(1).write_text('{"error": "second: Ray ended with exit code 1"}')
    with fails(ResourceError, "--nodes", "second"):
        member.check_answers()


HOLDS_A_FOLDER = """
import sys, time
from pathlib import Path
from pipeline.execution import allocation
with allocation.scratch(sys.argv[2], Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_folder_of_a_killed_task_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    prefix = f"adaptnet-{os.getuid()}-"
    foreign = [tmp_path / name for name in (f"{prefix}notes", f"adaptnet-{os.getuid() + 1}-7-0-0")]
    for folder in foreign:
        folder.mkdir()
    (foreign[1] / "held").touch()
    env = {**os.environ, "PYTHONPATH": str(Path(allocation.__file__).parents[2])}
    tasks = {}
    for key in ("5-0-0", "6-0-0"):
        line = [sys.executable, "-c", HOLDS_A_FOLDER, str(tmp_path), key]
        tasks[key] = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert [task.stdout and task.stdout.readline() for task in tasks.values()] == ["held\n"] * 2
        tasks["5-0-0"].kill()
        tasks["5-0-0"].wait()
        assert (tmp_path / f"{prefix}5-0-0").is_dir()
        with allocation.scratch("7-0-1", tmp_path) as ray:
            mine = ray.parent
            names = {f"{prefix}6-0-0", f"{prefix}7-0-1", *(folder.name for folder in foreign)}
            assert {path.name for path in tmp_path.iterdir()} == names and mine.name in names
            assert mine.stat().st_mode & 0o777 == 0o700
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


def test_rays_environment_has_no_cpu_bindings_of_the_batch_system_and_no_other_clusters_tokens(tmp_path: Path) -> None:
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
    made = allocation.environment({**slow, **other, **kept}, node)
    assert not {*slow, *other} & set(made) and kept.items() <= made.items()
    assert made["RAY_AUTH_TOKEN_PATH"] == str(node.token)


DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "300.25"])  # as Ray starts processes
print("ready", flush=True)
time.sleep(300)
"""


@pytest.mark.faults
def test_a_ray_that_ignores_sigterm_is_killed_with_its_descendants() -> None:
    line = ["sh", "-c", allocation.SUPERVISED, "sh", sys.executable, "-c", DEAF]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        group = [each for each in psutil.process_iter() if each.is_running() and _group(each) == process.pid]
        assert len(group) == 3
        process.terminate()
        time.sleep(2)
        assert process.poll() is None
        process.terminate()  # a second time changes nothing
        process.wait(300)
    _, alive = psutil.wait_procs(group, timeout=300)
    assert not alive


def test_the_exit_code_of_a_ray_that_ends_by_itself_is_passed_on() -> None:
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
    """A task that runs a head, as the first node's does, and its key."""
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
def test_rays_head_ends_with_the_task_that_runs_it_even_if_that_is_killed(
    holder: tuple[subprocess.Popen[str], str],
) -> None:
    """Otherwise the other nodes would keep running, and the job would occupy its nodes to the end of its time."""
    process, key = holder
    assert process.stdout
    address = process.stdout.readline().strip()
    assert sockets.listens(address) and ours(key)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 300
    while (ours(key) or sockets.listens(address)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ours(key) and not sockets.listens(address)
