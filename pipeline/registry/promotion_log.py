"""Who holds an alias, decided in order: a journal of promotions that only the first of two at once may continue.

MLflow moves an alias without asking where it was. But it numbers the versions of a model in one order, each number
once, so a registered model `NAME.promotions` serves as a journal: an entry names the entry that it follows, and of two
that follow the same one the lower number counts and the other is void. The alias is moved after that, by the promoter
or, should it die, by whoever comes next; everyone who reads the journal finds the same holder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ConfigError, ResourceError
from pipeline.registry import store_reader
from pipeline.registry.catalogue import JOURNAL

Kind = Literal["promotion", "rollback"]
SUFFIX = ".promotions"


@dataclass(frozen=True)
class PromotionEntry:
    """One change of an alias's holder; `before` and `follows` are None and 0 where there was none."""

    number: int
    alias: str
    kind: str
    version: int
    before: int | None
    follows: int
    who: str
    when: str
    why: str
    forced: bool
    done: bool  # the alias has been moved


def history(uri: str, name: str, alias: str) -> list[PromotionEntry]:
    """The entries that count, in order."""
    rows = sorted(store_reader.rows(uri, name + SUFFIX), key=lambda row: row.version)
    counted: list[PromotionEntry] = []
    for row in rows:
        entry = _entry(row)
        if entry.alias == alias and entry.follows == (counted[-1].number if counted else 0):
            counted.append(entry)
    return counted


def _entry(row: store_reader.VersionRow) -> PromotionEntry:
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


def append(
    client: Any,
    uri: str,
    name: str,
    alias: str,
    *,
    kind: Kind,
    version: int,
    before: int | None,
    follows: int,
    who: str,
    why: str,
    forced: bool,
    source: str,
    run_id: str | None,
    facts: Mapping[str, str],
) -> PromotionEntry:
    """Writes an entry and, where it counts, moves the alias. `source` is where its artifacts lie, `facts` more tags.

    Raises ResourceError where another entry came first: then nothing has changed.
    """
    _make_journal(client, name)
    tags = {
        "alias": alias,
        "kind": kind,
        "version": str(version),
        "before": "" if before is None else str(before),
        "follows": str(follows),
        "who": who,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "why": why,
        "forced": "yes" if forced else "no",
        **facts,
    }
    text = f"{kind} of {name} {version} to {alias} by {who}: {why or 'no reason given'}"
    stamped = {f"adaptnet.{key}": value for key, value in tags.items()}
    made = client.create_model_version(name + SUFFIX, source, run_id, tags=stamped, description=text)
    mine = next((entry for entry in history(uri, name, alias) if entry.number == int(made.version)), None)
    if mine is None:
        first = history(uri, name, alias)[-1]
        raise ResourceError(
            f"{name}@{alias}: {first.who} was first: version {first.version} holds it since {first.when}. Nothing was "
            "changed; look at that version, then give the same command again"
        )
    settle(client, uri, name, alias)
    return mine


def settle(client: Any, uri: str, name: str, alias: str) -> None:
    """Moves the alias to where the last entry that counts wants it, if that has not been done yet.

    Whoever has moved it looks again: an entry that was made meanwhile is served too, although its own promoter may
    have moved the alias before us.
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
        told = f"{last.when} by {last.who}, entry {last.number} of {name}{SUFFIX}: {last.why or 'no reason given'}"
        client.set_model_version_tag(name, str(last.version), f"adaptnet.alias.{alias}", told)
        moved = last.number


def previous(counted: Sequence[PromotionEntry], present: int | None) -> int | None:
    """The version that held the alias before the present one did; None where none is known.

    A rollback takes back what came last, so that two of them go back two holders. An alias that was moved past this
    journal goes back to where the journal has it.
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


def _make_journal(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        text = f"who promoted which version of {name}, when and why; the reports lie in the artifacts of each entry"
        client.create_registered_model(name + SUFFIX, tags={JOURNAL: name}, description=text)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if JOURNAL not in client.get_registered_model(name + SUFFIX).tags:
            raise ConfigError(
                f"{name}{SUFFIX}: promotions of {name} are kept under this name, and it is taken by a model; rename "
                "that one"
            ) from None
