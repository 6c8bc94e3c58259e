"""The lines that show a run: header, events, evaluations, progress. Functions of journal records and a width alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.runs.journal import Record

QUIET = ("checkpoint", "driver-started", "driver-ended", "finished", "stopped", "hang", "ray-frozen")  # not printed
SHOWN = ("bar", "step", "epoch", "loss", "train", "val", "rate", "wait", "macs", "memory", "left")  # from left to right
KEPT = ("step", "left", "loss", "val", "rate", "bar", "train", "wait", "epoch", "macs", "memory")  # the last goes first
GAP = "  "
BAR_COLUMNS = (8, 24)  # the fewest and the most
EVALUATED = re.compile(r"(eval|held_out)/(.+)/(top1|loss)")
SPLITS = {"eval": "val", "held_out": "held-out"}


def percent(share: float, digits: int = 2) -> str:
    """An accuracy or a share in 0..1 as text: "65.40 %"."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: "0:01:23"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def scaled(value: float) -> str:
    """A number with three digits and the prefix of its thousands: "12.3 M"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"


@dataclass(frozen=True)
class EvaluationPoint:
    """An evaluation while training: top-1 in 0..1 and loss of the first policy on one split."""

    step: int
    split: str
    top1: float
    loss: float | None = None


def evaluations(records: Iterable[Record]) -> list[EvaluationPoint]:
    """The evaluations among the records, in the order of writing; of several policies the first."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    policies: dict[tuple[int, str], str] = {}
    for record in records:
        match = EVALUATED.fullmatch(record.get("key", ""))
        if match:
            place = (record["step"], SPLITS[match[1]])
            if policies.setdefault(place, match[2]) == match[2]:
                found.setdefault(place, {})[match[3]] = record["value"]
    return [
        EvaluationPoint(step, split, values["top1"], values.get("loss"))
        for (step, split), values in found.items()
        if "top1" in values
    ]


def best_of(found: Iterable[EvaluationPoint]) -> EvaluationPoint | None:
    """The evaluation with the highest top-1, the newest of equal ones; None if there is none."""
    return max(found, key=lambda each: (each.top1, each.step), default=None)


def evaluation_line(new: EvaluationPoint, best: EvaluationPoint) -> str:
    """The line of an evaluation, which stays. best: of all on this split up to this one."""
    loss = "" if new.loss is None else f", loss {new.loss:.4f}"
    rank = "the best so far" if best.step == new.step else f"best {percent(best.top1)} at step {best.step}"
    return f"evaluation at step {new.step}: {new.split} top-1 {percent(new.top1)}{loss}; {rank}"


def event_line(record: Record) -> str:
    """The line of an event: its kind in brackets, its step, then its facts."""
    if record["event"] == "started" and "total_steps" in record:
        return f"[started] at step {record['step']} of {record['total_steps']}, {_workers(record)}"
    skip = ("event", "attempt", "fence", "time", "step", "text")
    facts = [f"{key} {value}" for key, value in record.items() if key not in skip and value not in (None, [])]
    text = [str(record["text"])] if "text" in record else []
    at = f" at step {record['step']}" if record.get("step") is not None else ""
    return f"[{record['event']}]{at} {', '.join([*text, *facts])}".rstrip()


def _workers(started: Record) -> str:
    count = started.get("workers", 1)
    return f"{count} worker{'s' * (count != 1)}"


def header(started: Record, places: Mapping[str, str]) -> list[str]:
    """The lines that say what is trained, on what and where. places: more names and values, after those of the event.

    An event that an earlier version has written gives the places alone.
    """
    facts = {**_header_facts(started), **places}
    width = max(map(len, facts), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in facts.items()]


def _header_facts(started: Record) -> dict[str, str]:
    if not isinstance(net := started.get("net"), dict) or not isinstance(data := started.get("data"), dict):
        return {}
    compiled = ", compiled" if started.get("compile") else ""
    steps = f"{started['total_steps']:,} steps"
    images = f"{data['train_images']:,} train, {data['val_images']:,} val images of {data['classes']:,} classes"
    return {
        "net": f"{net['family']}: {net['parameters']:,} parameters, {scaled(net['macs'])}MACs at {net['side_px']} px",
        "data": f"{data['root']}: {images}",
        "compute": f"{_workers(started)} on {started['device']}, {started['precision']}{compiled}",
        "training": f"{steps} of {started['batch_size']:,} images, {started['epochs']:g} epochs",
    }


