"""A Ray cluster on this machine whose nodes are processes: to try several nodes, or to share a workstation.

Each node has a keeper: a process in a session of its own that runs the node's Ray by `pipeline.execution.allocation`
(with its own ports, temporary folder and token) and ends it when it is ended itself. The cluster's folder records the
processes that were started, and only these are ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypedDict, cast

import psutil

from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import allocation
from pipeline.execution.allocation import JoinedNode, Node
from pipeline.installation import CODE, module
from pipeline.runs.files import read_json, write_text

CLUSTERS = Path("runs") / "clusters"
RECORD = "cluster.json"
ENDS_WITHIN_S = 2 * allocation.ENDS_WITHIN_S
SAME_PROCESS_S = 0.05  # two readings of one process' start
MOST = 64  # nodes


class ClusterRecord(TypedDict):
    """A running cluster: its machine, HOST:PORT of its head once all nodes have joined, [pid, start] of each keeper."""

    host: str
    address: str | None
    keepers: list[list[float]]


@dataclass(frozen=True)
class Local:
    """The cluster of `folder`, which holds its record while it runs."""

    folder: Path

    @property
    def _record(self) -> Path:
        return self.folder / RECORD

    def read(self) -> ClusterRecord | None:
        """The record; None if no cluster was started in this folder."""
        try:
            record = read_json(self._record)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            record = None
        if not isinstance(record, dict) or not set(ClusterRecord.__annotations__) <= set(record):
            raise ResourceError(
                f"{self._record}: damaged; end its processes with `ray stop`, then remove the file",
                key=RECORD,
                subject=self._record,
            )
        return cast(ClusterRecord, record)

    @property
    def key(self) -> str:
        """A short name for the cluster's temporary folders, since paths of sockets are limited."""
        return sha256(str(self.folder.absolute()).encode()).hexdigest()[:8]

    @property
    def token(self) -> Path:
        """The file of the cluster's token."""
        return self._node(0, 1, cpus=1, gpus=0, patience_s=1.0).token

    @property
    def is_running(self) -> bool:
        """Whether any keeper process of this cluster runs on this machine."""
        record = self.read()
        return record is not None and record["host"] == socket.gethostname() and any(_alive(record["keepers"]))

    def up(self, num_nodes: int, *, cpus: int, gpus: Sequence[str], patience_s: float) -> str:
        """Starts `num_nodes` nodes with `cpus` CPUs each and equal shares of `gpus`; returns the head's HOST:PORT.

        Returns when all nodes have joined. If one does not within `patience_s`, ends them all and raises ResourceError.
        """
        if not 1 <= num_nodes <= MOST:
            raise ConfigError(f"--local (={num_nodes}): 1 to {MOST} nodes", key="--local", subject=num_nodes)
        self._refuse_second()
        self._clear()
        each = len(gpus) // num_nodes
        nodes = [self._node(rank, num_nodes, cpus=cpus, gpus=each, patience_s=patience_s) for rank in range(num_nodes)]
        try:
            return self._start(nodes, gpus)
        except BaseException:
            self.down()
            raise

    def down(self) -> int:
        """Ends the processes that `up` started, and returns the number of nodes."""
        record = self._mine()
        if record is None:
            return 0
        keepers = list(_alive(record["keepers"]))
        for keeper in keepers:
            with suppress(psutil.Error):
                keeper.terminate()
        _, left = psutil.wait_procs(keepers, timeout=ENDS_WITHIN_S)
        _kill([*left, *self._orphans()])
        self._clear()
        return len(record["keepers"])

    def _mine(self) -> ClusterRecord | None:
        """The record. Raises ResourceError if the cluster was started on another machine."""
        record = self.read()
        if record is not None and record["host"] != socket.gethostname():
            raise ResourceError(
                f"{self.folder}: this cluster was started on {record['host']}; end it there, or use another --name",
                key="--name",
                subject=record["host"],
            )
        return record

    def _refuse_second(self) -> None:
        record = self._mine()
        if record is not None and self.is_running:
            raise ResourceError(
                f"{self.folder}: a cluster runs at {record['address']}; `adaptnet cluster down` ends it",
                key="--name",
                subject=record["address"],
            )

    def _start(self, nodes: Sequence[Node], gpus: Sequence[str]) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        keepers: list[subprocess.Popen[bytes]] = []
        for node in nodes:
            keepers.append(_keeper(node, gpus))
            self._write(keepers, None)
        address = _address(nodes[0], keepers[0])
        JoinedNode(nodes[0], address, keepers[0]).await_nodes()
        self._write(keepers, address)
        return address

    def _orphans(self) -> list[psutil.Process]:
        """Processes of nodes whose keeper was killed: those with their folder in the command line, and descendants."""
        sign = f"/tmp/adaptnet-{os.getuid()}-{self.key}-"
        mine = (each for each in psutil.process_iter(["cmdline", "uids"]) if each.info["uids"].real == os.getuid())
        orphans = {each for each in mine if any(sign in word for word in each.info["cmdline"] or ())}
        for process in list(orphans):
            with suppress(psutil.Error):
                orphans |= set(process.children(recursive=True))
        return list(orphans)

    def _write(self, keepers: Iterable[subprocess.Popen[bytes]], address: str | None) -> None:
        started = [[keeper.pid, _started(keeper.pid)] for keeper in keepers]
        record: ClusterRecord = {"host": socket.gethostname(), "address": address, "keepers": started}
        write_text(self._record, json.dumps(record))

    def _node(self, rank: int, num_nodes: int, *, cpus: int, gpus: int, patience_s: float) -> Node:
        """A node at a loopback address of its own, since Ray distinguishes nodes by address and replaces 127.0.0.1."""
        names = tuple(f"node{each}" for each in range(num_nodes))
        ip, folder = f"127.0.0.{rank + 2}", self.folder.absolute()
        return Node(rank, names, ip, self.key, folder, cpus=cpus, gpus=gpus, patience_s=patience_s)

    def _clear(self) -> None:
        """Removes the cluster's own files, including those that killed keepers left; other files stay."""
        for path in (self._record, *self.folder.glob(f"{self.key}-*")):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
        for rank in range(MOST):
            shutil.rmtree(f"/tmp/adaptnet-{os.getuid()}-{self.key}-{rank}", ignore_errors=True)


