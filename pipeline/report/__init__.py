"""The report: accuracy against cost of trained nets under all their policies, as a page, pictures and numbers.

`build` writes it from nets with their evaluations (`Evaluated`); `report` finds these by the sources that a user names
and uploads the folder to their tracked runs.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from pipeline import config as configs
from pipeline import family as families
from pipeline import tracking
from pipeline.data.index import ImageIndex
from pipeline.deploy import evaluations, seed_groups
from pipeline.deploy.evaluations import EvaluatedNet
from pipeline.errors import ConfigError, ContractError
from pipeline.evaluation.over_seeds import seed_of
from pipeline.family import Evaluated
from pipeline.figures import Bars, Figure, Gallery, HeatMap, Lines, Series, Table
from pipeline.report import cells, confusion, folder, general, published, resolutions, seeds, training
from pipeline.report.contact_sheet import contact_sheet
from pipeline.report.page import Section, Shown, drawn, page
from pipeline.report.published import PublishedPoint
from pipeline.report.seeds import GroupComparison
from pipeline.report.thumbnails import thumbnails
from pipeline.runs import files

NO_IMAGES = " The images are not available here; their names are shown instead."
FIGURE_NAME = re.compile("[a-z0-9]+(--?[a-z0-9]+)*")  # two hyphens before the mark of a net


@dataclass(frozen=True)
class WrittenReport:
    """A written report: its page, what it holds, the tracked runs that have it, and warnings about others.

    verdicts: which recipe is better, one sentence for every two groups of seeds.
    """

    page: Path
    num_nets: int
    num_policies: int
    num_figures: int
    verdicts: Sequence[str] = ()
    sent: Sequence[str] = ()
    warnings: Sequence[str] = ()


def report(
    sources: Sequence[str],
    out: Path,
    *,
    groups: Path | None = None,
    uri: str | None = None,
    registry: str | None = None,
    track: bool = True,
    data_set: str | None = None,
    first: Sequence[Figure] = (),
) -> WrittenReport:
    """Writes the report of the nets in `sources` (run folders, checkpoint folders, versions) into the folder `out`.

    A source may also be several seeds of a recipe (the folder NAME-seeds, or a pattern such as runs/NAME-s*): then its
    figures are means with their spread, and every two such groups are compared. groups is a file {superclass: [class,
    ...]}. data_set: a name in published.yaml, whose published points are drawn too, or "none"; None: the name of the
    evaluated folder decides (see `published`). first: as of `build`. registry: where versions are looked up; None: uri.
    With `track` the folder is also logged to the nets' tracked runs, of a folder NAME-seeds to the parent; a server
    that cannot be reached gives a warning.

    Raises ConfigError for nets that cannot be compared, a net that is given twice, a pattern without a finished run,
    nets of a group that differ in more than the seed, a data set that the images cannot be, and a folder `out` that
    holds other files.
    """
    folder.check(out)
    members = [seed_groups.members(source) for source in sources]
    named = [source for given, found in zip(sources, members, strict=True) for source in found or [given]]
    nets = [evaluations.find(source, registry or uri) for source in named]
    _refuse_duplicates(nets)
    evaluated = evaluations.together(nets)
    if groups is not None:
        evaluated = grouped(evaluated, groups)
    shown = seed_groups.means(sources, members, evaluated)
    data = evaluated[0].data
    others = published.points(published.data_set_of(evaluated[0], _root(nets, data), data_set))
    root = _root(nets, data)
    written = build(shown, out, evaluations.images(nets, data), others, first, Path(root).name if root else "")
    if not track:
        return written
    sent, warnings = tracking.send_folder(_run_dirs(sources, members, nets), out, "report", uri)
    return replace(written, sent=sent, warnings=warnings)


def _root(nets: Sequence[EvaluatedNet], data: str) -> str | None:
    """The folder of the data set on which the first net was evaluated, if that is known."""
    stored = nets[0].on(data)
    return stored.about.root if stored else None


def _run_dirs(sources: Sequence[str], members: Sequence[Sequence[str]], nets: Sequence[EvaluatedNet]) -> list[Path]:
    """The folders of the tracked runs that get the report: of the folder NAME-seeds that of the parent, else each."""
    parents = {name: Path(given) for given, found in zip(sources, members, strict=True) for name in found}
    dirs = [(parents.get(net.source), net.run_dir) for net in nets]
    is_group = {parent: parent is not None and parent.is_dir() for parent, _ in dirs}
    return list(dict.fromkeys(parent if parent and is_group[parent] else own for parent, own in dirs if own))


def _refuse_duplicates(nets: Sequence[EvaluatedNet]) -> None:
    seen: dict[str, str] = {}
    for net in nets:
        key = files.sha256(net.model.weights)
        if key in seen:
            raise ConfigError(
                f"{net.source}: the same net as {seen[key]}; give each net once", key="sources", subject=net.source
            )
        seen[key] = net.source


def grouped(nets: Sequence[Evaluated], path: Path) -> list[Evaluated]:
    """The nets with the superclasses of a YAML or JSON file {superclass: [class, ...]}.

    Raises ConfigError for classes that the nets do not have, or that are in two groups.
    """
    try:
        groups = configs.read_mapping(path)
    except ConfigError as error:
        raise ConfigError(
            f"--groups: write {{superclass: [class, ...]}} as YAML or JSON; {error}", key="--groups", subject=path
        ) from None
    known, seen = set(nets[0].classes), set[str]()
    superclasses: dict[str, tuple[str, ...]] = {}
    for group, classes in groups.items():
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise _wrong_group(path, group, f"write a list of classes, [CLASS, ...], not {classes!r}", group)
        names = [str(name) for name in classes]
        unknown = [name for name in names if name not in known]
        if unknown:
            listed = f"{', '.join(nets[0].classes[:10])}{' ...' if len(known) > 10 else ''}"
            message = f"the nets have no class {', '.join(unknown[:10])}; they have {listed}"
            raise _wrong_group(path, group, message, unknown[0])
        twice = [name for name in names if name in seen]
        if twice:
            raise _wrong_group(path, group, f"{', '.join(twice[:10])}: in another group as well", twice[0])
        seen.update(names)
        superclasses[str(group)] = tuple(names)
    return [replace(net, superclasses=superclasses) for net in nets]


def _wrong_group(path: Path, group: object, message: str, subject: object) -> ConfigError:
    return ConfigError(f"--groups {path}: {group}: {message}", key="--groups", subject=subject)


def build(
    nets: Sequence[Evaluated],
    out: Path,
    images: ImageIndex | None = None,
    others: Sequence[PublishedPoint] = (),
    first: Sequence[Figure] = (),
    data_set: str = "",
) -> WrittenReport:
    """Writes the report of these nets into `out`; `images` is the split of their evaluation, if it is available.

    others: points published for the same images. first: figures at the top, under the heading "Result". data_set: the
    name of the images' set, for the title. Raises ContractError if a figure of a family breaks the contract in
    `pipeline.figures`, ConfigError if a seed's evaluation has no answers by image.
    """
    whole = general.all_policies(nets)
    compared = seeds.comparisons(nets)
    result = [Section("result", "Result", first)] if first else []
    sections = [*result, *_sections(nets, whole, compared, others)]
    pictures = [(section, [_shown(figure, images) for figure in section.figures]) for section in sections]
    contents: dict[str, str | bytes] = {"policies.csv": cells.sheet(whole, {}).csv()}
    for heat_map in general.by_class(nets, all_classes=True):
        contents["classes.csv"] = cells.sheet(heat_map, {}).csv()
    for shown in (shown for _, group in pictures for shown in group):
        contents[f"{folder.FIGURES}/{shown.figure.name}.csv"] = shown.sheet.csv()
        if shown.png:
            contents[f"{folder.FIGURES}/{shown.figure.name}.png"] = shown.png
    footer = f"Made by adaptnet {version('adaptnet')} at {time.strftime('%Y-%m-%d %H:%M %Z')}."
    verdicts = [each.verdict for each in compared]
    contents[folder.PAGE] = page(_title(nets, data_set), _lead(nets, compared), pictures, footer)
    folder.write(out, {**_data(nets, sections), "over_seeds": seeds.to_json(nets, compared)}, contents)
    num_policies = sum(len(net.reports) for net in nets)
    num_figures = sum(len(group) for _, group in pictures)
    return WrittenReport(out / folder.PAGE, len(nets), num_policies, num_figures, verdicts)


def _title(nets: Sequence[Evaluated], data_set: str) -> str:
    """What was measured: the nets, the images with their number and side, and the device."""
    what = nets[0].name if len(nets) == 1 else f"{len(nets)} nets"
    counts, sides = {report.num_images for net in nets for report in net.reports}, {net.side_px for net in nets}
    several = len(counts) > 1
    images = f"{'up to ' if several else ''}{max(counts, default=0):,} images of {'/'.join(map(str, sorted(sides)))} px"
    devices = sorted({entry.device for net in nets for report in net.reports for entry in report.latency})
    on = f" on {data_set}" if data_set else ""
    return f"Accuracy and cost of {what}{on}: {images}" + (f", {'; '.join(devices)}" if devices else "")


def _lead(nets: Sequence[Evaluated], compared: Sequence[GroupComparison]) -> list[str]:
    """The paragraphs under the title."""
    names = ", ".join(general.titled(net) for net in nets)
    unreadable = {name for net in nets for report in net.reports for name in report.unreadable}
    images = f"Evaluated on the images {nets[0].data}, {len(nets[0].classes):,} classes."
    if unreadable:
        images += f" {len(unreadable):,} unreadable images are left out."
    usage = (
        "Point at a mark, tap it, or move with the arrow keys to read its numbers. Click an entry of a legend to show "
        "its family only, again to show all. The same numbers are in policies.csv, figures/*.csv and data.json."
    )
    verdicts = [f"{each.verdict}." for each in compared]
    return [*general.recommendation(nets), f"{names}.", *verdicts, images, usage]


def _sections(
    nets: Sequence[Evaluated],
    whole: Table,
    compared: Sequence[GroupComparison],
    others: Sequence[PublishedPoint],
) -> Iterator[Section]:
    yield Section("frontier", "Accuracy against cost", general.frontiers(nets, others))
    of_seeds = seeds.tables(nets, compared)
    if of_seeds:
        yield Section("seeds", "Over seeds", of_seeds)
    yield Section("each-policy", "Each policy", general.policies(nets, whole))
    trained: list[Figure] = [*general.training(nets), *training.speeds(nets)]
    if trained:
        yield Section("training", "Training", trained)
    lower = resolutions.resolutions(nets)
    if lower:
        yield Section("resolutions", "Lower resolutions", lower)
    classes: list[Figure] = [*general.by_class(nets), *confusion.confusions(nets)]
    if classes:
        yield Section("classes", "Classes", classes)
    for name in dict.fromkeys(net.family for net in nets):
        figures = families_own(name, nets)
        if figures:
            first = ", first seed" if any(net.seeds for net in nets if net.family == name) else ""
            yield Section(f"family-{name.replace('_', '-')}", f"Family {name}{first}", figures)
    if others:
        yield Section("published", "Published by others", published.tables(others))


def families_own(name: str, nets: Sequence[Evaluated]) -> list[Figure]:
    """The checked figures of a family, their names prefixed with its own. Raises ContractError for a faulty one.

    Of several seeds they are those of the first, for answers by image and curves have no mean.
    """
    single = [net.seeds[0] if net.seeds else net for net in nets]
    mine = [net for net in single if net.family == name]
    others = [net for net in single if net.family != name]
    figures, seen = [], set[str]()
    prefix = name.replace("_", "-")
    for figure in families.find(name).figures(mine, others):
        fault = "another figure has this name" if figure.name in seen else fault_of(figure)
        if fault:
            raise ContractError(f"family {name}, figure {figure.name!r}: {fault}", key=figure.name, subject=name)
        seen.add(figure.name)
        figures.append(
            figure if figure.name.startswith(f"{prefix}-") else replace(figure, name=f"{prefix}-{figure.name}")
        )
    return figures


def fault_of(figure: Figure) -> str | None:
    """The way in which a figure breaks the contract in `pipeline.figures`; None if it keeps it."""
    if not FIGURE_NAME.fullmatch(figure.name):
        return "its name may hold lower case, digits and hyphens"
    fault = _fault_of_shape(figure)
    if fault is None and not all(value is None or math.isfinite(value) for value in _numbers(figure)):
        fault = "a value is not finite"
    return fault


def _fault_of_shape(figure: Figure) -> str | None:
    if isinstance(figure, Lines):
        uneven = [series.name for series in figure.series if _is_uneven(series)]
        return f"series {uneven[0]!r}: x, y, texts, faded, x_sd, y_sd and labels differ in length" if uneven else None
    if isinstance(figure, Bars) and any(len(values) != len(figure.labels) for values in figure.series.values()):
        return f"a series does not have as many values as there are labels ({len(figure.labels)})"
    if isinstance(figure, HeatMap):
        return _fault_of_grid(figure)
    if isinstance(figure, Table) and any(len(row) != len(figure.columns) for row in figure.rows):
        return f"a row does not have as many cells as there are columns ({len(figure.columns)})"
    return None


def _is_uneven(series: Series) -> bool:
    optional = (series.texts, series.faded, series.x_sd, series.y_sd, series.labels)
    return len({len(series.x), len(series.y), *(len(part or series.x) for part in optional)}) > 1


def _fault_of_grid(figure: HeatMap) -> str | None:
    shape = {len(row) for row in figure.values} | {len(figure.columns)}
    if len(figure.values) != len(figure.rows) or len(shape) > 1:
        return f"values are not {len(figure.rows)} rows of {len(figure.columns)}"
    if figure.groups and sum(figure.groups.values()) != len(figure.rows):
        return f"its groups hold {sum(figure.groups.values())} rows, there are {len(figure.rows)}"
    return None


def _numbers(figure: Figure) -> Iterator[float | None]:
    if isinstance(figure, Lines):
        yield from (v for series in figure.series for v in (*series.x, *series.y, *series.x_sd, *series.y_sd))
    elif isinstance(figure, Bars):
        yield from (value for values in figure.series.values() for value in values)
    elif isinstance(figure, HeatMap):
        yield from (value for row in figure.values for value in row)
    elif isinstance(figure, Table):
        yield from (value for row in figure.rows for value in row if not isinstance(value, str))


def _shown(figure: Figure, images: ImageIndex | None) -> Shown:
    if not isinstance(figure, Gallery):
        return drawn(figure, {})
    small = thumbnails(images, [row for group in figure.groups.values() for row, _ in group])
    if not any(thumbnail.jpeg for thumbnail in small.values()):
        figure = replace(figure, caption=figure.caption + NO_IMAGES)
    return drawn(figure, small, contact_sheet(figure, small))


def _data(nets: Sequence[Evaluated], sections: Sequence[Section]) -> dict[str, object]:
    """data.json: all reports and all figures."""
    return {
        "data": nets[0].data,
        "classes": list(nets[0].classes),
        "superclasses": {group: list(classes) for group, classes in nets[0].superclasses.items()},
        "nets": [_net(net) for net in nets],
        "figures": [
            {"kind": type(figure).__name__, "section": section.name, **asdict(figure)}
            for section in sections
            for figure in section.figures
        ],
    }


def _net(net: Evaluated) -> dict[str, object]:
    plain = ("name", "family", "data", "side_px", "step", "parameters")
    return {
        **{name: getattr(net, name) for name in plain},
        "reports": [report.to_json() for report in net.reports],
        "attacked": {attack: [report.to_json() for report in reports] for attack, reports in net.attacked.items()},
        "swept": {sweep: [report.to_json() for report in reports] for sweep, reports in net.swept.items()},
        "seeds": [{"seed": seed_of(seed), **_net(seed)} for seed in net.seeds],
    }
