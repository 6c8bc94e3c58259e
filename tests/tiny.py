"""A tiny family for tests: a two-layer net without BatchNorm, and in-memory batches drawn from the step number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.config import Duration
from pipeline.family import Family, FamilyConfig, Loss, Params
from pipeline.runs.records import Meta
from pipeline.training import state
from pipeline.training.checkpoint import Checkpointer, LocalStorage
from pipeline.training.config import CheckpointConfig, TrainingConfig
from pipeline.training.optimizers.sgd import SgdConfig
from pipeline.training.plan import TrainingPlan
from pipeline.training.state import TrainState
from pipeline.training.step import MicroBatch, wrap

SIDE, CLASSES, IMAGES = 4, 3, 40
CPU = torch.device("cpu")


class TinyConfig(FamilyConfig):
    name: Literal["tiny"] = "tiny"
    dropout: float = 0.0
    shaped: bool = False  # two scalars in a group of their own, moved at every second step before the rest


@dataclass
class Logits:
    logits: Tensor


class Tiny(nn.Module):
    def __init__(self, config: TinyConfig, num_classes: int) -> None:
        super().__init__()
        if config.shaped:
            self.alpha = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.hidden = nn.Linear(3 * SIDE * SIDE, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Logits:
        x = self.norm(self.hidden(images.flatten(1))).relu()
        if hasattr(self, "alpha"):
            x = x * self.alpha.repeat(4)
        return Logits(self.head(self.drop(x)))


def groups(config: TinyConfig, net: nn.Module) -> dict[str, list[Params]]:
    weights = Params([p for name, p in net.named_parameters() if name != "alpha"])
    return {"main": [weights]} | (
        {"shape": [Params([net.alpha], decay=False, outside_ddp=True)]} if config.shaped else {}
    )


FAMILY = Family(
    config=TinyConfig,
    build=Tiny,
    loss=lambda config, output, targets, criterion: Loss(criterion(output.logits, targets)),
    groups=groups,
    optimizers=lambda config: ["main", "shape"] if config.shaped else ["main"],
    updates=lambda config, step: ["shape", "main"] if config.shaped and step % 2 == 0 else ["main"],
    policies=lambda config, net: [],
)


def fresh(training: TrainingConfig, config: TinyConfig | None = None) -> TrainState:
    return state.fresh(FAMILY, config or TinyConfig(), training, num_classes=CLASSES, seed=3, device=CPU)


def training(**changes: object) -> TrainingConfig:
    base = {"batch_size": 8, "epochs": 4.0, "optimizer": SgdConfig(lr=0.1, nesterov=True)}
    return TrainingConfig(**{**base, **changes})  # type: ignore[arg-type]


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """The global batch of a step, the same for every caller: images [B, 3, S, S] and labels [B]."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def batches(start: int, parts: int = 1, rows: slice = slice(None)) -> Iterator[list[MicroBatch]]:
    step = start
    while True:
        images, labels = (tensor[rows] for tensor in batch(step))
        chunks = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        yield [MicroBatch(part, truth, truth) for part, truth in chunks]
        step += 1


def plan(
    net: nn.Module,
    training: TrainingConfig,
    config: TinyConfig | None = None,
    *,
    total_steps: int = 0,
    **intervals: str,
) -> TrainingPlan:
    def span(text: str) -> Duration:
        value, unit = text.split()
        return Duration(value=float(value), unit=unit)  # type: ignore[arg-type]

    forward, _ = wrap(net, training, CPU, [net.alpha] if hasattr(net, "alpha") else [])
    spans = {"log_every": "2 steps", "save_every": "5 steps", "evaluate_every": "1000 steps", **intervals}
    return TrainingPlan(
        family=FAMILY,
        config=config or TinyConfig(),
        training=training,
        seed=3,
        num_classes=CLASSES,
        device=CPU,
        forward=forward,
        batch_size=training.batch_size,
        epochs_per_step=training.batch_size / IMAGES,
        total_steps=total_steps,
        **{name: span(text) for name, text in spans.items()},
    )


class Recorder:
    """Records the events of the loop and saves into a folder. Stops at `stop_at` if given."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        self.storage = LocalStorage(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.saver = Checkpointer(self.storage, folder, CheckpointConfig(keep_last=100))
        self.logged: dict[int, dict[str, float]] = {}
        self.saved: list[int] = []
        self.evaluated: list[int] = []
        self.stop_at, self.step = stop_at, 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged[step] = dict(values)

    def evaluate(self, current: TrainState) -> None:
        self.evaluated.append(current.step)

    def save(self, current: TrainState, *, wait: bool) -> None:
        self.saved.append(current.step)
        self.saver.save(current, meta(current.step), {"bad": {}}, wait=wait)

    def last_good(self) -> str | None:
        self.saver.wait()
        names = self.storage.names()
        return names[-1] if names else None

    def wants_to_stop(self) -> bool:
        return self.stop_at is not None


def meta(step: int, **metrics: float) -> Meta:
    return Meta(step=step, fingerprint={}, recipe={}, classes=(), metrics=metrics, best_key="top1")


def tensors(current: TrainState) -> dict[str, Tensor]:
    """Every tensor of a training state by name, including those of optimizers and EMA."""
    found = {f"net.{name}": value for name, value in current.net.state_dict().items()}
    for name, optimizer in current.optimizers.items():
        for key, slots in optimizer.state_dict()["state"].items():
            found |= {f"{name}.{key}.{slot}": value for slot, value in slots.items() if isinstance(value, Tensor)}
    if current.ema is not None:
        found |= {f"ema.{name}": value for name, value in current.ema.state_dict().items()}
    return found
