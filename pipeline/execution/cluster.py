"""`with cluster(compute)`: connects to Ray, started on this machine or running at an address."""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import psutil

from pipeline.errors import AdaptNetError, ResourceError
from pipeline.execution import allocation, ray_messages, ray_processes, ray_token, sockets
from pipeline.execution.asking import Asking
from pipeline.execution.ray_processes import RayState
from pipeline.execution.ray_token import own_sigterm
from pipeline.execution.sockets import HERE, connection_error, host_and_port
from pipeline.installation import CODE
from pipeline.run_config import ComputeConfig

SHUTDOWN_S = 60.0  # a living Ray ends within a second or two, on a busy machine later
STOPPED_S = 5.0  # how long the end of a Ray may take one of whose processes is stopped
STOPPED_AT_START_S = 10.0  # how long one may be stopped while Ray starts, until it is given up after
GIVEN_UP_S = 40.0  # so many seconds: Ray's own error comes after 30, and after 60 Ray ends this process
POLL_S = 0.5
HEALTH_CHECK_S = "0.5"  # how often Ray's controller polls the workers; a report waits for one poll

_frozen: list[tuple[threading.Thread, list[psutil.Process]]] = []  # ends that were given up, with Ray's own processes


@dataclass
class Connection:
    """A connection to Ray. ends_within_s: how long its end may take before it is given up. lost: Ray has died."""

    ray: RayState
    ends_within_s: float = SHUTDOWN_S
    lost: bool = False


@contextmanager
def cluster(compute: ComputeConfig, messages: Path | None = None) -> Iterator[Connection]:
    """Connects to Ray with the resources that `compute` needs; ends Ray afterwards if it was started here.

    messages: the file for what Ray's C++ code would print, such as its dump of a process that has died.
    Where this process is connected already, only the resources are checked. Raises ResourceError if the address does
    not answer or the cluster is too small.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_S)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(compute.start_patience_s))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 all other processes of the node have priority
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a call after the end of a Ray must not start another
    import ray

    if any(thread.is_alive() for thread, _ in _frozen):
        raise ResourceError(
            "the Ray of this process was lost, and there can be no other; start a new process", key="compute.address"
        )
    if ray.is_initialized():
        connection = Connection(_state(compute, ()))
        _while_ray_answers(partial(_check_resources, compute), connection, compute)
        yield connection
        return
    others = {each.pid for each in ray_processes.of_driver(None)}  # of an earlier start, which has failed
    _await_head(compute)
    with (
        ray_messages.into_file(messages),
        ray_token.mode(ray_token.mode_for(compute.address)),
        _place(compute) as folder,
    ):
        with own_sigterm(), nullcontext() if folder is None else _ended_with_ray(others):
            _start(compute, folder)
        connection = Connection(RayState(None, compute.hang_after_s, others))
        try:
            connection.ray = _state(compute, others)
            _while_ray_answers(partial(_check_resources, compute), connection, compute)
            yield connection
        finally:
            with own_sigterm():
                _shut_down(connection, started_here=compute.address is None)


def _state(compute: ComputeConfig, others: Collection[int]) -> RayState:
    """What is known of the processes of the Ray that has just been connected; it has seen those that live now."""
    import ray

    gcs = str(ray.get_runtime_context().gcs_address) if compute.address else None  # None: children of this process
    state = RayState(gcs, compute.hang_after_s, others)
    state.frozen()
    return state


def _while_ray_answers(ask: Callable[[], None], connection: Connection, compute: ComputeConfig) -> None:
    """Asks Ray in a thread, and gives it up if one of its processes has died or is stopped.

    Raises what `ask` raises, and ResourceError if Ray is given up; the connection is lost then.
    """
    connection.ray.hang_after_s = min(compute.hang_after_s, ray_processes.STARTS_STOPPED_S)
    asking = Asking(ask, "ask-ray")
    while asking.lasts:
        asking.wait(0.05)
        _give_up(connection, connection.ray.frozen())
    if asking.error is not None:
        if not isinstance(asking.error, AdaptNetError):
            _give_up(connection, connection.ray.frozen(at_once=True))
        raise asking.error


def _give_up(connection: Connection, frozen: str | None) -> None:
    if frozen is not None:
        connection.lost = True
        raise ResourceError(
            f"{frozen}, before the workers were started; the same command starts again",
            key="compute.address",
            subject=frozen,
        )


def _shut_down(connection: Connection, *, started_here: bool) -> None:
    """ray.shutdown, given up where Ray does not answer: then `leave_frozen_ray` must end this process.

    Ray's processes are not killed before that, and a lost Ray is not asked: Ray would end this process with status 1.
    """
    import ray

    target = threading.Event().wait if connection.lost else ray.shutdown
    thread = threading.Thread(target=target, name="ray-shutdown", daemon=True)
    thread.start()
    deadline, stopped_s = time.monotonic() + (0 if connection.lost else connection.ends_within_s), 0.0
    while thread.is_alive() and time.monotonic() < deadline and stopped_s < STOPPED_S:
        thread.join(POLL_S)
        stopped_s = stopped_s + POLL_S if started_here and _any_stopped() else 0.0
    if thread.is_alive():
        _frozen.append((thread, ray_processes.of_driver(None) if started_here else []))
        atexit.register(leave_frozen_ray, 2)


def _any_stopped() -> bool:
    for process in ray_processes.of_driver(None):
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_STOPPED:
                return True
    return False


@contextmanager
def _ended_with_ray(others: Collection[int]) -> Iterator[None]:
    """Ends this process with a sentence and status 2 if the block waits for a process of Ray that died or is stopped.

    The block starts Ray in the main thread, where Ray's C++ code cannot be interrupted; after a minute Ray would end
    this process with status 1 and without a word. others: ids of processes that are not of this Ray.
    """
    over, state = threading.Event(), RayState(None, STOPPED_AT_START_S, others)
    thread = threading.Thread(target=_end_with_ray, args=(state, over), name="ray-start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _end_with_ray(state: RayState, over: threading.Event) -> None:
    since: float | None = None  # when it was first seen
    while not over.wait(POLL_S):
        found = state.frozen()
        if found is None:
            since = None
            continue
        since = since or time.monotonic()
        if time.monotonic() - since < GIVEN_UP_S:  # an error of Ray's own is better
            continue
        found = state.frozen(at_once=True)
        if found is not None and not over.is_set():
            with suppress(Exception):
                sys.stderr.write(f"adaptnet: {found}, while Ray was started; the same command starts again\n")
            _leave(state.living(), 2)


def leave_frozen_ray(code: int) -> None:
    """Ends this process with `code` and without Python's last steps, in which Ray waits; returns if Ray has ended."""
    frozen = [processes for thread, processes in _frozen if thread.is_alive()]
    if frozen:
        _leave(itertools.chain.from_iterable(frozen), code)


