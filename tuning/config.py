"""A sweep's file: the question, the recipe, the space, and how it is searched; `load` reads one with its overrides."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline import config as configs
from pipeline import run_config
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.run_config import RunConfig, RunName
from tuning import space
from tuning.space import Case, Sample

SWEEPS = Path(__file__).parent / "sweeps"
LOOKED_AT = 64  # samples of what a study may draw, before it does
Positive = Annotated[float, Field(gt=0)]


class SearchConfig(Config):
    """How draws are made. A grid is gone through in full for each sample; `grid` says that nothing else is drawn."""

    kind: Literal["grid", "random", "optuna"] = "random"
    samples: Annotated[int, Field(ge=1)] = 1  # of each case in which something is random; optuna: trials in all
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # of the draws; the recipe's own seed is the training's


class SchedulerConfig(Config):
    """Which trials end early. ASHA (Li et al., MLSys 2020, arXiv 1810.05934) lets the best 1/reduction of them go on.

    It judges the recipe's first policy, by the evaluations while training (`evaluation.every`).
    """

    kind: Literal["none", "asha"] = "none"
    grace_epochs: Positive = 1.0  # no trial ends before
    reduction: Annotated[float, Field(gt=1)] = 3.0
    metric: str = "top1"  # of the first policy


class Bounds(Config):
    """What a draw may cost: one above is refused before it is trained, and counted."""

    max_gmacs: Positive | None = None  # of the whole net on one image of the recipe's evaluated size
    max_mparameters: Positive | None = None  # in millions
    max_minutes: Positive | None = None  # of training; a trial that takes longer is stopped and keeps what it reached


class SweepConfig(Config):
    """A sweep's file in full."""

    name: RunName  # of the sweep and its folder
    question: str = ""  # the file's header
    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)  # laid over the recipe, for every trial
    space: Any
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    bounds: Bounds = Bounds()
    objectives: dict[str, Literal["max", "min"]] = Field(default={"top1": "max", "gmacs": "min"}, min_length=1)
    concurrency: Annotated[int, Field(ge=1)] | None = None  # trials at once; null: as many as the cluster holds
    curves: tuple[str, ...] = ()  # expressions for metrics whose curves are drawn over one another, trial by trial
    memory: bool = False  # measure what a training step keeps of each image, and draw accuracy against it
    profiles: bool = False  # draw the sides of the maps along the best, worst and fixed nets

    @model_validator(mode="after")
    def _rules(self) -> SweepConfig:
        if len(self.objectives) > 2:
            raise ValueError(f"objectives (={', '.join(self.objectives)}): one, or accuracy and cost")
        for curve in self.curves:
            try:
                re.compile(curve)
            except re.error as error:
                raise ValueError(f"curves: {curve!r} is no regular expression ({error})") from None
        return self

    @property
    def accuracy_metric(self) -> str:
        """The objective that trials are chosen by: the first."""
        return next(iter(self.objectives))

    @property
    def cost_metric(self) -> str:
        """The objective that it is set against: the second, or the MACs of the same policy."""
        names = list(self.objectives)
        policy, slash, _ = self.accuracy_metric.rpartition("/")
        return names[1] if len(names) > 1 else f"{policy}{slash}gmacs"

    def sign(self, metric: str) -> int:
        """1 where more of it is better; cost that is no objective is to be low."""
        return 1 if self.objectives.get(metric, "min") == "max" else -1


@dataclass(frozen=True)
class Sweep:
    """A sweep ready to run: its file, and what a trial is made of."""

    config: SweepConfig
    cases: Sequence[Case]
    overrides: Sequence[str]  # of the recipe, in order: the file's, then the command's
    base: RunConfig  # what no draw has touched
    data_home: str | None = None

    def recipe(self, draw: Sample) -> RunConfig:
        """The recipe of a draw. Raises ConfigError naming the draw."""
        try:
            return run_config.load(
                self.config.recipe, [*self.overrides, *_texts(draw.overrides)], data_home=self.data_home
            )
        except ConfigError as error:
            raise ConfigError(f"draw {draw.number} ({draw.text}): {error}") from None

    def samples(self) -> list[Sample]:
        """All draws, where they do not hang on results (Optuna's do)."""
        search = self.config.search
        if search.kind == "optuna":
            return []
        return space.draw_samples(self.cases, samples=search.samples, seed=search.seed)

    def identity(self, images: str) -> dict[str, Any]:
        """What a sweep's folder must agree with to be gone on with, by dotted key; more samples may be asked for.

        `images` is the identity of the training images.
        """
        mapping = configs.as_mapping(self.config)
        kept = {key: mapping[key] for key in ("recipe", "scheduler", "bounds", "objectives")}
        search = {key: value for key, value in mapping["search"].items() if key != "samples"}
        learned = {f"recipe.{key}": value for key, value in run_config.fingerprint(self.base, images).items()}
        judged = {"recipe.evaluation.every": str(self.base.evaluation.every), "space": mapping["space"]}
        return configs.flat({**kept, "search": search}) | learned | judged


