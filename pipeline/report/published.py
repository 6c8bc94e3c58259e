"""Accuracy and cost that others have published for the same images: grey marks behind a report's own points.

They are drawn where the data set is the same, so that no report flatters its nets by the company it chooses. Which data
set a report's images are cannot be read from the images: sets of other images with the same classes and numbers exist
(corrupted copies of ImageNet, for one), and a packed or re-encoded copy is the same set with other bytes. So a person
must have named it: `--published NAME`, or the name of the folder that was evaluated (`imagenet`, as recipes call it).
Either way the numbers of classes and of evaluated images must be those of the set; else nothing is drawn for a folder's
name, and `--published` is refused. The points, their sources and the names are in published.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline import config as configs
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.evaluation.frontier import dominated
from pipeline.family import Evaluated
from pipeline.figures import Cell, Series, Table

FILE = Path(__file__).with_name("published.yaml")
NONE = "none"
NAME = "published by others"


class DataSetFacts(Config):
    """Numbers of a data set's evaluated split, and names of folders that hold it."""

    split: str
    images: int
    classes: int
    folders: tuple[str, ...]


class PublishedSource(Config):
    """Where points were published: points [name, side in px, GMACs per image, top-1 in %]."""

    title: str
    data_set: str
    link: str
    note: str
    points: tuple[tuple[str, int, float, float], ...]


class PublishedFile(Config):
    """The content of published.yaml."""

    data_sets: dict[str, DataSetFacts]
    sources: tuple[PublishedSource, ...]


@dataclass(frozen=True)
class PublishedPoint:
    """One published point; top1 in 0..1."""

    name: str
    side_px: int
    macs: float
    top1: float
    source: PublishedSource


@cache
def published() -> PublishedFile:
    """The file's content."""
    return configs.validate(PublishedFile, configs.read_mapping(FILE), FILE.name)


def points(data_set: str | None) -> list[PublishedPoint]:
    """The published points on a data set; none for None."""
    return [
        PublishedPoint(name, side, 1e9 * gmacs, top1 / 100, source)
        for source in published().sources
        if source.data_set == data_set
        for name, side, gmacs, top1 in source.points
    ]


def data_set_of(net: Evaluated, root: str | None, stated: str | None) -> str | None:
    """The known data set that the net was evaluated on; None for others: see the head of this file.

    root: the folder of the evaluated set. stated: what the user says it is, or "none". Raises ConfigError if that is
    unknown, or its numbers of classes or images are others.
    """
    known = published().data_sets
    if stated == NONE:
        return None
    if stated is None:
        folder = Path(root).name.lower() if root else None
        named = [name for name, facts in known.items() if folder in facts.folders]
        return next((name for name in named if _counts(net) == (known[name].classes, known[name].images)), None)
    if stated not in known:
        raise ConfigError(
            f"--published (={stated}): no such data set; one of {', '.join([*known, NONE])}",
            key="--published",
            subject=stated,
        )
    expected = (known[stated].classes, known[stated].images)
    if _counts(net) != expected:
        raise ConfigError(
            f"--published (={stated}): the {known[stated].split} split has {expected[0]:,} classes and {expected[1]:,} "
            f"images, {net.name} was evaluated on {_counts(net)[0]:,} and {_counts(net)[1]:,}; published points of "
            "other images cannot be compared: leave the option out",
            key="--published",
            subject=stated,
        )
    return stated


def _counts(net: Evaluated) -> tuple[int, int]:
    """(number of classes, number of images, including those that could not be read)."""
    first = net.reports[0]
    return len(net.classes), first.num_images + len(first.unreadable)


# ---- on the page


def series(found: Sequence[PublishedPoint]) -> Series:
    """The points as marks in the background; x in millions of MACs per image, y in %."""
    return Series(
        name=NAME,
        x=[point.macs / 1e6 for point in found],
        y=[100 * point.top1 for point in found],
        texts=[f"{point.name}, {point.side_px} px: {point.source.title}" for point in found],
        joined=False,
        group=NAME,
        background=True,
    )


def caption(found: Sequence[PublishedPoint], own: Sequence[tuple[float, float]]) -> str:
    """What the marks are, and how many of the report's best points (MACs, top-1) a published one beats."""
    costs = [*(point.macs for point in found), *(macs for macs, _ in own)]
    beaten = dominated(costs, [*(point.top1 for point in found), *(top1 for _, top1 in own)])[len(found) :]
    return (
        "Grey marks are published by others for the same images, which their nets may see at another side; they do not "
        f"decide what is dominated here. They beat {sum(beaten)} of the {len(own)} points that are not dominated."
    )


def tables(found: Sequence[PublishedPoint]) -> list[Table]:
    """The points, and where each was published."""
    sources = list(dict.fromkeys(point.source.title for point in found))
    links = {point.source.title: point.source for point in found}
    rows: list[list[Cell]] = [
        [point.name, point.side_px, 100 * point.top1, point.macs / 1e6, point.source.title]
        for point in sorted(found, key=lambda point: point.macs)
    ]
    columns = ["net", "side (px)", "top-1 (%)", "MMACs", "source"]
    where: list[list[Cell]] = [[title, links[title].link, links[title].note] for title in sources]
    return [
        Table("published-points", "Published points", "By rising MACs; 1 MAC is one multiply-add.", columns, rows),
        Table("published-sources", "Sources", "", ["source", "link", "note"], where),
    ]
