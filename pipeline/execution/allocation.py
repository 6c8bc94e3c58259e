"""A Ray cluster over the nodes of one batch job: the task of each node joins, and the first node's task also drives.

Every task runs `joined(node)` with a folder that all nodes share. The first task starts a Ray head on a free port and
writes its address and token into that folder. The others write an answer, start Ray with that address, and run until
the head is gone. Ray's processes are children of the tasks in sessions of their own, so jobs and users on one node do
not interfere, and only processes that were started here are ended. `ray symmetric-run` and `ray stop` act on every Ray
of the node.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from pipeline.errors import ResourceError
from pipeline.execution import ray_token, sockets
from pipeline.runs.files import move_file, read_json, write_text

POLL_S = 0.5
MISSES = 3  # failed polls in a row after which the head counts as gone
ENDS_WITHIN_S = 10.0
OBJECT_STORE_BYTES = 256 << 20  # training passes nothing through it
ATTEMPTS = 3  # attempts to start a head
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked child must not load libraries
SCRATCH = Path("/tmp")  # sockets need a short path
RAY = "r"  # the part of a scratch folder that is Ray's
HELD = "held"  # lock file in each scratch folder, held while its task runs
# Runs `ray start` with the job's warning signals ignored, which by default would end Ray. On SIGTERM it stops Ray and,
# 5 s later, kills the rest of its process group: `ray start` can miss a SIGTERM during start-up.
SUPERVISED = """
trap '' USR1 USR2
ray=
trap '
    trap "" TERM
    [ -z "$ray" ] || kill "$ray" 2>/dev/null
    for half in 1 2 3 4 5 6 7 8 9 10; do
        sleep 0.5
        kill -0 "$ray" 2>/dev/null || break
    done
    kill -KILL 0
' TERM
"$@" &
ray=$!
wait "$ray"
"""
PASSED_ON = ("SLURM_JOB_ID", "SLURMD_NODENAME")  # a site's epilog finds a job's processes by these variables


@dataclass(frozen=True)
class Node:
    """The task of one node of a batch job: node `rank` of `names`, with the address `ip`.

    `key` identifies this start of the job (its id and restart count); every node sees `folder`. `cpus`, `gpus` and
    `memory_bytes` are the job's share of this node; memory_bytes is None if the batch system does not report it.
    """

    rank: int
    names: tuple[str, ...]
    ip: str
    key: str
    folder: Path
    cpus: int
    gpus: int
    memory_bytes: int | None = None
    patience_s: float = 120.0

    @property
    def is_head(self) -> bool:
        """Whether this node runs Ray's head and the driver."""
        return self.rank == 0

    @property
    def head_file(self) -> Path:
        """The file in which the head publishes its address, or the error that stopped it."""
        return self.folder / f"{self.key}-head.json"

    def answer(self, rank: int) -> Path:
        """The file in which node `rank` reports to the head that it has started, or the error that stopped it."""
        return self.folder / f"{self.key}-node{rank}.json"

    @property
    def token(self) -> Path:
        """The file with the cluster's token, readable for this user only."""
        return self.folder / f"{self.key}-token"

    @property
    def log(self) -> Path:
        """The output of this node's `ray start`."""
        return self.folder / f"{self.key}-ray{self.rank}.log"


@dataclass(frozen=True)
class JoinedNode:
    """A node that has joined a cluster: HOST:PORT of the head, and this node's Ray process."""

    node: Node
    address: str
    ray: subprocess.Popen[bytes]

    def await_nodes(self, fewest: int | None = None) -> int:
        """Waits until every node has joined, or at least `fewest` when `patience_s` is over; returns their number.

        For the head only. Raises ResourceError as soon as a node reports an error, and after `patience_s` naming the
        nodes that are missing.
        """
        ray_token.set_permanently(_authentication(self.node))
        import ray

        node, deadline = self.node, time.monotonic() + self.node.patience_s
        with ray_token.own_sigterm():
            _connect(self.address, deadline, self)
        try:
            while True:
                alive = sum(bool(each["Alive"]) for each in ray.nodes())
                if alive >= len(node.names):
                    return alive
                self.check_answers()
                if time.monotonic() >= deadline:
                    if fewest is not None and alive >= fewest:
                        return alive
                    raise self.missing(alive)
                time.sleep(POLL_S)
        finally:
            with ray_token.own_sigterm():
                ray.shutdown()

    def serve(self) -> None:
        """Waits until the head is gone. Raises ResourceError if this node's Ray ends before."""
        misses = 0
        while misses < MISSES:
            time.sleep(POLL_S)
            listens = self.head_listens()
            if self.ray.poll() is not None and listens:
                raise _ended(self.node, self.ray)
            misses = 0 if listens else misses + 1

    def head_listens(self) -> bool:
        """Whether the head accepts connections."""
        return sockets.listens(self.address)

    def check_answers(self) -> None:
        """Raises ResourceError with the first error that another node has reported."""
        for rank in range(1, len(self.node.names)):
            error = _read(self.node.answer(rank)).get("error")
            if error:
                raise ResourceError(error, key="--nodes", subject=self.node.names[rank])

    def missing(self, alive: int) -> ResourceError:
        """The error for `alive` nodes of those expected: names the silent ones, and whether they see the folder."""
        node = self.node
        silent = [name for rank, name in enumerate(node.names) if rank and not node.answer(rank).is_file()]
        if silent:
            return ResourceError(
                f"{', '.join(silent)}: these nodes wrote nothing into {node.folder} within {node.patience_s:g} s. Is "
                "that folder on a file system that every node shares? Choose a run folder that is, with --run-dir",
                key="--run-dir",
                subject=", ".join(silent),
            )
        return ResourceError(
            f"{alive} of {len(node.names)} nodes joined Ray at {self.address} within {node.patience_s:g} s; see "
            f"{node.folder}/{node.key}-ray*.log. If nodes start slowly, set a higher patience_s in the site's profile",
            key="patience_s",
            subject=self.address,
        )


