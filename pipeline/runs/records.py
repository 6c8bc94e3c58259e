"""The small records of a run: status.json, attempt.json, error-<rank>.json, about.json, a checkpoint's meta.json.

Each record is a frozen dataclass with `from_json` and `to_json`. A file holds its format number beside the fields; a
file without one was written before the number existed and reads as format 1. Keys that a record does not know are
ignored, so that a later version may add some.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from pipeline.errors import AdaptNetError, CheckpointError, JsonValue, from_record
from pipeline.runs.files import write_json

STATUS, ATTEMPT, ABOUT, META = "status.json", "attempt.json", "about.json", "meta.json"


@dataclass(frozen=True)
class Record:
    """Base class of the records; subclasses are frozen dataclasses of JSON values and read what they wrote."""

    FORMAT: ClassVar[int] = 1
    FILE: ClassVar[str] = ""

    @classmethod
    def from_json(cls, content: object, where: str) -> Self:
        """The record in a decoded JSON value; `where` names its file in errors.

        Raises CheckpointError if the value is no record of this kind or has a newer format.
        """
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{where}: {cls.FILE} holds no mapping, so it is damaged", key=cls.FILE, subject=where
            )
        number = content.get("format", 1)
        if not isinstance(number, int) or number > cls.FORMAT:
            raise CheckpointError(
                f"{where}: format {number} of {cls.FILE}; this version of adaptnet reads up to {cls.FORMAT}",
                key=cls.FILE,
                subject=number,
            )
        try:
            return cls._from_fields(content)
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{where}: {cls.FILE} is damaged ({why})", key=cls.FILE, subject=where) from None

    @classmethod
    def _from_fields(cls, content: Mapping[str, JsonValue]) -> Self:
        raise NotImplementedError

    def to_json(self) -> dict[str, JsonValue]:
        """The record as JSON can hold it, with its format number."""
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"format": self.FORMAT, **fields}


@dataclass(frozen=True)
class Status(Record):
    """status.json: the state of a run or a sweep when it last ended by itself.

    finished: whether it ran to completion; False if it stopped on request.
    best, last: names of checkpoints. fingerprint: the run's, as of `run_config.fingerprint`.
    trials: a sweep's trials counted by state, for people. best_trial: the name of a sweep's best trial.
    """

    FILE: ClassVar[str] = STATUS
    finished: bool = False
    step: int = 0
    fingerprint: Mapping[str, JsonValue] = field(default_factory=dict)
    best: str | None = None
    last: str | None = None
    trials: str | None = None
    best_trial: str | None = None

    @classmethod
    def _from_fields(cls, content: Mapping[str, JsonValue]) -> Self:
        return cls(
            finished=bool(content.get("finished", False)),
            step=_integer(content.get("step", 0)),
            fingerprint=_mapping(content.get("fingerprint")),
            best=_text(content.get("best")),
            last=_text(content.get("last")),
            trials=_text(content.get("trials")),
            best_trial=_text(content.get("best_trial")),
        )

    def to_json(self) -> dict[str, JsonValue]:
        """A run's record leaves out the fields of a sweep, and a sweep's those of a run."""
        of_other = ("trials", "best_trial") if self.trials is None else ("step", "fingerprint", "best", "last")
        return {key: value for key, value in super().to_json().items() if key not in of_other}


@dataclass(frozen=True)
class Attempt(Record):
    """attempt.json: how often the run has been started."""

    FILE: ClassVar[str] = ATTEMPT
    attempt: int = 0

    @classmethod
    def _from_fields(cls, content: Mapping[str, JsonValue]) -> Self:
        return cls(_integer(content["attempt"]))


@dataclass(frozen=True)
class About(Record):
    """about.json of a stored evaluation: of which weights, on which images, under what conditions.

    source: what the user named (a run, a checkpoint, a version). checkpoint: where the evaluated checkpoint is stored;
    set by the evaluation after training, which has no source. sha256: of the weights' file; None in that evaluation.
    data: identity of the split. root: folder of its data set. policies: names of those that ran; None for all.
    attack, sides: names of the attack and of the resolution sweep. overrides: those that change the result.
    """

    FILE: ClassVar[str] = ABOUT
    step: int | None = None
    data: str | None = None
    root: str | None = None
    source: str | None = None
    checkpoint: str | None = None
    sha256: str | None = None
    policies: tuple[str, ...] | None = None
    attack: str | None = None
    sides: str | None = None
    overrides: tuple[str, ...] = ()

    @classmethod
    def _from_fields(cls, content: Mapping[str, JsonValue]) -> Self:
        return cls(
            step=None if content.get("step") is None else _integer(content["step"]),
            data=_text(content.get("data")),
            root=_text(content.get("root")),
            source=_text(content.get("source")),
            checkpoint=_text(content.get("checkpoint")),
            sha256=_text(content.get("sha256")),
            policies=None if content.get("policies") is None else _texts(content["policies"]),
            attack=_text(content.get("attack")),
            sides=_text(content.get("sides")),
            overrides=_texts(content.get("overrides")),
        )


@dataclass(frozen=True)
class Meta(Record):
    """meta.json of a checkpoint: the run's progress, recipe and metrics.

    epoch: images seen over images of an epoch. fence: the number of the driver that saved it.
    workers: how many ranks trained it; None in a checkpoint that no training made.
    recipe: the RunConfig as plain values. metrics: of the evaluation at this step; empty if there was none.
    best_key: the metric that ranks checkpoints unless `checkpoint.best` names one.
    imported: the file that foreign weights came from, and the tensors that it lacked.
    """

    FILE: ClassVar[str] = META
    step: int
    recipe: Mapping[str, JsonValue]
    fingerprint: Mapping[str, JsonValue]
    classes: tuple[str, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    images_seen: int = 0
    epoch: float | None = None
    fence: int | None = None
    workers: int | None = None
    best_key: str | None = None
    imported: Mapping[str, JsonValue] | None = None

    @classmethod
    def _from_fields(cls, content: Mapping[str, JsonValue]) -> Self:
        metrics = {name: _number(value) for name, value in _mapping(content.get("metrics")).items()}
        return cls(
            step=_integer(content["step"]),
            recipe=_mapping(content["recipe"]),
            fingerprint=_mapping(content["fingerprint"]),
            classes=_texts(content["classes"]),
            metrics=metrics,
            images_seen=_integer(content.get("images_seen", 0)),
            epoch=None if content.get("epoch") is None else _number(content["epoch"]),
            fence=None if content.get("fence") is None else _integer(content["fence"]),
            workers=None if content.get("workers") is None else _integer(content["workers"]),
            best_key=_text(content.get("best_key")),
            imported=None if content.get("imported") is None else _mapping(content["imported"]),
        )

    @property
    def family(self) -> Mapping[str, JsonValue]:
        """The recipe's section `family`."""
        return _mapping(self.recipe.get("family"))

    @property
    def data_identity(self) -> str | None:
        """Identity of the images that it was trained on."""
        return _text(self.fingerprint.get("data.identity"))


