"""A trained net as a folder: written whole or not at all, checked before it is used, run on encoded images.

Letters: N images, K classes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline import config as configs
from pipeline import family as families
from pipeline.data.config import DataConfig
from pipeline.errors import CheckpointError, ResourceError, UndecodableError
from pipeline.evaluation.evaluate import choose, restored
from pipeline.family import Family, FamilyConfig, Policy, Report
from pipeline.runs.files import whole_folder
from pipeline.runs.records import Meta
from pipeline.training import checkpoint
from pipeline.training.memory import keep_freed_memory

FORMAT = 1
WEIGHTS, RECIPE, CARD = "net.safetensors", "recipe.yaml", "card.json"
FIGURES = (
    "policy",
    "num_images",
    "top1",
    "top5",
    "ece",
    "macs_mean",
    "macs_p95",
    "full_share",
    "latency",
    "calibration",
)


def write_model_folder(
    source: Path, reports: Sequence[Report], destination: Path, *, evaluated_on: str | None = None
) -> Path:
    """Writes the net of a checkpoint's folder as a model's folder, whole or not at all. Returns `destination`.

    evaluated_on is the identity of the images that the reports are of.
    Raises CheckpointError where the checkpoint is damaged, ResourceError where the folder cannot be written.
    """
    checkpoint.verify(source)
    meta = checkpoint.read_meta(source)
    try:
        with whole_folder(destination) as aside:
            (aside / "reports").mkdir()
            shutil.copyfile(weights_of(source), aside / WEIGHTS)
            (aside / RECIPE).write_text(configs.dump_yaml(meta.recipe), encoding="utf-8")
            whole = [report.to_json() for report in reports]
            (aside / "reports" / "reports.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
            recipe = {"sha256": checkpoint.sha256(aside / RECIPE)}
            card = {**_card(meta, whole, aside / WEIGHTS), "recipe": recipe, "evaluated_on": evaluated_on}
            (aside / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{destination}: the model cannot be written there ({error.strerror})") from None
    return destination


def weights_of(folder: Path) -> Path:
    """A checkpoint's weights to use: the moving average where there is one."""
    ema = folder / "ema.safetensors"
    return ema if ema.exists() else folder / WEIGHTS


def _card(meta: Meta, reports: Sequence[Mapping[str, Any]], weights: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": meta.recipe.get("name"),
        "family": meta.family["name"],
        "step": meta.step,
        "epoch": meta.epoch,
        "data": meta.data_identity,
        "classes": list(meta.classes),
        "weights": {"bytes": weights.stat().st_size, "sha256": checkpoint.sha256(weights)},
        "reports": [{key: report.get(key) for key in (*FIGURES, "calibration")} for report in reports],
        "fingerprint": meta.fingerprint,
    }


@dataclass(frozen=True)
class Trained:
    """A trained net on disk: a checkpoint's folder or a model's."""

    folder: Path
    weights: Path
    recipe: Mapping[str, Any]  # RunConfig
    classes: tuple[str, ...]
    step: int
    card: Mapping[str, Any] = field(default_factory=dict)  # of a model's folder; empty for a checkpoint


def describe(folder: Path) -> Trained:
    """What lies in a checkpoint's or a model's folder, its weights checked against their checksum.

    Raises CheckpointError where it is neither, damaged, or of a newer format.
    """
    if not (folder / CARD).is_file():
        checkpoint.verify(folder)
        meta = checkpoint.read_meta(folder)
        return Trained(folder, weights_of(folder), meta.recipe, meta.classes, meta.step)
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        known = card["format"] <= FORMAT
        entry, classes, step = card["weights"], tuple(card["classes"]), int(card["step"])
        size, sum_expected = entry["bytes"], entry["sha256"]
        recipe_expected = card.get("recipe", {}).get("sha256")  # None in cards that were written before it was kept
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CARD}: cannot be read ({type(error).__name__}: {error})") from None
    if not known:
        raise CheckpointError(f"{folder}: model format {card['format']}; this adaptnet reads up to {FORMAT}")
    weights = folder / WEIGHTS
    if not weights.is_file() or weights.stat().st_size != size or checkpoint.sha256(weights) != sum_expected:
        raise CheckpointError(f"{weights}: not the weights that {CARD} was written for: damaged or exchanged")
    recipe = configs.read_mapping(folder / RECIPE)
    if recipe_expected not in (None, checkpoint.sha256(folder / RECIPE)):
        raise CheckpointError(f"{folder / RECIPE}: not the recipe that {CARD} was written for: damaged or exchanged")
    return Trained(folder, weights, recipe, classes, step, card)


