"""One evaluator for all families: every policy on every image of a split once, whatever the number of ranks.

It uses only a policy's identity and its predictions. It averages a family's facts, and groups them by
class, without knowing their meaning. Letters: N images, B of them in a batch, K classes, n a fact's own length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline import cost, ranks
from pipeline.data import pixels
from pipeline.data.config import DataConfig
from pipeline.errors import CheckpointError, ConfigError, DataError, JsonValue
from pipeline.evaluation import reports_v1
from pipeline.family import Fitted, Latency, Policy, Prediction, Report
from pipeline.figures import hits
from pipeline.runs.files import read_json, whole_file, write_json
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import precision_of

BINS = 15  # bins of the calibration error
Arrays = dict[str, NDArray[Any]]
K = TypeVar("K")


class LabelledBatch(Protocol):
    """A batch of the loader: images uint8 [B, S, S, 3] and labels [B] i64 on the device, rows [B] of the index."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def rows(self) -> NDArray[np.int64]: ...


class Batches(Protocol):
    """A split that can be iterated repeatedly, and the names of the images that it could not read."""

    @property
    def unreadable(self) -> Sequence[str]: ...

    def __iter__(self) -> Iterator[LabelledBatch]: ...


@dataclass(frozen=True)
class Evaluator:
    """The conditions of an evaluation: pixel statistics, device, precision, memory layout, and latency measurement.

    chosen_on, last_top1 {policy: its top-1}: how the checkpoint was chosen, as in `Report`.
    """

    data: DataConfig
    device: torch.device
    num_classes: int
    autocast: bool = False
    channels_last: bool = False
    latency_batches: Sequence[int] = ()
    latency_repeats: int = 0
    chosen_on: str = ""
    last_top1: Mapping[str, float] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """As in `Report`."""
        return precision_of(self.device, autocast=self.autocast)

    def images(self, batch: LabelledBatch) -> Tensor:
        """The normalised images [B, 3, S, S] of a batch."""
        images = pixels.normalise(batch.images, self.data.mean, self.data.std)
        return images if self.channels_last else images.contiguous()

    def predict(self, policy: Policy, net: nn.Module, images: Tensor) -> Prediction:
        """Runs the policy without gradient, under autocast if that is enabled."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return policy.predict(net, images)


def choose(policies: Sequence[Policy], names: Sequence[str] | None) -> list[Policy]:
    """The policies of the given names, or all of them. Raises ConfigError listing the available ones."""
    by_name = {policy.name: policy for policy in policies}
    unknown = [name for name in names or () if name not in by_name]
    if unknown:
        raise ConfigError(
            f"policy {', '.join(unknown)}: no such policy; this net has: {', '.join(by_name)}",
            key="evaluation.policies",
            subject=", ".join(unknown),
        )
    return list(policies) if names is None else [by_name[name] for name in names]


@dataclass(frozen=True)
class _Pairs:
    """A split as (normalised images, labels), decoded again at each iteration, so it need not fit into memory."""

    batches: Batches
    evaluator: Evaluator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            yield self.evaluator.images(batch), batch.labels


def calibrate(
    policies: Sequence[Policy], net: nn.Module, batches: Batches | None, evaluator: Evaluator
) -> list[Policy]:
    """The policies fitted on held-out training images. Collective.

    Raises ConfigError if there are none and a policy needs them.
    """
    if batches is None:
        unfitted = [policy.name for policy in policies if isinstance(policy, Fitted) and not policy.state()]
        if unfitted:
            raise ConfigError(
                f"policy {', '.join(unfitted)}: is fitted on held-out training images, and there are none; set "
                "data.held_out, e.g. 0.1, before training, or choose other policies",
                key="data.held_out",
                subject=", ".join(unfitted),
            )
        return list(policies)
    net.eval()
    pairs = _Pairs(batches, evaluator)
    with torch.inference_mode(), torch.autocast(evaluator.device.type, torch.bfloat16, enabled=evaluator.autocast):
        return [policy.calibrated(net, pairs) for policy in policies]


def restored(policies: Sequence[Policy], reports: Iterable[Mapping[str, JsonValue]]) -> list[Policy]:
    """The policies with their calibration from stored reports; those without one stay as they are."""
    states = {str(report["policy"]): report.get("calibration") for report in reports}

    def restore(policy: Policy) -> Policy:
        state = states.get(policy.name)
        return policy.restored(state) if isinstance(policy, Fitted) and isinstance(state, dict) and state else policy

    return [restore(policy) for policy in policies]


def evaluate(
    net: nn.Module, policies: Sequence[Policy], batches: Batches, evaluator: Evaluator, store: Path | None = None
) -> list[Report]:
    """The report of each policy, on every rank; each image is decoded once. Collective.

    With `store`, rank 0 writes reports.json and per-image arrays `<policy>.npz` into that folder. Rank 0 alone measures
    latency while the others wait. Raises DataError if no image of the split can be read.
    """
    if evaluator.device.type == "cpu":
        keep_freed_memory()
    net.eval()
    own, sample = _run_all(net, policies, batches, evaluator)
    gathered = ranks.gather((own, list(batches.unreadable)))
    unreadable = [name for _, names in gathered for name in names]
    merged = {policy.name: _merge([arrays[policy.name] for arrays, _ in gathered]) for policy in policies}
    reports = []
    if ranks.rank() == 0:
        if any(len(arrays.get("rows", ())) == 0 for arrays in merged.values()):
            names = ", ".join(unreadable[:5]) or "none"
            raise DataError(f"no image of the split could be read; unreadable: {names}", key="data.root", subject=names)
        if sample is None:  # the other ranks have all images
            side = evaluator.data.side_for_eval
            sample = torch.zeros(1, 3, side, side, device=evaluator.device)
        full = cost.measure(net, sample[:1]).macs
        latencies = _latencies(policies, net, sample, evaluator)
        for policy, latency in zip(policies, latencies, strict=True):
            reports.append(_report(policy, merged[policy.name], full, evaluator, latency, unreadable))
        if store is not None:
            _store(store, reports, merged)
    return ranks.agree(reports)


def _run_all(
    net: nn.Module, policies: Sequence[Policy], batches: Batches, evaluator: Evaluator
) -> tuple[dict[str, Arrays], Tensor | None]:
    """This rank's per-image arrays by policy, and its first batch of images, if it has one."""
    parts: dict[str, list[Arrays]] = {policy.name: [] for policy in policies}
    sample: Tensor | None = None
    for batch in batches:
        images = evaluator.images(batch)
        sample = images if sample is None else sample
        predictions = {policy.name: evaluator.predict(policy, net, images) for policy in policies}
        for name, arrays in _per_image(predictions, batch).items():
            parts[name].append(arrays)
    return {name: _merge(arrays) for name, arrays in parts.items()}, sample


