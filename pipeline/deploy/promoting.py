"""From a run to the version that serves: register, promote through a gate, roll back.

A version is promoted where it adds to what the present holder of the alias can do: of both, evaluated on the same
images, at least one of its policies must be undominated in accuracy and MACs.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.deploy import evaluations
from pipeline.deploy.evaluations import Evaluation
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.frontier import dominated, macs_text
from pipeline.family import Report
from pipeline.registry import catalogue, promotion_log
from pipeline.registry.catalogue import Version, listed
from pipeline.registry.publishing import publish
from pipeline.registry.resolve import asking
from pipeline.runs import provenance
from pipeline.runs.records import read_about
from pipeline.tracking.address import registered_alias

NEWEST = "candidate"  # the alias of a model's newest version, which nothing is promoted to


@dataclass(frozen=True)
class Promotion:
    """What was decided: the version, who held the alias before, what both can do, and the entry that says so.

    `entry` is None where the version held the alias already.
    """

    version: Version
    before: Version | None
    data: str
    reports: Sequence[Report]
    champion_reports: Sequence[Report]
    entry: promotion_log.PromotionEntry | None
    overruled: str | None = None  # why the gate would have refused it


def register(
    source: str,
    name: str,
    uri: str | None = None,
    *,
    alias: str = NEWEST,
    remarks: Mapping[str, str] | None = None,
) -> Version:
    """Registers a run's best checkpoint, or the checkpoint in that folder, as a version of `name`.

    The run is sent to MLflow first where it has not been. Idempotent. Raises ConfigError where `source` is not of a
    run, no evaluation of it is stored, or `alias` is one that versions are promoted to.
    """
    registered_alias(alias)
    net = evaluations.find(source)
    if net.run_dir is None:
        raise ConfigError(f"{source}: this is not of a run's folder; register what a run has trained or imported")
    place = catalogue.address(uri) if uri else tracking.resolve_uri(_recipe_uri(net.run_dir), net.run_dir)
    run_id = tracking.sync(net.run_dir, place).run_id
    if alias != NEWEST and promotion_log.history(place, name, alias):
        raise ConfigError(
            f"--alias (={alias}): versions of {name} are promoted to it, through a gate; leave --alias out, then "
            f"`adaptnet models promote {name} VERSION --alias {alias}`"
        )
    newest = net.newest
    return publish(
        net.model.folder,
        newest.reports,
        name,
        run_id=run_id,
        uri=place,
        alias=alias,
        evaluated_on=newest.data,
        remarks=remarks,
    )


def _recipe_uri(run_dir: Path) -> str | None:
    uri: str | None = tracking.recipe_of(run_dir).get("tracking", {}).get("uri")
    return uri


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
    """Points `alias` at a version once it has been evaluated, beside the present holder, on the images of `root`.

    root: a set of images; default: the one the version was trained on. Raises ConfigError where the holder dominates
    it, or cannot be evaluated, and `force` is off; ResourceError where another promotion came first.
    """
    registered_alias(alias)
    if alias == NEWEST:
        raise ConfigError(f"--alias (={alias}): that is the newest version; promote to another, e.g. champion")
    if force and not why.strip():
        raise ConfigError("--force: say why, with --why, so that others can read it")
    place = catalogue.address(uri)
    found = catalogue.versions(place, name)
    version = _numbered(found, number)
    with asking(place) as client:
        promotion_log.settle(client, place, name, alias)
        follows = _last(promotion_log.history(place, name, alias))
        found = catalogue.versions(place, name)
        before = next((each for each in found if alias in each.aliases), None)
        if before is not None and before.version == number:
            return Promotion(version, before, "", (), (), None)
        mine = _evaluated(version, root, place, data_home)
        theirs, refusal = _compared(mine, version, before, alias, place, data_home) if before else (None, None)
        if refusal and not force:
            raise ConfigError(
                f"{version.reference} is not promoted: {refusal}. To promote it all the same: --force --why REASON"
            )
        source = _keep_reports(client, version, alias, mine, theirs)
        entry = promotion_log.append(
            client,
            place,
            name,
            alias,
            kind="promotion",
            version=number,
            before=before.version if before else None,
            follows=follows,
            who=provenance.who(),
            why=why,
            forced=bool(refusal),
            source=source,
            run_id=version.run_id,
            facts={"data": _identity(mine), "reports": _figures(mine.reports), **_champion_facts(theirs)},
        )
    reports = theirs.reports if theirs else ()
    return Promotion(version, before, _identity(mine), mine.reports, reports, entry, refusal)


def _numbered(found: Sequence[Version], number: int) -> Version:
    version = next((each for each in found if each.version == number), None)
    if version is None:
        name = found[0].name if found else "the model"
        raise ConfigError(f"version {number}: {name} has no such version; it has: {listed(found)}")
    return version


def _last(counted: Sequence[promotion_log.PromotionEntry]) -> int:
    return counted[-1].number if counted else 0


def _evaluated(version: Version, root: Path | None, uri: str, data_home: str | None) -> Evaluation:
    if version.run_id is None:
        raise ConfigError(f"{version.reference} has no MLflow run that its reports could be kept with; register a run")
    wanted = [f"data.root={json.dumps(str(root))}"] if root else []
    return evaluations.evaluate(version.reference, wanted, data_home=data_home, uri=uri)


def _compared(
    mine: Evaluation, version: Version, before: Version, alias: str, uri: str, data_home: str | None
) -> tuple[Evaluation | None, str | None]:
    """The holder on the same images, and why it is not to be replaced; no evaluation where its files are gone."""
    same = [f"data.root={json.dumps(str(mine.root))}"]
    try:
        theirs = evaluations.evaluate(before.reference, same, data_home=data_home, uri=uri)
    except CheckpointError as error:
        return None, f"{before.reference}, the present {alias}, cannot be evaluated beside it: {error}"
    if _identity(theirs) != _identity(mine):
        raise ConfigError(
            f"{mine.root}: {version.reference} and {before.reference} see different images there ({_identity(mine)} "
            f"and {_identity(theirs)}); name a set with a val split of its own with --data"
        )
    found = gate(mine.reports, theirs.reports)
    why = f"{before.reference}, the present {alias}, dominates it on {mine.root}: {found}"
    return theirs, why if found else None


def _identity(evaluation: Evaluation) -> str:
    return str(read_about(evaluation.folder).data)


def gate(challenger: Sequence[Report], champion: Sequence[Report]) -> str | None:
    """Why the champion dominates the challenger, with by how much; None where it does not.

    Of equal points the champion's stands: a change must bring something.
    """
    both = [*champion, *challenger]
    beaten = dominated([r.macs_mean for r in both], [r.top1 for r in both])[len(champion) :]
    if not all(beaten):
        return None
    own = dominated([r.macs_mean for r in challenger], [r.top1 for r in challenger])
    return "; ".join(_by_how_much(r, champion) for r, dull in zip(challenger, own, strict=True) if not dull)


def _by_how_much(report: Report, champion: Sequence[Report]) -> str:
    better = [r for r in champion if r.macs_mean <= report.macs_mean and r.top1 >= report.top1]
    best = max(better, key=lambda r: (r.top1, -r.macs_mean))
    cheaper = 100 * (1 - best.macs_mean / report.macs_mean)
    return (
        f"{report.policy} has {100 * report.top1:.2f} % at {macs_text(report.macs_mean)}, its {best.policy} "
        f"{100 * best.top1:.2f} % at {macs_text(best.macs_mean)}: {100 * (best.top1 - report.top1):.2f} points more "
        f"for {cheaper:.1f} % fewer MACs"
    )


def _keep_reports(client: Any, version: Version, alias: str, mine: Evaluation, theirs: Evaluation | None) -> str:
    """Puts both reports among the artifacts of the version's run; where they lie."""
    place = f"promotions/{alias}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="adaptnet-promote-") as scratch:
        for name, evaluation in (("challenger", mine), ("champion", theirs)):
            if evaluation is not None:
                text = {"of": evaluation.what, "root": str(evaluation.root), "reports": _whole(evaluation.reports)}
                (Path(scratch) / f"{name}.json").write_text(json.dumps(text, indent=1), encoding="utf-8")
        client.log_artifacts(version.run_id, scratch, place)
    return f"{client.get_run(version.run_id).info.artifact_uri}/{place}"


