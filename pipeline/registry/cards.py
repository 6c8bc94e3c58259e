"""The card of a version: what it is, where it came from, its frontier; and the differences between two versions."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline import config as configs
from pipeline.errors import JsonValue
from pipeline.registry import store_reader
from pipeline.registry.catalogue import StoredReport, Version, lookup
from pipeline.registry.model_store import TrackedRun

NOT_FACTS = {"adaptnet.reports", "adaptnet.imported", "adaptnet.start_from"}  # shown in sentences of their own


@dataclass(frozen=True)
class Card:
    """Facts in the order in which they are shown, one line each; the version holds the frontier."""

    version: Version
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """A fact that differs between two versions; "-" where one version does not have it."""

    what: str
    a: str
    b: str


def card(reference: str, uri: str) -> Card:
    """Raises ConfigError if the reference is unknown, ResourceError if the registry does not answer."""
    version = lookup(reference, uri)
    run = store_reader.run(uri, version.run_id) if version.run_id else None
    return Card(version, dict(_facts(version, run, uri)))


def _facts(version: Version, run: TrackedRun | None, uri: str) -> Iterator[tuple[str, str]]:
    tags = version.tags
    yield "version", version.reference
    yield "aliases", " ".join(version.aliases) or "-"
    for key, value in tags.items():
        if key.startswith("adaptnet.") and key not in NOT_FACTS:
            yield re.sub(r"[_.]", " ", key.removeprefix("adaptnet.")), value
    if version.reports:
        yield "precision", ", ".join(sorted({report.get("precision") or "not noted" for report in version.reports}))
    yield "made", time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created))
    if version.run_id is not None:
        yield from _of_run(version.run_id, run)
    if lines := list(_lineage(tags, run.tags if run else {}, uri)):
        yield "lineage", "; ".join(lines)


def _of_run(run_id: str, run: TrackedRun | None) -> Iterator[tuple[str, str]]:
    if run is None:
        yield "MLflow run", f"{run_id}, which no longer exists"
        return
    deleted = f", deleted; `mlflow runs restore --run-id {run_id}` restores it" if run.deleted else ""
    yield "MLflow run", f"{run_id} ({run.tags.get('mlflow.runName', 'no name')}){deleted}"
    yield "run folder", run.tags.get("adaptnet.run_dir", "-")


def _lineage(tags: Mapping[str, str], run: Mapping[str, str], uri: str) -> Iterator[str]:
    """What preceded the version: imported weights, the weights it started from, its sweep or parent run."""
    if "adaptnet.imported" in tags:
        origin = json.loads(tags["adaptnet.imported"])
        sha256 = f" (sha256 {origin['sha256'][:16]})" if origin.get("sha256") else ""  # a folder has none
        yield f"imported from {origin.get('file')}{sha256}"
    if "adaptnet.start_from" in tags:
        yield f"started from {tags['adaptnet.start_from']}"
    if parent := run.get("mlflow.parentRunId"):
        above = store_reader.run(uri, parent)
        known = above.tags if above else {}
        what = f"a trial of the sweep {known['adaptnet.sweep']}," if "adaptnet.sweep" in known else "part of"
        yield f"{what} run {parent} ({known.get('mlflow.runName', 'no name') if above else 'no longer exists'})"


def differences(
    a: Version, b: Version, recipe_a: Mapping[str, JsonValue], recipe_b: Mapping[str, JsonValue]
) -> list[Difference]:
    """The facts of the versions, values of their recipes and figures of their policies that differ."""
    sides = [_comparable(a, recipe_a), _comparable(b, recipe_b)]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    pairs = [(key, sides[0].get(key, "-"), sides[1].get(key, "-")) for key in keys]
    return [Difference(key, left, right) for key, left, right in pairs if left != right]


def _comparable(version: Version, recipe: Mapping[str, JsonValue]) -> dict[str, str]:
    tags = {key.removeprefix("adaptnet."): value for key, value in version.tags.items() if key.startswith("adaptnet.")}
    facts = {key.replace("_", " "): value for key, value in tags.items() if key != "reports"}
    facts |= {f"recipe: {key}": json.dumps(value) for key, value in configs.flat(recipe).items()}
    return facts | {f"policy {report['policy']}": _figures(report) for report in version.reports}


def _figures(report: StoredReport) -> str:
    return f"top-1 {100 * report['top1']:.2f} %, {report['macs_mean'] / 1e6:.3f} MMACs"
