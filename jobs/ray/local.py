"""A Ray cluster on this machine whose nodes are processes: to try what runs on several nodes, or share a workstation.

Each node has a keeper, a process of its own session that holds its Ray by `pipeline.execution.allocation` (own ports,
own temporary folder, a token) and ends it when it is itself ended. What was started is written down in the cluster's
folder; only that is ended again.
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
from typing import Any, NoReturn

import psutil

from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import allocation
from pipeline.execution.allocation import JoinedNode, Node
from pipeline.runs.files import write_text

CLUSTERS = Path("runs") / "clusters"
RECORD = "cluster.json"
ENDS_WITHIN_S = 2 * allocation.ENDS_WITHIN_S
SAME_PROCESS_S = 0.05  # two readings of one process' start
MOST = 64  # nodes


@dataclass(frozen=True)
class Local:
    """The cluster of that folder: {"host", "address", "keepers": [[pid, started]], "nodes": [...]} while it runs."""

    folder: Path

    @property
    def _record(self) -> Path:
        return self.folder / RECORD

    def read(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self._record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    @property
    def key(self) -> str:
        """Short: sockets lie below a folder of this name."""
        return sha256(str(self.folder.absolute()).encode()).hexdigest()[:8]

    @property
    def token(self) -> Path:
        return self._node(0, 1, cpus=1, gpus=0, patience_s=1.0).token

    @property
    def lives(self) -> bool:
        found = self.read()
        return found is not None and found["host"] == socket.gethostname() and any(_alive(found["keepers"]))

    def up(self, num_nodes: int, *, cpus: int, gpus: Sequence[str], patience_s: float) -> str:
        """Starts `num_nodes` nodes with `cpus` CPUs each and equal shares of `gpus`; the head's HOST:PORT.

        Returns when all have joined. Raises ResourceError where one does not, and leaves nothing behind then.
        """
        if not 1 <= num_nodes <= MOST:
            raise ConfigError(f"--local (={num_nodes}): 1 to {MOST} nodes")
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
        """Ends what `up` started and nothing else; how many nodes that were."""
        found = self._mine()
        if found is None:
            return 0
        keepers = list(_alive(found["keepers"]))
        for keeper in keepers:
            with suppress(psutil.Error):
                keeper.terminate()
        _, left = psutil.wait_procs(keepers, timeout=ENDS_WITHIN_S)
        _kill([*left, *self._orphans()])
        self._clear()
        return len(found["keepers"])

    def _mine(self) -> dict[str, Any] | None:
        """What is written down. Raises ResourceError where it is of another machine."""
        found = self.read()
        if found is not None and found["host"] != socket.gethostname():
            raise ResourceError(
                f"{self.folder}: this cluster was started on {found['host']}; end it there, or take another --name"
            )
        return found

    def _refuse_second(self) -> None:
        found = self._mine()
        if found is not None and self.lives:
            raise ResourceError(f"{self.folder}: it runs at {found['address']}; `adaptnet cluster down` ends it")

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
        """Ray of nodes whose keeper was killed: processes whose command lines name its folder, and their children."""
        sign = f"/tmp/adaptnet-{os.getuid()}-{self.key}-"
        mine = (each for each in psutil.process_iter(["cmdline", "uids"]) if each.info["uids"].real == os.getuid())
        found = {each for each in mine if any(sign in word for word in each.info["cmdline"] or ())}
        for process in list(found):
            with suppress(psutil.Error):
                found |= set(process.children(recursive=True))
        return list(found)

    def _write(self, keepers: Iterable[subprocess.Popen[bytes]], address: str | None) -> None:
        started = [[keeper.pid, _started(keeper.pid)] for keeper in keepers]
        record = {"host": socket.gethostname(), "address": address, "keepers": started}
        write_text(self._record, json.dumps(record))

    def _node(self, rank: int, num_nodes: int, *, cpus: int, gpus: int, patience_s: float) -> Node:
        """At a loopback address of its own, by which Ray tells nodes of a machine apart; 127.0.0.1 it replaces."""
        names = tuple(f"node{each}" for each in range(num_nodes))
        ip, folder = f"127.0.0.{rank + 2}", self.folder.absolute()
        return Node(rank, names, ip, self.key, folder, cpus=cpus, gpus=gpus, patience_s=patience_s)

    def _clear(self) -> None:
        """Removes what a cluster of this folder has left, also where its keepers could not; other files stay."""
        for path in (self._record, *self.folder.glob(f"{self.key}-*")):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
        for rank in range(MOST):
            shutil.rmtree(f"/tmp/adaptnet-{os.getuid()}-{self.key}-{rank}", ignore_errors=True)


def gpus_here(num_nodes: int) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Raises ResourceError where there is not one for each of `num_nodes` nodes.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        found = [gpu for gpu in shown.split(",") if gpu and gpu != "-1"]
    else:
        import torch

        found = [str(number) for number in range(torch.cuda.device_count())]
    if len(found) < num_nodes:
        raise ResourceError(f"--gpus: {num_nodes} nodes, and {len(found)} GPUs here; start fewer, or leave --gpus out")
    return found


def _keeper(node: Node, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that holds the node's Ray, with its share of the GPUs in sight."""
    mine = gpus[node.rank * node.gpus : (node.rank + 1) * node.gpus]
    given = {"names": node.names, "ip": node.ip, "key": node.key, "folder": str(node.folder), "rank": node.rank}
    given |= {"cpus": node.cpus, "gpus": node.gpus, "patience_s": node.patience_s}
    paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(mine), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with open(node.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.ray.local", json.dumps(given)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _address(head: Node, keeper: subprocess.Popen[bytes]) -> str:
    """What the head's letter says. Raises ResourceError where none comes."""
    deadline = time.monotonic() + head.patience_s
    while not head.head_file.is_file():
        if keeper.poll() is not None or time.monotonic() >= deadline:
            lines = head.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise ResourceError(f"Ray's head did not start: {' / '.join(lines)[-600:] or 'it is silent'}")
        time.sleep(0.1)
    address: str = json.loads(head.head_file.read_text(encoding="utf-8"))["address"]
    return address


def _started(pid: int) -> float:
    """When a process started; 0 for one that has ended."""
    with suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return 0.0


def _alive(keepers: Iterable[Sequence[float]]) -> Iterable[psutil.Process]:
    """Those that still run; a number that has gone to another process is not one of ours."""
    for pid, started in keepers:
        with suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - started) < SAME_PROCESS_S and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _kill(processes: Sequence[psutil.Process]) -> None:
    left = [process for process in processes if process.is_running()]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=ENDS_WITHIN_S)


def _end(number: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


def keep(node: Node) -> None:
    """Holds a node's Ray until SIGTERM comes, or Ray has ended."""
    signal.signal(signal.SIGTERM, _end)
    with allocation.joined(node) as member:
        member.serve()


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    keep(Node(**{**words, "names": tuple(words["names"]), "folder": Path(words["folder"])}))
