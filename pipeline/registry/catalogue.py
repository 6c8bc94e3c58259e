"""The versions in the registry, by name and alias, and those of their policies that meet a budget.

Nothing here imports torch or MLflow, so that looking something up does not take seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NotRequired, TypedDict

from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.frontier import Budget, dominated, merit
from pipeline.registry import cache, store_reader
from pipeline.registry.model_store import RegisteredModel, VersionRow
from pipeline.tracking.address import database_file, resolve_uri

RUNS = Path("runs")  # where runs and their database are by default
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w\-]+)|/(?P<version>\d+|latest))")
MOST = 2**31 - 1  # the largest integer of PostgreSQL
JOURNAL = "adaptnet.promotions_of"  # tag of the registered models that hold promotions, not nets


class StoredReport(TypedDict):
    """The evaluation of one policy in a version's tag, which may contain further figures."""

    policy: str
    num_images: int
    top1: float  # in 0..1
    macs_mean: float  # per image
    macs_p95: NotRequired[float]  # per image; 95th percentile
    full_share: NotRequired[float]  # mean MACs as a share of those of the whole net
    precision: NotRequired[str]  # fp32, tf32 or bf16


@dataclass(frozen=True)
class Version:
    """One version of a registered model, as the registry stores it."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str | None
    created: float  # seconds since 1970
    tags: Mapping[str, str]

    @property
    def reference(self) -> str:
        """The reference that users write: models:/NAME/VERSION."""
        return f"models:/{self.name}/{self.version}"

    @cached_property
    def reports(self) -> list[StoredReport]:
        """The figures of each policy, the default first. Raises CheckpointError if the tag is damaged."""
        try:
            reports: list[StoredReport] = json.loads(self.tags.get("adaptnet.reports", "[]"))
            if not isinstance(reports, list) or not all(isinstance(each, dict) for each in reports):
                raise ValueError("it holds no reports")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.reference}: its tag adaptnet.reports is damaged ({error})",
                key="adaptnet.reports",
                subject=self.reference,
            ) from None
        return reports

    @cached_property
    def dominated(self) -> list[bool]:
        """For each report whether another one is at least as accurate and costs no more."""
        merits = [merit(str(report.get("kind", "")), report["top1"]) for report in self.reports]
        return dominated([report["macs_mean"] for report in self.reports], merits)

    def is_of(self, dataset: str) -> bool:
        """Whether it was trained or evaluated on the images with this name or identity."""
        return dataset in {self.tags.get(f"adaptnet.{key}") for key in ("dataset", "data", "evaluated_on")}


def address(uri: str | None) -> str:
    """The complete URI of the registry; runs/mlflow.db here if none is given."""
    return resolve_uri(uri, RUNS / "any")


def versions(uri: str, name: str | None = None) -> list[Version]:
    """Every version of `name`, or of all names, newest first.

    Raises ConfigError listing the existing names if `name` is unknown.
    """
    models = _models(uri, name)
    if store_reader.is_web(uri):
        return _versions(models, cache.rows(uri, models))
    return _versions(models, store_reader.rows(uri, name))


def _models(uri: str, name: str | None) -> list[RegisteredModel]:
    """The model of that name, or all; without those that hold promotions instead of nets."""
    check_there(uri)
    models = [model for model in store_reader.models(uri) if JOURNAL not in model.tags]
    if name is None:
        return models
    names = ", ".join(model.name for model in models) or "none"
    wanted = [model for model in models if model.name == name]
    if not wanted:
        raise ConfigError(
            f"{name}: the registry has no model of that name; existing names: {names}", key="name", subject=name
        )
    return wanted


def _versions(models: Sequence[RegisteredModel], rows: Sequence[VersionRow]) -> list[Version]:
    """The versions, newest first."""
    names = {model.name for model in models}
    aliases: dict[tuple[str, int], tuple[str, ...]] = {}
    for model in models:
        for alias, number in sorted(model.aliases.items()):
            aliases[model.name, number] = (*aliases.get((model.name, number), ()), alias)
    versions = [
        Version(row.name, row.version, aliases.get((row.name, row.version), ()), row.run_id, row.created, row.tags)
        for row in rows
        if row.name in names
    ]
    return sorted(versions, key=lambda version: (version.name, -version.version))


def check_there(uri: str) -> None:
    """Raises ConfigError for a database file that does not exist."""
    path = database_file(uri)
    if path is not None and not path.exists():
        raise ConfigError(
            f"{path}: no registry exists here yet; name another with --uri, e.g. sqlite:////data/runs/mlflow.db, which "
            "is beside the folders of its runs",
            key="--uri",
            subject=path,
        )


def lookup(reference: str, uri: str) -> Version:
    """The version behind `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/latest`.

    Raises ConfigError listing what exists if the name, version or alias is unknown.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise _unknown(reference, "write models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest")
    models = _models(uri, match["name"])
    if match["alias"]:
        number = models[0].aliases.get(match["alias"], 0)
    elif match["version"] == "latest":
        number = max((version.version for version in versions(uri, match["name"])), default=0)
    else:
        number = int(match["version"])
    wanted = _versions(models, store_reader.rows(uri, match["name"], number)) if 0 < number <= MOST else []
    if not wanted:
        existing = listed(versions(uri, match["name"]))
        raise _unknown(reference, f"no such version or alias; {match['name']} has: {existing}")
    return wanted[0]


