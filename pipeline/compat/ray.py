"""Private parts of Ray's core: token authentication of a running process, what Ray prints, and Ray on loopback.

Ray reads RAY_AUTH_MODE once, when it is imported. No public function makes it read the variable again. Nor has it a
public way to use 127.0.0.1 on Linux: it replaces that address by the machine's own, on which every network sees it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ray

from pipeline.compat import require

_raylet = import_module("ray._raylet")  # compiled, and without type hints
require(
    "ray",
    _raylet,
    (
        "Config.initialize",
        "AuthenticationTokenLoader.instance",
        "AuthenticationTokenLoader.reset_cache",
        "GcsClient",  # passes its calls on to the inner one
        "InnerGcsClient.internal_kv_get",
    ),
    tried="2.60",
)
require("ray", ray, ("exceptions.AuthenticationError",), tried="2.60")
_worker = import_module("ray._private.worker")
require("ray", _worker, ("print_to_stdstream", "listen_error_messages"), tried="2.60")
_constants: Any = import_module("ray._private.ray_constants")
require("ray", _constants, ("ENABLE_RAY_CLUSTER", "ENABLE_RAY_CLUSTERS_ENV_VAR"), tried="2.60")


@contextmanager
def on_loopback() -> Iterator[None]:
    """Ray that is started within listens on 127.0.0.1 alone, as it does by default on macOS and Windows."""
    name, enabled = _constants.ENABLE_RAY_CLUSTERS_ENV_VAR, _constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(name)
    os.environ[name], _constants.ENABLE_RAY_CLUSTER = "0", False  # for Ray's other processes, and for this one
    try:
        yield
    finally:
        _constants.ENABLE_RAY_CLUSTER = enabled
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def reload_authentication() -> None:
    """Makes Ray read RAY_AUTH_MODE and the token's place again in this process."""
    _raylet.Config.initialize("")  # before the cached token is dropped: Ray's threads look it up in the old mode
    _raylet.AuthenticationTokenLoader.instance().reset_cache()


def asks_for_token(address: str, timeout_s: float) -> bool:
    """Whether the head at HOST:PORT refuses a caller without a token; False where nothing answers.

    Authentication must be disabled in this process when this is called.
    """
    try:
        _raylet.GcsClient(address=address).internal_kv_get(b"adaptnet", None, timeout=timeout_s)
    except ray.exceptions.AuthenticationError:
        return True
    except Exception:  # nothing answers; the connection that follows reports why
        return False
    return False


def silence_messages() -> None:
    """Keeps Ray from printing remarks and what its nodes report, such as a worker's end, into this process's output."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    vars(_worker)["print_to_stdstream"] = lambda data, ignore_prefix: None
