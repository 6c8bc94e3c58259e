"""The number of trials that fit the connected Ray cluster.

A trial's driver is a thread of the sweep's process and needs no resources of its own: a trial needs its workers only.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import ResourceError
from pipeline.execution import cluster, sockets
from pipeline.run_config import ComputeConfig


def slots(compute: ComputeConfig) -> int:
    """The trials of this size that fit the cluster's nodes if nothing else runs there.

    Raises ResourceError with the numbers if not even one fits.
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
            f"{offers or 'none'}: room for {workers}. Lower compute.workers or compute.cpus_per_worker, or add nodes",
            key="compute.workers",
            subject=fewest,
        )
    return _trials(compute, workers)


def _trials(compute: ComputeConfig, workers: int) -> int:
    """The trials for which there are workers: elastic ones at their largest size, but at least one at its smallest."""
    fewest, most = max(1, compute.fewest_workers), max(1, compute.most_workers)
    return max(workers // most, min(1, workers // fewest))


def free(compute: ComputeConfig, running: int) -> int:
    """The trials that may start beside the `running` ones, without the resources that others use now.

    Resources of our own trials count as used even while they start. New nodes count at once, lost ones no more.
    """
    import ray

    capacity = _trials(compute, sum(cluster.fitting(node, _of_worker(compute)) for node in _nodes()))
    each = cluster.demand(compute, max(1, compute.fewest_workers), gpu=cluster.computes_on_gpu(compute))
    whole, now = ray.cluster_resources(), ray.available_resources()
    rooms = []
    for name, amount in each.items():
        ours = running * amount
        others = max(0.0, whole.get(name, 0) - now.get(name, 0) - ours)
        rooms.append(int((whole.get(name, 0) - ours - others + 1e-6) // amount))
    return max(0, min([*rooms, capacity - running]))


def alive() -> bool:
    """Whether the cluster's head accepts connections and the cluster has a node."""
    return sockets.listens(head()) and bool(_nodes())


def head() -> str:
    """HOST:PORT of the head of the cluster that this process has joined."""
    import ray

    address: str = ray.get_runtime_context().gcs_address
    return address


def _nodes() -> list[Mapping[str, float]]:
    """The resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _of_worker(compute: ComputeConfig) -> dict[str, float]:
    return cluster.demand(compute, 1, gpu=cluster.computes_on_gpu(compute))