def code_of(version: Version, uri: str) -> dict[str, str]:
    """`commit` of the code that trained the version, and `uncommitted`: "true" if it had changes; as far as known."""
    run = store_reader.run(uri, version.run_id) if version.run_id else None
    tags = {"commit": "mlflow.source.git.commit", "uncommitted": "adaptnet.git.dirty"}
    return {key: run.tags[tag] for key, tag in tags.items() if tag in run.tags} if run else {}


def _unknown(reference: str, why: str) -> ConfigError:
    return ConfigError(f"{reference}: {why}", key="reference", subject=reference)


def listed(versions: Sequence[Version], most: int = 40) -> str:
    """Versions and their aliases in one line."""
    names = [f"{v.version}{''.join(f' @{alias}' for alias in v.aliases)}" for v in versions]
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


@dataclass(frozen=True)
class Match:
    """A version and one of its policies that meet the bounds; top1 in 0..1, macs mean per image."""

    version: Version
    policy: str
    top1: float
    macs: float
    num_images: int


def matching(
    candidates: Sequence[Version], *, max_macs: Budget | None, min_top1: float | None, dataset: str | None
) -> list[Match]:
    """The undominated policies within the bounds: the most accurate first, among equals the cheapest, then the newest.

    min_top1 in 0..1. Raises ConfigError naming the nearest policy if none meets the bounds.
    """
    on_data = [version for version in candidates if dataset is None or version.is_of(dataset)]
    if not on_data:
        known = sorted({each.tags["adaptnet.dataset"] for each in candidates if "adaptnet.dataset" in each.tags})
        raise ConfigError(
            f"--dataset (={dataset}): no version was trained or evaluated on it; known: {', '.join(known) or 'none'}",
            key="--dataset",
            subject=dataset,
        )
    every = [match for version in on_data for match in _matches(version)]
    within = [match for match in every if max_macs is None or match.macs <= max_macs.amount]
    wanted = [match for match in within if min_top1 is None or match.top1 >= min_top1]
    if not wanted:
        raise _nearest(every, within, max_macs, min_top1)
    return sorted(wanted, key=lambda match: (-match.top1, match.macs, match.version.name, -match.version.version))


def _matches(version: Version) -> Iterator[Match]:
    for report, beaten in zip(version.reports, version.dominated, strict=True):
        if not beaten:
            yield Match(version, report["policy"], report["top1"], report["macs_mean"], report["num_images"])


def _nearest(
    every: Sequence[Match], within: Sequence[Match], max_macs: Budget | None, min_top1: float | None
) -> ConfigError:
    """The error that says how far the nearest policy is from the bounds."""
    if not every:
        return ConfigError("no version in the registry has figures of its policies", key="name")
    if not within:
        assert max_macs is not None
        cheapest = min(every, key=lambda match: match.macs)
        return ConfigError(
            f"--max-macs (={max_macs.text}): every policy costs more; the cheapest is {cheapest.policy} of "
            f"{cheapest.version.reference} at {max_macs.written(cheapest.macs)}",
            key="--max-macs",
            subject=max_macs.text,
        )
    best = max(within, key=lambda match: match.top1)
    bound = f" within --max-macs (={max_macs.text})" if max_macs else ""
    return ConfigError(
        f"--min-top1 (={100 * (min_top1 or 0):g}): no policy{bound} is as accurate; the best is {best.policy} of "
        f"{best.version.reference} with {100 * best.top1:.2f} %",
        key="--min-top1",
        subject=f"{100 * (min_top1 or 0):g}",
    )
