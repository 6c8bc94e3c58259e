"""Answers images with the most accurate policy within a budget, chosen from the net's stored evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data import dali, pixels
from pipeline.deploy import evaluations
from pipeline.errors import ConfigError, UndecodableError
from pipeline.evaluation.evaluate import Evaluator, choose, device_name, restored, seconds_of
from pipeline.evaluation.frontier import Budget, best_within, macs_text
from pipeline.family import Policy, Report
from pipeline.registry.model import Answers, LoadedModel, load_model, predict
from pipeline.runs.files import write_text
from pipeline.training.loop import device_of

READ_AT_ONCE = 256  # images held in memory
SAMPLE, REPEATS = 8, 7  # images and rounds that a policy's time is measured on
TOLERANCE = 0.02  # by which the images' mean price may exceed a budget without a word


@dataclass(frozen=True)
class Choice:
    """A policy, why it was taken, and its price in the budget's unit (None without a budget)."""

    policy: str
    why: str
    budget: Budget | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Answer:
    """What an image is: classes and their probabilities, the likeliest first, and the MACs spent on it."""

    file: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    macs: float


@dataclass(frozen=True)
class Unreadable:
    """An image without an answer, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Predictor:
    """A trained net and its stored evaluation. cache: folder for what was measured on this machine."""

    source: str
    model: LoadedModel
    reports: Sequence[Report]
    sha256: str  # of the weights
    cache: Path

    @cached_property
    def policies(self) -> dict[str, Policy]:
        """Those that can run at once: all but the ones whose calibration is not stored."""
        found = restored(self.model.policies, [report.to_json() for report in self.reports])
        return {policy.name: policy for policy in found}

    def choose(self, budget: Budget | None, policy: str | None, sample: Sequence[Path]) -> Choice:
        """The policy asked for, else the most accurate within the budget, else the net's default.

        A budget in milliseconds is met by what a pass over one image takes on this device: measured on images of
        `sample`, once for each net and device. Raises ConfigError where no policy is within it, or none is so called.
        """
        if policy is not None:
            choose(list(self.policies.values()), [policy])
            return Choice(policy, "as asked for")
        if budget is None:
            return Choice(self.reports[0].policy, "the net's default; --budget chooses another")
        times = self._milliseconds(sample) if budget.unit == "ms" else [None] * len(self.reports)
        costs = [budget.cost_of(report, ms) for report, ms in zip(self.reports, times, strict=True)]
        best = best_within(self.reports, costs, budget)
        report = self.reports[best]
        price = f"{budget.written(costs[best])}{' an image here' if budget.unit == 'ms' else ''}"
        accuracy = f"top-1 {100 * report.top1:.2f} % on {report.num_images:,} images"
        why = f"the most accurate within {budget.text}: {price}, {accuracy}"
        return Choice(report.policy, why, budget, costs[best])

    def answers(
        self, files: Sequence[Path], policy: str, *, top: int = 5, batch_size: int = 64
    ) -> Iterator[Answer | Unreadable]:
        """One for each file, in their order."""
        for start in range(0, len(files), READ_AT_ONCE):
            yield from self._answer(files[start : start + READ_AT_ONCE], policy, top, batch_size)

    def _answer(self, files: Sequence[Path], policy: str, top: int, batch_size: int) -> Iterator[Answer | Unreadable]:
        encoded, bad = _read(files)
        good = [number for number in range(len(files)) if number not in bad]
        try:
            found = self._predict([encoded[n] for n in good], policy, batch_size)
        except UndecodableError as error:
            bad |= {good[position]: reason for position, reason in error.reasons.items()}
            good = [number for number in good if number not in bad]
            found = self._predict([encoded[n] for n in good], policy, batch_size)
        rows = dict(zip(good, range(len(good)), strict=True))
        for number, file in enumerate(files):
            if number in bad:
                yield Unreadable(str(file), bad[number])
            else:
                row = rows[number]
                yield self._named(str(file), found.probabilities[row], float(found.macs[row]), top)

    def _predict(self, encoded: Sequence[bytes], policy: str, batch_size: int) -> Answers:
        return predict(self._ready, encoded, policy, batch_size=batch_size)

    @cached_property
    def _ready(self) -> LoadedModel:
        return replace(self.model, policies=list(self.policies.values()))

    def _named(self, file: str, probabilities: NDArray[np.float32], macs: float, top: int) -> Answer:
        order = (-probabilities).argsort(kind="stable")[:top]
        labels = tuple(self.model.classes[place] for place in order)
        return Answer(file, labels, tuple(float(probabilities[place]) for place in order), macs)

    # ---- time on this device

    def _milliseconds(self, sample: Sequence[Path]) -> list[float]:
        """Of one image under each policy: measured here before, or now."""
        path = self.cache / f"{self._key}.json"
        if path.is_file():
            stored: Mapping[str, float] = json.loads(path.read_text(encoding="utf-8"))["milliseconds"]
        else:
            stored = self._measured(self._pictures(sample), [report.policy for report in self.reports])
            about = {"source": self.source, "device": device_name(self.model.device), "batch": 1}
            with suppress(OSError):  # it is measured again where it cannot be kept
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps({**about, "milliseconds": stored}, indent=1))
        return [stored[report.policy] for report in self.reports]

    @property
    def _key(self) -> str:
        """Names what a time depends on: weights, policies and their calibration, device, threads, size."""
        fitted = [[report.policy, dict(report.calibration)] for report in self.reports]
        where = [device_name(self.model.device), torch.get_num_threads(), self.model.data_config.side_for_eval]
        text = json.dumps([self.sha256, fitted, where, torch.__version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _pictures(self, sample: Sequence[Path]) -> Tensor:
        encoded, bad = _read(sample[:SAMPLE])
        usable = [each for number, each in enumerate(encoded) if number not in bad]
        config, device = self.model.data_config, self.model.device
        try:
            raw = dali.decode(usable, config, device)
        except UndecodableError as error:
            raw = dali.decode([e for n, e in enumerate(usable) if n not in error.reasons], config, device)
        if len(raw) == 0:
            raise ConfigError(
                "a budget in milliseconds is measured on the first images, and none of them can be read; give the "
                "budget as MACs or as a share, or other images"
            )
        return pixels.normalise(raw, config.mean, config.std)

    def late(self, choice: Choice, sample: Sequence[Path]) -> str | None:
        """A sentence where one of these images takes longer than a budget in milliseconds allows; None where none."""
        if choice.budget is None or choice.budget.unit != "ms":
            return None
        (now,) = self._measured(self._pictures(sample), [choice.policy]).values()
        if now <= choice.budget.amount * (1 + TOLERANCE):
            return None
        return (
            f"these images take {now:.3g} ms each on this device now, above the budget of {choice.budget.text}: the "
            "policy was chosen by a time measured before, on other images or a less busy machine"
        )

    def _measured(self, images: Tensor, names: Sequence[str]) -> dict[str, float]:
        """Milliseconds each policy takes for one image: the mean over images of the median over rounds, by turns."""
        how = Evaluator(self.model.data_config, self.model.device, len(self.model.classes), channels_last=True)
        times: dict[str, list[list[float]]] = {name: [[] for _ in images] for name in names}
        for turn in range(REPEATS + 1):  # the first warms up
            for number in range(len(images)):
                for name in names:
                    passed = seconds_of(self.policies[name], self.model.net, images[number : number + 1], how)
                    if turn:
                        times[name][number].append(passed)
        return {name: 1e3 * mean(median(turns) for turns in found) for name, found in times.items()}


def load(source: str, uri: str | None = None, *, device: str = "auto", cache: Path | None = None) -> Predictor:
    """The net that `source` names (a run's folder, a checkpoint's, a version), ready to answer.

    Raises ConfigError where no evaluation of it is stored, or the device is none or not here.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device (={device}): auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device (=cuda): torch sees no GPU here; take auto or cpu")
    net = evaluations.find(source, uri)
    model = load_model(net.model.folder, device_of(device))
    home = cache or Path.home() / ".cache" / "adaptnet" / "latency"
    return Predictor(source, model, net.newest.reports, net.sha256, home)


