"""Which classes a net takes for which others: a matrix where classes are few, and the most frequent confusions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.frontier import merit
from pipeline.family import Evaluated
from pipeline.figures import Cell, Figure, HeatMap, Table, marks

Labels = NDArray[np.int64]
MOST_CLASSES = 20  # of a matrix that is drawn
MOST_PAIRS = 15  # rows of a table of confusions


def confusions(nets: Sequence[Evaluated]) -> list[Figure]:
    """The figures of each net whose answers by image are at hand, under its most accurate policy.

    Of several seeds the answers of all are counted.
    """
    found: list[Figure] = []
    for net, mark in zip(nets, marks([net.name for net in nets]), strict=True):
        policy = max(net.reports, key=lambda report: (merit(report.kind, report.top1), report.top1)).policy
        answers = _answers(net, policy)
        if answers is None:
            continue
        title, (labels, predicted) = f"{net.name} · {policy}", answers
        if len(net.classes) <= MOST_CLASSES:
            found.append(_matrix(title, mark, net.classes, labels, predicted))
        pairs = _pairs(net.classes, labels, predicted)
        if pairs:
            columns = ["class", "predicted as", "images", "% of the class"]
            caption = f"The {len(pairs)} most frequent wrong answers, by the number of images."
            found.append(Table(f"confused-{mark}", f"Most frequent confusions of {title}", caption, columns, pairs))
    return found


def _answers(net: Evaluated, policy: str) -> tuple[Labels, Labels] | None:
    """True and predicted classes [N] each; None if no answers are at hand."""
    stored = [each.details(policy) for each in net.seeds or [net]]
    known = [arrays for arrays in stored if arrays is not None]
    if not known:
        return None
    labels, predicted = (np.concatenate([arrays[key] for arrays in known]) for key in ("labels", "predicted"))
    return labels.astype(np.int64), predicted.astype(np.int64)


def _matrix(title: str, mark: str, classes: Sequence[str], labels: Labels, predicted: Labels) -> HeatMap:
    size = len(classes)
    counts = np.bincount(labels * size + predicted, minlength=size * size).reshape(size, size)
    values = [[100 * int(count) / int(row.sum()) if row.sum() else None for count in row] for row in counts]
    return HeatMap(
        f"confusion-{mark}",
        f"Predicted classes of {title}",
        "Of the images of a row's class, the share that was predicted to be of a column's class, in %.",
        list(classes),
        list(classes),
        values,
        "images of the class (%)",
        high=100.0,
    )


def _pairs(classes: Sequence[str], labels: Labels, predicted: Labels) -> list[list[Cell]]:
    """The most frequent wrong answers, most frequent first; of equal ones the first class."""
    of_class = np.bincount(labels, minlength=len(classes))
    wrong = predicted != labels
    places, counts = np.unique(labels[wrong] * len(classes) + predicted[wrong], return_counts=True)
    best = np.argsort(-counts, kind="stable")[:MOST_PAIRS]
    found = [(*divmod(int(places[each]), len(classes)), int(counts[each])) for each in best]
    return [[classes[a], classes[b], count, 100 * count / int(of_class[a])] for a, b, count in found]
