"""Ray in this process: whether it shows a token to a cluster, and asks for one; and that it leaves SIGTERM alone.

Ray reads RAY_AUTH_MODE once, when it is imported: what is set afterwards reaches the processes that it starts and not
the process itself, and the two turn each other away. A driver that shows a token also asks for one, so that a cluster
without authentication, whose head has none to show, cannot answer it. So the mode is settled at each connection, by
what the cluster asks for, and is put back when that ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODE = "RAY_AUTH_MODE"
PROBE_S = 10.0


@contextmanager
def mode(wanted: str | None) -> Iterator[None]:
    """Ray in that mode ("token", "disabled"; None: Ray's own rule), in this process and in what it starts."""
    before = os.environ.get(MODE)
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def set_for_good(variables: dict[str, str]) -> None:
    """Takes these variables of Ray's over into this process."""
    os.environ.update(variables)
    _set(os.environ.get(MODE))


def mode_for(address: str | None) -> str | None:
    """What a driver of the cluster at HOST:PORT needs: what the environment says, or what the cluster asks for.

    Ray's own rule (None) for a cluster that is still to be started, and for "auto" and its like.
    """
    given = os.environ.get(MODE)
    if given is not None or address is None or not has_token():
        return given
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return None
    return "token" if _asks(address) else "disabled"


def has_token() -> bool:
    """Whether this user holds a token of Ray's."""
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"]
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or any(place and Path(place).is_file() for place in places)


def _asks(address: str) -> bool:
    """Whether the head turns a caller without a token away."""
    from ray.exceptions import AuthenticationError

    with mode("disabled"):
        try:
            _raylet().GcsClient(address=address).internal_kv_get(b"adaptnet", None, timeout=PROBE_S)
        except AuthenticationError:
            return True
        except Exception:  # it does not answer at all: what follows says so
            return False
    return False


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Around ray.init and ray.shutdown: what SIGTERM does here stays as it was.

    The first puts a handler of Ray's in place, by which a driver ends without saving; the second has the kernel end
    the process, while Python still shows the handler.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _set(wanted: str | None) -> None:
    if wanted is None:
        os.environ.pop(MODE, None)
    else:
        os.environ[MODE] = wanted
    _raylet().Config.initialize("")  # before the token is forgotten: Ray's threads look it up in the old mode
    _raylet().AuthenticationTokenLoader.instance().reset_cache()


def _raylet() -> Any:
    """Ray's compiled part, of which mypy knows nothing."""
    import ray._raylet

    return ray._raylet
