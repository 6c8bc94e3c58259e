"""A client for writing to MLflow's registry that raises our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import ResourceError, without_secrets
from pipeline.tracking.client import Client, connect, failures, reason_of


@contextmanager
def session(uri: str) -> Iterator[Client]:
    """A client on `uri`. Raises ResourceError, without secrets, for whatever the client raises in the block."""
    try:
        yield connect(uri)
    except failures() as error:
        shown = without_secrets(uri)
        raise ResourceError(
            f"registry {shown}: {reason_of(error)}. Check that it is running and that this address is right, then give "
            "the same command again",
            key="--uri",
            subject=shown,
        ) from None  # a traceback would show MLflow's message, with a password that the address contains
