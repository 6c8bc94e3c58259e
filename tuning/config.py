"""A sweep's file: question, recipe, search space and search method; `load` reads one with its overrides."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator

from pipeline import config as configs
from pipeline import run_config
from pipeline.config import Config, Positive
from pipeline.errors import ConfigError
from pipeline.run_config import RunConfig, RunName
from tuning import shipped, space
from tuning.space import Case, Sample, Values

SWEEPS = Path(__file__).parent / "sweeps"
OF_RECIPE = "recipe."  # begins the keys of the recipe in a sweep's identity
JUDGED_EVERY = f"{OF_RECIPE}evaluation.every"
CHECKED_SAMPLES = 64  # rounds of random samples checked in place of a study's, which are not known in advance


class SearchConfig(Config):
    """How samples are drawn. Each round goes through the whole grid; `grid` requires a space without random keys."""

    kind: Literal["grid", "random", "optuna"] = "random"
    samples: Annotated[int, Field(ge=1, le=space.MOST_SAMPLES)] = (
        1  # rounds over the cases with random keys; optuna: trials in all
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # seed of the samples; training uses the recipe's seed


class SchedulerConfig(Config):
    """Which trials stop early. ASHA (Li et al., MLSys 2020, arXiv 1810.05934) continues the best 1/reduction of them.

    It judges the recipe's first policy by its evaluations during training (`evaluation.every`).
    """

    kind: Literal["none", "asha"] = "none"
    grace_epochs: Positive = 1.0  # no trial stops earlier
    reduction: Annotated[float, Field(gt=1, le=1000)] = 3.0
    metric: str = "top1"  # metric of the first policy


class Bounds(Config):
    """Limits on the cost of a trial. A sample above one is refused before training and counted."""

    max_gmacs: Positive | None = None  # bound on the full net's cost for one image of the evaluated size
    max_mparameters: Positive | None = None  # in millions
    max_minutes: Positive | None = None  # a trial that trains longer is stopped; its results so far count


class SweepConfig(Config):
    """The keys of a sweep's file."""

    name: RunName  # name of the sweep and its folder
    question: str = ""  # the header of the file
    recipe: str
    overrides: dict[str, JsonValue] = Field(default_factory=dict)  # overrides of the recipe, for every trial
    space: JsonValue
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    bounds: Bounds = Bounds()
    objectives: dict[str, Literal["max", "min"]] = Field(default={"top1": "max", "gmacs": "min"}, min_length=1)
    concurrency: Annotated[int, Field(ge=1, le=10_000)] | None = (
        None  # trials at a time; null: as many as fit the cluster
    )
    curves: tuple[str, ...] = ()  # regular expressions of metrics; their curves of all trials are drawn in one picture
    memory: bool = False  # measure the memory of a training step per image, and draw accuracy against it
    profiles: bool = False  # draw the family's profile of the best and worst net and of those without random keys

    @field_validator("objectives")
    @classmethod
    def _at_most_two(cls, objectives: dict[str, str]) -> dict[str, str]:
        if len(objectives) > 2:
            raise ValueError(f"(={', '.join(objectives)}): give one, or accuracy and cost")
        return objectives

    @field_validator("curves")
    @classmethod
    def _are_expressions(cls, curves: tuple[str, ...]) -> tuple[str, ...]:
        for curve in curves:
            try:
                re.compile(curve)
            except re.error as error:
                raise ValueError(f"{curve!r} is no regular expression ({error})") from None
        return curves

    @property
    def accuracy_metric(self) -> str:
        """The metric by which trials are chosen: the first objective."""
        return next(iter(self.objectives))

    @property
    def cost_metric(self) -> str:
        """The metric against which accuracy is drawn: the second objective, or the MACs of the same policy."""
        names = list(self.objectives)
        policy, slash, _ = self.accuracy_metric.rpartition("/")
        return names[1] if len(names) > 1 else f"{policy}{slash}gmacs"

    def sign(self, metric: str) -> int:
        """1 if more of the metric is better, else -1. Less is better for a metric that is no objective."""
        return 1 if self.objectives.get(metric, "min") == "max" else -1