def _mapping(value: JsonValue) -> dict[str, JsonValue]:
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"a mapping is expected, not {value!r}")
    return value or {}


def _texts(value: JsonValue) -> tuple[str, ...]:
    if value is not None and not isinstance(value, list):
        raise TypeError(f"a list is expected, not {value!r}")
    return tuple(str(each) for each in value or ())


def _text(value: JsonValue) -> str | None:
    return None if value is None else str(value)


def _integer(value: JsonValue) -> int:
    if not isinstance(value, int):
        raise TypeError(f"a whole number is expected, not {value!r}")
    return value


def _number(value: JsonValue) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"a number is expected, not {value!r}")
    return value


# ---- files of a run folder


def read_status(run_dir: Path) -> Status:
    """The run's status.json; `Status()` if the run never ended by itself or the file cannot be read.

    Raises CheckpointError if the file has a newer format.
    """
    try:
        content = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Status()
    return Status.from_json(content, str(run_dir))


def write_status(run_dir: Path, status: Status) -> None:
    write_json(run_dir / STATUS, status.to_json())


def read_about(folder: Path) -> About:
    """about.json of an evaluation's folder; `About()` if there is none. Raises CheckpointError if it is damaged."""
    path = folder / ABOUT
    if not path.is_file():
        return About()
    try:
        return About.from_json(json.loads(path.read_text(encoding="utf-8")), str(folder))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})", key=ABOUT, subject=path) from None


def write_about(folder: Path, about: About) -> None:
    write_json(folder / ABOUT, about.to_json())


def next_attempt(run_dir: Path) -> int:
    """Counts one more start of the run in attempt.json; returns its number, from 1."""
    attempt = attempts(run_dir) + 1
    write_json(run_dir / ATTEMPT, Attempt(attempt).to_json())
    return attempt


def attempts(run_dir: Path) -> int:
    """How often the run in this folder has been started."""
    path = run_dir / ATTEMPT
    if not path.exists():
        return 0
    return Attempt.from_json(json.loads(path.read_text(encoding="utf-8")), str(run_dir)).attempt


def leave_error(error: AdaptNetError, run_dir: Path, rank: int) -> None:
    """Writes a rank's error to error-<rank>.json for the driver; does nothing if the disk is full."""
    with suppress(OSError):
        write_json(run_dir / f"error-{rank}.json", error.to_record())


def error_left(run_dir: Path) -> AdaptNetError | None:
    """The error that the lowest rank wrote to the run folder, of its own class; None if no rank did."""
    for path in sorted(run_dir.glob("error-*.json")):
        return from_record(json.loads(path.read_text(encoding="utf-8")))
    return None
