"""RunConfig: the sections of a recipe put together; `load` reads one with its overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, ValidationInfo, create_model, model_validator

from pipeline import config as configs
from pipeline import family as families
from pipeline import recipes
from pipeline.config import Config, Count, fault, is_stored
from pipeline.data.config import DataConfig
from pipeline.errors import ConfigError, JsonValue
from pipeline.family import FamilyConfig
from pipeline.tracking import TrackingConfig
from pipeline.training.config import CheckpointConfig, EvaluationConfig, LoggingConfig, TrainingConfig
from pipeline.training.teachers.trained import TrainedTeacherConfig

IDENTITY = "data.identity"
DUMPED = {"name", "seed", "family", "data", "training", "compute", "checkpoint", "evaluation", "logging", "tracking"}
STREAM = (  # keys of data that are in the fingerprint
    *("held_out", "side_px", "side_schedule", "side_choices", "aug_repeats", "augment", "mean", "std", "interpolation"),
    *("shuffle", "sampling", "lanes", "window"),
)
NOT_LEARNED = ("compile", "cuda_graphs", "channels_last", "start_from", "new_head")  # not in the fingerprint


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}", name):
        raise ValueError(
            "a run's name is up to 120 letters, digits, '.', '_' and '-', and begins with a letter or a digit; "
            "it may be given as name=NAME"
        )
    return name


RunName = Annotated[str, AfterValidator(_plain_name)]


MOST_WORKERS = 10_000
Workers = Annotated[int, Field(ge=1, le=MOST_WORKERS)]


def _whole(gpus: float) -> float:
    if gpus != int(gpus):
        raise ValueError("it must be whole: NCCL connects no workers that share a GPU")
    return gpus


def _host_and_port(address: str) -> str:
    if address == "auto":  # the cluster that this process belongs to, as in a job of a Ray cluster
        return address
    match = re.fullmatch(r"(?:[\w.-]+|\[[\da-fA-F:]+\]):(\d{1,5})", address)
    if not match or not 0 < int(match[1]) < 2**16:
        raise ValueError("the address of a Ray cluster is HOST:PORT, e.g. head:6379, or auto")
    return address


class ComputeConfig(Config):
    """Where a run computes; no key here changes what is learned."""

    workers: Annotated[int, Field(ge=0, le=MOST_WORKERS)] | tuple[Workers, Workers] = (
        1  # 0: in this process; [min, max]: elastic
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # auto: as many as each GPU has on its node; without GPUs, as many as each worker of this run has if it is alone
    cpus_per_worker: Annotated[float, Field(gt=0, le=4096)] | Literal["auto"] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0, le=64), AfterValidator(_whole)] | None = (
        None  # null: 1 where the device is a GPU
    )
    # images in memory at once, more are accumulated; auto: as many as fit, found by trying; null: all
    max_batch_per_worker: Count | Literal["auto"] | None = None
    # cuDNN times its algorithms for each new shape of a map, or only if the maps of all steps have the same sizes. Each
    # start may then choose others, so that a resumed run is the same within rounding, but not bit for bit
    cudnn_benchmark: Literal["fixed-sizes"] | bool = False
    start_patience_s: Annotated[float, Field(gt=0, le=1e6)] = 60.0  # how long to wait for the workers to start
    max_failures: Annotated[int, Field(ge=0, le=1_000_000)] = 3  # lost workers that a run survives
    # no progress for so long, and 20 median steps, is a hang; starting and saving may take 10 times as long, compiling
    # 30 times, but are reported as early
    hang_after_s: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    on_hang: Literal["restart", "report", "stop"] = "restart"  # within max_failures, from the newest checkpoint
    # HOST:PORT of a running Ray cluster, auto: the one on this machine; null: start Ray on this machine
    address: Annotated[str, AfterValidator(_host_and_port)] | None = None

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason."""
        of_ray = ("gpus_per_worker", "start_patience_s", "max_failures", "on_hang")
        inert = dict.fromkeys(of_ray, "workers is 0, which does without Ray") if values["workers"] == 0 else {}
        return inert | ({"cudnn_benchmark": "device is cpu"} if values["device"] == "cpu" else {})

    @model_validator(mode="after")
    def _rules(self) -> ComputeConfig:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers (={list(self.workers)}): the minimum comes first")
        return self

    @property
    def max_batch(self) -> int | None:
        """The images that a worker has in memory at once; None if that is its whole share or found by trying."""
        return None if self.max_batch_per_worker == "auto" else self.max_batch_per_worker

    @property
    def cpus(self) -> float | None:
        """The CPUs of a worker; None if they depend on the node."""
        return None if self.cpus_per_worker == "auto" else self.cpus_per_worker

    @property
    def most_workers(self) -> int:
        """The largest number of workers that the run may have; 0 without Ray."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def fewest_workers(self) -> int:
        """The smallest number of workers that the run may have; 0 without Ray."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]


