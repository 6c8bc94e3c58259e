"""Append-only promotion log; of two concurrent writers the first wins.

MLflow moves an alias without checking where it pointed. But it numbers the versions of a model in one order, each
number once, so a registered model `NAME.promotions` serves as a log: an entry names the entry that it follows, and of
two entries that follow the same one only the lower number counts. The alias is moved after that, by the promoter or, if
it is killed, by the next one; everyone who reads the log finds the same holder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import ConfigError, ResourceError
from pipeline.registry import store_reader
from pipeline.registry.catalogue import JOURNAL
from pipeline.registry.model_store import VersionRow
from pipeline.tracking.client import Client

Kind = Literal["promotion", "rollback"]
SUFFIX = ".promotions"


@dataclass(frozen=True)
class HolderChange:
    """A change of the version that an alias points to, before it is in the log.

    before: the present holder; None if there is none. follows: number of the last entry; 0 if there is none.
    who: USER@HOST. why: the user's reason. forced: the gate refused it. source: where its artifacts are, run_id: the
    run that holds them. facts: more tags of the entry.
    """

    name: str
    alias: str
    kind: Kind
    version: int
    before: int | None
    follows: int
    who: str
    source: str
    run_id: str | None
    why: str = ""
    forced: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)

    def tags(self) -> dict[str, str]:
        """The tags of its entry."""
        return {
            "alias": self.alias,
            "kind": self.kind,
            "version": str(self.version),
            "before": "" if self.before is None else str(self.before),
            "follows": str(self.follows),
            "who": self.who,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "why": self.why,
            "forced": "yes" if self.forced else "no",
            **self.facts,
        }


@dataclass(frozen=True)
class PromotionEntry:
    """One entry of the log; `before` is None and `follows` 0 if there was none."""

    number: int
    alias: str
    kind: str
    version: int
    before: int | None
    follows: int
    who: str
    when: str  # UTC
    why: str
    forced: bool
    done: bool  # the alias has been moved


def history(uri: str, name: str, alias: str) -> list[PromotionEntry]:
    """The entries of an alias that count, in order. Raises ResourceError if the registry does not answer."""
    rows = sorted(store_reader.rows(uri, name + SUFFIX), key=lambda row: row.version)
    counted: list[PromotionEntry] = []
    for row in rows:
        entry = _entry(row)
        if entry.alias == alias and entry.follows == (counted[-1].number if counted else 0):
            counted.append(entry)
    return counted


def _entry(row: VersionRow) -> PromotionEntry:
    tags = {key.removeprefix("adaptnet."): value for key, value in row.tags.items()}
    return PromotionEntry(
        number=row.version,
        alias=tags.get("alias", ""),
        kind=tags.get("kind", ""),
        version=int(tags.get("version", 0)),
        before=int(tags["before"]) if tags.get("before") else None,
        follows=int(tags.get("follows", -1)),
        who=tags.get("who", ""),
        when=tags.get("when", ""),
        why=tags.get("why", ""),
        forced=tags.get("forced") == "yes",
        done=tags.get("done") == "yes",
    )


def append(client: Client, uri: str, change: HolderChange) -> PromotionEntry:
    """Writes an entry and, if it counts, moves the alias.

    Raises ResourceError if another entry came first: then nothing has changed.
    """
    name, alias = change.name, change.alias
    _make_log(client, name)
    text = f"{change.kind} of {name} {change.version} to {alias} by {change.who}: {change.why or 'no reason given'}"
    tags = {f"adaptnet.{key}": value for key, value in change.tags().items()}
    made = client.create_model_version(name + SUFFIX, change.source, change.run_id, tags=tags, description=text)
    counted = history(uri, name, alias)
    mine = next((entry for entry in counted if entry.number == int(made.version)), None)
    if mine is None:
        first = counted[-1]
        raise ResourceError(
            f"{name}@{alias}: {first.who} moved it to version {first.version} first, at {first.when}. Nothing "
            "was changed here; look at that version, then run the same command again",
            key="--alias",
            subject=f"{name}@{alias}",
        )
    settle(client, uri, name, alias)
    return mine


def settle(client: Client, uri: str, name: str, alias: str) -> None:
    """Moves the alias to the version of the last entry that counts, if that has not been done yet.

    After moving it, the log is read again: an entry that was written meanwhile must be settled too, although its own
    promoter may have moved the alias before this process did.
    """
    moved: int | None = None
    while True:
        counted = history(uri, name, alias)
        if not counted or (counted[-1].done and moved is None):
            return
        last = counted[-1]
        if last.number == moved:
            client.set_model_version_tag(name + SUFFIX, str(last.number), "adaptnet.done", "yes")
            return
        client.set_registered_model_alias(name, alias, str(last.version))
        note = f"{last.when} by {last.who}, entry {last.number} of {name}{SUFFIX}: {last.why or 'no reason given'}"
        client.set_model_version_tag(name, str(last.version), f"adaptnet.alias.{alias}", note)
        moved = last.number


def previous(counted: Sequence[PromotionEntry], present: int | None) -> int | None:
    """The version that held the alias before the present one; None if none is known.

    A rollback undoes the last promotion, so that two rollbacks go back by two holders. If an alias was moved without
    this log, it goes back to its holder according to the log.
    """
    held: list[int] = []
    for entry in counted:
        if entry.kind == "rollback":
            while held and held[-1] != entry.version:
                held.pop()
        elif entry.before is not None and held[-1:] != [entry.before]:
            held.append(entry.before)
        if held[-1:] != [entry.version]:
            held.append(entry.version)
    if held and held[-1] == present:
        held.pop()
    return held[-1] if held else None


def _make_log(client: Client, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        text = f"who promoted which version of {name}, when and why; the artifacts of each entry hold the reports"
        client.create_registered_model(name + SUFFIX, tags={JOURNAL: name}, description=text)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if JOURNAL not in client.get_registered_model(name + SUFFIX).tags:
            raise ConfigError(
                f"{name}{SUFFIX}: the promotions of {name} are stored under this name, but a model has it; rename that "
                "model",
                key="name",
                subject=f"{name}{SUFFIX}",
            ) from None
