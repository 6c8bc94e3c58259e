"""The driver's end of the connections to the guardians: it receives their reports and sends them commands."""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.execution.hang_report import Sight, fatal_line
from pipeline.execution.sockets import HERE
from pipeline.execution.watched import WatchAddress

Failed = Callable[[Sequence[str]], str | None]  # failures of a start -> why there is no other one


@dataclass
class Peer:
    """A connection; sight is set once it has shown the token and is a guardian's."""

    socket: socket.socket
    buffer: bytes = b""
    sight: Sight | None = None
    kill_at: float | None = None  # when a rank of an earlier start is killed

    def send(self, word: str) -> None:
        with suppress(OSError):
            self.socket.sendall(word.encode() + b"\n")


class Guardians:
    """Listens at a free port; `receive` handles what has come. Not for several threads.

    failed is called with the failures that Ray Train's controller reports.
    """

    def __init__(self, failed: Failed, *, other_machines: bool) -> None:
        self._failed = failed
        self._listener = socket.create_server(("" if other_machines else HERE, 0), backlog=1024)
        self._token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: list[Peer] = []

    def address(self, host: str = HERE) -> WatchAddress:
        """Where the guardians connect; host: this machine as the nodes of the cluster know it."""
        return WatchAddress(host, self._listener.getsockname()[1], self._token)

    def close(self) -> None:
        for peer in self._peers:
            peer.socket.close()
        self._listener.close()
        self._selector.close()

    def sights(self) -> list[Sight]:
        """Of all living processes of this start, the driver first, then by rank."""
        found = [peer.sight for peer in self._peers if peer.sight is not None and peer.kill_at is None]
        return sorted((s for s in found if s.ended is None), key=lambda s: -1 if s.rank is None else s.rank)

    def deaths(self) -> list[str]:
        """How ranks of this start died: "rank 1 on node7 (process 4711): killed by signal 9 (SIGKILL)"."""
        found = [peer.sight for peer in self._of_ranks() if peer.kill_at is None and peer.sight is not None]
        return [f"{s.name} (process {s.pid}): {s.ended}{fatal_line(s.stacks or '')}" for s in found if s.ended]

    def forgive(self) -> None:
        """Counts every guardian as just heard: this process could not listen."""
        for sight in self.sights():
            sight.heard = time.monotonic()

    def ask_for_stacks(self, within_s: float) -> None:
        """Asks all for the Python lines of their processes, and waits for the answers."""
        for peer in self._peers:
            if peer.sight is not None:
                peer.sight.stacks = None
                peer.send("stacks")
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and any(sight.stacks is None for sight in self.sights()):
            self.receive(0.1)

    def kill_ranks(self) -> None:
        for peer in self._of_ranks():
            peer.send("kill")

    def retire(self, after_s: float) -> None:
        """The ranks of this start belong to an earlier one from now on; those that still live then are killed."""
        for peer in self._of_ranks():
            peer.kill_at = peer.kill_at or time.monotonic() + after_s

    def kill_retired(self) -> None:
        """Kills the ranks whose time is over."""
        for peer in self._of_ranks():
            if peer.kill_at is not None and time.monotonic() > peer.kill_at:
                peer.send("kill")

    def _of_ranks(self) -> list[Peer]:
        return [peer for peer in self._peers if peer.sight is not None and peer.sight.rank is not None]

    # --- messages

    def receive(self, timeout_s: float) -> None:
        """Waits for messages and handles them."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._read(key.data)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            connection.settimeout(5)
            peer = Peer(connection)
            self._peers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.socket.recv(1 << 16)
            *lines, peer.buffer = (peer.buffer + data).split(b"\n")
            keep = bool(data) and all(self._take(peer, json.loads(line)) for line in lines)
        except (OSError, ValueError, KeyError, TypeError):
            keep = False
        if not keep:
            self._selector.unregister(peer.socket)
            peer.socket.close()
            self._peers = [each for each in self._peers if each is not peer or _is_death(each)]

    def _take(self, peer: Peer, message: Mapping[str, Any]) -> bool:
        """One message; whether to keep the connection."""
        if peer.sight is not None:
            peer.sight.note(message)
            return True
        if not hmac.compare_digest(str(message.get("token")), self._token):
            return False
        if "failures" in message:
            peer.socket.sendall(json.dumps({"end": self._failed(message["failures"])}).encode() + b"\n")
            return False
        peer.sight = Sight(message["rank"], message["node"], message["pid"], message["thread"], time.monotonic())
        return True


def _is_death(peer: Peer) -> bool:
    return peer.sight is not None and peer.sight.ended is not None


def report_failures(address: WatchAddress, failures: Sequence[str], timeout_s: float = 10.0) -> str | None:
    """Reports to the driver why a start failed.

    Returns the reason why no other start may follow; None if one may, or without an answer.
    """
    try:
        with socket.create_connection((address.host, address.port), timeout=timeout_s) as connection:
            connection.sendall(json.dumps({"token": address.token, "failures": list(failures)}).encode() + b"\n")
            answer = connection.makefile().readline()
        end = json.loads(answer)["end"]
    except (OSError, ValueError, KeyError):
        return None
    return None if end is None else str(end)
