"""Evaluates a net from its weights: the recipe's evaluator and loaders, and the metrics for the tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pipeline import family as families
from pipeline import ranks
from pipeline.data.dali import EvalLoader
from pipeline.data.index import ImageIndex, Splits
from pipeline.errors import ConfigError, JsonValue
from pipeline.evaluation.evaluate import Batches, Evaluator, calibrate, choose, evaluate, restored
from pipeline.evaluation.robustness import Attack, Attacked, ResolutionSweep
from pipeline.family import HELD_OUT, THESE_IMAGES, Fitted, Report
from pipeline.run_config import RunConfig
from pipeline.training.config import LAST
from pipeline.training.loop import device_of
from pipeline.training.plan import use_bf16
from pipeline.weights import load

FINAL = "final"  # the evaluation after training


def placed(net: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The net on its device, with the memory layout of the images."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return net.to(device).to(memory_format=layout)


def check_policies(config: RunConfig, splits: Splits) -> None:
    """Raises ConfigError if a requested policy is unknown, cannot work, or has no images to be fitted on.

    Also if `checkpoint.best` is no metric of the evaluations during training.
    """
    family, num_classes = families.find(config.family.name), len(splits.train.classes)
    net = family.build(config.family, num_classes).eval()
    policies = family.policies(config.family, net)
    _check_best(config.checkpoint.best, policies[0].name, num_classes)
    policies = choose(policies, config.evaluation.policies)
    example = torch.zeros(1, 3, config.data.side_for_eval, config.data.side_for_eval)
    for policy in policies:
        if isinstance(policy, Fitted):
            policy.check(net, example)
    if len(splits.held_out) == 0:
        calibrate(policies, net, None, evaluator(config, torch.device("cpu"), num_classes, latency=False))


def _check_best(best: str | None, policy: str, num_classes: int) -> None:
    logged = [f"eval/{policy}/top1", *([f"eval/{policy}/top5"] if num_classes >= 5 else [])]
    if best is not None and best not in (LAST, *logged):
        raise ConfigError(
            f"checkpoint.best (={best}): no evaluation during training gives it; they run the first policy and give "
            f"{' and '.join(logged)}",
            key="checkpoint.best",
            subject=best,
        )


def evaluator(config: RunConfig, device: torch.device, num_classes: int, *, latency: bool) -> Evaluator:
    """How the recipe's nets are evaluated on this device."""
    return Evaluator(
        data=config.data,
        device=device,
        num_classes=num_classes,
        autocast=use_bf16(config.training.precision, device),
        channels_last=config.training.channels_last,
        latency_batches=config.evaluation.latency_batches,
        latency_repeats=config.evaluation.latency_repeats if latency else 0,
    )


def chosen_on(metric: str) -> str:
    """The images on which this metric chooses a checkpoint, as `Report` names them; the metric itself if of others."""
    return {"eval": THESE_IMAGES, "held_out": HELD_OUT, LAST: ""}.get(metric.partition("/")[0], metric)


def eval_loader(config: RunConfig, split: ImageIndex, device: torch.device, threads: int) -> EvalLoader:
    """This rank's share of a split, each image once over all ranks."""
    return EvalLoader(
        split,
        config.data,
        batch_size=max(1, config.evaluation.batch_size // ranks.world()),
        rank=ranks.rank(),
        world=ranks.world(),
        device=device,
        threads=threads,
    )


def evaluate_checkpoint(
    config: RunConfig,
    weights: Path,
    splits: Splits,
    wanted: Sequence[str] | None,
    store: Path,
    known: Sequence[Mapping[str, JsonValue]] = (),
    *,
    attack: Attack | None = None,
    sweep: ResolutionSweep | None = None,
    chosen: str = "",
    last_top1: Mapping[str, float] | None = None,
) -> Sequence[Report]:
    """Evaluates the net with `weights` (safetensors) on the val split, in this process, under the `wanted` policies.

    known: stored reports, whose calibration is reused; other policies are fitted on the held-out images. `attack` and
    `sweep` perturb and resize the images of the val split, after the calibration. chosen, last_top1: how the checkpoint
    was chosen, as in `Evaluator`. The results are written to `store`.
    """
    from safetensors.torch import load_file

    device = device_of(config.compute.device)
    family = families.find(config.family.name)
    net = family.build(config.family, len(splits.val.classes))
    load(net, load_file(weights))
    conditions = replace(
        evaluator(config, device, len(splits.val.classes), latency=True), chosen_on=chosen, last_top1=last_top1 or {}
    )
    net = placed(net, device, conditions.channels_last).eval()
    policies = restored(choose(family.policies(config.family, net), wanted or config.evaluation.policies), known)
    if sweep is not None:
        sweep.check(net, config.data.side_for_eval)
    threads = config.data.decode_threads or torch.get_num_threads()
    fitted = all(policy.state() for policy in policies if isinstance(policy, Fitted))
    held_out = None if fitted or not len(splits.held_out) else eval_loader(config, splits.held_out, device, threads)
    policies = calibrate(policies, net, held_out, conditions)
    policies = sweep.of(policies) if sweep is not None else policies
    batches: Batches = eval_loader(config, splits.val, device, threads)
    if attack is not None:
        batches = Attacked(batches, net, conditions, attack)
    return evaluate(net, policies, batches, conditions, store=store)


def metrics_of(reports: Sequence[Report]) -> dict[str, float]:
    """The reports as metrics for the tracker: `eval/<policy>/top1` and so on."""
    values: dict[str, float] = {}
    for report in reports:
        metrics = {
            "top1": report.top1,
            "top5": report.top5,
            "ece": report.ece,
            "loss": report.loss,
            "gmacs": report.macs_mean / 1e9,
            "gmacs_p95": report.macs_p95 / 1e9,
            "full_share": report.relative_macs,
        }
        values |= {f"eval/{report.policy}/{key}": value for key, value in metrics.items() if value is not None}
    return values
