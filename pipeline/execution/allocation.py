"""Ray over the nodes of one batch job: each node's task joins, the first one's also drives.

Every task runs `joined(node)` in a folder that all nodes see. The first starts a Ray head on a free port and leaves a
letter there (address, token); the others answer, start their Ray beside it, and stay until the head is gone. Ray's
processes are children of the tasks in sessions of their own, so several jobs and users on a node do not meet, and only
what was started here is ended. `ray symmetric-run` and `ray stop` would reach for every Ray on the node.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import ResourceError
from pipeline.execution import ray_token
from pipeline.runs.files import move_file, write_text

POLL_S = 0.5
MISSES = 3  # polls in a row without an answer after which a head counts as gone
ENDS_WITHIN_S = 10.0
OBJECT_STORE_BYTES = 256 << 20  # training hands nothing over through it
ATTEMPTS = 3  # at starting a head
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # before a fork: nothing is loaded after it
SCRATCH = Path("/tmp")  # sockets need a short path
HELD = "held"  # a file in each folder there, locked for as long as its task lives
# Runs `ray start` deaf to a job's warning, which by default would end Ray. Told to end, it ends Ray, and within 5 s all
# that is left of its process group: a `ray start` that was told while it started was seen to stay.
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
KEPT = ("SLURM_JOB_ID", "SLURMD_NODENAME")  # by which a site's epilog finds a job's processes


@dataclass(frozen=True)
class Node:
    """One node's task of a batch job: node `rank` of `names`, this one at address `ip`.

    key names this start of the job (its id and restart), folder is seen by every node. cpus and gpus are what the job
    has here, memory_bytes None where the batch system does not say.
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
        return self.rank == 0

    @property
    def letter(self) -> Path:
        """What the head tells the others."""
        return self.folder / f"{self.key}-head.json"

    def answer(self, rank: int) -> Path:
        """What node `rank` tells the head."""
        return self.folder / f"{self.key}-node{rank}.json"

    @property
    def token(self) -> Path:
        return self.folder / f"{self.key}-token"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.key}-ray{self.rank}.log"


