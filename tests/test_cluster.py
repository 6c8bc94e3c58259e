"""Connecting to Ray: errors where it lacks what a run needs, tokens, and which code its workers import."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from raised import fails
from ray_here import Head

from pipeline.errors import ResourceError
from pipeline.execution import allocation
from pipeline.execution.allocation import Node
from pipeline.execution.cluster import cluster, cpu_share, demand, with_cpus
from pipeline.run_config import ComputeConfig

ROOT = Path(__file__).parents[1]


def test_an_address_where_nothing_listens_is_an_error_after_start_patience_s() -> None:
    with socket.socket() as taken:  # a port of ours on which nothing listens
        taken.bind(("127.0.0.1", 0))
        compute = ComputeConfig(address=f"127.0.0.1:{taken.getsockname()[1]}", start_patience_s=1.0)
        start = time.monotonic()
        with (
            fails(ResourceError, "compute.address", compute.address),
            cluster(compute),
        ):
            raise AssertionError("nothing listens there")
        assert time.monotonic() - start < 300


def test_the_demand_of_workers_is_a_sum() -> None:
    compute = ComputeConfig(cpus_per_worker=1.5)
    assert demand(compute, 4, gpu=False) == {"CPU": 6.0}
    assert demand(compute, 4, gpu=True) == {"CPU": 6.0, "GPU": 4.0}
    assert demand(compute.model_copy(update={"gpus_per_worker": 2}), 4, gpu=True) == {"CPU": 6.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("own", "nodes", "gpu", "cpus"),
    [
        ({"workers": 8}, [(16, 8)], True, 2),
        ({"workers": 4, "gpus_per_worker": 2}, [(16, 8)], True, 4),
        ({"workers": 16}, [(96, 8), (20, 8)], True, 2),
        ({"workers": 8}, [(4, 8), (64, 0)], True, 1),
        ({"workers": 4}, [(16, 0)], False, 4),
        ({"workers": (2, 3)}, [(9, 0), (8, 0)], False, 4),
        ({"workers": 4}, [(2, 0)], False, 1),
    ],
)
def test_the_cpus_of_a_node_are_shared_by_its_gpus_or_its_workers(
    own: dict[str, object], nodes: list[tuple[int, int]], gpu: bool, cpus: float
) -> None:
    compute = ComputeConfig(cpus_per_worker="auto", **own)  # type: ignore[arg-type]
    resources = [{"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})} for cpus, gpus in nodes]
    assert cpu_share(compute, resources, gpu=gpu) == cpus


def test_a_run_in_this_process_has_all_cpus_that_it_may_use() -> None:
    assert with_cpus(ComputeConfig(cpus_per_worker="auto", workers=0)).cpus == len(os.sched_getaffinity(0))
    assert with_cpus(ComputeConfig(cpus_per_worker=3.0)).cpus == 3


@pytest.mark.ray
def test_workers_that_share_a_nodes_cpus_fit_on_it(ray_head: Head) -> None:
    compute = ComputeConfig(workers=2, cpus_per_worker="auto", address=ray_head.address, device="cpu")
    with cluster(compute):
        import ray

        whole = ray.cluster_resources()["CPU"]
        assert whole / 2 <= demand(compute, 2, gpu=False)["CPU"] <= whole
        assert with_cpus(compute).cpus == demand(compute, 1, gpu=False)["CPU"]


@pytest.mark.ray
def test_more_workers_than_cpus_are_an_error_about_compute_workers(ray_head: Head) -> None:
    with (
        fails(ResourceError, "compute.workers", 4000),
        cluster(ComputeConfig(workers=4000, address=ray_head.address, device="cpu", start_patience_s=1.0)),
    ):
        raise AssertionError("no machine has as many")


VISITS = """
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
import psutil
import ray
from pipeline.execution.cluster import cluster
from pipeline.run_config import ComputeConfig

@ray.remote
def code(held):
    import pipeline
    return pipeline.__file__ + ray.get(held[0], timeout=300)  # a value that the driver holds

warnings = []
signal.signal(signal.SIGTERM, lambda *_: warnings.append(1))
def listeners():
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.Error):
            sockets = process.net_connections("inet")
            yield from (each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN)

