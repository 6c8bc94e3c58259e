"""`with cluster(compute)`: Ray on this machine, or a running Ray cluster by its address."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ResourceError
from pipeline.execution import ray_token
from pipeline.execution.ray_token import own_sigterm
from pipeline.run_config import ComputeConfig

CODE = str(Path(__file__).parents[2])
HEALTH_CHECK_S = "0.5"  # how often Ray's controller polls the workers; a report waits for one poll


class _OursFirst(list[str]):
    """Where workers look for code: Ray adds the folder that the driver stands in, and looks there before all others.

    A job that is submitted from a checkout stands in it, and must not take code that was edited since.
    """

    def extend(self, folders: Iterable[str]) -> None:
        self[:0] = folders


@contextmanager
def cluster(compute: ComputeConfig) -> Iterator[None]:
    """Ray, connected, with what the workers need; ended afterwards if it was started here.

    Raises ResourceError where the address does not answer or the cluster is too small.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_S)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(compute.start_patience_s))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let anything else on the node go first
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        _check_resources(compute)
        yield
        return
    _await_head(compute)
    with ray_token.mode(ray_token.mode_for(compute.address)):
        with own_sigterm():
            _start(compute)
        try:
            _check_resources(compute)
            yield
        finally:
            with own_sigterm():
                ray.shutdown()


def _await_head(compute: ComputeConfig) -> None:
    """Waits up to `start_patience_s` for something to listen at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = (compute.address or "").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return  # "auto" and its like
    deadline = time.monotonic() + compute.start_patience_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, compute.start_patience_s)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise _unreachable(compute, error) from None
        time.sleep(0.5)


def _unreachable(compute: ComputeConfig, error: Exception) -> ResourceError:
    if compute.address is None:
        return ResourceError(
            f"Ray could not be started on this machine ({error}). Its logs lie in /tmp/ray/session_latest/logs; "
            "compute.workers=0 trains in this process without Ray"
        )
    return ResourceError(
        f"compute.address (={compute.address}): no Ray cluster can be reached ({error}). Is it HOST:PORT of a running "
        f"head? It was tried for compute.start_patience_s (={compute.start_patience_s:g}). Where the cluster asks for "
        "a token, put it into ~/.ray/auth_token or RAY_AUTH_TOKEN"
    )


def _start(compute: ComputeConfig) -> None:
    import ray
    import ray.job_config

    quiet = {"include_dashboard": False} if compute.address is None else {}
    try:
        ray.init(
            address=compute.address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=False,
            configure_logging=False,
            job_config=ray.job_config.JobConfig(_py_driver_sys_path=_OursFirst([CODE])),
            **quiet,
        )
    except Exception as error:  # Ray raises several kinds, a plain Exception where a machine is too slow for it
        raise _unreachable(compute, error) from None


@dataclass(frozen=True)
class NodeHere:
    """A node of a running cluster: resources {"CPU": 4.0, "GPU": 1.0, "memory": bytes}."""

    ip: str
    alive: bool
    resources: Mapping[str, float]


def members(address: str, patience_s: float = 10.0) -> list[NodeHere]:
    """The nodes of the cluster at HOST:PORT, the lost ones too. Raises ResourceError where it does not answer."""
    with cluster(ComputeConfig(address=address, workers=0, device="cpu", start_patience_s=patience_s)):
        import ray

        return [NodeHere(each["NodeManagerAddress"], each["Alive"], each["Resources"]) for each in ray.nodes()]


def computes_on_gpu(compute: ComputeConfig) -> bool:
    """Whether the workers take GPUs: where "auto" leaves it open, if the connected cluster has any."""
    import ray

    return compute.device == "cuda" or (compute.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def demand(compute: ComputeConfig, workers: int, *, gpu: bool) -> dict[str, float]:
    """CPUs and GPUs that `workers` workers need."""
    gpus = compute.gpus_per_worker if compute.gpus_per_worker is not None else float(gpu)
    needed = {"CPU": workers * compute.cpus_per_worker, "GPU": workers * gpus if gpu else 0.0}
    return {name: amount for name, amount in needed.items() if amount}


def _check_resources(compute: ComputeConfig) -> None:
    """Waits up to `start_patience_s` on a cluster by address, not at all on this machine."""
    import ray

    needed = demand(compute, compute.fewest_workers, gpu=computes_on_gpu(compute))
    deadline = time.monotonic() + (compute.start_patience_s if compute.address else 0)
    while lacking := _lacking(needed, ray.cluster_resources()):
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"compute.workers (={compute.workers}) x cpus_per_worker (={compute.cpus_per_worker:g}) needs "
                f"{'; '.join(lacking)}. Ask for less or wait for more nodes (compute.start_patience_s)"
            )
        time.sleep(1)


def room(each: Mapping[str, float]) -> int | None:
    """How many workers that take `each`, e.g. {"CPU": 2.0, "GPU": 1.0}, the cluster's living nodes hold.

    None where this process is not connected to a cluster, or loses it just now.
    """
    import ray

    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    except Exception:  # Ray raises several kinds
        return None
    return sum(fitting(node, each) for node in nodes) if nodes else None


def fitting(node: Mapping[str, float], one: Mapping[str, float]) -> int:
    """How many times a node that has `node` holds `one`."""
    return min(int((node.get(name, 0) + 1e-6) // amount) for name, amount in one.items() if amount)


def _lacking(needed: dict[str, float], found: dict[str, float]) -> list[str]:
    return [
        f"{amount:g} {name}s, the Ray cluster has {found.get(name, 0):g}"
        for name, amount in needed.items()
        if found.get(name, 0) < amount
    ]
