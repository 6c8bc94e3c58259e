"""Runs training steps and policies of recipes on the null GPU and prints what they asked of it, as JSON.

usage: python measure.py RECIPE[,key=value...]...   with nullgpu's library preloaded, see conftest.py
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from null_gpu import Counts, counted
from torch import Tensor

from pipeline import families as _  # noqa: F401
from pipeline import family as family_of
from pipeline import run_config
from pipeline.data import augment
from pipeline.data.config import DataConfig
from pipeline.data.philox import SampleKeys
from pipeline.evaluation.evaluate import Evaluator, _per_image, calibrate
from pipeline.family import Policy
from pipeline.training import optim, state, step
from pipeline.training.loop import _finite
from pipeline.training.plan import TrainingPlan

DEVICE = torch.device("cuda", 0)
BATCH, CLASSES = 8, 1000


@dataclass
class Batch:
    """A batch as a loader makes it, of black images."""

    data: DataConfig
    step: int
    draws: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        side = self.data.side_px
        self.images = torch.zeros(BATCH, side, side, 3, dtype=torch.uint8, device=DEVICE)
        self.labels = torch.zeros(BATCH, dtype=torch.long, device=DEVICE)
        self.rows = np.arange(BATCH)
        keys = SampleKeys(1, np.full(BATCH, self.step), self.rows)
        self.draws = augment.placed(self.data.augment, augment.draw(self.data.augment, keys, side), DEVICE)


class Split:
    """A split of one batch."""

    unreadable = ()

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch])


def measured(recipe: str, overrides: tuple[str, ...], *, policies: bool = True) -> dict[str, object]:
    """What three training steps, the checks around them and each policy ask of the device, by name."""
    config = run_config.load(recipe, ("data.root=/nowhere", f"training.batch_size={BATCH}", *overrides), data_home="/")
    family, training = family_of.find(config.family.name), config.training
    current = state.fresh(
        family,
        config.family,
        training,
        num_classes=CLASSES,
        seed=1,
        device=DEVICE,
        channels_last=training.channels_last,
    )
    forward, warnings = step.wrap(current.net, training, DEVICE, optim.parameters_outside_ddp(current.optimizers))
    plan = TrainingPlan(family, config.family, training, 1, CLASSES, DEVICE, forward, BATCH, 0.001)
    current.net.train()
    found: dict[str, object] = {"warnings": list(warnings)}
    meter = step.Meter()
    for n in range(3):
        batch = Batch(config.data, n)
        with counted() as prepared:
            micros = step.micro_batches(plan, config.data, batch, 1)
        with counted() as trained:
            step.train_step(plan, current, micros, meter)
        found |= {f"prepare {n}": prepared, f"step {n}": trained}
    with counted() as flushed, suppress(ZeroDivisionError):  # all that is read back is 0, the counts too
        meter.flush()
    with counted() as checked:
        meter.watch(_finite(current), 1)
    found |= {"flush": flushed, "finite": checked}
    return found | dict(_policies(config, family, current)) if policies and not training.cuda_graphs else found


def _policies(config, family, current) -> Iterator[tuple[str, object]]:
    net, batch = current.best_net.eval(), Batch(config.data, 0)
    training = config.training
    autocast = TrainingPlan(family, config.family, training, 1, CLASSES, DEVICE, net, BATCH, 0.001).autocast
    how = Evaluator(config.data, DEVICE, CLASSES, autocast=autocast, channels_last=training.channels_last)
    policies = list(family.policies(config.family, net))
    policies = calibrate(policies, net, Split(batch), how)
    for policy in policies:
        yield f"predict {policy.name}", _predicted(policy, net, how, batch)


def _predicted(policy: Policy, net: torch.nn.Module, how: Evaluator, batch: Batch) -> object:
    images = how.images(batch)
    how.predict(policy, net, images)  # measures costs
    with counted() as found:
        prediction = how.predict(policy, net, images)
    with counted() as stored:
        _per_image({"": prediction}, batch)
    devices = {each.device.type for each in (prediction.logits, prediction.macs, *prediction.facts.values())}
    return {**asdict(found), "stored": stored, "devices": sorted(devices)}


if __name__ == "__main__":
    torch.cuda.set_device(DEVICE)
    everything: dict[str, object] = {}
    for word in sys.argv[1:]:
        recipe, *overrides = word.split(",")
        try:
            everything[word] = measured(recipe, tuple(overrides))
        except Exception:
            everything[word] = {"error": traceback.format_exc()}
    print(json.dumps(everything, default=lambda value: asdict(value) if isinstance(value, Counts) else str(value)))