for address in sys.argv[1:]:
    where = None if address == "here" else address
    with cluster(ComputeConfig(address=where, workers=1, device="cpu", start_patience_s=300)):
        os.kill(os.getpid(), signal.SIGTERM)
        print(address, ray.get(code.remote([ray.put("!")]), timeout=300), flush=True)
        if where is None:
            session = Path(ray._private.worker._global_node.get_session_dir_path())
            private = [oct(each.stat().st_mode & 0o777) for each in session.parents if each.name[:8] == "adaptnet"]
            print({ip.removeprefix("::ffff:") for ip in listeners()}, *private, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # Ray's own handler would end this process
print(len(warnings))
"""


@pytest.mark.faults
@pytest.mark.ray
def test_one_process_connects_to_clusters_with_a_token_without_one_and_to_its_own(
    ray_head: Head, tmp_path: Path
) -> None:
    """While its user has a token. Workers import our code, whatever the working directory holds.

    Its own Ray is on loopback, and its session folder within one of the user's alone.
    """
    ours = Path(allocation.__file__).parents[2]
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise AssertionError('edited')")
    (tmp_path / ".ray").mkdir()
    key = secrets.token_hex(4)
    node = Node(0, ("here",), "127.0.0.2", key, tmp_path / "letters", cpus=1, gpus=0, patience_s=300)
    with allocation.joined(node) as guarded:
        (tmp_path / ".ray" / "auth_token").write_text(node.token.read_text())
        visits = [ray_head.address, guarded.address, "here"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
        env = {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(ours), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-P", "-c", VISITS, *visits]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [f"{address} {ours}/pipeline/__init__.py!" for address in visits]
    assert done.stdout.splitlines() == [*lines, "{'127.0.0.1'} 0o700", str(2 * len(visits))]


# ---- a Ray that is lost while it starts

STAND_IN = "open('/proc/self/comm', 'w').write('gcs_server'); import time; time.sleep(600)"
STARTS = """
import signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from pipeline.execution import cluster, ray_processes
from pipeline.execution.cluster import _ended_with_ray

cluster.GIVEN_UP_S, cluster.STOPPED_AT_START_S, cluster.POLL_S = {given_up_s}, 1.0, 0.2
start = lambda code={stand_in!r}: subprocess.Popen([sys.executable, "-c", code])
def seen(process):
    while open(f"/proc/{{process.pid}}/comm").read().strip() != "gcs_server": time.sleep(0.05)
{before}
with _ended_with_ray(others):
    {inside}
    time.sleep(8)
print("started", flush=True)
for each in everything: each.kill()
"""


def starting(inside: str, before: str = "others, everything = (), []", given_up_s: float = 1.0) -> tuple[int, str, str]:
    """(status, output, error) of a process in which `inside` runs while Ray, a stand-in, starts."""
    code = STARTS.format(
        root=str(ROOT), stand_in=STAND_IN, before=before, inside=inside.replace("\n", "\n    "), given_up_s=given_up_s
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.mark.parametrize("signal_", ["SIGKILL", "SIGSTOP"])
def test_a_start_that_waits_for_a_lost_process_of_ray_ends_in_one_sentence_and_leaves_none(signal_: str) -> None:
    inside = "other, gcs = start(), start(); seen(other); seen(gcs); print(other.pid, gcs.pid, flush=True)\n"
    inside += "time.sleep(2)\n"
    code, printed, said = starting(inside + f"gcs.send_signal(signal.{signal_})")
    assert code == 2 and "started" not in printed and "gcs_server" in said and "Traceback" not in said, said
    deadline = time.monotonic() + 60
    while any(lives(int(pid)) for pid in printed.split()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("inside", "before"),
    [
        ("gcs = start(); seen(gcs); time.sleep(2); everything.append(gcs)", "others, everything = (), []"),
        (  # of another run, below a process that this one has started
            "run = start('import subprocess, sys, time; p = subprocess.Popen([sys.executable, \"-c\", '"
            f"+ repr({STAND_IN!r}) + ']); time.sleep(3); p.kill(); p.wait(); time.sleep(600)'); everything.append(run)",
            "others, everything = (), []",
        ),
        ("time.sleep(2); old.kill()", "old = start(); seen(old); others, everything = {old.pid}, []"),
        (  # stopped for a while
            "gcs = start(); seen(gcs); everything.append(gcs); time.sleep(1); gcs.send_signal(signal.SIGSTOP)\n"
            "time.sleep(3); gcs.send_signal(signal.SIGCONT)",
            "others, everything = (), []",
        ),
    ],
    ids=["living", "of another run", "of an earlier start", "resumed"],
)
def test_a_start_goes_on_unless_its_own_ray_is_lost(inside: str, before: str) -> None:
    code, printed, said = starting(inside, before, given_up_s=4.0)
    assert (code, printed.split(), said) == (0, ["started"], "")


def test_a_start_whose_ray_is_lost_is_left_to_its_own_error_first() -> None:
    inside = "gcs = start(); seen(gcs); time.sleep(2); gcs.kill(); time.sleep(2)\nraise OSError('of Ray')"
    code, _, said = starting(inside, given_up_s=6.0)
    assert code == 1 and "of Ray" in said
