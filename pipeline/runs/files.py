"""Atomic writes: a reader sees the old file or folder, or the new one, never part of either.

New content is written beside its destination, under a hidden name on the same file system, flushed to disk and renamed.
No other module renames files or folders.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import JsonValue

CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # some network file systems, unreadable folders


def write_text(path: Path, text: str) -> None:
    """Replaces the content of `path` by `text` in UTF-8. Raises OSError and leaves the old content if it cannot."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of `path`. Raises OSError and leaves the old content if it cannot."""
    with whole_file(path) as aside:
        aside.write_bytes(content)


def write_json(path: Path, value: object, *, indent: int | None = 1) -> None:
    """Replaces the content of `path` by `value` as JSON; creates the folder of `path` if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=indent))


class DamagedFile(UserWarning):
    """A file of ours is damaged, and what is done without it."""


def sha256(path: Path) -> str:
    """The checksum of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> JsonValue:
    """The content of a JSON file. Raises OSError if it cannot be read, ValueError if it is no JSON."""
    try:
        content: JsonValue = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("too many levels") from None
    return content


def remark(path: Path, consequence: str) -> None:
    """Warns that a file of ours is damaged, and says what happens without it."""
    warnings.warn(f"{path} is damaged: {consequence}", DamagedFile, stacklevel=2)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a hidden path beside `path` to write to, and renames it to `path` at the end of the block.

    A file that is replaced passes its permissions on. If the block raises, `path` is unchanged and nothing remains.
    """
    aside = _beside(path)
    try:
        yield aside
        with suppress(OSError):  # there is no old file, or the file system has no permissions
            aside.chmod(path.stat().st_mode)
        move_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new hidden folder beside `path` to fill, and renames it to `path` at the end of the block.

    Creates the folder of `path` if it is missing. If the block raises, `path` is unchanged and nothing remains.
    Raises FileExistsError at the end if `path` exists and is not empty: of two writers, the first wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(path)
    try:
        aside.mkdir()
        yield aside
        move_folder(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_file(source: Path, path: Path) -> None:
    """Flushes a finished file to disk and renames it to `path`, on the same file system; replaces a file there."""
    sync_file(source)
    os.replace(source, path)
    sync_folder(path.parent)


def move_folder(source: Path, path: Path, *, replace: bool = False) -> None:
    """Flushes a finished folder to disk and renames it to `path`, on the same file system.

    Raises FileExistsError if `path` is a folder with content, unless `replace`: then the old folder is renamed to a
    hidden name first and deleted last, so that a crash in between leaves it intact.
    """
    _sync_tree(source)
    old = _beside(path)
    if replace and path.exists():
        os.rename(path, old)
    try:
        os.rename(source, path)
    except OSError as error:
        if old.exists():
            os.rename(old, path)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on disk."""
    _sync(path)


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on disk, where its file system can promise that."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in CANNOT_SYNC_FOLDERS:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(place, name)):
                sync_file(Path(place, name))
        sync_folder(Path(place))


def _beside(path: Path) -> Path:
    """A hidden name of its own in the folder of `path`; it keeps the suffix, which some writers check."""
    return path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
