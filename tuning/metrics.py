"""The metrics of a trial: which ones an evaluation reports, and their values when a trial has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean

from pipeline import family as families
from pipeline.errors import ConfigError
from pipeline.evaluation import from_weights
from pipeline.evaluation.evaluate import load_reports
from pipeline.run_config import RunConfig
from pipeline.runs import journal, records
from tuning import cost
from tuning.config import Sweep, SweepConfig

METRICS = ("top1", "top5", "ece", "gmacs", "gmacs_p95", "full_share")  # metrics of each policy
OF_NET = ("mparameters", "memory_mib")  # memory_mib only if the sweep measures it
LOWER_IS_BETTER = ("ece", "gmacs", "gmacs_p95", "full_share", *OF_NET)
MEAN = "mean"  # over all policies


def reported(num_classes: int) -> list[str]:
    """The metrics that an evaluation on this many classes reports of each policy."""
    return [metric for metric in METRICS if metric != "top5" or num_classes > 5]


def sign_of(config: SweepConfig, num_classes: int) -> int:
    """1 if more of the scheduler's metric is better, -1 if less is. Raises ConfigError for one that is not reported."""
    metric, known = config.scheduler.metric, reported(num_classes)
    if metric not in known:
        raise ConfigError(
            f"scheduler.metric (={metric}): an evaluation reports {', '.join(known)}",
            key="scheduler.metric",
            subject=metric,
        )
    return -1 if metric in LOWER_IS_BETTER else 1


def check_objectives(config: SweepConfig, policies: Sequence[str], num_classes: int) -> None:
    """Raises ConfigError for an objective that no trial will report."""
    metrics = reported(num_classes)
    known = [*metrics, *(metric for metric in OF_NET if metric != "memory_mib" or config.memory)]
    known += [f"{policy}/{metric}" for policy in (*policies, MEAN) for metric in metrics]
    for name in (*config.objectives, config.cost_metric):
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"objectives: {name}: no trial reports it; {hint}known: {', '.join(metrics)} and mparameters "
                f"(memory_mib with memory=true) for the first policy, POLICY/top1 and so on for another, {MEAN}/top1 "
                f"and so on for the mean of all; policies: {', '.join(policies)}",
                key="objectives",
                subject=name,
            )


def final_metrics(sweep: Sweep, folder: Path, config: RunConfig) -> dict[str, float]:
    """All metrics of a finished trial: POLICY/metric, those of the first policy without its name, and the means."""
    reports = load_reports(folder / "evaluations" / from_weights.FINAL)
    metrics = {key.removeprefix("eval/"): value for key, value in from_weights.metrics_of(reports).items()}
    for report in reports:
        metrics |= {f"{report.policy}/{fact}": float(sum(values)) for fact, values in report.facts.items()}
    metrics |= _without_policy(metrics, reports[0].policy) if reports else {}
    for name in METRICS:
        values = [metrics[f"{report.policy}/{name}"] for report in reports if f"{report.policy}/{name}" in metrics]
        metrics |= {f"{MEAN}/{name}": fmean(values)} if values else {}
    return metrics | _of_net(sweep, folder, config)


def metrics_at(folder: Path, step: int) -> dict[str, float]:
    """The metrics of a trial that stopped early: those of its newest evaluation up to `step`."""
    metrics: dict[str, float] = {}
    for key, points in journal.curves(folder / "journal").items():
        earlier = [value for at, value in points if at <= step]
        if key.startswith("eval/") and earlier:
            metrics[key.removeprefix("eval/")] = earlier[-1]
    policies = {key.rpartition("/")[0] for key in metrics}  # one: no other is evaluated during training
    return metrics | {name: value for policy in policies for name, value in _without_policy(metrics, policy).items()}


def _without_policy(metrics: Mapping[str, float], policy: str) -> dict[str, float]:
    return {name: metrics[f"{policy}/{name}"] for name in METRICS if f"{policy}/{name}" in metrics}


def _of_net(sweep: Sweep, folder: Path, config: RunConfig) -> dict[str, float]:
    """The trained net's parameters and, if the sweep measures them, its memory and its profile (NAME/NN)."""
    from pipeline.training import checkpoint

    best = records.read_status(folder).best
    if not best:
        return {}
    net = checkpoint.load_net(checkpoint.open_storage(config.checkpoint, folder).fetch(best))[0]
    metrics = {"mparameters": sum(p.numel() for p in net.parameters()) / 1e6}
    side = config.data.side_for_eval
    if sweep.config.memory:
        metrics["memory_mib"] = cost.memory_mib(net, side)
    if sweep.config.profiles:
        profile = families.find(config.family.name).profile
        metrics |= {f"{profile.name}/{place:02d}": float(v) for place, v in enumerate(profile.measure(net, side))}
    return metrics