def _per_image(predictions: Mapping[str, Prediction], batch: LabelledBatch) -> dict[str, Arrays]:
    """The arrays of each policy's predictions for a batch; all are copied from the device at once."""
    tensors = {(name, key): value for name in predictions for key, value in _results(predictions[name], batch).items()}
    arrays: dict[str, Arrays] = {name: {"rows": batch.rows} for name in predictions}
    for (name, key), array in _on_host(tensors).items():
        arrays[name][key] = array
    return arrays


def _results(prediction: Prediction, batch: LabelledBatch) -> dict[str, Tensor]:
    probabilities = prediction.logits.float().softmax(1)
    confidence, predicted = probabilities.max(1)
    own = prediction.logits.gather(1, batch.labels[:, None])
    return {
        "labels": batch.labels,
        "predicted": predicted,
        "rank_of_truth": (prediction.logits > own).sum(1),
        "tied": (prediction.logits == own).sum(1),
        "confidence": confidence,
        "loss": cross_entropy(prediction.logits.float(), batch.labels, reduction="none"),
        "macs": prediction.macs.double(),
        **{f"facts/{name}": fact.float() for name, fact in prediction.facts.items()},
    }


def _on_host(tensors: Mapping[K, Tensor]) -> dict[K, NDArray[Any]]:
    """The tensors [B, ...] as arrays of the same types, by one copy: f64 holds each of their values exactly."""
    columns = [tensor.double().reshape(len(tensor), -1) for tensor in tensors.values()]
    whole = torch.cat(columns, dim=1).cpu()
    parts = torch.split(whole, [each.shape[1] for each in columns], dim=1)
    pairs = zip(tensors.items(), parts, strict=True)
    return {key: part.reshape(tensor.shape).to(tensor.dtype).numpy() for (key, tensor), part in pairs}


def _merge(parts: Iterable[Arrays]) -> Arrays:
    """The parts joined in the order of the rows, so that the result does not depend on the number of ranks."""
    filled = [part for part in parts if part]
    if not filled:
        return {}
    joined = {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}
    order = np.argsort(joined["rows"], kind="stable")
    return {name: values[order] for name, values in joined.items()}


def _report(
    policy: Policy,
    arrays: Arrays,
    full: float,
    evaluator: Evaluator,
    latency: Sequence[Latency],
    unreadable: Sequence[str],
) -> Report:
    hit, num_classes = hits(arrays), evaluator.num_classes
    facts = {name.removeprefix("facts/"): values for name, values in arrays.items() if name.startswith("facts/")}
    return Report(
        policy=policy.name,
        num_images=len(hit),
        top1=float(hit.mean()),
        top5=float(hits(arrays, 5).mean()) if num_classes > 5 else None,
        ece=calibration_error(arrays["confidence"], arrays["predicted"] == arrays["labels"]),
        macs_mean=float(arrays["macs"].mean()),
        macs_p95=float(np.percentile(arrays["macs"], 95)),
        relative_macs=float(arrays["macs"].mean()) / full,
        kind=policy.kind,
        settings=dict(policy.settings),
        latency=latency,
        facts={name: _row(values.mean(0)) for name, values in facts.items()},
        facts_by_class={name: _by_class(values, arrays["labels"], num_classes) for name, values in facts.items()},
        top1_by_class=[None if row is None else row[0] for row in _by_class(hit, arrays["labels"], num_classes)],
        unreadable=list(unreadable),
        calibration=policy.state() if isinstance(policy, Fitted) else {},
        precision=evaluator.precision,
        chosen_on=evaluator.chosen_on,
        last_top1=evaluator.last_top1.get(policy.name),
        loss=_finite_mean(arrays["loss"]),
    )


