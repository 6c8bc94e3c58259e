"""What the journal says of a run, as facts, data sets and a description for trackers. Functions of records alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from pipeline.runs.journal import Record
from pipeline.tracking.tracker import DatasetUse

FINAL = re.compile(r"final/(.+)/([^/]+)")  # what the evaluation after training measures, once
CHARTED = ("top1", "gmacs")  # of these figures, what remains a metric: runs are sorted and compared by it
MARK = "*Written by adaptnet from the run's figures; a description that a person has changed is left alone.*"


def shortened(text: str, most: int) -> str:
    """A description of at most `most` characters: whole lines of it, and MARK at its end if that is there."""
    if len(text) <= most or not text.endswith(MARK):
        return text[:most]
    return f"{text[: most - len(MARK) - 2].rpartition(chr(10))[0]}\n\n{MARK}"


def is_charted(key: str) -> bool:
    """Whether a metric is sent as one: not a figure that is measured once and is in the summary."""
    match = FINAL.fullmatch(key)
    return match is None or match[2] in CHARTED


def summary_facts(started: Record, final: Mapping[str, float]) -> dict[str, str]:
    """Facts of a run by name. started: the newest such event; final: the metrics `final/...`.

    Names: parameters, macs, device, precision, workers; final.<policy>: the figures of a policy after training.
    """
    net = started.get("net")
    facts: dict[str, str] = {key: str(started[key]) for key in ("device", "precision", "workers") if key in started}
    if isinstance(net, dict):
        facts |= {"parameters": str(net["parameters"]), "macs": str(net["macs"])}
    return facts | {f"final.{policy}": _figures(values) for policy, values in by_policy(final).items()}


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())


def by_policy(final: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """{policy: {figure: value}} of the metrics `final/<policy>/<figure>`."""
    found: dict[str, dict[str, float]] = {}
    for key, value in final.items():
        if match := FINAL.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = value
    return found


def datasets(started: Record) -> list[DatasetUse]:
    """The splits that the run trains and is evaluated on; empty for an event of an earlier version."""
    data = started.get("data")
    if not isinstance(data, dict):
        return []
    root, classes = data["root"], data["classes"]
    splits = (("training", "train"), ("validation", "val"))
    return [
        DatasetUse(PurePath(root).name or root, root, data[split], data[f"{split}_images"], classes, context)
        for context, split in splits
        if data.get(split)
    ]


def description(recipe: str, started: Record, final: Mapping[str, float]) -> str:
    """Markdown that says what was trained on what, and the figures of each policy; "" if nothing is known."""
    paragraphs = [*_setup(recipe, started), *_table(by_policy(final))]
    return "\n\n".join([*paragraphs, MARK]) if paragraphs else ""


def _setup(recipe: str, started: Record) -> Sequence[str]:
    net, data = started.get("net"), started.get("data")
    if not isinstance(net, dict) or not isinstance(data, dict):
        return ()
    of_net = f"{net['parameters']:,} parameters, {net['macs'] / 1e6:,.3f} MMACs at {net['side_px']} px"
    images = f"{data['train_images']:,} train and {data['val_images']:,} val images of {data['classes']:,} classes"
    steps = f"{started['total_steps']:,} steps of {started['batch_size']:,} images ({started['epochs']:g} epochs)"
    return (
        f"**{recipe}**: {net['family']}, {of_net}.",
        f"{PurePath(data['root']).name}: {images}. {steps} on {started['workers']} x {started['device']}, "
        f"{started['precision']}.",
    )


def _table(policies: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    rows = [
        f"| {policy} | {100 * values['top1']:.2f} | {1000 * values['gmacs']:.3f} |"
        for policy, values in policies.items()
        if {"top1", "gmacs"} <= set(values)
    ]
    return ["\n".join(["| policy | top-1 % | MMACs |", "|---|---|---|", *rows])] if rows else []
