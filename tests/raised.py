"""What an error is about: tests assert its class and key, never its sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from pipeline.errors import AdaptNetError

E = TypeVar("E", bound=AdaptNetError)


@contextmanager
def fails(kind: type[E], key: str, subject: object = None) -> Iterator[pytest.ExceptionInfo[E]]:
    """Passes where the block raises an error of exactly this class about this key, and names `subject` if given.

    `key` may be any of the keys that one error names; `subject` must be contained in the error's subject.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}"
    assert key in (error.key, *error.keys), f"about {error.keys or error.key!r} instead of {key!r}: {error}"
    if subject is not None:
        assert str(subject) in error.subject, f"subject {error.subject!r} instead of {subject!r}: {error}"
