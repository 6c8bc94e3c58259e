"""Summarises the runs in a folder, from the folder alone."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckpointError, ResourceError
from pipeline.runs import journal
from pipeline.runs.files import DamagedFile, remark
from pipeline.runs.progress import read as read_progress
from pipeline.runs.records import Status, read_status
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.uploader import is_live, last_status


@dataclass(frozen=True)
class RunSummary:
    """One run: its status, its progress, and how much of its journal is not in MLflow yet."""

    run_dir: Path
    status: str  # RUNNING, HANGING, FINISHED, STOPPED, FAILED or KILLED
    step: int
    top1: float | None  # the best `eval/<policy>/top1` of any evaluation while training
    run_id: str | None
    unsent_bytes: int
    stall: str | None  # since when a HANGING run makes no progress, and why


def summaries(folder: Path) -> list[RunSummary]:
    """The runs in `folder`, or `folder` itself if it is a run folder, by name."""
    own = (folder / "config.yaml").is_file()
    places = [folder] if own else sorted(path.parent for path in folder.glob("*/config.yaml"))
    return [_summary(place) for place in places]


def _sent(run_dir: Path) -> Ledger:
    try:
        return Ledger.peek(run_dir)
    except ResourceError:
        remark(run_dir / "tracking.json", "the run is listed as if nothing of it had been sent")
        return Ledger(run_dir / "tracking.json", "unknown")


def _status(run_dir: Path) -> Status:
    try:
        return read_status(run_dir)
    except CheckpointError as error:
        warnings.warn(str(error), DamagedFile, stacklevel=2)
        return Status()


def _summary(run_dir: Path) -> RunSummary:
    written = run_dir / "journal" / f"rank0{journal.SUFFIX}"
    metrics = [r for r in journal.read_all(written) if "event" not in r] if written.exists() else []
    tops = [r["value"] for r in metrics if re.fullmatch("eval/.*/top1", r["key"])]
    sent, status = _sent(run_dir), _status(run_dir)
    otherwise = "FINISHED" if status.finished else "KILLED"
    ended = str((last_status(run_dir) or {}).get("status", otherwise))
    running = is_live(run_dir)
    progress = read_progress(run_dir) if running else None
    stall = progress.stall() if progress is not None else None
    return RunSummary(
        run_dir=run_dir,
        status=("HANGING" if stall else "RUNNING") if running else ended,
        step=max([r["step"] for r in metrics] + [status.step]),
        top1=max(tops, default=None),
        run_id=sent.run_id,
        unsent_bytes=sum(p.stat().st_size - sent.offsets.get(p.name, 0) for p in journal.paths(run_dir / "journal")),
        stall=stall,
    )