def names() -> list[str]:
    """The shipped sweeps."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def title(name: str) -> str:
    """The first sentence of a shipped sweep's question."""
    return re.split(r"(?<=[.?])(?= |$)", question_of(path_of(name)), maxsplit=1)[0]


def path_of(source: str) -> Path:
    """The file of a shipped sweep's name, or of a path. Raises ConfigError with the nearest name."""
    if source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise ConfigError(f"sweep {source}: no such file")
        return Path(source)
    if source not in names():
        close = get_close_matches(source, names(), 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"sweep {source}: no such sweep; {hint}known: {', '.join(names())}; or a path to a .yaml")
    return SWEEPS / f"{source}.yaml"


def question_of(path: Path) -> str:
    """The header up to its first line that names a source, command or the like."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    words = [line.lstrip("# ") for line in lines]
    return " ".join(takewhile(lambda line: not re.match(r"[A-Z][a-z]+:", line), words)).strip()


def load(source: str, overrides: Sequence[str] = (), *, data_home: str | None = None) -> Sweep:
    """The shipped sweep of that name, or the file at that path, with overrides laid on top in order.

    `search.samples=4` and the like change the sweep, `space.KEY=…` what a key may be; any other key is the recipe's and
    holds for every trial. Raises ConfigError naming each fault; for a draw that the recipe does not take, the draw.
    """
    path = path_of(source)
    mapping = {"name": path.stem, "question": question_of(path), **configs.read_mapping(path)}
    of_recipe: list[str] = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key.strip().startswith("space."):
            given = configs.parse_override(f"value={value}")["value"]
            mapping["space"] = _respaced(mapping.get("space"), key.strip().removeprefix("space."), given)
        elif key.strip() in ("space", "objectives"):  # anew, not beside what is there
            mapping[key.strip()] = configs.parse_override(f"value={value}")["value"]
        elif key.strip().partition(".")[0] in SweepConfig.model_fields:
            mapping = configs.merge(mapping, configs.parse_override(text))
        else:
            _check_section(key.strip())
            of_recipe.append(text)
    config = configs.validate(SweepConfig, mapping, f"sweep {source}")
    cases = space.parse(config.space)
    texts = [*_texts(configs.flat(config.overrides)), *of_recipe]
    _check_overrides(of_recipe, cases)
    _check_kind(config, cases)
    base = run_config.load(config.recipe, [*texts, f"name={config.name}"], data_home=data_home)
    sweep = Sweep(config, cases, texts, base, data_home)
    for draw in sweep.samples() or _samples(cases, config.search.seed):
        sweep.recipe(draw)
    return sweep


def _samples(cases: Sequence[Case], seed: int) -> Iterator[Sample]:
    """Draws such as a study may make: those in which a key is there for the first time."""
    seen: set[tuple[int, str]] = set()
    for draw in space.draw_samples(cases, samples=LOOKED_AT, seed=seed):
        keys = {(draw.case, key) for key in draw.values}
        if not keys <= seen:
            yield draw
        seen |= keys


def _check_section(key: str) -> None:
    """Raises ConfigError for what is a sweep's own section but for a slip; whatever else is the recipe's to refuse."""
    section, dot, rest = key.partition(".")
    close = get_close_matches(section, SweepConfig.model_fields, 1, 0.75)
    if section not in RunConfig.model_fields and close:
        raise ConfigError(f"{key}: no such key of a sweep or its recipe; did you mean {close[0]}{dot}{rest}?")


def _respaced(section: Any, key: str, value: Any) -> Any:
    """The space with what `key` may be replaced wherever it stands; added to every case where it stands nowhere."""
    cases = [space.flattened(case) for case in (section if isinstance(section, list) else [section or {}])]
    having = [case for case in cases if key in case] or cases
    for case in having:
        case[key] = value
    return cases


def _texts(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _check_overrides(texts: Iterable[str], cases: Sequence[Case]) -> None:
    drawn = {entry.key for case in cases for entry in case}
    for text in texts:
        key = text.partition("=")[0].strip()
        if key in drawn:
            raise ConfigError(f"{key}: the sweep's space sets it; say what it may be with space.{key}=…")


def _check_kind(config: SweepConfig, cases: Sequence[Case]) -> None:
    if config.search.kind == "grid":
        drawn = [entry.key for case in cases for entry in case if entry.kind in space.RANDOM]
        if drawn:
            raise ConfigError(f"search.kind (=grid): {', '.join(drawn)} is drawn; take search.kind=random, or a grid")
    if config.search.kind == "optuna":
        grids = [entry.key for case in cases for entry in case if entry.kind == "grid"]
        if grids:
            raise ConfigError(
                f"search.kind (=optuna): {', '.join(grids)} is a grid, which is not searched: a choice is"
            )
