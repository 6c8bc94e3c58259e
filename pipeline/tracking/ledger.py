"""The ledger of a run folder: which MLflow run it is, and what has been sent to it."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ResourceError
from pipeline.runs.files import write_text
from pipeline.runs.provenance import without_secrets


@dataclass
class Ledger:
    """run_dir/tracking.json: which MLflow run this folder is, and how far its journals have been sent.

    The offsets save time; that nothing is sent twice does not rest on them. The URI is kept without its secrets.
    """

    path: Path
    id: str  # stands in a tag of the MLflow run
    uri: str = ""
    experiment: str = ""
    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)  # bytes of each journal
    files: dict[str, Any] = field(default_factory=dict)  # uploaded: {name: what it was like}

    @classmethod
    def open(cls, run_dir: Path) -> Ledger:
        """The folder's ledger, begun where there is none. Raises ResourceError where it is damaged."""
        ledger = cls.peek(run_dir)
        if not ledger.path.exists():
            ledger.save()
        return ledger

    @classmethod
    def peek(cls, run_dir: Path) -> Ledger:
        """As `open`, without beginning one."""
        path = run_dir / "tracking.json"
        if not path.exists():
            return cls(path, uuid.uuid4().hex)
        try:
            return cls(path, **json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ResourceError(
                f"{path}: cannot be read ({error}). Bring back a copy, or remove it: a new MLflow run is then begun"
            ) from None

    def aim(self, uri: str, experiment: str) -> None:
        """Points the ledger at a server; another one than before is sent everything anew."""
        shown = without_secrets(uri)
        if shown != self.uri:
            self.uri, self.experiment, self.run_id = shown, experiment, None
        if self.run_id is None:
            self.offsets, self.files = {}, {}
        self.save()

    def save(self) -> None:
        values = {key: value for key, value in vars(self).items() if key != "path"}
        write_text(self.path, json.dumps(values, indent=1))
