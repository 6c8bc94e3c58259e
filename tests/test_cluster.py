"""Connecting to Ray: errors where it lacks what a run needs, tokens, and which code its workers import."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from raised import fails
from ray_here import Head

from pipeline.errors import ResourceError
from pipeline.execution import allocation
from pipeline.execution.allocation import Node
from pipeline.execution.cluster import cluster, cpu_share, demand, with_cpus
from pipeline.run_config import ComputeConfig


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