def _leave(rays: Iterable[psutil.Process], code: int) -> NoReturn:
    """Ends this process at once, and these of Ray."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # nobody reads it any more
            stream.flush()
    with open(os.devnull, "w") as devnull:  # what Ray's C++ code says of its end
        os.dup2(devnull.fileno(), 2)
        for process in rays:
            with suppress(psutil.Error):
                process.kill()
        os._exit(code)


@contextmanager
def _place(compute: ComputeConfig) -> Iterator[Path | None]:
    """Where a Ray that is started here has its sockets and logs; its servers listen on loopback, not on the network."""
    if compute.address is not None:
        yield None
        return
    from pipeline.compat import ray as compat

    with compat.on_loopback(), allocation.scratch(secrets.token_hex(3), sockets.scratch_root(os.environ)) as folder:
        yield folder


def _await_head(compute: ComputeConfig) -> None:
    """Waits up to `start_patience_s` until something listens at HOST:PORT; Ray itself would try for minutes."""
    place = host_and_port(compute.address or "")
    if place is None:
        return
    deadline = time.monotonic() + compute.start_patience_s
    while (error := connection_error(*place, min(5.0, compute.start_patience_s))) is not None:
        if time.monotonic() >= deadline:
            raise _unreachable(compute, error)
        time.sleep(0.5)


def _unreachable(compute: ComputeConfig, error: Exception) -> ResourceError:
    if compute.address is None:
        return ResourceError(
            f"Ray could not be started on this machine ({error}). Start again when it is less busy; "
            "compute.workers=0 trains in this process without Ray",
            key="compute.workers",
            subject=compute.workers,
        )
    return ResourceError(
        f"compute.address (={compute.address}): no Ray cluster answers ({error}) within compute.start_patience_s "
        f"(={compute.start_patience_s:g}). Is it HOST:PORT of a running head? If the cluster requires a token, put it "
        "into ~/.ray/auth_token or RAY_AUTH_TOKEN",
        key="compute.address",
        subject=compute.address,
    )


def _start(compute: ComputeConfig, folder: Path | None) -> None:
    """ray.init in the folder of our packages.

    Ray puts the driver's working directory first in its workers' search path. A job that was submitted from a checkout
    has that as its working directory, and its workers must not import code that was edited since.
    """
    import ray

    from pipeline.compat.ray import silence_messages

    silence_messages()
    here = {} if folder is None else {"include_dashboard": False, "_temp_dir": str(folder)}
    try:
        with chdir(CODE):
            ray.init(
                address=compute.address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                ignore_reinit_error=False,
                configure_logging=False,
                **here,
            )
    except Exception as error:  # Ray raises several kinds, a plain Exception if a machine is too slow for it
        raise _unreachable(compute, error) from None


@dataclass(frozen=True)
class ClusterNode:
    """A node of a running cluster, with its resources: {"CPU": 4.0, "GPU": 1.0, "memory": bytes}."""

    ip: str
    alive: bool
    resources: Mapping[str, float]


def members(address: str, patience_s: float = 10.0) -> list[ClusterNode]:
    """The nodes of the cluster at HOST:PORT, lost ones included. Raises ResourceError if it does not answer."""
    with cluster(ComputeConfig(address=address, workers=0, device="cpu", start_patience_s=patience_s)):
        import ray

        return [ClusterNode(each["NodeManagerAddress"], each["Alive"], each["Resources"]) for each in ray.nodes()]


def own_ip(compute: ComputeConfig) -> str:
    """The address at which the cluster's nodes reach this one; the loopback where the cluster is this machine."""
    import ray.util

    return ray.util.get_node_ip_address() if compute.address else HERE


