"""The few kinds of error. Each message says what was found, where, what is allowed and what to do.

Besides its message an error carries `key`, what the user has to change or fix (a key of the recipe, an option of the
command, a file of ours), and `subject`, the value or name that was refused. Programs and tests select by these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Self

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
_KINDS: dict[str, type[AdaptNetError]] = {}


# A URI to its last @, up to a blank or quote; a password may hold any other character. HOST:PORT/... has no password.
_USERINFO = re.compile(
    r"\b([a-z][a-z0-9+.-]*)://(?!/)([^\s'\"/@:]*(?::(?!\d{1,5}(?:[/?#\s]|$))[^\s'\"]*)?)@", re.IGNORECASE
)
_SECRET_QUERY = re.compile(
    r"([?&;](?:\w*(?:password|passwd|pwd|token|secret|signature|key)))=[^&;\s'\"]*", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """`text` without user:password@ in its URIs and without the values of query keys for secrets.

    The URI of a database keeps its user, so that it is usable if the password comes from elsewhere.
    """
    return _SECRET_QUERY.sub(r"\1=***", _USERINFO.sub(_without_password, text))


def _without_password(match: re.Match[str]) -> str:
    scheme, user = match[1], match[2].partition(":")[0]
    web = scheme.lower() in ("http", "https")  # in http URIs the user name may be a token
    return f"{scheme}://" if web or not user else f"{scheme}://{user}@"


class AdaptNetError(Exception):
    """An error that the user must act on; the command prints it without a traceback and exits with 2.

    key: what is to be changed: "training.epochs", "--nodes", "recipe", "data.root", "lease.json"; "" if there is none.
    subject: the value, path or name that was found there.
    keys: all keys where one error names several faults; `key` is the first.
    The message and the subject are stored without the passwords of the URIs in them.
    """

    kind: ClassVar[str] = "AdaptNetError"

    def __init__(
        self, message: str = "", *, key: str = "", subject: object = None, keys: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(without_secrets(message))
        self.keys = keys if keys is not None else ((key,) if key else ())
        self.key = key or (self.keys[0] if self.keys else "")
        self.subject = "" if subject is None else without_secrets(str(subject))

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kind = cls.__name__
        _KINDS[cls.kind] = cls

    def __reduce__(self) -> tuple[object, ...]:
        return (from_record, (self.to_record(),))

    def to_record(self) -> dict[str, JsonValue]:
        """The error as JSON can hold it; `from_record` rebuilds one of the same class from it."""
        return {
            "kind": self.kind,
            "message": str(self),
            "key": self.key,
            "keys": list(self.keys),
            "subject": self.subject,
            **self._details(),
        }

    def _details(self) -> dict[str, JsonValue]:
        """The additional fields of a subclass; `_rebuilt` restores them."""
        return {}

    @classmethod
    def _rebuilt(cls, record: Mapping[str, JsonValue]) -> Self:
        keys = record.get("keys")  # records written before errors had keys have none
        listed = tuple(str(each) for each in keys) if isinstance(keys, list) else None
        return cls(
            str(record["message"]), key=str(record.get("key", "")), subject=record.get("subject", ""), keys=listed
        )


def from_record(record: Mapping[str, JsonValue]) -> AdaptNetError:
    """The error that `to_record` gave; an AdaptNetError where its kind is not known here."""
    kind = _KINDS.get(str(record.get("kind")), AdaptNetError)
    return kind._rebuilt(record)


class ConfigError(AdaptNetError):
    """The user must change the recipe, an override or a command-line argument."""


class DataError(AdaptNetError):
    """The user must fix the images, shards or labels, or use others."""


class UndecodableError(DataError):
    """Some of the given images cannot be decoded; `reasons` says which, by position, and why."""

    def __init__(self, num_images: int, reasons: Mapping[int, str]) -> None:
        listed = "; ".join(f"image {position}: {reasons[position]}" for position in sorted(reasons))
        super().__init__(
            f"{len(reasons)} of {num_images} images, counted from 0, cannot be decoded: {listed}",
            key="images",
            subject=", ".join(str(position) for position in sorted(reasons)),
        )
        self.num_images, self.reasons = num_images, dict(reasons)

    def _details(self) -> dict[str, JsonValue]:
        return {"num_images": self.num_images, "reasons": {str(at): why for at, why in self.reasons.items()}}

    @classmethod
    def _rebuilt(cls, record: Mapping[str, JsonValue]) -> Self:
        reasons, count = record.get("reasons"), record.get("num_images")
        assert isinstance(reasons, dict) and isinstance(count, int)
        return cls(count, {int(at): str(why) for at, why in reasons.items()})


class ResourceError(AdaptNetError):
    """The user must free or add what the run needs: workers, GPUs, disk, a reachable server, a free run folder."""


class CheckpointError(AdaptNetError):
    """A checkpoint is missing, damaged or of another recipe; use an older one or a fresh run folder."""


class DivergedError(AdaptNetError):
    """The loss or a gradient is not finite; carries the step and the last good checkpoint.

    Lower the learning rate or clip, and continue from `checkpoint`.
    """

    def __init__(self, message: str, *, step: int, checkpoint: str | None) -> None:
        super().__init__(message, key="training.optimizer.lr")
        self.step = step
        self.checkpoint = checkpoint

    def _details(self) -> dict[str, JsonValue]:
        return {"step": self.step, "checkpoint": self.checkpoint}

    @classmethod
    def _rebuilt(cls, record: Mapping[str, JsonValue]) -> Self:
        step, checkpoint = record.get("step", 0), record.get("checkpoint")
        assert isinstance(step, int)
        return cls(str(record["message"]), step=step, checkpoint=None if checkpoint is None else str(checkpoint))


class ContractError(AdaptNetError):
    """The author of a family must fix it: it violates the contract in `pipeline.family`."""


_KINDS[AdaptNetError.kind] = AdaptNetError
