"""TCP addresses of a cluster: their parts, free ports, and whether something listens."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = "127.0.0.1"


SOCKET_CHARS = 107  # of the path of a Unix socket
# The longest path below this folder.
IN_RAY = "/adaptnet-1000000000-123abc/r/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.12"


def scratch_root(variables: Mapping[str, str]) -> Path:
    """The folder that is to hold Ray's own, with its sockets: RAY_TMPDIR or TMPDIR; else /tmp.

    /tmp also where that folder is missing or cannot be written, or its path is too long for a socket's.
    """
    root = variables.get("RAY_TMPDIR") or variables.get("TMPDIR") or "/tmp"
    short = len(os.fsencode(root)) + len(IN_RAY) <= SOCKET_CHARS
    return Path(root if short and root.startswith("/") and _writable(root) else "/tmp")


def _writable(folder: str) -> bool:
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError:
        return False
    return True


def host_and_port(address: str) -> tuple[str, int] | None:
    """The parts of HOST:PORT or [IPv6]:PORT; None for other addresses, such as "auto" or a URI."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return None
    return host.strip("[]"), int(port)


def free_port(ip: str = HERE) -> int:
    """A TCP port at `ip` that is free at this moment. Raises OSError where `ip` is no address of this machine."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        port: int = probe.getsockname()[1]
        return port


def connection_error(host: str, port: int, timeout_s: float = 2.0) -> OSError | None:
    """The error of an attempt to connect; None where something listens."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return error
    return None


def listens(address: str) -> bool:
    """Whether something accepts connections at HOST:PORT."""
    place = host_and_port(address)
    return place is not None and connection_error(*place) is None
