"""The small records of a run: status.json, attempt.json, error-<rank>.json, about.json, a checkpoint's meta.json.

Each record is a frozen dataclass with `from_json` and `to_json`. A file holds its format number beside the fields; a
file without one was written before the number existed and reads as format 1. Keys that a record does not know are
ignored, so that a later version may add some.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Self, cast

from pipeline.errors import AdaptNetError, CheckpointError, JsonValue, from_record
from pipeline.runs import journal
from pipeline.runs.files import read_json, remark, write_json

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
        if type(number) is not int or number > cls.FORMAT:
            raise CheckpointError(
                f"{where}: format {shown(number)} of {cls.FILE}; this version of adaptnet reads up to {cls.FORMAT}",
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
            finished=_truth(content.get("finished", False)),
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
        raise TypeError(f"a mapping is expected, not {shown(value)}")
    return value or {}


def _texts(value: JsonValue) -> tuple[str, ...]:
    if value is not None and not isinstance(value, list):
        raise TypeError(f"a list is expected, not {shown(value)}")
    return tuple(str(each) for each in value or ())


def _text(value: JsonValue) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"a text is expected, not {shown(value)}")
    return value


def _truth(value: JsonValue) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"true or false is expected, not {shown(value)}")
    return value


def _integer(value: JsonValue) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"a whole number is expected, not {shown(value)}")
    return value


def _number(value: JsonValue) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"a number is expected, not {shown(value)}")
    return cast(float, value)


def shown(value: object) -> str:
    """The beginning of a damaged value, for messages."""
    return repr(value)[:60]


# ---- files of a run folder


def read_status(run_dir: Path) -> Status:
    """The run's status.json; `Status()` if the run never ended by itself or the file is damaged.

    Raises CheckpointError if the file has a newer format.
    """
    try:
        content = read_json(run_dir / STATUS)
        status = Status.from_json(content, str(run_dir))
    except FileNotFoundError:
        return Status()
    except (OSError, ValueError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and _is_newer(content, Status):
            raise
        remark(run_dir / STATUS, "the run counts as one that has not ended; the same command ends it again")
        return Status()
    return status


def _is_newer(content: JsonValue, kind: type[Record]) -> bool:
    number = content.get("format") if isinstance(content, dict) else None
    return type(number) is int and number > kind.FORMAT


def write_status(run_dir: Path, status: Status) -> None:
    write_json(run_dir / STATUS, status.to_json())


def read_about(folder: Path) -> About:
    """about.json of an evaluation's folder; `About()` if there is none. Raises CheckpointError if it is damaged."""
    path = folder / ABOUT
    if not path.is_file():
        return About()
    try:
        return About.from_json(read_json(path), str(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error})", key=ABOUT, subject=path) from None


def write_about(folder: Path, about: About) -> None:
    write_json(folder / ABOUT, about.to_json())


def next_attempt(run_dir: Path) -> int:
    """Counts one more start of the run in attempt.json; returns its number, from 1."""
    attempt = attempts(run_dir) + 1
    write_json(run_dir / ATTEMPT, Attempt(attempt).to_json())
    return attempt


def attempts(run_dir: Path) -> int:
    """How often the run in this folder has been started; by its journal if attempt.json is damaged."""
    path = run_dir / ATTEMPT
    try:
        content = read_json(path)
        return Attempt.from_json(content, str(run_dir)).attempt
    except FileNotFoundError:
        return _attempts_in_journal(run_dir)
    except (OSError, ValueError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and _is_newer(content, Attempt):
            raise
        remark(path, "the starts are counted in the journal")
        return _attempts_in_journal(run_dir)


def _attempts_in_journal(run_dir: Path) -> int:
    path = run_dir / "journal" / f"rank0{journal.SUFFIX}"
    counts = [record.get("attempt", 0) for record in journal.last_records(path)] if path.is_file() else []
    return max((count for count in counts if isinstance(count, int)), default=0)


def leave_error(error: AdaptNetError, run_dir: Path, rank: int) -> None:
    """Writes a rank's error to error-<rank>.json for the driver; does nothing if the disk is full."""
    with suppress(OSError):
        write_json(run_dir / f"error-{rank}.json", error.to_record())


def error_left(run_dir: Path) -> AdaptNetError | None:
    """The error that the lowest rank wrote to the run folder, of its own class; None if no rank did."""
    for path in sorted(run_dir.glob("error-*.json")):
        try:
            record = read_json(path)
            if isinstance(record, dict):
                return from_record(record)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError):
            remark(path, "the error of that rank is in the log only")
    return None