@dataclass(frozen=True)
class JoinedNode:
    """A node that has joined: the cluster's address, and Ray's process here."""

    node: Node
    address: str
    ray: subprocess.Popen[bytes]

    def await_nodes(self, fewest: int | None = None) -> int:
        """Waits until every node's Ray has joined, `fewest` at least when patience ends; how many there are.

        Head only. Raises ResourceError at once where a node's Ray has died, and naming the nodes that are missing.
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
                self._check_answers()
                if time.monotonic() >= deadline:
                    if fewest is not None and alive >= fewest:
                        return alive
                    raise self._missing(alive)
                time.sleep(POLL_S)
        finally:
            with ray_token.own_sigterm():
                ray.shutdown()

    def serve(self) -> None:
        """Stays until the head is gone or Ray has ended here. Raises ResourceError in the latter case."""
        misses = 0
        while misses < MISSES:
            time.sleep(POLL_S)
            listens = self.head_listens()
            if self.ray.poll() is not None and listens:
                raise ResourceError(_died(self.node, self.ray))
            misses = 0 if listens else misses + 1

    def head_listens(self) -> bool:
        host, _, port = self.address.rpartition(":")
        return _listens(host, int(port))

    def _check_answers(self) -> None:
        for rank in range(1, len(self.node.names)):
            found = _read(self.node.answer(rank)).get("error")
            if found:
                raise ResourceError(found)

    def _missing(self, alive: int) -> ResourceError:
        node = self.node
        silent = [name for rank, name in enumerate(node.names) if rank and not node.answer(rank).is_file()]
        if silent:
            return ResourceError(
                f"{', '.join(silent)}: nothing was heard of these nodes in {node.folder} within {node.patience_s:g} s. "
                "Is that folder on a file system that every node sees? Give a run folder that is, by --run-dir"
            )
        return ResourceError(
            f"{alive} of {len(node.names)} nodes joined Ray at {self.address} within {node.patience_s:g} s; see "
            f"{node.folder}/{node.key}-ray*.log, and raise patience_s in the site's profile where nodes start slowly"
        )


@contextmanager
def joined(node: Node) -> Iterator[JoinedNode]:
    """This node in the job's Ray cluster; what was started here is ended afterwards.

    Raises ResourceError where Ray does not start, or the head is not heard of within the node's patience.
    """
    node.folder.mkdir(parents=True, exist_ok=True)
    with _scratch(node) as scratch:
        try:
            member = _head(node, scratch) if node.is_head else _follower(node, scratch)
            try:
                yield member
            finally:
                _end(member.ray)
        finally:
            for path in (node.letter, node.token) if node.is_head else (node.answer(node.rank),):
                if "error" not in _read(path):  # that is for the others, who may not have read it yet
                    path.unlink(missing_ok=True)


@contextmanager
def _scratch(node: Node) -> Iterator[Path]:
    """A folder on this node for Ray's sockets and logs, removed afterwards; those that killed tasks left go first.

    A task locks a file in its folder, and however it ends the kernel unlocks it. A folder without one is left alone.
    """
    prefix = f"adaptnet-{os.getuid()}-"
    for held in SCRATCH.glob(f"{prefix}*/{HELD}"):
        _remove_left(held)
    folder = SCRATCH / f"{prefix}{node.key}-{node.rank}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ResourceError(f"{folder}: not a folder of this user's own; the job needs that name on this node")
    descriptor = os.open(folder / f".{HELD}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        move_file(folder / f".{HELD}", folder / HELD)  # nobody sees it unlocked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left(held: Path) -> None:
    """Removes the folder of a task that is no more; a task that lives holds the lock."""
    with suppress(OSError):
        descriptor = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(held.parent, ignore_errors=True)
        finally:
            os.close(descriptor)


def _head(node: Node, scratch: Path) -> JoinedNode:
    descriptor = os.open(node.token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    try:
        address, started = _start_head(node, scratch)
    except ResourceError as error:  # the others would wait for as long as they have patience
        write_text(node.letter, json.dumps({"error": str(error)}))
        raise
    write_text(node.letter, json.dumps({"address": address, "head": node.names[0]}))
    return JoinedNode(node, address, started)


def _start_head(node: Node, scratch: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """On ports that were free a moment ago; on others where another job has taken them since."""
    deadline = time.monotonic() + node.patience_s
    for attempt in range(1, ATTEMPTS + 1):
        port = _free_port(node.ip)
        words = ["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor", f"--temp-dir={scratch}"]
        words += [f"--ray-client-server-port={_free_port(node.ip)}"] if find_spec("grpc") else []  # 10001 for everyone
        started = _start(node, words)
        address = f"{node.ip}:{port}"
        try:
            _await(lambda: _listens(node.ip, port), node, started, f"Ray's head does not listen at {address}")  # noqa: B023
            return address, started
        except ResourceError:
            if attempt == ATTEMPTS or time.monotonic() >= deadline:
                raise
    raise AssertionError("the last attempt returns or raises")


def _follower(node: Node, scratch: Path) -> JoinedNode:
    deadline = time.monotonic() + node.patience_s
    write_text(node.answer(node.rank), json.dumps({"name": node.names[node.rank]}))
    while not (letter := _read(node.letter)):
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"{node.names[node.rank]}: nothing was heard of the head, {node.names[0]}, in {node.folder} within "
                f"{node.patience_s:g} s. Is that folder on a file system that every node sees?"
            )
        with suppress(OSError):
            os.listdir(node.folder)  # a network file system looks anew
        time.sleep(POLL_S)
    if "error" in letter:
        raise ResourceError(f"{node.names[0]}, the head, did not start: {letter['error']}")
    address = letter["address"]
    started = _start(node, [f"--address={address}", f"--temp-dir={scratch}"])
    time.sleep(POLL_S)
    if started.poll() is not None:
        error = _died(node, started)
        write_text(node.answer(node.rank), json.dumps({"error": error}))
        raise ResourceError(error)
    return JoinedNode(node, address, started)


def _start(node: Node, words: list[str]) -> subprocess.Popen[bytes]:
    """`ray start` under a child that the job's warning does not reach, and that ends it where this process is killed:
    the other nodes would stay as long as Ray's head is there.
    """
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}", f"--node-ip-address={node.ip}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--include-log-monitor=false"]  # each of Ray's helpers is a Python that takes seconds to start
    command += [f"--memory={max(node.memory_bytes - OBJECT_STORE_BYTES, 1 << 20)}"] if node.memory_bytes else []
    with open(node.log, "ab") as log:
        return subprocess.Popen(
            ["sh", "-c", SUPERVISED, "sh", *command, *words],
            env=_environment(os.environ, node),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Runs in the child: Linux ends it when the thread that started it has ended."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment(given: Mapping[str, str], node: Node) -> dict[str, str]:
    """The task's environment without what slows or confuses Ray: the batch system's bindings, other clusters' keys."""
    leaks = ("SLURM", "SBATCH", "SRUN", "SUBMITIT", "PMI", "RAY_ADDRESS", "RAY_AUTH", "OMP_NUM_THREADS")
    kept = {key: value for key, value in given.items() if key in KEPT or not key.startswith(leaks)}
    return {
        **kept,
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
    """A head's port listens before its own node is registered."""
    import logging

    import ray

    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
            return
        except Exception as error:  # Ray raises several kinds
            if member.ray.poll() is not None:
                raise ResourceError(_died(member.node, member.ray)) from None
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"Ray's head at {address} does not answer ({error}); see {member.node.log}"
                ) from None
        time.sleep(1)


def _await(is_there: Callable[[], bool], node: Node, started: subprocess.Popen[bytes], otherwise: str) -> None:
    deadline = time.monotonic() + node.patience_s
    while started.poll() is not None or not is_there():
        if started.poll() is not None:
            raise ResourceError(_died(node, started))
        if time.monotonic() >= deadline:
            _end(started)
            raise ResourceError(f"{otherwise} after {node.patience_s:g} s; see {node.log}")
        time.sleep(POLL_S / 5)


def _died(node: Node, started: subprocess.Popen[bytes]) -> str:
    """What is known of a Ray that has ended by itself."""
    lines: list[str] = []
    with suppress(OSError):
        lines = node.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    ended = f"{node.names[node.rank]}: Ray ended with exit code {started.returncode}"
    return f"{ended}: {' / '.join(lines)[-600:]}; see {node.log}"


def _end(started: subprocess.Popen[bytes]) -> None:
    """Ends Ray's process and all that it started, and nothing else."""
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


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _free_port(ip: str) -> int:
    with socket.socket() as found:
        try:
            found.bind((ip, 0))
        except OSError as error:
            raise ResourceError(
                f"{socket.gethostname()}: no port at {ip} ({error.strerror}). SLURM knows this node by that address "
                "(NodeAddr); is it one of its own?"
            ) from None
        port: int = found.getsockname()[1]
        return port


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
