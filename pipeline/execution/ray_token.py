"""Ray's token authentication in this process, and keeping Ray's SIGTERM handler out of it.

Ray reads RAY_AUTH_MODE once, when it is imported. A later change reaches the processes that it starts and not this
process, and the two then refuse each other. A driver that sends a token also requires one of the cluster, so a cluster
without authentication cannot answer it. So the mode is set for each connection by what the cluster requires, and is
restored when the connection ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.execution.sockets import host_and_port

MODE = "RAY_AUTH_MODE"
PROBE_S = 10.0


@contextmanager
def mode(wanted: str | None) -> Iterator[None]:
    """Sets Ray's mode ("token", "disabled"; None: Ray's default) for this process and the processes that it starts."""
    before = os.environ.get(MODE)
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def set_permanently(variables: dict[str, str]) -> None:
    """Sets these variables of Ray in this process and makes Ray read them."""
    os.environ.update(variables)
    _set(os.environ.get(MODE))


def mode_for(address: str | None) -> str | None:
    """The mode for a driver of the cluster at HOST:PORT: the environment's, or the one that the cluster requires.

    None, which is Ray's default, for a cluster that is yet to be started and for addresses such as "auto".
    """
    given = os.environ.get(MODE)
    if given is not None or address is None or not has_token():
        return given
    if host_and_port(address) is None:
        return None
    return "token" if _asks_for_token(address) else "disabled"


def has_token() -> bool:
    """Whether this user has a Ray token."""
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"]
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or any(place and Path(place).is_file() for place in places)


def _asks_for_token(address: str) -> bool:
    from pipeline.compat import ray as compat

    with mode("disabled"):
        return compat.asks_for_token(address, PROBE_S)


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keeps this process's SIGTERM handler across ray.init and ray.shutdown.

    ray.init installs a handler that ends a driver without saving. ray.shutdown restores the default action in the
    kernel while Python still shows the handler.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _set(wanted: str | None) -> None:
    from pipeline.compat import ray as compat

    if wanted is None:
        os.environ.pop(MODE, None)
    else:
        os.environ[MODE] = wanted
    compat.reload_authentication()
