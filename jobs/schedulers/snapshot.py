"""Snapshots of our code, stored beside a job: later edits to the checkout do not affect the job."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from pipeline.installation import CODE, PACKAGES
from pipeline.runs import provenance
from pipeline.runs.files import whole_folder, write_text

WEIGHTS = ".safetensors"
KINDS = (".py", ".yaml", ".html", ".css", ".js", ".json", WEIGHTS)


def name(root: Path = CODE) -> str:
    """The snapshot folder's name, which holds the digest of the code in the checkout `root`."""
    digest = sha256()
    for relative, path in _sources(root).items():
        digest.update(f"{relative}\0".encode() + path.read_bytes())
    return f"code-{digest.hexdigest()[:12]}"


def save(folder: Path, root: Path = CODE) -> None:
    """Copies the code of the checkout `root` to `folder`, completely or not at all; does nothing if it exists."""
    if folder.is_dir():
        return
    with suppress(FileExistsError):  # another submission was first
        with whole_folder(folder) as aside:
            for relative, path in _sources(root).items():
                target = aside / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(path, target)
            write_text(aside / provenance.KEPT, json.dumps(provenance.git_state(root)))


def _copy(path: Path, target: Path) -> None:
    """Weights of the zoo, which nobody edits, are linked where that is possible, so that snapshots stay small."""
    if path.suffix == WEIGHTS:
        with suppress(OSError):  # another file system
            os.link(path.resolve(), target)
            return
    shutil.copyfile(path, target)


def _sources(root: Path) -> Mapping[str, Path]:
    """The files of our packages by their path within the snapshot."""
    paths = (path for package in PACKAGES for path in sorted((root / package).rglob("*")))
    return {str(path.relative_to(root)): path for path in paths if path.suffix in KINDS}