@dataclass(frozen=True)
class Sweep:
    """A sweep that is ready to run.

    overrides: those of the recipe by the command, laid over the file's. base: the recipe with them, without a sample.
    data_home: the folder of data sets, for ${data} in recipes. environment: what the user's environment sets in a
    recipe, laid below it.
    """

    config: SweepConfig
    cases: Sequence[Case]
    overrides: Sequence[str]
    base: RunConfig
    data_home: str | None = None
    environment: Mapping[str, JsonValue] | None = None

    def recipe(self, sample: Sample) -> RunConfig:
        """The recipe of a sample. Raises ConfigError naming the sample and the keys of the recipe."""
        try:
            return run_config.load(
                self.config.recipe,
                self.overrides,
                below=_texts(configs.flat(self.config.overrides)),
                drawn=_texts(sample.overrides),
                data_home=self.data_home,
                environment=self.environment,
            )
        except ConfigError as error:
            raise ConfigError(
                f"sample {sample.number} ({sample.text}): {error}",
                key=error.key,
                keys=error.keys,
                subject=error.subject,
            ) from None

    def samples(self) -> list[Sample]:
        """All samples; none for an Optuna study, whose samples depend on results."""
        search = self.config.search
        if search.kind == "optuna":
            return []
        return space.draw_samples(self.cases, rounds=search.samples, seed=search.seed)

    def identity(self, images: str) -> dict[str, JsonValue]:
        """The values by dotted key that must not change when a sweep resumes in its folder; more samples are allowed.

        `images` is the identity of the training images.
        """
        mapping = configs.as_mapping(self.config)
        own = {key: mapping[key] for key in ("recipe", "scheduler", "bounds", "objectives")}
        search = {key: value for key, value in configs.section(mapping, "search").items() if key != "samples"}
        base = run_config.with_teacher(self.base, run_config.TEACHER_BY_RUNS)
        learned = {f"{OF_RECIPE}{key}": value for key, value in run_config.fingerprint(base, images).items()}
        judged = {JUDGED_EVERY: str(self.base.evaluation.every), "space": mapping["space"]}
        return configs.flat({**own, "search": search}) | learned | judged