def progress_parts(values: Mapping[str, float], total: int) -> dict[str, str]:
    """What is known of a training as short texts, by name. values: the newest of each metric, and "step"."""
    parts = {"step": f"step {values.get('step', 0):.0f}/{total or '?'}"}
    forms: dict[str, tuple[str, Callable[[float], str]]] = {
        "epoch": ("train/epoch", lambda value: f"epoch {value:.2f}"),
        "loss": ("train/loss", lambda value: f"loss {value:.4f}"),
        "train": ("train/top1", lambda value: f"train {percent(value, 1)}"),
        "val": ("val", lambda value: f"val {percent(value)}"),
        "rate": ("time/images_per_s", lambda value: f"{value:.{1 if value < 10 else 0}f} img/s"),
        "wait": ("time/data_share", lambda value: f"data wait {percent(value, 0)}"),
        "memory": ("memory_peak_bytes", lambda value: f"{value / 1e9:.1f} GB"),
    }
    parts |= {name: form(value) for name, (key, form) in forms.items() if (value := _named(values, key)) is not None}
    parts |= _speed(values)
    seconds = _seconds_left(values, total)
    return parts if seconds is None else {**parts, "left": f"{duration(seconds)} left"}


def _named(values: Mapping[str, float], key: str) -> float | None:
    """The value of a key, or of the first one that ends with it below a prefix."""
    if key in values:
        return values[key]
    return next((value for name, value in values.items() if name.endswith(f"/{key}")), None)


def _speed(values: Mapping[str, float]) -> dict[str, str]:
    rate, share = _named(values, "macs_per_s"), _named(values, "macs_share_of_peak")
    if rate is None:
        return {}
    return {"macs": f"{scaled(rate)}MAC/s" + ("" if share is None else f" ({percent(share, 0)} of peak)")}


def _seconds_left(values: Mapping[str, float], total: int) -> float | None:
    """Extrapolated from the last log interval."""
    seconds, steps = values.get("time/interval_s"), values.get("time/interval_steps")
    if not total or seconds is None or not steps:
        return None
    return (total - values.get("step", 0)) * seconds / steps


def plain_line(values: Mapping[str, float], total: int) -> str:
    """The progress as a line of a log: everything that is known."""
    parts = progress_parts(values, total)
    return GAP.join(parts[name] for name in SHOWN if name in parts)


def bar_line(values: Mapping[str, float], total: int, width: int) -> str:
    """The progress in one line of at most `width` columns.

    Of KEPT it holds as many as fit, from the first on, so that a narrower line has lost the last of a wider one.
    """
    parts = progress_parts(values, total)
    done = values.get("step", 0) / total if total else 0.0
    fewest, most = BAR_COLUMNS
    room, kept = width, set[str]()
    for name in (each for each in KEPT if each == "bar" or each in parts):
        columns = (fewest if name == "bar" else len(parts[name])) + len(GAP) * bool(kept)
        if columns > room:
            break
        room -= columns
        kept.add(name)
    if "bar" in kept:
        parts["bar"] = _bar(done, min(most, fewest + room))
    return GAP.join(parts[name] for name in SHOWN if name in kept)[:width] or parts["step"][:width]


def _bar(done: float, columns: int) -> str:
    filled = round(min(max(done, 0.0), 1.0) * (columns - 2))
    return f"[{'#' * filled}{'.' * (columns - 2 - filled)}]"


@dataclass
class RunLines:
    """A run as its journal tells it: what has been read so far, and the lines that new records give."""

    places: Mapping[str, str] = field(default_factory=dict)  # of the header
    values: dict[str, float] = field(default_factory=dict)  # the newest of each metric, and "step"
    total: int = 0
    started: bool = False
    _best: dict[str, EvaluationPoint] = field(default_factory=dict)  # by split

    def remember(self, records: Iterable[Record]) -> None:
        """Takes in what an earlier start of the run has written; its evaluations count for the best."""
        for each in evaluations(records):
            self._rank(each)

    def take(self, records: Iterable[Record]) -> list[str]:
        """Takes in new records; returns the lines that are to be printed and stay."""
        records = list(records)
        lines = [line for record in records for line in self._lines_of(record)]
        for each in evaluations(records):
            lines.append(evaluation_line(each, self._rank(each)))
            if each.split == "val":
                self.values["val"] = each.top1
        return lines

    def _lines_of(self, record: Record) -> Iterator[str]:
        if "event" not in record:
            if not record["key"].startswith("system/"):
                self.values["step"] = max(self.values.get("step", 0), record["step"])
                self.values[record["key"]] = record["value"]
            return
        self.total = record.get("total_steps", self.total)
        if record["event"] == "started":
            self.values["step"] = max(self.values.get("step", 0), record.get("step") or 0)
            if not self.started:
                yield from header(record, self.places)
            self.started = True
        if record["event"] not in QUIET:
            yield event_line(record)

    def _rank(self, new: EvaluationPoint) -> EvaluationPoint:
        """The best evaluation on the split up to this one."""
        before = self._best.get(new.split)
        if before is None or new.top1 >= before.top1:
            self._best[new.split] = new
        return self._best[new.split]
