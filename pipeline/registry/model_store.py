"""What the registry is read through: `ModelStore`, the records that it returns and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.errors import ResourceError, without_secrets

HOME = "default"  # MLflow's workspace


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model: its aliases {alias: version}, tags and description.

    stamp: changes whenever versions of the model appear or disappear; "" if the store has no such mark.
    """

    name: str
    aliases: Mapping[str, int]
    tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    stamp: str = ""


@dataclass(frozen=True)
class VersionRow:
    """A version as the registry stores it; created in seconds since 1970."""

    name: str
    version: int
    run_id: str | None
    created: float
    tags: Mapping[str, str]


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run, which may have been deleted, and its tags."""

    deleted: bool
    tags: Mapping[str, str]


class ModelStore(Protocol):
    """What the registry is read through. Methods raise ResourceError if the registry does not answer."""

    def models(self) -> list[RegisteredModel]:
        """Every registered model, by name."""

    def rows(self, name: str | None = None, number: int | None = None) -> list[VersionRow]:
        """Every version of `name`, only that of `number`, or all versions of all names; in any order."""

    def run(self, run_id: str) -> TrackedRun | None:
        """The run of this id; None if there is none."""


class UnknownRevision(Exception):
    """The tables are of a revision that the SQL was not written for."""


def unanswered(uri: str, reason: str) -> ResourceError:
    """The error for a registry that does not answer."""
    shown = without_secrets(uri)
    return ResourceError(
        f"registry {shown}: {reason}. Check that it is running and that this address is right, then run the same "
        "command again",
        key="--uri",
        subject=shown,
    )
