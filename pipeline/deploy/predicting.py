"""Classifies images with the most accurate policy within a budget, chosen by the net's stored evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data import dali, pixels
from pipeline.data.verdict import DecodeError, read_image
from pipeline.deploy import evaluations
from pipeline.errors import ConfigError, JsonValue, UndecodableError
from pipeline.evaluation.evaluate import Evaluator, choose, device_name, restored, seconds_of
from pipeline.evaluation.frontier import Budget, best_within, macs_text
from pipeline.family import Policy, Report
from pipeline.registry.model import Answers, LoadedModel, load_model, predict
from pipeline.runs.files import read_json, write_text
from pipeline.training.loop import device_of

READ_AT_ONCE = 256  # images held in memory
SAMPLE, REPEATS = 8, 7  # images and rounds for measuring a policy's time
TOLERANCE = 0.02  # no warning if the images' mean cost exceeds the budget by at most this share


@dataclass(frozen=True)
class Choice:
    """A policy, why it was chosen, and its cost in the budget's unit (None without a budget)."""

    policy: str
    why: str
    budget: Budget | None = None
    cost: float | None = None


Image: TypeAlias = Path | bytes  # an image's file, or its content: JPEG, PNG or another format that we read


@dataclass(frozen=True)
class Classified:
    """The classes of an image with their probabilities, the most probable first, and the MACs that it took."""

    file: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    macs: float


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be classified, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Predictor:
    """A trained net and its stored evaluation; without one, `reports` is empty and budgets are refused.

    sha256: of the weights. cache: folder for measurements on this machine.
    """

    source: str
    model: LoadedModel
    reports: Sequence[Report]
    sha256: str
    cache: Path

    @cached_property
    def policies(self) -> dict[str, Policy]:
        """The policies by name, with their stored calibration if there is one."""
        policies = restored(self.model.policies, [report.to_json() for report in self.reports])
        return {policy.name: policy for policy in policies}

    def choose(self, budget: Budget | None, policy: str | None, sample: Sequence[Image]) -> Choice:
        """The given policy, else the most accurate one within the budget, else the net's default.

        A budget in milliseconds limits the time of a pass over one image on this device, which is measured on images of
        `sample`, once for each net and device. Raises ConfigError if no policy is within the budget or has this name.
        """
        if policy is not None:
            choose(list(self.policies.values()), [policy])
            return Choice(policy, "as given")
        if budget is None:
            return Choice(self._default, "the net's default; --budget chooses another")
        if not self.reports:
            raise evaluations.no_evaluation(self.source)
        times = self._milliseconds(sample) if budget.unit == "ms" else [None] * len(self.reports)
        costs = [budget.cost_of(report, ms) for report, ms in zip(self.reports, times, strict=True)]
        best = best_within(self.reports, costs, budget)
        report = self.reports[best]
        price = f"{budget.written(costs[best])}{' an image here' if budget.unit == 'ms' else ''}"
        accuracy = f"top-1 {100 * report.top1:.2f} % on {report.num_images:,} images"
        why = f"the most accurate within {budget.text}: {price}, {accuracy}"
        return Choice(report.policy, why, budget, costs[best])

    @property
    def _default(self) -> str:
        return self.reports[0].policy if self.reports else self.model.policies[0].name

    def answers(
        self, files: Sequence[Image], policy: str, *, top: int = 5, batch_size: int = 64
    ) -> Iterator[Classified | Unreadable]:
        """One answer for each file, in the given order. top: how many classes an answer lists."""
        for start in range(0, len(files), READ_AT_ONCE):
            yield from self._answer(files[start : start + READ_AT_ONCE], policy, top, batch_size)

    def _answer(
        self, files: Sequence[Image], policy: str, top: int, batch_size: int
    ) -> Iterator[Classified | Unreadable]:
        encoded, bad = _read(files)
        good = [number for number in range(len(files)) if number not in bad]
        try:
            answers = self._predict([encoded[n] for n in good], policy, batch_size)
        except UndecodableError as error:
            bad |= {good[position]: reason for position, reason in error.reasons.items()}
            good = [number for number in good if number not in bad]
            answers = self._predict([encoded[n] for n in good], policy, batch_size)
        rows = dict(zip(good, range(len(good)), strict=True))
        for number, file in enumerate(files):
            if number in bad:
                yield Unreadable(_name(file), bad[number])
            else:
                row = rows[number]
                yield self._named(_name(file), answers.probabilities[row], float(answers.macs[row]), top)

    def _predict(self, encoded: Sequence[bytes], policy: str, batch_size: int) -> Answers:
        return predict(self._ready, encoded, policy, batch_size=batch_size)

    @cached_property
    def _ready(self) -> LoadedModel:
        return replace(self.model, policies=list(self.policies.values()))

    def _named(self, file: str, probabilities: NDArray[np.float32], macs: float, top: int) -> Classified:
        order = (-probabilities).argsort(kind="stable")[:top]
        labels = tuple(self.model.classes[place] for place in order)
        return Classified(file, labels, tuple(float(probabilities[place]) for place in order), macs)

    # ---- time on this device

    def _milliseconds(self, sample: Sequence[Image]) -> list[float]:
        """The time of one image under each policy, from the cache or measured now."""
        path = self.cache / f"{self._key}.json"
        stored = _stored_times(path, [report.policy for report in self.reports])
        if stored is None:
            stored = self._measured(self._pictures(sample), [report.policy for report in self.reports])
            about = {"source": self.source, "device": device_name(self.model.device), "batch": 1}
            with suppress(OSError):  # it is measured again if it cannot be stored
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps({**about, "milliseconds": stored}, indent=1))
        return [stored[report.policy] for report in self.reports]

    @property
    def _key(self) -> str:
        """A hash of what the times depend on: weights, policies and their calibration, device, threads, image size."""
        fitted = [[report.policy, dict(report.calibration)] for report in self.reports]
        where = [device_name(self.model.device), torch.get_num_threads(), self.model.data_config.side_for_eval]
        text = json.dumps([self.sha256, fitted, where, torch.__version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prepared(self, images: Sequence[Image]) -> Tensor:
        """The images as in the evaluation, [N, 3, S, S] f32 on the device, normalised.

        Raises UndecodableError naming the positions of those that cannot be read.
        """
        encoded, bad = _read(images)
        if bad:
            raise UndecodableError(len(images), bad)
        config = self.model.data_config
        return pixels.normalise(dali.decode(encoded, config, self.model.device), config.mean, config.std)

    def _pictures(self, sample: Sequence[Image]) -> Tensor:
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
                "budget as MACs or as a share, or other images",
                key="--budget",
            )
        return pixels.normalise(raw, config.mean, config.std)

    def late(self, choice: Choice, sample: Sequence[Image]) -> str | None:
        """A warning if these images take longer than a budget in milliseconds allows; None if they do not."""
        if choice.budget is None or choice.budget.unit != "ms":
            return None
        (now,) = self._measured(self._pictures(sample), [choice.policy]).values()
        if now <= choice.budget.amount * (1 + TOLERANCE):
            return None
        return (
            f"these images take {now:.3g} ms each on this device now, above the budget of {choice.budget.text}: the "
            "policy was chosen by a time that was measured on other images, or when this machine was less busy"
        )

    def _measured(self, images: Tensor, names: Sequence[str]) -> dict[str, float]:
        """Milliseconds of each policy for one image: mean over images of the median over rounds; policies alternate."""
        evaluator = Evaluator(self.model.data_config, self.model.device, len(self.model.classes), channels_last=True)
        times: dict[str, list[list[float]]] = {name: [[] for _ in images] for name in names}
        for turn in range(REPEATS + 1):  # the first warms up
            for number in range(len(images)):
                for name in names:
                    passed = seconds_of(self.policies[name], self.model.net, images[number : number + 1], evaluator)
                    if turn:
                        times[name][number].append(passed)
        return {name: 1e3 * mean(median(turns) for turns in rounds) for name, rounds in times.items()}


def load(
    source: str,
    uri: str | None = None,
    *,
    device: str = "auto",
    cache: Path | None = None,
    nets: Path | None = None,
    evaluated: bool = True,
) -> Predictor:
    """The net that `source` names (a folder, a version, a net of the zoo), ready to classify.

    nets: the zoo's folder; default: the shipped one. Raises ConfigError if the device is unknown or not available, or,
    unless `evaluated` is off, no evaluation of it is stored.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device (={device}): auto, cpu or cuda", key="--device", subject=device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device (=cuda): torch finds no GPU here; choose auto or cpu", key="--device", subject=device
        )
    net = (evaluations.find if evaluated else evaluations.look_up)(source, uri, nets=nets)
    model = load_model(net.model.folder, device_of(device))
    home = cache or Path.home() / ".cache" / "adaptnet" / "latency"
    return Predictor(source, model, net.newest.reports if net.sets else (), net.sha256, home)


def exceeded(choice: Choice, answers: Sequence[Classified], full_macs: float) -> str | None:
    """A warning if these images cost more MACs on average than the budget allows; None if they do not.

    full_macs: of the full network, for a budget that is a share of it.
    """
    budget = choice.budget
    if budget is None or budget.unit == "ms" or not answers:
        return None
    mean_macs = mean(answer.macs for answer in answers)
    allowed = budget.amount * (full_macs if budget.unit == "share" else 1)
    if mean_macs <= allowed * (1 + TOLERANCE):
        return None
    return (
        f"these images cost {macs_text(mean_macs)} on average, above the budget of {macs_text(allowed)}: the policy "
        "was within it on the images of the evaluation, and these are harder"
    )


def _name(image: Image) -> str:
    """The image's file; "" of one that is given by its content."""
    return str(image) if isinstance(image, Path) else ""


def _read(images: Sequence[Image]) -> tuple[list[bytes], dict[int, str]]:
    """The bytes of each image, and by position the reasons of those that cannot be read."""
    encoded, bad = list[bytes](), dict[int, str]()
    for number, image in enumerate(images):
        try:
            encoded.append(image if isinstance(image, bytes) else read_image(str(image)))
        except DecodeError as error:
            encoded.append(b"")
            bad[number] = str(error)
    return encoded, bad


def full_macs(reports: Sequence[Report]) -> float:
    """The MACs of the full network, from the cost of a policy and its share of the full network."""
    return reports[0].macs_mean / reports[0].relative_macs


def as_mapping(answer: Classified | Unreadable) -> dict[str, JsonValue]:
    """The answer as a JSON object: {"file", "top": [{"label", "probability"}], "macs"} or {"file", "reason"}."""
    if isinstance(answer, Unreadable):
        return {"file": answer.file, "reason": answer.reason}
    pairs = zip(answer.labels, answer.probabilities, strict=True)
    top: list[JsonValue] = [{"label": label, "probability": probability} for label, probability in pairs]
    return {"file": answer.file, "top": top, "macs": answer.macs}


def _stored_times(path: Path, policies: Sequence[str]) -> Mapping[str, float] | None:
    """The milliseconds in a file of the cache; None if there is none for each policy."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    times = content.get("milliseconds") if isinstance(content, dict) else None
    found = times if isinstance(times, dict) else {}
    known = {name: float(each) for name, each in found.items() if isinstance(each, int | float)}
    return known if set(policies) <= set(known) else None