@dataclass(frozen=True)
class LoadedModel:
    """A net ready to predict, with all that its images and answers need."""

    net: nn.Module  # in eval mode, on `device`
    family: Family
    family_config: FamilyConfig
    data_config: DataConfig
    classes: tuple[str, ...]
    policies: Sequence[Policy]  # the first is the default
    card: Mapping[str, Any]
    device: torch.device
    _decoders: list[Any] = field(default_factory=list, compare=False, repr=False)  # none or one, kept between calls

    def decoding(self, most: int) -> Any:
        """What decodes up to `most` images at a time for this net."""
        from pipeline.data import dali

        if not self._decoders or self._decoders[0].most < most:
            self._decoders[:] = [dali.Decoding(self.data_config, self.device, torch.get_num_threads(), most)]
        return self._decoders[0]


def load_model(folder: Path, device: torch.device | None = None) -> LoadedModel:
    """The net of a model's or a checkpoint's folder; no code in the folder is run and nothing is unpickled.

    Raises CheckpointError where the weights are not those of the card or do not fit the family.
    """
    from safetensors.torch import load_file

    found, device = describe(folder), device or torch.device("cpu")
    section = found.recipe["family"]
    family = families.find(section["name"])
    family_config = configs.validate(family.config, section, f"{folder}: recipe.family")
    data_config = configs.validate(DataConfig, found.recipe["data"], f"{folder}: recipe.data")
    with torch.random.fork_rng(devices=[]):
        net = family.build(family_config, len(found.classes))
    try:
        net.load_state_dict(load_file(found.weights), strict=True)
    except Exception as error:  # safetensors and torch raise several kinds
        raise CheckpointError(f"{found.weights}: weights do not load ({type(error).__name__}: {error})") from None
    net = net.eval().to(device).to(memory_format=torch.channels_last)  # as the images come
    return LoadedModel(
        net=net,
        family=family,
        family_config=family_config,
        data_config=data_config,
        classes=found.classes,
        policies=restored(family.policies(family_config, net), found.card.get("reports", ())),
        card=found.card,
        device=device,
    )


@dataclass(frozen=True)
class Answers:
    """probabilities [N, K] f32 and the MACs [N] f64 that each image took."""

    probabilities: NDArray[np.float32]
    macs: NDArray[np.float64]


def predict(
    model: LoadedModel, encoded: Sequence[bytes], policy: str | None = None, *, batch_size: int = 64
) -> Answers:
    """Classifies encoded images (JPEG, PNG) with the evaluation's pixels under the policy called `policy`.

    On a CPU the process keeps the memory that it frees from then on, for the next batch: without, ARRN's cifar size
    took 1.5 times as long at batch 64 on one thread. Raises UndecodableError naming the positions of images that cannot
    be decoded, ConfigError for an unknown policy.
    """
    from pipeline.data import pixels

    if model.device.type == "cpu":
        keep_freed_memory()
    chosen = model.policies[0] if policy is None else choose(model.policies, [policy])[0]
    probabilities = np.zeros((len(encoded), len(model.classes)), np.float32)
    macs, undecodable = np.zeros(len(encoded)), dict[int, str]()
    for rows in _batches(encoded, batch_size):
        try:
            raw = model.decoding(batch_size)(encoded[rows])
        except UndecodableError as error:
            undecodable |= {rows.start + position: reason for position, reason in error.reasons.items()}
            continue
        with torch.inference_mode():
            images = pixels.normalise(raw, model.data_config.mean, model.data_config.std)
            found = chosen.predict(model.net, images)
        probabilities[rows] = found.logits.float().softmax(1).cpu().numpy()
        macs[rows] = found.macs.double().cpu().numpy()
    if undecodable:
        raise UndecodableError(len(encoded), undecodable)
    return Answers(probabilities, macs)


def _batches(encoded: Sequence[bytes], batch_size: int) -> Iterator[slice]:
    """Runs of at most batch_size images whose pixels, decoded, fit into MAX_PIXELS together; or one alone."""
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