class RunConfig(Config):
    """A whole recipe."""

    name: RunName  # name of the run and its folder
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    profile: Annotated[int, Field(ge=0, le=1000)] = 0  # steps whose times are traced, after 5 others; 0: none
    family: SerializeAsAny[FamilyConfig]
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _meant(self, info: ValidationInfo) -> RunConfig:
        repeats, batch_size = self.data.aug_repeats, self.training.batch_size
        if batch_size % repeats and not is_stored(info):
            raise fault("data.aug_repeats", f"it must divide training.batch_size, which is {batch_size}")
        late = [epoch for epoch, _ in self.data.side_schedule if epoch >= self.training.epochs]
        if late and not is_stored(info):
            epochs = f"training.epochs is {self.training.epochs:g}"
            raise fault("data.side_schedule", f"epoch {', '.join(map(str, late))} never comes: {epochs}")
        return self

    @model_validator(mode="after")
    def _balanced_once(self) -> RunConfig:
        if self.data.sampling == "balanced" and self.training.loss.class_weights == "inverse-frequency":
            raise fault(
                "training.loss.class_weights", "data.sampling: balanced shows the classes equally often already"
            )
        return self

    @model_validator(mode="after")
    def _has_a_whole_net(self) -> RunConfig:
        if self.training.teacher.kind == "whole_net":
            why = families.find(self.family.name).whole(self.family)
            if isinstance(why, str):
                raise fault("training.teacher.kind", why)
        return self

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason: optimizers that the family lacks."""
        names = _optimizers_of(configs.section(values, "family"))
        others = configs.section(configs.section(values, "training"), "other_optimizers")
        unused = [name for name in others if names is not None and (name == "main" or name not in names)]
        why = f"the optimizers of this family section are: {', '.join(names or ())}"
        return {f"training.other_optimizers.{name}": why for name in unused}


def _optimizers_of(section: Mapping[str, JsonValue]) -> Sequence[str] | None:
    """Names of the family's optimizers; None if the section is not valid."""
    try:
        family = families.find(str(section.get("name")))
        return family.optimizers(configs.validate_stored(family.config, section, "family"))
    except ConfigError:
        return None


def load(
    source: str,
    overrides: Sequence[str] = (),
    *,
    below: Sequence[str] = (),
    drawn: Sequence[str] = (),
    data_home: str | None = None,
    environment: Mapping[str, JsonValue] | None = None,
) -> RunConfig:
    """The recipe `family/recipe[:variant]`, or a YAML file's, with `a.b=c` overrides laid on top in order.

    below, drawn: further overrides, laid before and after; later ones may make keys of earlier ones inert.
    environment: what the user's environment sets, laid below the recipe. `${data_home}` in a value is replaced by
    `data_home`. Raises ConfigError naming each fault; a missing `data_home` is one only if there is no other.
    """
    layers: list[Mapping[str, object]] = [
        {"name": recipes.run_name(source), **(environment or {})},
        *map(_without_unused_defaults, recipes.layers(source)),
        *map(_together, (below, overrides, drawn)),
    ]
    start: Mapping[str, object] = {}
    mapping = reduce(lay, layers, start)
    where = f"recipe {source}"
    return from_mapping(_with_home(mapping, where, data_home, stored=False), where)


def _with_home(
    mapping: Mapping[str, object], where: str, data_home: str | None, *, stored: bool = True
) -> Mapping[str, object]:
    """`mapping` with `${data_home}` replaced. Faults of its keys come before that of a missing home."""
    try:
        return configs.interpolate(mapping, {"data_home": data_home})
    except ConfigError:
        from_mapping(mapping, where, stored=stored)  # a path may hold ${...}, so this raises for other faults only
        raise


def origins(
    keys: Sequence[str], source: str, overrides: Sequence[str], environment: Mapping[str, JsonValue]
) -> dict[str, str]:
    """Where `load` takes the value of each dotted key from.

    That is "the command", "the recipe", "environment" or "the default".
    """
    layers: dict[str, Mapping[str, object]] = {
        "the command": _together(overrides),
        "the recipe": reduce(configs.merge, recipes.layers(source), {}),
        "environment": environment,
    }
    return {
        key: next((name for name, layer in layers.items() if configs.has(layer, key)), "the default") for key in keys
    }


def with_batch_size(source: str, overrides: Sequence[str], batch_size: int) -> list[str]:
    """The overrides for a recipe on a batch of another size, with which `load` gives what `adaptnet train` trains.

    If `training.scale_lr` is set and nothing names a reference batch, the recipe's own batch becomes that.
    """
    start: Mapping[str, object] = {}
    given = reduce(configs.merge, [*recipes.layers(source), _together(overrides)], start)
    training = configs.section(given, "training")
    sized = [*overrides, f"training.batch_size={batch_size}"]
    if training.get("scale_lr", "none") != "none" and training.get("reference_batch") is None:
        sized.append(f"training.reference_batch={training.get('batch_size', TrainingConfig().batch_size)}")
    return sized


