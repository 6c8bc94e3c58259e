"""RunConfig: the sections of a recipe put together; `load` reads one with its overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, create_model, model_validator

from pipeline import config as configs
from pipeline import family as families
from pipeline import recipes
from pipeline.config import Config
from pipeline.data.config import DataConfig
from pipeline.errors import ConfigError
from pipeline.family import FamilyConfig
from pipeline.tracking import TrackingConfig
from pipeline.training.config import CheckpointConfig, Count, EvaluationConfig, LoggingConfig, TrainingConfig


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}", name):
        raise ValueError(
            "a run's name is up to 120 letters, digits, '.', '_' and '-', and begins with a letter or a digit; "
            "it may be given as name=NAME"
        )
    return name


RunName = Annotated[str, AfterValidator(_plain_name)]


class ComputeConfig(Config):
    """Where a run computes; nothing here changes what is learned."""

    workers: Annotated[int, Field(ge=0)] | tuple[Count, Count] = 1  # 0: in this process; [min, max]: elastic
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None  # null: 1 where the device is a GPU
    max_batch_per_worker: Count | None = None  # images in memory at once; more are accumulated
    start_patience_s: Annotated[float, Field(gt=0)] = 60.0  # for the workers to be there
    max_failures: Annotated[int, Field(ge=0)] = 3  # lost workers that a run survives
    address: str | None = None  # of a running Ray cluster; null: Ray here

    @model_validator(mode="after")
    def _rules(self) -> ComputeConfig:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers (={list(self.workers)}): the minimum comes first")
        return self

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]


class RunConfig(Config):
    """A whole recipe."""

    name: RunName  # of the run and its folder
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    family: SerializeAsAny[FamilyConfig]
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    tracking: TrackingConfig = TrackingConfig()


def load(source: str, overrides: Sequence[str] = (), *, data_home: str | None = None) -> RunConfig:
    """The recipe `family/recipe[:variant]`, or a YAML file's, with `a.b=c` overrides laid on top in order.

    `${data_home}` in a value is replaced by `data_home`. Raises ConfigError naming each fault.
    """
    layers = [*recipes.layers(source), *map(configs.parse_override, overrides)]
    mapping: dict[str, Any] = reduce(configs.merge, layers, {})
    mapping.setdefault("name", recipes.run_name(source))
    return from_mapping(configs.interpolate(mapping, {"data_home": data_home}), f"recipe {source}")


def from_mapping(mapping: Mapping[str, Any], where: str) -> RunConfig:
    """A mapping as a RunConfig whose `family` is of the class that `family.name` asks for."""
    section = mapping.get("family")
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise ConfigError(f"{where}: family.name: this key must be given; known: {', '.join(families.names())}")
    family = families.find(section["name"])
    model = create_model("RunConfig", __base__=RunConfig, family=(family.config, ...))
    return configs.validate(model, mapping, where)


def fingerprint(config: RunConfig, data_identity: str) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued, by dotted key.

    Family, seed, the images and their order and augmentation, and what shapes the optimisation; not compute,
    tracking, logging, evaluation, intervals or paths.
    """
    mapping = configs.as_mapping(config)
    stream = ("held_out", "side_px", "side_schedule", "augment", "mean", "std", "shuffle")
    data = {key: mapping["data"][key] for key in stream}
    if config.data.shuffle == "block":
        data |= {"lanes": config.data.lanes, "window": config.data.window}
    training = {k: v for k, v in mapping["training"].items() if k not in ("compile", "channels_last", "start_from")}
    if config.training.start_from is not None:
        training["start_from"] = config.training.start_from.name  # the file may move
    chosen = {"family": mapping["family"], "seed": config.seed, "data": data, "training": training}
    return {**configs.flat(chosen), "data.identity": data_identity}