def calibration_error(confidence: NDArray[np.float32], hit: NDArray[np.bool_]) -> float:
    """The expected calibration error over BINS equal bins of the confidence in the predicted class; both are [N].

    torchmetrics' binary_calibration_error (l1) in fp64: its import would take longer than most evaluations.
    Source: Guo et al., ICML 2017 (arXiv 1706.04599), eq. 3.
    """
    chosen = np.clip(confidence, 0, 1).astype(np.float64)
    bins = np.minimum((chosen * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=hit - chosen, minlength=BINS)  # of each bin: images x (accuracy - confidence)
    return float(np.abs(gaps).sum() / len(chosen))


def _finite_mean(values: NDArray[np.float32]) -> float | None:
    mean = float(values.astype(np.float64).mean())
    return mean if math.isfinite(mean) else None


def _row(values: NDArray[Any]) -> list[float]:
    return [float(value) for value in np.atleast_1d(values)]


def _by_class(values: NDArray[Any], labels: NDArray[Any], num_classes: int) -> list[list[float] | None]:
    """The mean of values [N] or [N, n] over the images of each class; None for a class without images."""
    groups = [values[labels == label] for label in range(num_classes)]
    return [_row(rows.mean(0)) if len(rows) else None for rows in groups]


def _latencies(policies: Sequence[Policy], net: nn.Module, sample: Tensor, evaluator: Evaluator) -> list[list[Latency]]:
    """The latency of each policy at each batch size.

    The policies take turns, so that other load on the machine affects all of them; the first round is the warm-up.
    """
    if evaluator.latency_repeats == 0:
        return [[] for _ in policies]
    latencies: list[list[Latency]] = [[] for _ in policies]
    for size in evaluator.latency_batches:
        images = sample.repeat(-(-size // len(sample)), 1, 1, 1)[:size]
        if evaluator.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        before, start = _waited_s(), time.perf_counter()
        rounds = [
            [seconds_of(policy, net, images, evaluator) for policy in policies]
            for _ in range(evaluator.latency_repeats + 1)
        ]
        waited = max(0.0, _waited_s() - before) / (time.perf_counter() - start) / torch.get_num_threads()
        for entries, times in zip(latencies, zip(*rounds[1:], strict=True), strict=True):
            entries.append(_latency(size, times, evaluator, waited))
    return latencies


def _waited_s() -> float:
    """The seconds for which threads of this process waited for a free core; 0 if the system does not report it."""
    waited = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # the thread ended meanwhile
            waited += int(file.read_text().split()[1])
    return waited / 1e9


def seconds_of(policy: Policy, net: nn.Module, images: Tensor, evaluator: Evaluator) -> float:
    """The seconds of one `predict`, with the device synchronised before and after."""
    _synchronise(evaluator.device)
    start = time.perf_counter()
    evaluator.predict(policy, net, images)
    _synchronise(evaluator.device)
    return time.perf_counter() - start


def _latency(size: int, times: Sequence[float], evaluator: Evaluator, waited_share: float) -> Latency:
    return Latency(
        batch=size,
        median_ms=median(times) * 1e3,
        p95_ms=float(np.percentile(times, 95)) * 1e3,
        images_per_s=size / median(times),
        device=device_name(evaluator.device),
        threads=torch.get_num_threads(),
        waited_share=waited_share,
        precision=evaluator.precision,
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The name of the GPU or the processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "cpu"


def _store(folder: Path, reports: Sequence[Report], merged: Mapping[str, Arrays]) -> None:
    """Writes the evaluation file by file; it is complete with reports.json, the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    for report in reports:
        with whole_file(folder / f"{report.policy}.npz") as path, open(path, "wb") as file:
            np.savez_compressed(file, **{n.replace("/", "."): v for n, v in merged[report.policy].items()})  # type: ignore[arg-type]
    write_json(folder / "reports.json", [report.to_json() for report in reports])


def load_reports(folder: Path) -> list[Report]:
    """The reports in the folder of an evaluation; empty if there are none. Raises CheckpointError if damaged."""
    path = folder / "reports.json"
    if not path.exists():
        return []
    try:
        return reports_v1.read_all(read_json(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); evaluate again, or remove the folder", key=path.name, subject=path
        ) from None
