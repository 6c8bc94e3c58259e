"""A claim's file: what was claimed, the arms that are trained, what is measured, and the rules of the verdict.

`load` reads one. A figure in a statement is a `Quantity`: top-1 in per cent, MACs in millions, or the spread of a fact
over the classes; of a policy, of a mixture of policies, of the mean of several arms, or a published value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from pipeline import config as configs
from pipeline import family as families
from pipeline import run_config
from pipeline.config import Config, Side
from pipeline.errors import ConfigError
from pipeline.evaluation.from_weights import FINAL
from pipeline.run_config import RunConfig, RunName
from pipeline.tracking import resolve_uri
from tuning import shipped

CLAIMS = Path(__file__).parents[1] / "claims"
MOST_SEEDS = 1000
CLASSES = 10  # of the net that is built to know its policies
PUBLISHED = "published"  # what a value is
OF_THE_COMPUTER = (
    "device",
    "address",
    "cpus_per_worker",
    "start_patience_s",
    "max_failures",
    "hang_after_s",
    "on_hang",
)
OF_THE_MACHINE: tuple[str, ...] = (  # keys that change neither what is learned nor what is measured
    *("data.root", "data.index", "data.decode", "tracking.", "logging.", "checkpoint.every"),
    *(f"compute.{key}" for key in OF_THE_COMPUTER),
)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
Value = Annotated[float, Field(ge=-1e9, le=1e9)]
UNITS = {"top1": "points", "macs": "MMACs", "class_sd": "of the fact"}


class Arm(Config):
    """One recipe with overrides by dotted key or section."""

    recipe: str
    overrides: dict[str, JsonValue] = Field(default_factory=dict)


class ExtraEvaluation(Config):
    """An evaluation besides the one after training, of the same checkpoint on the val split.

    overrides: as of `adaptnet evaluate`. sides_px: the images are reduced to each first, as policies NAME@16px, with
    up_again enlarged again, as NAME@16px-and-up.
    """

    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    overrides: dict[str, JsonValue] = Field(default_factory=dict)
    policies: tuple[str, ...] | None = None  # null: all
    sides_px: tuple[Side, ...] = ()
    up_again: bool = False

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """Keys that change nothing under these values, each with the reason."""
        return {} if values["sides_px"] else {"up_again": "sides_px is empty"}


class PolicyOf(Config):
    """A policy of an arm."""

    arm: str
    policy: str


class Quantity(Config):
    """A measured figure, or a published `value` in the unit of the other side.

    policies with at_macs_of: images are split at random between the two of these policies whose MACs enclose those of
    the named policy, so that the mean cost is the same. policies with shares_of: at random between all of them, by the
    shares that this fact of that policy has, e.g. `exits`.
    """

    value: Value | None = None
    arms: tuple[str, ...] = ()  # several: the mean over them
    policy: str | None = None
    policies: tuple[str, ...] = ()
    at_macs_of: PolicyOf | None = None
    shares_of: str | None = None  # the policy
    fact: str | None = None
    evaluation: str = FINAL
    figure: Literal["top1", "macs", "class_sd"] = "top1"
    shuffled_labels: bool = False  # class_sd: of classes drawn at random, the null

    @model_validator(mode="after")
    def _rules(self) -> Quantity:
        if self.value is not None:
            if self.model_fields_set - {"value"}:
                raise ValueError("a published value has no other key")
            return self
        if not self.arms or (self.policy is None) == (not self.policies):
            raise ValueError("give value, or arms with either policy or policies")
        if self.policy and (self.at_macs_of or self.shares_of):
            raise ValueError("at_macs_of and shares_of are for policies, of which there are several")
        if self.policies and self.figure == "class_sd":
            raise ValueError("figure class_sd is of one policy")
        if self.shuffled_labels and self.figure != "class_sd":
            raise ValueError("shuffled_labels is for figure class_sd")
        if self.policies and (self.at_macs_of is None) == (self.shares_of is None):
            raise ValueError("policies are mixed: give at_macs_of or shares_of")
        if (self.fact is None) != (self.figure != "class_sd" and self.shares_of is None):
            raise ValueError("figure class_sd and shares_of need fact, and nothing else has it")
        return self

    @property
    def what(self) -> str:
        """For people, e.g. "aig gates-hard"."""
        if self.value is not None:
            return PUBLISHED
        arms = self.arms[0] if len(self.arms) == 1 else f"mean of {len(self.arms)} arms"
        at = f"{'+'.join(self.policies)} at random as {self.shares_of}" if self.shares_of else ""
        if self.at_macs_of is not None:
            at = f"{'+'.join(self.policies)} at the MACs of {self.at_macs_of.arm} {self.at_macs_of.policy}"
        shuffled = ", classes shuffled" if self.shuffled_labels else ""
        return f"{arms} {self.policy or at}{shuffled}"


class ClaimStatement(Config):
    """That a - b is more than, or less than, a threshold. control: it tests an explanation other than the claimed."""

    says: str
    published: str = ""  # the paper's figures, as text
    a: Quantity
    b: Quantity
    more_than: Value | None = None
    less_than: Value | None = None
    control: bool = False

    @model_validator(mode="after")
    def _rules(self) -> ClaimStatement:
        if (self.more_than is None) == (self.less_than is None):
            raise ValueError("give either more_than or less_than")
        measured = [each for each in (self.a, self.b) if each.value is None]
        if not measured or len({each.figure for each in measured}) > 1:
            raise ValueError("a and b: one at least is measured, and both are the same figure")
        return self

    @property
    def figure(self) -> str:
        """What is compared; UNITS has its unit, in which the threshold is."""
        return self.a.figure if self.a.value is None else self.b.figure

    @property
    def rule(self) -> str:
        """The threshold, for people."""
        return f"> {self.more_than:g}" if self.more_than is not None else f"< {self.less_than:g}"


class ClaimConfig(Config):
    """The keys of a claim's file."""

    title: str
    source: str  # paper and section
    claimed: str  # the sentence
    published: str = ""  # the paper's figures, as text
    seeds: Annotated[int, Field(ge=1, le=MOST_SEEDS)] = 3
    overrides: dict[str, JsonValue] = Field(default_factory=dict)  # of every arm
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    evaluations: dict[Name, ExtraEvaluation] = Field(default_factory=dict)
    statements: Annotated[tuple[ClaimStatement, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_exist(self) -> ClaimConfig:
        named = {arm for each in self.evaluations.values() for arm in each.arms}
        for quantity in self.quantities():
            named |= {*quantity.arms, *([quantity.at_macs_of.arm] if quantity.at_macs_of else [])}
            self._check_evaluation(quantity)
        if unknown := sorted(named - set(self.arms)):
            raise ValueError(f"no arm {', '.join(unknown)}; known: {', '.join(self.arms)}")
        if FINAL in self.evaluations:
            raise ValueError(f"evaluations: {FINAL} is the one after training; choose another name")
        return self

    def _check_evaluation(self, quantity: Quantity) -> None:
        if quantity.evaluation == FINAL:
            return
        found = self.evaluations.get(quantity.evaluation)
        missing = [arm for arm in quantity.arms if found is None or arm not in found.arms]
        if missing:
            raise ValueError(f"no evaluation {quantity.evaluation} of arm {', '.join(missing)}")

    def quantities(self) -> Iterator[Quantity]:
        """Both sides of all statements."""
        for statement in self.statements:
            yield from (statement.a, statement.b)

    def evaluations_of(self, arm: str) -> dict[str, ExtraEvaluation]:
        """The evaluations of an arm besides the one after training."""
        return {name: each for name, each in self.evaluations.items() if arm in each.arms}


@dataclass(frozen=True)
class LoadedClaim:
    """A claim that is ready to run: its file's name and SHA-256, and the arms' recipes with the user's overrides."""

    name: str
    config: ClaimConfig
    sha256: str
    overrides: Sequence[str]
    arms: Mapping[str, RunConfig]

    @property
    def learned(self) -> tuple[str, ...]:
        """The user's overrides that change what is learned or measured; the others are this machine's."""
        return tuple(text for text in self.overrides if not text.startswith(OF_THE_MACHINE))

    def tracked(self, runs: Path | None) -> LoadedClaim:
        """The claim whose arms, unless they say where, are tracked in the database of that folder."""
        if runs is None:
            return self
        uri = resolve_uri(None, runs / "any")
        arms = {arm: config if config.tracking.uri else _tracked(config, uri) for arm, config in self.arms.items()}
        return replace(self, arms=arms)


def _tracked(config: RunConfig, uri: str) -> RunConfig:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def names() -> list[str]:
    """The names of the shipped claims."""
    return shipped.names(CLAIMS)


def read(source: str) -> tuple[str, ClaimConfig, str]:
    """(name, config, SHA-256) of the shipped claim of that name, or of the file at that path.

    Raises ConfigError naming each fault.
    """
    path = shipped.path_of("claim", source, CLAIMS)
    config = configs.validate(ClaimConfig, configs.read_mapping(path), f"claim {source}")
    return path.stem, config, hashlib.sha256(path.read_bytes()).hexdigest()


def load(
    source: str,
    overrides: Sequence[str] = (),
    *,
    data_home: str | None = None,
    environment: Mapping[str, JsonValue] | None = None,
) -> LoadedClaim:
    """A claim with its arms' recipes. overrides: of every arm, laid over the file's. environment: of run_config.load.

    Every arm begins with seed 1, ends with its last checkpoint and is registered as CLAIM-ARM, unless an override says
    otherwise. Raises ConfigError naming each fault, and the arm whose recipe refuses an override.
    """
    name, config, sha256 = read(source)
    arms = {}
    for arm, of_arm in config.arms.items():
        own = configs.validate(_RunNamed, {"name": f"{name}-{arm}"}, f"claim {source}").name
        below = ["seed=1", "checkpoint.best=last", f"tracking.register={own}"]
        below += override_texts(configs.flat(config.overrides)) + override_texts(configs.flat(of_arm.overrides))
        try:
            arms[arm] = run_config.load(
                of_arm.recipe,
                [*overrides, f"name={own}"],
                below=below,
                data_home=data_home,
                environment=environment,
            )
        except ConfigError as error:
            raise ConfigError(
                f"claim {source}, arm {arm}: {error}", key=error.key, keys=error.keys, subject=error.subject
            ) from None
        if (best := arms[arm].checkpoint.best) != "last":
            raise ConfigError(
                f"claim {source}, arm {arm}: checkpoint.best (={best}): a claim is judged by the last checkpoint; "
                "leave it out",
                key="checkpoint.best",
                subject=best,
            )
    return LoadedClaim(name, config, sha256, tuple(overrides), arms)


def check_policies(claim: LoadedClaim) -> None:
    """Raises ConfigError if a statement names a policy of the evaluation after training that its arm does not have."""
    for quantity in claim.config.quantities():
        if quantity.evaluation == FINAL:
            for arm in quantity.arms:
                _check_names(claim.arms[arm], arm, [*quantity.policies, *filter(None, (quantity.policy,))])
        if quantity.at_macs_of is not None:
            _check_names(claim.arms[quantity.at_macs_of.arm], quantity.at_macs_of.arm, [quantity.at_macs_of.policy])


def _check_names(config: RunConfig, arm: str, named: Sequence[str]) -> None:
    family = families.find(config.family.name)
    known = [each.name for each in family.policies(config.family, family.build(config.family, CLASSES).eval())]
    if unknown := [name for name in named if name not in known]:
        raise ConfigError(
            f"claim: arm {arm} has no policy {', '.join(unknown)}; known: {', '.join(known)}",
            key="policy",
            subject=unknown[0],
        )


class _RunNamed(Config):
    name: RunName


def override_texts(values: Mapping[str, JsonValue]) -> list[str]:
    """The values as overrides, KEY=JSON."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
