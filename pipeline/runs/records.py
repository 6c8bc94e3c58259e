"""The small records of a run folder: attempt.json, status.json, error-<rank>.json."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import AdaptNetError, from_record
from pipeline.runs.files import write_json


def next_attempt(run_dir: Path) -> int:
    """Counts a start of the run in this folder; returns its number, from 1."""
    attempt = attempts(run_dir) + 1
    write_json(run_dir / "attempt.json", {"attempt": attempt})
    return attempt


def attempts(run_dir: Path) -> int:
    """How often the run in this folder has been started."""
    path = run_dir / "attempt.json"
    return int(json.loads(path.read_text())["attempt"]) if path.exists() else 0


def read_status(run_dir: Path) -> dict[str, Any]:
    """What the run had come to when it last ended by itself; empty where it never did."""
    path = run_dir / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def leave_error(error: AdaptNetError, run_dir: Path, rank: int) -> None:
    """Keeps the error of a rank in the run folder, for the driver; without a word where the disk is full."""
    with suppress(OSError):
        write_json(run_dir / f"error-{rank}.json", error.to_record())


def error_left(run_dir: Path) -> AdaptNetError | None:
    """The error that the first rank in order left in the run folder, of its own class; None where there is none."""
    for path in sorted(run_dir.glob("error-*.json")):
        return from_record(json.loads(path.read_text(encoding="utf-8")))
    return None