@contextmanager
def joined(node: Node) -> Iterator[JoinedNode]:
    """Joins the job's Ray cluster with this node, and ends the processes started here afterwards.

    Raises ResourceError if Ray does not start, or if the head publishes no address within the node's `patience_s`.
    """
    node.folder.mkdir(parents=True, exist_ok=True)
    with scratch(f"{node.key}-{node.rank}") as folder:
        try:
            member = _head(node, folder) if node.is_head else _follower(node, folder)
            try:
                yield member
            finally:
                _end(member.ray)
        finally:
            for path in (node.head_file, node.token) if node.is_head else (node.answer(node.rank),):
                if "error" not in _read(path):  # other nodes may not have read an error yet
                    path.unlink(missing_ok=True)


@contextmanager
def scratch(name: str, root: Path = SCRATCH) -> Iterator[Path]:
    """A folder on this node for Ray's sockets and logs, removed afterwards; first removes those of killed tasks.

    It is within one that only this user can enter, because Ray opens its own for everyone. A task holds a lock on a
    file in its folder, which the kernel releases however the task ends. A folder without such a file is never removed.
    """
    prefix = f"adaptnet-{os.getuid()}-"
    for held in root.glob(f"{prefix}*/{HELD}"):
        _remove_abandoned(held)
    folder = root / f"{prefix}{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ResourceError(
            f"{folder}: belongs to another user, and the job needs that name on this node", key="/tmp", subject=folder
        )
    folder.chmod(0o700)
    descriptor = os.open(folder / f".{HELD}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        move_file(folder / f".{HELD}", folder / HELD)  # no other process can see it unlocked
        try:
            yield folder / RAY
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(held: Path) -> None:
    """Removes the folder of a task that has ended; a running task holds the lock."""
    with suppress(OSError):
        descriptor = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(held.parent, ignore_errors=True)
        finally:
            os.close(descriptor)


def _head(node: Node, scratch: Path) -> JoinedNode:
    node.token.unlink(missing_ok=True)  # one of an earlier start may be readable for others
    descriptor = os.open(node.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    try:
        address, started = _start_head(node, scratch)
    except ResourceError as error:  # without this file the other nodes would wait for `patience_s`
        write_text(node.head_file, json.dumps({"error": str(error)}))
        raise
    write_text(node.head_file, json.dumps({"address": address, "head": node.names[0]}))
    return JoinedNode(node, address, started)


def _start_head(node: Node, scratch: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """Starts a head on free ports and returns its HOST:PORT; tries others if a job has taken these meanwhile."""
    deadline = time.monotonic() + node.patience_s
    for attempt in range(1, ATTEMPTS + 1):
        port = _free_port(node.ip)
        options = ["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor", f"--temp-dir={scratch}"]
        if find_spec("grpc"):  # else Ray's client server takes port 10001 in every job
            options.append(f"--ray-client-server-port={_free_port(node.ip)}")
        started = _start(node, options)
        address = f"{node.ip}:{port}"
        try:
            _await_listening(address, node, started)
            return address, started
        except ResourceError:
            if attempt == ATTEMPTS or time.monotonic() >= deadline:
                raise
    raise AssertionError("the last attempt returns or raises")


def _follower(node: Node, scratch: Path) -> JoinedNode:
    deadline = time.monotonic() + node.patience_s
    write_text(node.answer(node.rank), json.dumps({"name": node.names[node.rank]}))
    while not (published := _read(node.head_file)):
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"{node.names[node.rank]}: the head, {node.names[0]}, wrote nothing into {node.folder} within "
                f"{node.patience_s:g} s. Is that folder on a file system that every node shares?",
                key="--run-dir",
                subject=node.names[0],
            )
        with suppress(OSError):
            os.listdir(node.folder)  # makes a network file system refresh its cache
        time.sleep(POLL_S)
    if "error" in published:
        raise ResourceError(
            f"{node.names[0]}, the head, did not start: {published['error']}", key="--nodes", subject=node.names[0]
        )
    address = published["address"]
    started = _start(node, [f"--address={address}", f"--temp-dir={scratch}"])
    time.sleep(POLL_S)
    if started.poll() is not None:
        error = _ended(node, started)
        write_text(node.answer(node.rank), json.dumps({"error": str(error)}))
        raise error
    return JoinedNode(node, address, started)


def _start(node: Node, options: list[str]) -> subprocess.Popen[bytes]:
    """Runs `ray start` under a shell that ignores the job's warning signals and ends Ray if this process is killed.

    Otherwise the head, and with it the other nodes, would outlive a killed task.
    """
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}", f"--node-ip-address={node.ip}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--include-log-monitor=false"]  # a Python process that takes seconds to start
    command += [f"--memory={max(node.memory_bytes - OBJECT_STORE_BYTES, 1 << 20)}"] if node.memory_bytes else []
    with open(node.log, "ab") as log:
        return subprocess.Popen(
            ["sh", "-c", SUPERVISED, "sh", *command, *options],
            env=environment(os.environ, node),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def end_with_parent() -> None:
    """Runs in the child: asks Linux to send it SIGTERM when the thread that started it ends."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def environment(given: Mapping[str, str], node: Node) -> dict[str, str]:
    """The task's environment without variables that disturb Ray: CPU bindings of the batch system, other tokens."""
    removed = ("SLURM", "SBATCH", "SRUN", "SUBMITIT", "PMI", "RAY_ADDRESS", "RAY_AUTH", "OMP_NUM_THREADS")
    task = {key: value for key, value in given.items() if key in PASSED_ON or not key.startswith(removed)}
    return {
        **task,
        **_authentication(node),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONUNBUFFERED": "1",
    }


def _authentication(node: Node) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(node.token)}


def _connect(address: str, deadline: float, member: JoinedNode) -> None:
    """Connects to the head; retries until `deadline`, since its port listens before its own node is registered."""
    import logging

    import ray

    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
            return
        except Exception as error:  # Ray raises several kinds
            if member.ray.poll() is not None:
                raise _ended(member.node, member.ray) from None
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"Ray's head at {address} does not answer ({error}); see {member.node.log}",
                    key="patience_s",
                    subject=address,
                ) from None
        time.sleep(1)