def _without_unused_defaults(layer: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """A recipe's layer; a complete dump, as older versions wrote for each job, loses the keys that change nothing."""
    written = set(layer) >= DUMPED and set(CheckpointConfig.model_fields) <= set(configs.section(layer, "checkpoint"))
    return configs.live(_model_of(layer), layer) if written else layer


def _together(overrides: Sequence[str]) -> dict[str, JsonValue]:
    return reduce(configs.merge, map(configs.parse_override, overrides), {})


def lay(base: Mapping[str, object], over: Mapping[str, object]) -> Mapping[str, object]:
    """A recipe with `over` laid on top; keys of `base` that `over` makes inert are dropped."""
    return configs.lay(_model_of(configs.merge(base, over)), base, over)


def from_mapping(mapping: Mapping[str, object], where: str, *, stored: bool = False) -> RunConfig:
    """A mapping as a RunConfig whose `family` is of the class that `family.name` selects.

    stored: see `configs.validate`.
    """
    section = mapping.get("family")
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        message = f"{where}: family.name: this key is required; known: {', '.join(families.names())}"
        raise ConfigError(message, key="family.name")
    families.find(section["name"])
    return configs.validate(_model_of(mapping), mapping, where, stored=stored)


def from_stored(
    mapping: Mapping[str, object], where: str, overrides: Sequence[str] = (), *, data_home: str | None = None
) -> RunConfig:
    """A recipe that this or an older version stored, with overrides laid on top.

    Keys that change nothing are dropped from the stored recipe, which older versions filled with all defaults; those
    among the overrides are refused. Raises ConfigError naming each fault.
    """
    base = configs.live(_model_of(mapping), mapping)
    mapping = lay(base, _together(overrides))
    nested = _with_home(mapping, where, data_home)
    faults = set(_faults(nested, data_home)) - set(_faults(base, data_home)) if overrides else ()
    return from_mapping(nested, where, stored=not faults)


def _faults(mapping: Mapping[str, object], data_home: str | None) -> tuple[str, ...]:
    """The keys whose values a new recipe may not have."""
    try:
        from_mapping(configs.interpolate(mapping, {"data_home": data_home}), "")
    except ConfigError as error:
        return error.keys
    return ()


def _model_of(mapping: Mapping[str, object]) -> type[RunConfig]:
    """RunConfig with the family's class for `family`; RunConfig itself if the mapping names no known family."""
    name = configs.section(mapping, "family").get("name")
    return _model(name) if isinstance(name, str) and name in families.names() else RunConfig


@cache
def _model(name: str) -> type[RunConfig]:
    return create_model("RunConfig", __base__=RunConfig, family=(families.find(name).config, ...))


def translated(saved: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """A fingerprint that this or an older version stored, in today's form; as it is if its recipe is unreadable.

    Older fingerprints hold keys that change nothing, and lack keys that are newer, which then have their defaults.
    """
    nested = configs.nested({key: value for key, value in saved.items() if key != IDENTITY})
    nested["data"] = {**configs.section(nested, "data"), "root": "unknown"}
    try:
        return fingerprint(from_stored({"name": "stored", **nested}, "a stored fingerprint"), str(saved[IDENTITY]))
    except (ConfigError, KeyError):
        return saved


TEACHER_BY_RUNS = "checked by each run"  # in the fingerprint of a group of runs, whose teacher may move


def with_teacher(config: RunConfig, source: str) -> RunConfig:
    """The recipe with this name of its teacher; as it is without a trained teacher."""
    if not isinstance(config.training.teacher, TrainedTeacherConfig):
        return config
    teacher = config.training.teacher.model_copy(update={"source": source})
    return config.model_copy(update={"training": config.training.model_copy(update={"teacher": teacher})})


def fingerprint(config: RunConfig, data_identity: str) -> dict[str, JsonValue]:
    """What must be equal for a checkpoint to be resumed, by dotted key.

    It covers the family, the seed, the images with their order and augmentation, and what determines the optimisation,
    but not compute, tracking, logging, evaluation, intervals or paths.
    """
    mapping = configs.as_mapping(config)
    data = {key: value for key, value in configs.section(mapping, "data").items() if key in STREAM}
    training = {k: v for k, v in configs.section(mapping, "training").items() if k not in NOT_LEARNED}
    if config.training.start_from is not None:
        training["start_from"] = config.training.start_from.name  # the file may move
    chosen = {"family": mapping["family"], "seed": config.seed, "data": data, "training": training}
    return {**configs.flat(chosen), IDENTITY: data_identity}
