"""Registers runs as versions, promotes versions through a gate, and rolls back.

A version is promoted if it adds to what the present holder of the alias can do: both are evaluated on the same images,
and at least one policy of the version must be undominated in accuracy and MACs.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import tracking
from pipeline.deploy import evaluations
from pipeline.deploy.evaluations import Evaluation
from pipeline.errors import CheckpointError, ConfigError, JsonValue
from pipeline.evaluation.frontier import dominated, macs_text, merit
from pipeline.family import Report
from pipeline.registry import catalogue, promotion_log
from pipeline.registry.catalogue import Version, listed
from pipeline.registry.promotion_log import HolderChange, PromotionEntry
from pipeline.registry.publishing import publish
from pipeline.registry.session import session
from pipeline.runs import provenance
from pipeline.runs.files import write_json
from pipeline.runs.records import read_about
from pipeline.tracking.address import registered_alias
from pipeline.tracking.client import Client

NEWEST = "candidate"  # the alias of a model's newest version; nothing is promoted to it


@dataclass(frozen=True)
class Promotion:
    """The decision: the version, the previous holder of the alias, what both can do, and the log entry.

    `entry` is None if the version held the alias already. `overruled` is why the gate refused a forced promotion.
    """

    version: Version
    before: Version | None
    data: str
    reports: Sequence[Report]
    champion_reports: Sequence[Report]
    entry: PromotionEntry | None
    overruled: str | None = None


def register(
    source: str,
    name: str,
    uri: str | None = None,
    *,
    alias: str = NEWEST,
    remarks: Mapping[str, str] | None = None,
) -> Version:
    """Registers the best checkpoint of a run, or the checkpoint in a folder, as a version of `name`.

    The run is sent to the tracking server first if it has not been. Idempotent. Raises ConfigError if `source` does not
    belong to a run, if no evaluation of it is stored, or if versions are promoted to `alias`.
    """
    registered_alias(alias)
    net = evaluations.find(source)
    if net.run_dir is None:
        raise ConfigError(
            f"{source}: not part of a run folder; register what a run has trained or imported",
            key="source",
            subject=source,
        )
    own = tracking.tracking_config(net.run_dir).uri
    address = catalogue.address(uri) if uri else tracking.resolve_uri(own, net.run_dir)
    run_id = tracking.sync(net.run_dir, address).run_id
    if alias != NEWEST and promotion_log.history(address, name, alias):
        raise ConfigError(
            f"--alias (={alias}): versions of {name} reach this alias only by promotion; leave out --alias, then run "
            f"`adaptnet models promote {name} VERSION --alias {alias}`",
            key="--alias",
            subject=alias,
        )
    newest = net.newest
    return publish(
        net.model.folder,
        newest.reports,
        name,
        run_id=run_id,
        uri=address,
        alias=alias,
        evaluated_on=newest.data,
        remarks=remarks,
    )


def promote(
    name: str,
    number: int,
    *,
    alias: str = "champion",
    root: Path | None = None,
    why: str = "",
    force: bool = False,
    uri: str | None = None,
    data_home: str | None = None,
) -> Promotion:
    """Points `alias` at a version after evaluating it beside the present holder on the images of `root`.

    root: a data set; default: the one that the version was trained on. Raises ConfigError if the holder dominates the
    version, or cannot be evaluated, and `force` is off; ResourceError if another promotion came first.
    """
    _check_promotable(alias, why, force)
    address = catalogue.address(uri)
    version = _numbered(catalogue.versions(address, name), number)
    with session(address) as client:
        promotion_log.settle(client, address, name, alias)
        follows = _last(promotion_log.history(address, name, alias))
        before = _holder(catalogue.versions(address, name), alias)
        if before is not None and before.version == number:
            return Promotion(version, before, "", (), (), None)
        mine = _evaluated(version, root, address, data_home)
        theirs, refusal = _compared(mine, version, before, alias, address, data_home) if before else (None, None)
        if refusal and not force:
            raise ConfigError(
                f"{version.reference} is not promoted: {refusal}. To promote it nevertheless: --force --why REASON",
                key="--force",
                subject=version.reference,
            )
        change = HolderChange(
            name=name,
            alias=alias,
            kind="promotion",
            version=number,
            before=before.version if before else None,
            follows=follows,
            who=provenance.who(),
            why=why,
            forced=bool(refusal),
            source=_store_reports(client, version, alias, mine, theirs),
            run_id=version.run_id,
            facts={"data": _identity(mine), "reports": _figures(mine.reports), **_champion_facts(theirs)},
        )
        entry = promotion_log.append(client, address, change)
    reports = theirs.reports if theirs else ()
    return Promotion(version, before, _identity(mine), mine.reports, reports, entry, refusal)


def _check_promotable(alias: str, why: str, force: bool) -> None:
    registered_alias(alias)
    if alias == NEWEST:
        raise ConfigError(
            f"--alias (={alias}): this is the newest version; promote to another alias, e.g. champion",
            key="--alias",
            subject=alias,
        )
    if force and not why.strip():
        raise ConfigError("--force: give the reason with --why, so that others can read it", key="--why")


def _numbered(versions: Sequence[Version], number: int) -> Version:
    version = next((each for each in versions if each.version == number), None)
    if version is None:
        name = versions[0].name if versions else "the model"
        raise ConfigError(
            f"version {number}: {name} has no such version; it has: {listed(versions)}", key="version", subject=number
        )
    return version


def _holder(versions: Sequence[Version], alias: str) -> Version | None:
    return next((each for each in versions if alias in each.aliases), None)


def _last(counted: Sequence[PromotionEntry]) -> int:
    return counted[-1].number if counted else 0


def _evaluated(version: Version, root: Path | None, uri: str, data_home: str | None) -> Evaluation:
    if version.run_id is None:
        raise ConfigError(
            f"{version.reference} belongs to no tracked run that could store its reports; register a run",
            key="version",
            subject=version.reference,
        )
    wanted = [f"data.root={json.dumps(str(root))}"] if root else []
    return evaluations.evaluate(version.reference, wanted, data_home=data_home, uri=uri)


def _compared(
    mine: Evaluation, version: Version, before: Version, alias: str, uri: str, data_home: str | None
) -> tuple[Evaluation | None, str | None]:
    """The holder's evaluation on the same images (None if its files are gone), and why it is not to be replaced."""
    same = [f"data.root={json.dumps(str(mine.root))}"]
    try:
        theirs = evaluations.evaluate(before.reference, same, data_home=data_home, uri=uri)
    except CheckpointError as error:
        return None, f"{before.reference}, the present {alias}, cannot be evaluated beside it: {error}"
    if _identity(theirs) != _identity(mine):
        raise ConfigError(
            f"{mine.root}: {version.reference} and {before.reference} use different images of it ({_identity(mine)} "
            f"and {_identity(theirs)}); name a data set that has a val split with --data",
            key="--data",
            subject=mine.root,
        )
    reason = gate(mine.reports, theirs.reports)
    why = f"{before.reference}, the present {alias}, dominates it on {mine.root}: {reason}"
    return theirs, why if reason else None