def translated(saved: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """An identity that this or an older version stored, in today's form; see `run_config.translated`."""
    learned = {key for key in saved if key.startswith(OF_RECIPE) and key != JUDGED_EVERY}
    recipe = run_config.translated({key.removeprefix(OF_RECIPE): saved[key] for key in learned})
    others = {key: value for key, value in saved.items() if key not in learned}
    return others | {f"{OF_RECIPE}{key}": value for key, value in recipe.items()}


def names() -> list[str]:
    """The names of the shipped sweeps."""
    return shipped.names(SWEEPS)


def title(name: str) -> str:
    """The first sentence of a shipped sweep's question."""
    return re.split(r"(?<=[.?])(?= |$)", question_of(path_of(name)), maxsplit=1)[0]


def path_of(source: str) -> Path:
    """The file of a shipped sweep, or the path itself. Raises ConfigError with the nearest name."""
    return shipped.path_of("sweep", source, SWEEPS)


def question_of(path: Path) -> str:
    """The header of a sweep's file up to its first line such as "Source: ..."."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    texts = (line.lstrip("# ") for line in lines)
    return " ".join(takewhile(lambda text: not re.match(r"[A-Z][a-z]+:", text), texts)).strip()


def load(
    source: str,
    overrides: Sequence[str] = (),
    *,
    data_home: str | None = None,
    environment: Mapping[str, JsonValue] | None = None,
) -> Sweep:
    """The shipped sweep of that name, or the file at that path, with the overrides in order.

    `search.samples=4` and the like change the sweep, `space.KEY=…` the allowed values of a key; any other key is the
    recipe's and holds for every trial. environment: as of `run_config.load`. Raises ConfigError naming each fault, and
    the sample that the recipe refuses.
    """
    path = path_of(source)
    mapping: dict[str, JsonValue] = {"name": path.stem, "question": question_of(path), **configs.read_mapping(path)}
    recipe_overrides = [text for text in overrides if not _is_of_sweep(_key_of(text))]
    for text in overrides:
        if _is_of_sweep(_key_of(text)):
            mapping = _overridden(mapping, text)
    config = configs.validate(SweepConfig, mapping, f"sweep {source}")
    cases = space.parse(config.space)
    _check_overrides(recipe_overrides, cases)
    _check_kind(config, cases)
    below = _texts(configs.flat(config.overrides))
    base = run_config.load(
        config.recipe,
        [*recipe_overrides, f"name={config.name}"],
        below=below,
        data_home=data_home,
        environment=environment,
    )
    sweep = Sweep(config, cases, recipe_overrides, base, data_home, environment)
    for sample in sweep.samples() or _first_of_each_key(cases, config.search.seed):
        sweep.recipe(sample)
    return sweep


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip()


def _is_of_sweep(key: str) -> bool:
    """Whether a key is the sweep's. Raises ConfigError for a key that the recipe does not have either."""
    if key.partition(".")[0] in SweepConfig.model_fields:
        return True
    _check_section(key)
    return False


def _overridden(mapping: dict[str, JsonValue], override: str) -> dict[str, JsonValue]:
    """The sweep's keys with one override. `space`, `space.KEY` and `objectives` are replaced, other keys are merged."""
    key, value = _key_of(override), override.partition("=")[2]
    if key.startswith("space."):
        given = configs.parse_override(f"value={value}")["value"]
        return {**mapping, "space": [*_with_key(mapping.get("space"), key.removeprefix("space."), given)]}
    if key in ("space", "objectives"):
        return {**mapping, key: configs.parse_override(f"value={value}")["value"]}
    return configs.merge(mapping, configs.parse_override(override))


def _first_of_each_key(cases: Sequence[Case], seed: int) -> Iterator[Sample]:
    """Samples such as a study may draw: each in which a key of a case appears for the first time."""
    seen: set[tuple[int, str]] = set()
    for sample in space.draw_samples(cases, rounds=CHECKED_SAMPLES, seed=seed):
        keys = {(sample.case, key) for key in sample.values}
        if not keys <= seen:
            yield sample
        seen |= keys


def _check_section(key: str) -> None:
    """Raises ConfigError for a misspelt section of a sweep. The recipe refuses all other unknown keys."""
    section, dot, rest = key.partition(".")
    close = get_close_matches(section, SweepConfig.model_fields, 1, 0.75)
    if section not in RunConfig.model_fields and close:
        raise ConfigError(f"{key}: no such key of a sweep or its recipe; did you mean {close[0]}{dot}{rest}?", key=key)


def _with_key(section: JsonValue, key: str, value: JsonValue) -> list[Values]:
    """The space with other allowed values of `key` in the cases that have it, or in every case if none has it."""
    cases = [space.flattened(case) for case in (space.sections(section) if section else [{}])]
    for case in [case for case in cases if key in case] or cases:
        case[key] = value
    return cases


def _texts(values: Mapping[str, JsonValue]) -> list[str]:
    """The values as overrides, KEY=JSON."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _check_overrides(texts: Iterable[str], cases: Sequence[Case]) -> None:
    """Raises ConfigError for an override of a key that the space sets."""
    in_space = {dimension.key for case in cases for dimension in case}
    for text in texts:
        key = text.partition("=")[0].strip()
        if key in in_space:
            raise ConfigError(f"{key}: the sweep's space sets it; give its allowed values with space.{key}=…", key=key)


def _check_kind(config: SweepConfig, cases: Sequence[Case]) -> None:
    """Raises ConfigError if the search cannot handle a kind of key in the space."""
    kinds = {dimension.key: dimension.kind for case in cases for dimension in case}
    if config.search.kind == "grid":
        random = ", ".join(key for key, kind in kinds.items() if kind in space.RANDOM)
        if random:
            raise ConfigError(
                f"search.kind (=grid): {random} is random; use search.kind=random, or a grid",
                key="search.kind",
                subject=random,
            )
    if config.search.kind == "optuna":
        grids = ", ".join(key for key, kind in kinds.items() if kind == "grid")
        if grids:
            raise ConfigError(
                f"search.kind (=optuna): {grids} is a grid, which a study cannot search; write it as a choice",
                key="search.kind",
                subject=grids,
            )
