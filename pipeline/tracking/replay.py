"""Sends the contents of a run folder to the trackers, in repeated idempotent passes.

What is sent is a function of the run folder alone, so the process may be killed anywhere: the next pass completes it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline import config as configs
from pipeline.errors import JsonValue, without_secrets
from pipeline.runs import journal, provenance
from pipeline.runs.files import write_json
from pipeline.runs.journal import FirstValues, Record
from pipeline.runs.records import read_status
from pipeline.tracking import description
from pipeline.tracking.address import TrackingConfig
from pipeline.tracking.tracker import Ending, MetricPoint, Progress, Tracker

POINTS_PER_CALL = 1000  # as many as MLflow accepts
INPUTS = "inputs"  # key of Progress.files: the data sets that were sent
STATUS_EVENTS = ("driver-started", "driver-ended")  # events of the journal `driver`


class Composite:
    """One run and all its trackers. An error of one tracker does not affect the others."""

    def __init__(self, replays: Mapping[str, Replay]) -> None:
        self.replays = replays

    def send(self, names: Iterable[str] | None = None, *, final: bool) -> dict[str, Exception]:
        """Makes one pass for each tracker, or for those named. Returns the errors of those that failed."""
        errors: dict[str, Exception] = {}
        for name in self.replays if names is None else names:
            try:
                self.replays[name].send(final=final)
            except Exception as error:  # each library has its own
                errors[name] = error
        return errors


class Replay:
    """One run and one tracker. After an error the same object may be used again: it sends what is missing."""

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        config: TrackingConfig,
        recipe: Mapping[str, JsonValue],
        *,
        points_per_call: int = POINTS_PER_CALL,
    ) -> None:
        self.tracker = tracker
        self.num_metrics = 0  # sent by this object
        self._run_dir, self._config, self._recipe = run_dir, config, recipe
        self._points_per_call = points_per_call
        self._progress: Progress | None = None
        self._first: dict[str, FirstValues] = {}
        self._read: dict[str, int] = {}  # bytes of each journal
        self._pending: list[MetricPoint] = []  # read but not sent
        self._events: list[Record] = []
        self._checkpoints_sent = 0
        self._final: dict[str, float] = {}  # what is measured once, after training

    def send(self, *, final: bool) -> None:
        """Sends everything new; if `final`, also plots, the best and the last checkpoint, and how the run ended.

        Raises whatever the tracker raises.
        """
        if self._progress is None:
            self._progress = self.tracker.open(self._run_dir, self._recipe)
        self._send_metrics(self._progress)
        self._send_locations()
        self._send_summary()
        self._send_inputs(self._progress)
        if self.tracker.takes_files:
            self._send_files(self._progress, final=final)
        self._send_status(final=final)

    # --- metrics and events

    def _send_metrics(self, progress: Progress) -> None:
        self._flush(progress)
        for path in journal.paths(self._run_dir / "journal"):
            while self._read_chunk(path, progress):
                self._flush(progress)

    def _read_chunk(self, path: Path, progress: Progress) -> bool:
        """Reads the next part of a journal; the part of it that must be sent becomes pending. False at the end."""
        before = self._read.get(path.name, 0)
        records, after = journal.read(path, before)
        if after == before:
            return False
        first = self._first.setdefault(path.name, FirstValues())
        metrics = [record for record in records if first.take(record)]
        self._events += [record for record in records if "event" in record]
        self._final |= {r["key"]: r["value"] for r in metrics if description.FINAL.fullmatch(r["key"])}
        if after > progress.offsets.get(path.name, 0):
            charted = [record for record in metrics if description.is_charted(record["key"])]
            self._pending = [MetricPoint(r["key"], r["step"], r["value"], r.get("time", 0.0)) for r in charted]
        self._read[path.name] = after
        return True

    def _flush(self, progress: Progress) -> None:
        while self._pending:
            batch = self._pending[: self._points_per_call]
            self.tracker.log(batch)
            self.num_metrics += len(batch)
            del self._pending[: len(batch)]
        further = {name: offset for name, offset in self._read.items() if offset > progress.offsets.get(name, 0)}
        if further:
            progress.offsets.update(further)
            progress.save()

    def _send_locations(self) -> None:
        """Where each checkpoint was saved: all in checkpoints.json, the newest in the summary."""
        saved = [record for record in self._events if record["event"] == "checkpoint"]
        if len(saved) == self._checkpoints_sent:
            return
        locations = [{key: record.get(key) for key in ("step", "where", "time")} for record in saved]
        if self.tracker.takes_files:
            with tempfile.TemporaryDirectory(prefix="adaptnet-tracking-") as scratch:
                file = Path(scratch) / "checkpoints.json"
                write_json(file, locations)
                self.tracker.log_artifact(file, "")
        self.tracker.log_summary({"checkpoint": as_text(locations[-1]["where"])})
        self._checkpoints_sent = len(saved)

    def _send_summary(self) -> None:
        """The note (note.md) or a description from the figures, the figures, and the run that this one is a part of."""
        note, started = self._run_dir / "note.md", self._started()
        facts = description.summary_facts(started, self._final)
        if note.is_file():
            facts["note"] = without_secrets(note.read_text(encoding="utf-8"))
        elif text := description.description(self._recipe_name(), started, self._final):
            facts["description"] = without_secrets(text)
        facts |= {"parent": str(self._config.parent)} if self._config.parent else {}
        self.tracker.log_summary(facts)

    def _send_inputs(self, progress: Progress) -> None:
        """The data sets, once."""
        found = description.datasets(self._started())
        stamp: JsonValue = [each.identity for each in found]
        if found and progress.files.get(INPUTS) != stamp:
            self.tracker.log_inputs(found)
            progress.files[INPUTS] = stamp
            progress.save()

    def _started(self) -> Record:
        """The newest start of the training; empty if there is none."""
        return next((r for r in reversed(self._events) if r["event"] == "started"), {})

    def _recipe_name(self) -> str:
        return provenance.recipe_of(provenance.read(self._run_dir)) or str(self._recipe.get("name", self._run_dir.name))

    def _send_status(self, *, final: bool) -> None:
        last: Record = next((r for r in reversed(self._events) if r["event"] in STATUS_EVENTS), {"event": None})
        if not final or last["event"] != "driver-ended":
            self.tracker.running()
            return
        error = as_text(last["error"]) if last.get("error") else None
        self.tracker.finish(Ending(last["status"], last["time"], error))

    # --- files

    def _send_files(self, progress: Progress, *, final: bool) -> None:
        if final:
            draw_curves(self._run_dir)
        for path in _small_files(self._run_dir):
            name = path.relative_to(self._run_dir)
            stamp: JsonValue = [path.stat().st_size, path.stat().st_mtime_ns]
            if progress.files.get(str(name)) != stamp:
                self.tracker.log_artifact(path, "" if len(name.parts) == 1 else name.parent.as_posix())
                progress.files[str(name)] = stamp
                progress.save()
        if final and self._config.upload_checkpoints:
            self._send_checkpoints(progress)

    def _send_checkpoints(self, progress: Progress) -> None:
        """The best and the newest complete checkpoint, and in the summary which is which."""
        from pipeline.training import checkpoint
        from pipeline.training.config import CheckpointConfig

        keys = configs.section(self._recipe, "checkpoint")
        section = configs.validate_stored(CheckpointConfig, keys, "recipe: checkpoint")
        storage = checkpoint.open_storage(section, self._run_dir)
        names = storage.names()
        roles = {"last": names[-1] if names else None, "best": read_status(self._run_dir).best}
        for role, name in roles.items():
            if name not in names:
                continue
            stamp: JsonValue = [storage.where(name), storage.meta(name).step]
            if progress.files.get(f"checkpoints/{name}") != stamp:
                folder = storage.fetch(name)
                checkpoint.verify(folder)
                self.tracker.log_artifact(folder, f"checkpoints/{name}")
                progress.files[f"checkpoints/{name}"] = stamp
                progress.save()
            self.tracker.log_summary({f"checkpoint.{role}": f"checkpoints/{name}"})


def as_text(value: object) -> str:
    """`value` as text without secrets; anything but text as JSON."""
    return without_secrets(value if isinstance(value, str) else json.dumps(value, default=str))


def _small_files(run_dir: Path) -> list[Path]:
    """The files that are sent as they are, without hidden ones, which are still being written."""
    patterns = ("*.yaml", "*.csv", "environment.json", "requirements.txt", "git.diff", "bad_images.json", "status.json")
    nested = ("evaluations/*/*.json", "plots/*.png", "profile/*")
    found = (path for pattern in (*patterns, *nested) for path in run_dir.glob(pattern))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def draw_curves(run_dir: Path) -> None:
    """Draws plots/loss.png and plots/top1.png from the journals, if these hold such curves."""
    from matplotlib.figure import Figure

    curves = journal.curves(run_dir / "journal")
    for name, wanted in (("loss", "train/(loss|ce)"), ("top1", "train/top1|eval/.*/top1")):
        chosen = {key: points for key, points in curves.items() if re.fullmatch(wanted, key)}
        if not chosen:
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=name, title=f"{run_dir.name}: {name}")
        for key, points in sorted(chosen.items()):
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 50 else None)
        axes.grid(alpha=0.3)
        axes.legend()
        (run_dir / "plots").mkdir(exist_ok=True)
        figure.savefig(run_dir / "plots" / f"{name}.png", dpi=120)
