"""The card of a version: what it is, what it came from, its frontier; and what sets two versions apart."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import config as configs
from pipeline.registry import store_reader
from pipeline.registry.catalogue import Version, lookup

NOT_FACTS = {"adaptnet.reports", "adaptnet.imported", "adaptnet.start_from"}  # told in words of their own


@dataclass(frozen=True)
class Card:
    """Facts in the order they are read, each a line; the version knows its frontier."""

    version: Version
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """A thing that two versions differ in; "-" where one has none."""

    what: str
    a: str
    b: str


def card(reference: str, uri: str) -> Card:
    """Raises ConfigError where the reference is unknown, ResourceError where the registry does not answer."""
    version = lookup(reference, uri)
    run = store_reader.run(uri, version.run_id) if version.run_id else None
    return Card(version, dict(_facts(version, run, uri)))


def _facts(version: Version, run: store_reader.TrackedRun | None, uri: str) -> Iterator[tuple[str, str]]:
    tags = version.tags
    yield "version", version.reference
    yield "aliases", " ".join(version.aliases) or "-"
    for key, value in tags.items():
        if key.startswith("adaptnet.") and key not in NOT_FACTS:
            yield re.sub(r"[_.]", " ", key.removeprefix("adaptnet.")), value
    yield "made", time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created))
    if version.run_id is not None:
        yield from _of_run(version.run_id, run)
    if lines := list(_lineage(tags, run.tags if run else {}, uri)):
        yield "lineage", "; ".join(lines)


def _of_run(run_id: str, run: store_reader.TrackedRun | None) -> Iterator[tuple[str, str]]:
    if run is None:
        yield "MLflow run", f"{run_id}, which is gone"
        return
    binned = f", deleted; `mlflow runs restore --run-id {run_id}` brings it back" if run.deleted else ""
    yield "MLflow run", f"{run_id} ({run.tags.get('mlflow.runName', 'no name')}){binned}"
    yield "run folder", run.tags.get("adaptnet.run_dir", "-")


def _lineage(tags: Mapping[str, str], run: Mapping[str, str], uri: str) -> Iterator[str]:
    """What came before: imported weights, the weights it grew from, the sweep or the run above it."""
    if "adaptnet.imported" in tags:
        origin = json.loads(tags["adaptnet.imported"])
        sha256 = f" (sha256 {origin['sha256'][:16]})" if origin.get("sha256") else ""  # a folder has none
        yield f"imported from {origin.get('file')}{sha256}"
    if "adaptnet.start_from" in tags:
        yield f"grown from {tags['adaptnet.start_from']}"
    if parent := run.get("mlflow.parentRunId"):
        above = store_reader.run(uri, parent)
        known = above.tags if above else {}
        what = f"a trial of the sweep {known['adaptnet.sweep']}," if "adaptnet.sweep" in known else "below"
        yield f"{what} run {parent} ({known.get('mlflow.runName', 'no name') if above else 'gone'})"


def differences(a: Version, b: Version, recipe_a: Mapping[str, Any], recipe_b: Mapping[str, Any]) -> list[Difference]:
    """What the versions say of themselves and what their recipes hold, where these differ; figures by policy."""
    sides = [_comparable(a, recipe_a), _comparable(b, recipe_b)]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    pairs = [(key, sides[0].get(key, "-"), sides[1].get(key, "-")) for key in keys]
    return [Difference(key, left, right) for key, left, right in pairs if left != right]


def _comparable(version: Version, recipe: Mapping[str, Any]) -> dict[str, str]:
    told = {key: value for key, value in version.tags.items() if key.startswith("adaptnet.")}
    told.pop("adaptnet.reports", None)
    facts = {key.removeprefix("adaptnet.").replace("_", " "): value for key, value in told.items()}
    facts |= {f"recipe: {key}": json.dumps(value) for key, value in configs.flat(recipe).items()}
    return facts | {f"policy {report['policy']}": _figures(report) for report in version.reports}


def _figures(report: Mapping[str, Any]) -> str:
    return f"top-1 {100 * report['top1']:.2f} %, {report['macs_mean'] / 1e6:.3f} MMACs"