def gpus_here(num_nodes: int) -> list[str]:
    """The GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES.

    Raises ResourceError if there are fewer than `num_nodes`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [gpu for gpu in visible.split(",") if gpu and gpu != "-1"]
    else:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    if len(gpus) < num_nodes:
        raise ResourceError(
            f"--gpus: {num_nodes} nodes, and this machine has {len(gpus)} GPUs; start fewer nodes, or omit --gpus",
            key="--gpus",
            subject=len(gpus),
        )
    return gpus


def _keeper(node: Node, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts the node's keeper, with its share of the GPUs visible."""
    mine = gpus[node.rank * node.gpus : (node.rank + 1) * node.gpus]
    keys = {"names": node.names, "ip": node.ip, "key": node.key, "folder": str(node.folder), "rank": node.rank}
    keys |= {"cpus": node.cpus, "gpus": node.gpus, "patience_s": node.patience_s}
    paths = [str(CODE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(mine), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with open(node.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module("jobs.ray.local"), json.dumps(keys)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _address(head: Node, keeper: subprocess.Popen[bytes]) -> str:
    """The address that the head publishes. Raises ResourceError if its keeper ends or `patience_s` is over."""
    deadline = time.monotonic() + head.patience_s
    while not head.head_file.is_file():
        if keeper.poll() is not None or time.monotonic() >= deadline:
            lines = head.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise ResourceError(
                f"Ray's head did not start: {' / '.join(lines)[-600:] or f'{head.log} is empty'}",
                key="--patience",
                subject=head.ip,
            )
        time.sleep(0.1)
    address: str = json.loads(head.head_file.read_text(encoding="utf-8"))["address"]
    return address


def _started(pid: int) -> float:
    """The start of a process in seconds since the epoch; 0 if it has ended."""
    with suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return 0.0


def _alive(keepers: Iterable[Sequence[float]]) -> Iterable[psutil.Process]:
    """The keepers that still run; compares the start too, since a process id may have been reused."""
    for pid, started in keepers:
        with suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - started) < SAME_PROCESS_S and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _kill(processes: Sequence[psutil.Process]) -> None:
    running = [process for process in processes if process.is_running()]
    for process in running:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(running, timeout=ENDS_WITHIN_S)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


def keep(node: Node) -> None:
    """Runs a node's Ray until this process gets SIGTERM or Ray ends."""
    signal.signal(signal.SIGTERM, _end)
    with allocation.joined(node) as member:
        member.serve()


if __name__ == "__main__":
    keys = json.loads(sys.argv[1])
    keep(Node(**{**keys, "names": tuple(keys["names"]), "folder": Path(keys["folder"])}))