def _whole(reports: Sequence[Report]) -> list[dict[str, Any]]:
    return [report.to_json() for report in reports]


def _figures(reports: Sequence[Report]) -> str:
    return json.dumps([{"policy": r.policy, "top1": r.top1, "macs_mean": r.macs_mean} for r in reports])


def _champion_facts(theirs: Evaluation | None) -> dict[str, str]:
    return {"champion_reports": _figures(theirs.reports)} if theirs else {}


def rollback(name: str, *, alias: str = "champion", why: str = "", uri: str | None = None) -> tuple[Version, Version]:
    """Gives `alias` back to the version that held it before; (that version, the one that loses it).

    Raises ConfigError where nobody held it before, or that version is gone.
    """
    place = catalogue.address(uri)
    catalogue.versions(place, name)
    with asking(place) as client:
        promotion_log.settle(client, place, name, alias)
        counted = promotion_log.history(place, name, alias)
        found = catalogue.versions(place, name)
        present = next((each for each in found if alias in each.aliases), None)
        number = promotion_log.previous(counted, present.version if present else None)
        if present is None or number is None:
            held = (
                f"only {present.reference} has held it" if present else f"nobody holds it; there are: {listed(found)}"
            )
            raise ConfigError(f"{name}@{alias}: there is nothing to roll back to: {held}")
        target = _numbered(found, number)
        promotion_log.append(
            client,
            place,
            name,
            alias,
            kind="rollback",
            version=number,
            before=present.version,
            follows=_last(counted),
            who=provenance.who(),
            why=why,
            forced=False,
            source=client.get_model_version(name, str(number)).source,
            run_id=target.run_id,
            facts={},
        )
    return target, present