def computes_on_gpu(compute: ComputeConfig) -> bool:
    """Whether the workers use GPUs; for device "auto", whether the connected cluster has any."""
    import ray

    return compute.device == "cuda" or (compute.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def with_cpus(compute: ComputeConfig) -> ComputeConfig:
    """`compute` with a number of CPUs; for "auto", a worker's share of the node of the cluster that has the fewest."""
    if compute.cpus is not None:
        return compute
    if compute.workers == 0:
        return compute.model_copy(update={"cpus_per_worker": float(len(os.sched_getaffinity(0)))})
    import ray

    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    found = cpu_share(compute, nodes, gpu=computes_on_gpu(compute))
    return compute.model_copy(update={"cpus_per_worker": found})


def cpu_share(compute: ComputeConfig, nodes: Sequence[Mapping[str, float]], *, gpu: bool) -> float:
    """The CPUs of each worker if its node's are shared: by the GPUs, without them by the workers spread over the nodes.

    nodes: their resources, as Ray names them. At least 1.
    """
    used = [node for node in nodes if node.get("GPU" if gpu else "CPU")]
    workers = math.ceil(compute.most_workers / max(1, len(used)))
    each = 1.0 if compute.gpus_per_worker is None else compute.gpus_per_worker
    shares = [node.get("CPU", 0.0) / (node["GPU"] / max(1.0, each) if gpu else workers) for node in used]
    return float(max(1, int(min(shares, default=1.0))))


def demand(compute: ComputeConfig, workers: int, *, gpu: bool) -> dict[str, float]:
    """The CPUs and GPUs of `workers` workers, as Ray names resources: {"CPU": 4.0, "GPU": 2.0}."""
    gpus = compute.gpus_per_worker if compute.gpus_per_worker is not None else float(gpu)
    cpus = compute.cpus if compute.cpus is not None else with_cpus(compute).cpus
    needed = {"CPU": workers * (cpus or 0.0), "GPU": workers * gpus if gpu else 0.0}
    return {name: amount for name, amount in needed.items() if amount}


def _check_resources(compute: ComputeConfig) -> None:
    """Raises ResourceError if the cluster is too small; a cluster by address may grow for `start_patience_s`."""
    import ray

    deadline = time.monotonic() + (compute.start_patience_s if compute.address else 0)
    while lacking := _lacking(
        demand(compute, compute.fewest_workers, gpu=computes_on_gpu(compute)), ray.cluster_resources()
    ):
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"compute.workers (={compute.workers}) x cpus_per_worker (={compute.cpus_per_worker}) needs "
                f"{'; '.join(lacking)}. Lower one of them, or wait longer for nodes (compute.start_patience_s)",
                key="compute.workers",
                subject=compute.workers,
            )
        time.sleep(1)


def room(each: Mapping[str, float]) -> int | None:
    """The number of workers of `each`, e.g. {"CPU": 2.0, "GPU": 1.0}, that fit on the cluster's remaining nodes.

    None if this process is not connected to a cluster or the connection fails.
    """
    import ray

    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    except Exception:  # Ray raises several kinds
        return None
    return sum(fitting(node, each) for node in nodes) if nodes else None


def fitting(node: Mapping[str, float], one: Mapping[str, float]) -> int:
    """The number of workers with the resources `one` that fit on a node with the resources `node`."""
    return min(int((node.get(name, 0) + 1e-6) // amount) for name, amount in one.items() if amount)


def _lacking(needed: dict[str, float], offered: dict[str, float]) -> list[str]:
    return [
        f"{amount:g} {name}s, the Ray cluster has {offered.get(name, 0):g}"
        for name, amount in needed.items()
        if offered.get(name, 0) < amount
    ]
