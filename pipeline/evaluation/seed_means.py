"""Several seeds of a recipe as one net: the mean of each figure, and its spread over the seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from pipeline.evaluation.over_seeds import SeedGroup, Spread, spread
from pipeline.family import Evaluated, Latency, Report
from pipeline.figures import Number


def mean_of(group: SeedGroup) -> Evaluated:
    """The group as one net under its name, whose reports are the means over its seeds, policy by policy.

    A policy is there if all seeds were evaluated under it. Answers by image, facts and curves are those of single nets,
    in `seeds`.
    """
    first = group.nets[0]
    return replace(
        first,
        name=group.name,
        reports=means([net.reports for net in group.nets]),
        details=lambda policy: None,
        curves=dict,
        attacked=_means_by_name([net.attacked for net in group.nets]),
        swept=_means_by_name([net.swept for net in group.nets]),
        seeds=tuple(group.nets),
    )


def means(reports: Sequence[Sequence[Report]]) -> list[Report]:
    """The mean report of each policy that every seed has, in the order of the first seed; reports [S][policies]."""
    by_seed = [{report.policy: report for report in each} for each in reports]
    shared = [name for name in by_seed[0] if all(name in each for each in by_seed)]
    return [_mean([each[name] for each in by_seed]) for name in shared]


def over_seeds(net: Evaluated, policy: str, figure: Callable[[Report], Number]) -> Spread | None:
    """The spread of a policy's figure over the net's seeds; None for a net without seeds, or if a seed lacks it."""
    found = [figure(report) for seed in net.seeds for report in seed.reports if report.policy == policy]
    values = [value for value in found if value is not None]
    return spread(values) if values and len(values) == len(net.seeds) else None


def _means_by_name(stored: Sequence[Mapping[str, Sequence[Report]]]) -> dict[str, list[Report]]:
    shared = [name for name in stored[0] if all(name in each for each in stored)]
    return {name: means([each[name] for each in stored]) for name in shared}


def _mean(reports: Sequence[Report]) -> Report:
    """The mean of one policy's reports; a latency is there if all were measured alike."""
    first = reports[0]
    chosen = {report.chosen_on for report in reports}
    return replace(
        first,
        top1=fmean(report.top1 for report in reports),
        top5=_mean_if_all([report.top5 for report in reports]),
        ece=fmean(report.ece for report in reports),
        loss=_mean_if_all([report.loss for report in reports]),
        macs_mean=fmean(report.macs_mean for report in reports),
        macs_p95=fmean(report.macs_p95 for report in reports),
        relative_macs=fmean(report.relative_macs for report in reports),
        last_top1=_mean_if_all([report.last_top1 for report in reports]),
        num_images=min(report.num_images for report in reports),
        latency=[each for entry in first.latency if (each := _mean_latency(entry.batch, reports))],
        facts={},
        facts_by_class={},
        top1_by_class=[_mean_if_all(column) for column in zip(*(r.top1_by_class for r in reports), strict=False)],
        unreadable=sorted({name for report in reports for name in report.unreadable}),
        calibration={},
        precision=" or ".join(dict.fromkeys(report.precision for report in reports)),
        chosen_on=first.chosen_on if len(chosen) == 1 else "",
    )


def _mean_if_all(values: Sequence[Number]) -> Number:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _mean_latency(batch: int, reports: Sequence[Report]) -> Latency | None:
    """The mean at this batch size; None if a seed was not measured, or on another device, threads or precision."""
    entries = [entry for report in reports for entry in report.latency if entry.batch == batch]
    conditions = {(entry.device, entry.threads, entry.precision) for entry in entries}
    if len(entries) < len(reports) or len(conditions) > 1:
        return None
    return replace(
        entries[0],
        median_ms=fmean(entry.median_ms for entry in entries),
        p95_ms=fmean(entry.p95_ms for entry in entries),
        images_per_s=fmean(entry.images_per_s for entry in entries),
        waited_share=max(entry.waited_share for entry in entries),
    )