def exceeded(choice: Choice, answers: Sequence[Answer], full_macs: float) -> str | None:
    """A sentence where these images cost more MACs on average than the budget allows, None where they do not.

    full_macs: of the whole network, for a budget that is a share of it.
    """
    budget = choice.budget
    if budget is None or budget.unit == "ms" or not answers:
        return None
    spent = mean(answer.macs for answer in answers)
    allowed = budget.amount * (full_macs if budget.unit == "share" else 1)
    if spent <= allowed * (1 + TOLERANCE):
        return None
    return (
        f"these images cost {macs_text(spent)} on average, above the budget of {macs_text(allowed)}: it was kept on "
        "the images of the evaluation, and these are harder"
    )


def _read(files: Sequence[Path]) -> tuple[list[bytes], dict[int, str]]:
    """The bytes of each file, and the reasons for those that cannot be read."""
    encoded, bad = list[bytes](), dict[int, str]()
    for number, file in enumerate(files):
        try:
            encoded.append(file.read_bytes())
        except OSError as error:
            encoded.append(b"")
            bad[number] = f"cannot be read: {error.strerror}"
    return encoded, bad


def full_macs(reports: Sequence[Report]) -> float:
    """The MACs of the whole network, from a policy's own price and share of it."""
    return reports[0].macs_mean / reports[0].relative_macs


def as_mapping(answer: Answer | Unreadable) -> dict[str, Any]:
    """For JSON: {"file", "top": [{"label", "probability"}], "macs"} or {"file", "reason"}."""
    if isinstance(answer, Unreadable):
        return {"file": answer.file, "reason": answer.reason}
    pairs = zip(answer.labels, answer.probabilities, strict=True)
    top = [{"label": label, "probability": probability} for label, probability in pairs]
    return {"file": answer.file, "top": top, "macs": answer.macs}
