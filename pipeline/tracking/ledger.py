"""The ledger of a run folder: which MLflow run it is, and what has been sent to it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import JsonValue, ResourceError, without_secrets
from pipeline.runs.files import read_json, write_json


def _checked(content: JsonValue) -> dict[str, Any]:
    """The content of a ledger. Raises ValueError if a field is not of its type."""
    fields = dict(content) if isinstance(content, dict) else {}
    offsets, run_id = fields.get("offsets", {}), fields.get("run_id")
    texts = all(isinstance(fields.get(key, ""), str) for key in ("id", "uri", "experiment"))
    counts = isinstance(offsets, dict) and all(type(each) is int and each >= 0 for each in offsets.values())
    if not (texts and counts and "id" in fields and isinstance(fields.get("files", {}), dict)):
        raise ValueError("it is damaged")
    if run_id is not None and not isinstance(run_id, str):
        raise ValueError("run_id is damaged")
    return fields


@dataclass
class Ledger:
    """run_dir/tracking.json: which MLflow run this folder is, and how far its journals have been sent.

    The offsets save time; that nothing is sent twice does not depend on them. The URI is stored without its secrets.
    """

    path: Path
    id: str  # stored as a tag of the MLflow run
    uri: str = ""
    experiment: str = ""
    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)  # bytes of each journal
    files: dict[str, JsonValue] = field(default_factory=dict)  # uploaded: {name: what identified the content}

    @classmethod
    def open(cls, run_dir: Path) -> Ledger:
        """The ledger of the folder, created if it is missing. Raises ResourceError if it is damaged."""
        ledger = cls.peek(run_dir)
        if not ledger.path.exists():
            ledger.save()
        return ledger

    @classmethod
    def peek(cls, run_dir: Path) -> Ledger:
        """Like `open`, but a missing ledger is not written to disk."""
        path = run_dir / "tracking.json"
        if not path.exists():
            return cls(path, uuid.uuid4().hex)
        try:
            return cls(path, **_checked(read_json(path)))
        except (OSError, ValueError, TypeError) as error:
            raise ResourceError(
                f"{path}: cannot be read ({error}). Restore a copy, or remove it: then a new MLflow run is created",
                key="tracking.json",
                subject=path,
            ) from None

    def aim(self, uri: str, experiment: str) -> None:
        """Points the ledger at a server; a different server is sent everything from the beginning."""
        shown = without_secrets(uri)
        if shown != self.uri:
            self.uri, self.experiment, self.run_id = shown, experiment, None
        if self.run_id is None:
            self.offsets, self.files = {}, {}
        self.save()

    def attach(self, run_id: str) -> None:
        """Records which MLflow run this folder is; a different run is sent everything from the beginning."""
        if run_id != self.run_id:
            self.run_id, self.offsets, self.files = run_id, {}, {}
            self.save()

    def save(self) -> None:
        """Writes the ledger to disk. Raises OSError if the disk is full."""
        write_json(self.path, {key: value for key, value in vars(self).items() if key != "path"})
