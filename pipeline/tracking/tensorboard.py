"""The tracker that writes TensorBoard's event files into the run folder: `tensorboard --logdir RUN/tensorboard`.

The event files themselves say what has been written: a new writer reads them first and skips every (key, step) that it
finds. So a writer that was killed, even in the middle of an event, is continued without a duplicate and without a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import dump_yaml
from pipeline.errors import ConfigError, JsonValue, without_secrets
from pipeline.runs.journal import FirstValues
from pipeline.tracking.tracker import DatasetUse, Ending, MetricPoint, NoProgress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
SUMMARY, SUFFIX = "summary/", "/text_summary"  # prefix and suffix of facts' tags; torch adds the suffix to texts


class TensorBoardTracker:
    """One run folder and its event files. Raises OSError if they cannot be written."""

    takes_files = False  # they are in the run folder already

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self.place = str(self._folder)
        self._writer: SummaryWriter | None = None
        self._written = _Written()

    def open(self, run_dir: Path, recipe: Mapping[str, JsonValue]) -> NoProgress:
        """Reads what the event files hold; a new one is created with the first new value.

        Raises ConfigError if TensorBoard is not installed.
        """
        require_tensorboard()
        self._written = _read_back(self._folder)
        self.log_summary({"recipe": f"```\n{without_secrets(dump_yaml(recipe))}```"})
        return NoProgress()

    def log(self, points: Sequence[MetricPoint]) -> None:
        new = [p for p in points if self._written.points.take({"key": p.key, "step": p.step})]
        if not new:
            return
        try:
            writer = self._open_writer()
            for point in new:
                writer.add_scalar(point.key, point.value, point.step, walltime=point.time)
            writer.flush()
        except Exception:
            self._start_over()
            raise

    def log_artifact(self, path: Path, place: str) -> None:
        raise NotImplementedError("event files hold no artifacts")

    def log_summary(self, facts: Mapping[str, str]) -> None:
        """Facts become texts `summary/KEY`; each new value is a further step of its text."""
        new = {key: value for key, value in facts.items() if value != self._written.facts.get(key, (0, ""))[1]}
        if not new:
            return
        try:
            writer = self._open_writer()
            for key, value in new.items():
                step = self._written.facts.get(key, (0, ""))[0] + 1
                writer.add_text(f"{SUMMARY}{key}", value, step)
                self._written.facts[key] = (step, value)
            writer.flush()
        except Exception:
            self._start_over()
            raise

    def log_inputs(self, datasets: Sequence[DatasetUse]) -> None:
        self.log_summary({f"dataset.{each.context}": f"{each.name}, {each.num_images:,} images" for each in datasets})

    def running(self) -> None:
        self.log_summary({"status": "RUNNING"})

    def finish(self, ending: Ending) -> None:
        self.log_summary({"error": ending.error or "", "status": ending.status})
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open_writer(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._folder.mkdir(exist_ok=True)
            self._writer = SummaryWriter(str(self._folder))
        return self._writer

    def _start_over(self) -> None:
        """After an error only the files show what was written; the next call continues in a new one."""
        self._writer = None
        self._written = _read_back(self._folder)


class _Written:
    """What event files hold: values by (key, step), and of each fact the last step and value."""

    def __init__(self) -> None:
        self.points = FirstValues()
        self.facts: dict[str, tuple[int, str]] = {}


def _read_back(folder: Path) -> _Written:
    written = _Written()
    if not folder.is_dir():
        return written
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "tensors": 0}
    events = EventAccumulator(str(folder), size_guidance=everything, purge_orphaned_data=False).Reload()
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            written.points.take({"key": key, "step": event.step})
    for tag in events.Tags()["tensors"]:
        key = tag.removeprefix(SUMMARY).removesuffix(SUFFIX)
        last = max(events.Tensors(tag), key=lambda event: event.step)
        written.facts[key] = (last.step, last.tensor_proto.string_val[0].decode())
    return written


def require_tensorboard() -> None:
    """Raises ConfigError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.also (=tensorboard) needs TensorBoard, which is not installed here: install the extra "
            "`tensorboard`, e.g. pip install -c constraints.txt -e '.[tensorboard]'",
            key="tracking.also",
            subject="tensorboard",
        )
