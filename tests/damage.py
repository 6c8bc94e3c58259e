"""Ways to damage a file, for tests that read what is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path


def _half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _other(value: object) -> object:
    """A value of another type, all the way down."""
    if isinstance(value, dict):
        return {key: _other(each) for key, each in value.items()}
    if isinstance(value, list):
        return {"0": [_other(each) for each in value]}
    return ["x"] if isinstance(value, str) else "x"


def _types(path: Path) -> None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        path.write_text("\n".join(json.dumps(_other(json.loads(line))) for line in lines) + "\n")
    except ValueError:  # it is no JSON
        path.write_text("7")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


WAYS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": _half,
    "flipped byte": _flipped,
    "{}": lambda path: path.write_text("{}"),
    "[]": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "wrong types": _types,
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "too deep": lambda path: path.write_text("[" * 100_000),
    "folder": _folder,
    "deleted": Path.unlink,
}


def copied(folder: Path, to: Path) -> Path:
    """A copy of a folder, to be damaged, without files that its uploader is just writing."""
    shutil.copytree(folder, to, symlinks=True, ignore=shutil.ignore_patterns(f".{'[0-9a-f]' * 8}.*"))
    return to
