"""A trained net as a folder: written atomically, checked before it is used, run on encoded images.

Letters: N images, K classes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline import config as configs
from pipeline import family as families
from pipeline.data.config import DataConfig
from pipeline.errors import CheckpointError, JsonValue, ResourceError, UndecodableError
from pipeline.evaluation.evaluate import choose, restored
from pipeline.family import AnyFamily, FamilyConfig, Policy, Report
from pipeline.registry import public
from pipeline.runs import files
from pipeline.runs.files import whole_folder
from pipeline.training import checkpoint
from pipeline.training.memory import keep_freed_memory
from pipeline.training.plan import precision_of

if TYPE_CHECKING:
    from pipeline.data.dali import Decoding

FORMAT, HUB_FORMAT = 1, 2  # of a model folder; of one with the file names of Hugging Face's Hub
DECODERS = 4  # of a net at most; each holds a batch of images
WEIGHTS, RECIPE, CARD = "net.safetensors", "recipe.yaml", "card.json"
HUB_WEIGHTS = "model.safetensors"
ORIGIN_OF_CARD = "origin"  # key of card.json
FIGURES = (
    "policy",
    "num_images",
    "top1",
    "top5",
    "ece",
    "loss",
    "macs_mean",
    "macs_p95",
    "full_share",
    "latency",
    "calibration",
    "precision",
    "chosen_on",
    "last_top1",
)


def write_model_folder(
    source: Path,
    reports: Sequence[Report],
    destination: Path,
    *,
    evaluated_on: str | None = None,
    origin: Mapping[str, JsonValue] | None = None,
    for_hub: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the net of a checkpoint or model folder as a model folder, completely or not at all.

    evaluated_on: identity of the images of the reports. origin: further facts for the card. for_hub: adds files to the
    folder before it is moved to its place; the weights then have their name on Hugging Face's Hub, and recipe and card
    name no place on this machine.
    Returns `destination`. Raises CheckpointError if the source is damaged, ResourceError if the folder cannot be
    written.
    """
    trained = describe(source)
    facts, name = _card_of(source), HUB_WEIGHTS if for_hub else WEIGHTS
    shown = public.recipe(trained.recipe) if for_hub else trained.recipe
    if for_hub:
        facts = _shared(facts)
    try:
        with whole_folder(destination) as aside:
            (aside / "reports").mkdir()
            shutil.copyfile(trained.weights, aside / name)
            (aside / RECIPE).write_text(configs.dump_yaml(shown), encoding="utf-8")
            whole = [report.to_json() for report in reports]
            whole = [_shared(each) for each in whole] if for_hub else whole
            (aside / "reports" / "reports.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
            recipe = {"sha256": files.sha256(aside / RECIPE)}
            card = {**facts, **_of_files(whole, aside / name), "recipe": recipe, "evaluated_on": evaluated_on}
            card |= {"format": HUB_FORMAT if for_hub else FORMAT} | ({ORIGIN_OF_CARD: dict(origin)} if origin else {})
            (aside / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
            if for_hub is not None:
                for_hub(aside)
    except OSError as error:
        raise ResourceError(
            f"{destination}: the model cannot be written there ({error.strerror})",
            key="destination",
            subject=destination,
        ) from None
    return destination


def _shared(facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The facts without places of this machine; names of classes are never places."""
    return {key: each if key == "classes" else public.without_places(each) for key, each in facts.items()}


def weights_of(folder: Path) -> Path:
    """The weights of a checkpoint that are used: the moving average if training maintained one."""
    ema = folder / "ema.safetensors"
    return ema if ema.exists() else folder / WEIGHTS


def _of_files(reports: Sequence[Mapping[str, JsonValue]], weights: Path) -> dict[str, JsonValue]:
    return {
        "weights": {"file": weights.name, "bytes": weights.stat().st_size, "sha256": files.sha256(weights)},
        "reports": [{key: report.get(key) for key in (*FIGURES, "calibration")} for report in reports],
    }


def _card_of(source: Path) -> dict[str, JsonValue]:
    """What a card says of the net itself, from the folder of a model or of a checkpoint."""
    if (source / CARD).is_file():
        card: dict[str, JsonValue] = json.loads((source / CARD).read_text(encoding="utf-8"))
        return card
    meta = checkpoint.read_meta(source)
    return {
        "name": meta.recipe.get("name"),
        "family": meta.family["name"],
        "step": meta.step,
        "epoch": meta.epoch,
        "data": meta.data_identity,
        "classes": list(meta.classes),
        "fingerprint": dict(meta.fingerprint),
    }


@dataclass(frozen=True)
class Trained:
    """A trained net on disk: the folder of a checkpoint or of a model. card: of a model folder, else empty."""

    folder: Path
    weights: Path
    recipe: Mapping[str, JsonValue]  # the RunConfig as plain values
    classes: tuple[str, ...]
    step: int
    card: Mapping[str, JsonValue] = field(default_factory=dict)
    trained_on: str | None = None  # identity of its training images

    def section(self, name: str) -> dict[str, JsonValue]:
        """A section of the recipe."""
        return configs.section(self.recipe, name)

    @property
    def stored_reports(self) -> list[dict[str, JsonValue]]:
        """What the card holds of each policy's report, the default first; empty for a checkpoint."""
        return _reports_in(self.card)

    @property
    def evaluated_on(self) -> str | None:
        """Identity of the images of these reports."""
        data = self.card.get("evaluated_on")
        return str(data) if data else None


def _reports_in(card: Mapping[str, JsonValue]) -> list[dict[str, JsonValue]]:
    reports = card.get("reports")
    return [report for report in reports if isinstance(report, dict)] if isinstance(reports, list) else []


def describe(folder: Path) -> Trained:
    """The net in the folder of a checkpoint or of a model, its weights checked against their checksum.

    Raises CheckpointError if the folder is neither, damaged, or of a newer format.
    """
    if (folder / CARD).is_file():
        return _describe_model(folder)
    checkpoint.verify(folder)
    meta = checkpoint.read_meta(folder)
    return Trained(
        folder, weights_of(folder), meta.recipe, tuple(meta.classes), meta.step, trained_on=meta.data_identity
    )


def _describe_model(folder: Path) -> Trained:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        known = card["format"] <= HUB_FORMAT
        weights, classes, step = card["weights"], tuple(card["classes"]), int(card["step"])
        size, sha256, name = weights["bytes"], weights["sha256"], weights.get("file", WEIGHTS)
        recipe_sha256 = card.get("recipe", {}).get("sha256")  # None in cards written before this checksum existed
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / CARD, f"cannot be read ({type(error).__name__}: {error})") from None
    if not known:
        raise _damaged(
            folder / CARD, f"model format {card['format']}; this version of adaptnet reads up to {HUB_FORMAT}"
        )
    if name not in (WEIGHTS, HUB_WEIGHTS):
        raise _damaged(folder / CARD, f"the weights (={name}) are neither {WEIGHTS} nor {HUB_WEIGHTS}")
    file = folder / name
    if not file.is_file() or file.stat().st_size != size or files.sha256(file) != sha256:
        raise _damaged(file, f"not the weights that {CARD} was written for: damaged or exchanged")
    recipe = configs.read_mapping(folder / RECIPE)
    if recipe_sha256 not in (None, files.sha256(folder / RECIPE)):
        raise _damaged(folder / RECIPE, f"not the recipe that {CARD} was written for: damaged or exchanged")
    return Trained(folder, file, recipe, classes, step, card, card.get("data"))


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: {why}", key=file.name, subject=file)


def _new_semaphore() -> BoundedSemaphore:
    return BoundedSemaphore(DECODERS)


@dataclass(frozen=True)
class LoadedModel:
    """A net ready to predict, with what its images and answers need."""

    net: nn.Module  # in eval mode, on `device`
    family: AnyFamily
    family_config: FamilyConfig
    data_config: DataConfig
    classes: tuple[str, ...]
    policies: Sequence[Policy]  # the first is the default
    card: Mapping[str, JsonValue]
    device: torch.device
    _decoders: list[Decoding] = field(default_factory=list, compare=False, repr=False)  # idle ones, for later use
    _decoding: BoundedSemaphore = field(default_factory=_new_semaphore, compare=False, repr=False)
    lock: Lock = field(default_factory=Lock, compare=False, repr=False)  # held while the net runs

    @property
    def precision(self) -> str:
        """The precision in which `predict` computes: fp32, or TF32 on a GPU that has it."""
        return precision_of(self.device, autocast=False)

    @property
    def stored_reports(self) -> list[dict[str, JsonValue]]:
        """What the card holds of each policy's report, the default first; empty without a card."""
        return _reports_in(self.card)

    @contextmanager
    def decoding(self, most: int) -> Iterator[Decoding]:
        """A decoder of up to `most` images at a time, for one thread; at most DECODERS threads decode at once."""
        from pipeline.data import dali

        with self._decoding:
            decoder = self._idle(most) or dali.Decoding(self.data_config, self.device, torch.get_num_threads(), most)
            try:
                yield decoder
            finally:
                self._decoders.append(decoder)

    def _idle(self, most: int) -> Decoding | None:
        """A decoder that no thread uses; one for fewer images at a time is closed."""
        try:
            decoder = self._decoders.pop()  # atomic: no other thread gets it
        except IndexError:
            return None
        if decoder.most >= most:
            return decoder
        decoder.close()
        return None


def load_model(folder: Path, device: torch.device | None = None) -> LoadedModel:
    """The net of a model's or checkpoint's folder; no code in the folder is run and nothing is unpickled.

    Raises CheckpointError if the weights are not those of the card or do not fit the family.
    """
    from safetensors.torch import load_file

    trained, device = describe(folder), device or torch.device("cpu")
    section = trained.section("family")
    family = families.find(str(section["name"]))
    family_config = configs.validate_stored(family.config, section, f"{folder}: recipe.family")
    data_config = configs.validate_stored(DataConfig, trained.section("data"), f"{folder}: recipe.data")
    with torch.random.fork_rng(devices=[]):
        net = family.build(family_config, len(trained.classes))
    try:
        net.load_state_dict(load_file(trained.weights), strict=True)
    except Exception as error:  # safetensors and torch raise several kinds
        why = f"{type(error).__name__}: {error}"
        raise _damaged(trained.weights, f"the weights cannot be loaded ({why})") from None
    net = net.eval().to(device).to(memory_format=torch.channels_last)  # like the images
    return LoadedModel(
        net=net,
        family=family,
        family_config=family_config,
        data_config=data_config,
        classes=trained.classes,
        policies=restored(family.policies(family_config, net), trained.stored_reports),
        card=trained.card,
        device=device,
    )


@dataclass(frozen=True)
class Answers:
    """probabilities [N, K] f32, and macs [N] f64: multiply-accumulates of each image."""

    probabilities: NDArray[np.float32]
    macs: NDArray[np.float64]


def predict(
    model: LoadedModel, encoded: Sequence[bytes], policy: str | None = None, *, batch_size: int = 64
) -> Answers:
    """Classifies encoded images (JPEG, PNG), prepared as for the evaluation, with the policy called `policy`.

    On a CPU, freed memory is retained for later batches, here and after: without this ARRN's cifar size was 1.5 times
    slower at batch 64 on one thread. Raises UndecodableError naming the positions of images that cannot be decoded,
    ConfigError for an unknown policy. Threads may decode at the same time, while another one runs the net.
    """
    from pipeline.data import pixels

    if model.device.type == "cpu":
        keep_freed_memory()
    chosen = model.policies[0] if policy is None else choose(model.policies, [policy])[0]
    probabilities = np.zeros((len(encoded), len(model.classes)), np.float32)
    macs, undecodable = np.zeros(len(encoded)), dict[int, str]()
    for rows in _batches(encoded, batch_size):
        try:
            with model.decoding(batch_size) as decode:
                raw = decode(encoded[rows])
        except UndecodableError as error:
            undecodable |= {rows.start + position: reason for position, reason in error.reasons.items()}
            continue
        with model.lock, torch.inference_mode():
            images = pixels.normalise(raw, model.data_config.mean, model.data_config.std)
            prediction = chosen.predict(model.net, images)
        probabilities[rows] = prediction.logits.float().softmax(1).cpu().numpy()
        macs[rows] = prediction.macs.double().cpu().numpy()
    if undecodable:
        raise UndecodableError(len(encoded), undecodable)
    return Answers(probabilities, macs)


def _batches(encoded: Sequence[bytes], batch_size: int) -> Iterator[slice]:
    """Slices of at most batch_size images that have at most MAX_PIXELS when decoded; or of one image."""
    from pipeline.data.image_headers import MAX_PIXELS, upright_size

    start, pixels = 0, 0
    for position, each in enumerate(encoded):
        height, width = upright_size(each) or (0, 0)
        if position - start == batch_size or (pixels + height * width > MAX_PIXELS and position > start):
            yield slice(start, position)
            start, pixels = position, 0
        pixels += height * width
    if start < len(encoded):
        yield slice(start, len(encoded))