def _identity(evaluation: Evaluation) -> str:
    return str(read_about(evaluation.folder).data)


def gate(challenger: Sequence[Report], champion: Sequence[Report]) -> str | None:
    """Why the champion dominates the challenger, and by how much; None if it does not.

    Equal points count for the champion: a change must improve something.
    """
    both = [*champion, *challenger]
    theirs = dominated([r.macs_mean for r in both], [merit(r.kind, r.top1) for r in both])[len(champion) :]
    if not all(theirs):
        return None
    own = dominated([r.macs_mean for r in challenger], [merit(r.kind, r.top1) for r in challenger])
    return "; ".join(_by_how_much(r, champion) for r, beaten in zip(challenger, own, strict=True) if not beaten)


def _by_how_much(report: Report, champion: Sequence[Report]) -> str:
    better = [r for r in champion if r.macs_mean <= report.macs_mean and r.top1 >= report.top1]
    best = max(better, key=lambda r: (r.top1, -r.macs_mean))
    cheaper = 100 * (1 - best.macs_mean / report.macs_mean)
    return (
        f"{report.policy} has {100 * report.top1:.2f} % at {macs_text(report.macs_mean)}, its {best.policy} "
        f"{100 * best.top1:.2f} % at {macs_text(best.macs_mean)}: {100 * (best.top1 - report.top1):.2f} points more "
        f"for {cheaper:.1f} % fewer MACs"
    )


def _store_reports(client: Client, version: Version, alias: str, mine: Evaluation, theirs: Evaluation | None) -> str:
    """Stores both reports among the artifacts of the version's run. Returns their location."""
    place = f"promotions/{alias}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="adaptnet-promote-") as scratch:
        for name, evaluation in (("challenger", mine), ("champion", theirs)):
            if evaluation is not None:
                content = {"of": evaluation.what, "root": str(evaluation.root), "reports": _whole(evaluation.reports)}
                write_json(Path(scratch) / f"{name}.json", content)
        client.log_artifacts(version.run_id, scratch, place)
    return f"{client.get_run(version.run_id).info.artifact_uri}/{place}"


def _whole(reports: Sequence[Report]) -> list[dict[str, JsonValue]]:
    return [report.to_json() for report in reports]


def _figures(reports: Sequence[Report]) -> str:
    return json.dumps([{"policy": r.policy, "top1": r.top1, "macs_mean": r.macs_mean} for r in reports])


def _champion_facts(theirs: Evaluation | None) -> dict[str, str]:
    return {"champion_reports": _figures(theirs.reports)} if theirs else {}


def rollback(name: str, *, alias: str = "champion", why: str = "", uri: str | None = None) -> tuple[Version, Version]:
    """Returns `alias` to the version that held it before: (that version, the one that loses it).

    Raises ConfigError if no version held it before, or that version no longer exists.
    """
    address = catalogue.address(uri)
    catalogue.versions(address, name)
    with session(address) as client:
        promotion_log.settle(client, address, name, alias)
        counted = promotion_log.history(address, name, alias)
        versions = catalogue.versions(address, name)
        present = _holder(versions, alias)
        number = promotion_log.previous(counted, present.version if present else None)
        if present is None or number is None:
            raise _nothing_before(name, alias, present, versions)
        target = _numbered(versions, number)
        change = HolderChange(
            name=name,
            alias=alias,
            kind="rollback",
            version=number,
            before=present.version,
            follows=_last(counted),
            who=provenance.who(),
            why=why,
            source=client.get_model_version(name, str(number)).source,
            run_id=target.run_id,
        )
        promotion_log.append(client, address, change)
    return target, present


def _nothing_before(name: str, alias: str, present: Version | None, versions: Sequence[Version]) -> ConfigError:
    held = f"only {present.reference} has held it" if present else f"no version holds it; existing: {listed(versions)}"
    return ConfigError(
        f"{name}@{alias}: there is nothing to roll back to: {held}", key="--alias", subject=f"{name}@{alias}"
    )