def _await_listening(address: str, node: Node, started: subprocess.Popen[bytes]) -> None:
    """Returns when the head that was started accepts connections. Raises ResourceError if it ends, or is too slow."""
    deadline = time.monotonic() + node.patience_s
    while started.poll() is not None or not sockets.listens(address):
        if started.poll() is not None:
            raise _ended(node, started)
        if time.monotonic() >= deadline:
            _end(started)
            raise ResourceError(
                f"Ray's head does not listen at {address} after {node.patience_s:g} s; see {node.log}",
                key="patience_s",
                subject=address,
            )
        time.sleep(POLL_S / 5)


def _ended(node: Node, started: subprocess.Popen[bytes]) -> ResourceError:
    """The error for a Ray that has ended by itself: its exit code and the last lines of its log."""
    lines: list[str] = []
    with suppress(OSError):
        lines = node.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    name = node.names[node.rank]
    return ResourceError(
        f"{name}: Ray ended with exit code {started.returncode}: {' / '.join(lines)[-600:]}; see {node.log}",
        key="--nodes",
        subject=name,
    )


def _end(started: subprocess.Popen[bytes]) -> None:
    """Ends Ray's process and its descendants."""
    ours: list[psutil.Process] = []
    with suppress(psutil.Error):
        ours = psutil.Process(started.pid).children(recursive=True)
    started.terminate()
    with suppress(subprocess.TimeoutExpired):
        started.wait(ENDS_WITHIN_S)
    left = [process for process in ours if process.is_running()]
    if started.poll() is None:
        started.kill()
        started.wait()
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=ENDS_WITHIN_S)


def _free_port(ip: str) -> int:
    try:
        return sockets.free_port(ip)
    except OSError as error:
        raise ResourceError(
            f"{socket.gethostname()}: no port can be opened at {ip} ({error.strerror}). SLURM knows this node by that "
            "address (NodeAddr); does it belong to this node?",
            key="NodeAddr",
            subject=ip,
        ) from None


def _read(path: Path) -> dict[str, str]:
    """The file's entries; {} if it does not exist or is not yet complete."""
    try:
        entries = read_json(path)
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in entries.items()} if isinstance(entries, dict) else {}
