"""How many trials the connected Ray cluster holds at once; what cannot be held at all is refused with the numbers.

A trial's driver is a thread of the sweep's process and takes no slot of its own, so that a trial needs its workers and
nothing else: where one fits, it runs.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from pipeline.errors import ResourceError
from pipeline.execution import cluster
from pipeline.run_config import ComputeConfig


def slots(compute: ComputeConfig) -> int:
    """Trials of this size that the cluster's nodes hold if nothing else runs on them.

    Raises ResourceError where not one does.
    """
    one, nodes = _of_worker(compute), _nodes()
    fewest, workers = max(1, compute.fewest_workers), sum(cluster.fitting(node, one) for node in nodes)
    if workers < fewest:
        needs = ", ".join(f"{amount:g} {name}s" for name, amount in one.items())
        offers = "; ".join(
            ", ".join(f"{node.get(name, 0):g} {name}s" for name in one) for node in nodes if any(map(node.get, one))
        )
        raise ResourceError(
            f"a trial is {fewest} workers (compute.workers) of {needs} each; the cluster's nodes have "
            f"{offers or 'none'}: room for {workers}. Set compute.workers or cpus_per_worker lower, or add nodes"
        )
    return _trials(compute, workers)


def _trials(compute: ComputeConfig, workers: int) -> int:
    """Trials of the room for so many workers: of elastic ones as many as may grow to their most, and one at least."""
    fewest, most = max(1, compute.fewest_workers), max(1, compute.most_workers)
    return max(workers // most, min(1, workers // fewest))


def free(compute: ComputeConfig, running: int) -> int:
    """Trials that may be started beside the `running` ones, given what others hold of the cluster just now.

    What our own trials take is counted as taken even while they start. Nodes that came later count, lost ones do not.
    """
    import ray

    held = _trials(compute, sum(cluster.fitting(node, _of_worker(compute)) for node in _nodes()))
    each = cluster.demand(compute, max(1, compute.fewest_workers), gpu=cluster.computes_on_gpu(compute))
    whole, now = ray.cluster_resources(), ray.available_resources()
    found = []
    for name, amount in each.items():
        ours = running * amount
        others = max(0.0, whole.get(name, 0) - now.get(name, 0) - ours)
        found.append(int((whole.get(name, 0) - ours - others + 1e-6) // amount))
    return max(0, min([*found, held - running]))


def alive() -> bool:
    """Whether the cluster's head listens and a node of it lives."""
    return listens(head()) and bool(_nodes())


def head() -> str:
    """HOST:PORT of the head of the cluster that this process has joined."""
    import ray

    address: str = ray.get_runtime_context().gcs_address
    return address


def listens(address: str) -> bool:
    """Whether something takes connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _nodes() -> list[Mapping[str, float]]:
    """What each living node has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _of_worker(compute: ComputeConfig) -> dict[str, float]:
    return cluster.demand(compute, 1, gpu=cluster.computes_on_gpu(compute))
