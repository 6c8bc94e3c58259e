"""Tables for people, as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pipeline.family imports torch, which takes seconds
    from pipeline.evaluation.over_seeds import Spread
    from pipeline.family import Report

MOST_FACTS = 64  # values of one fact that are printed
MOST_WAITED_SHARE = 0.1  # above this share of time spent waiting for a core, a latency is called doubtful


def align(rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Rows of cells as lines of text with aligned columns; the first row is the heading.

    The first column is aligned to the left, the others to the right, or all to the left with `left`.
    """
    from rich.cells import cell_len

    cells = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        gaps = [" " * (width - cell_len(cell)) for width, cell in zip(widths, row, strict=True)]
        padded = [
            cell + gap if left or number == 0 else gap + cell
            for number, (cell, gap) in enumerate(zip(row, gaps, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def byte_size(count: float) -> str:
    """A number of bytes in decimal units: "1.5 GB"."""
    from rich.filesize import decimal

    return decimal(round(count))


def of_reports(reports: Sequence[Report], family: str | None = None) -> str:
    """One row for each policy: accuracy, MACs, share of the full net's MACs, latency by batch size.

    With the family's name, what its policies do is said below.
    """
    sizes = [entry.batch for entry in reports[0].latency]
    heading = ["policy", "images", "top-1 %", "top-5 %", "MMACs mean", "MMACs p95", "% of full"]
    heading += [text for size in sizes for text in (f"ms @{size}", f"img/s @{size}")]
    text = align([heading, *(_row(report) for report in reports)])
    text += "\np95: 95 % of the images take at most these MACs; % of full: mean MACs as a share of the whole net's"
    text += "".join(f"\n{line}" for line in _policies(reports, family))
    if reports[0].latency:
        entry = reports[0].latency[0]
        precision = f", {entry.precision}" if entry.precision else ""
        text += f"\nlatency: medians on {entry.device}, {entry.threads} threads{precision}{_spread(reports)}"
    text += "".join(f"\n{line}" for line in _conditions(reports))
    if reports[0].unreadable:
        text += f"\nunreadable images, left out: {', '.join(reports[0].unreadable[:10])}"
    return text


def _policies(reports: Sequence[Report], family: str | None) -> Iterator[str]:
    """What the policies do: a line for the first of those that differ in a number alone."""
    from pipeline import family as families

    said = set[str]()
    for report in reports if family else ():
        text = families.described(str(family), report)
        form = re.sub(r"\d[\d.,]*", "", text)
        if form not in said:
            said.add(form)
            yield f"{report.policy}: {text}"


def _conditions(reports: Sequence[Report]) -> Iterator[str]:
    """The precision of the figures, and on which images the checkpoint was chosen."""
    first = reports[0]
    if first.precision:
        yield f"precision: {first.precision}"
    if first.choice:
        yield f"checkpoint: {first.choice}" + (f" ({first.policy})" if first.last_top1 is not None else "")


def _spread(reports: Sequence[Report]) -> str:
    """How far the 95th percentile of the passes is above the median, at worst, and whether the machine was busy."""
    entries = [entry for report in reports for entry in report.latency]
    worst = max(entry.p95_ms / entry.median_ms for entry in entries)
    waited = max(entry.waited_share for entry in entries)
    text = f"; p95 up to {worst:.1f} x the median"
    if waited > MOST_WAITED_SHARE:
        return f"{text}: a busy machine (threads waited {waited:.0%} of the time for a core), measure again"
    return text + (": a busy machine, measure again" if worst > 2 else "")


def _row(report: Report) -> list[str]:
    top5 = "-" if report.top5 is None else f"{100 * report.top5:.2f}"
    row = [report.policy, f"{report.num_images:,}", f"{100 * report.top1:.2f}", top5]
    row += [f"{report.macs_mean / 1e6:.3f}", f"{report.macs_p95 / 1e6:.3f}", f"{100 * report.relative_macs:.1f}"]
    for entry in report.latency:
        row += [f"{entry.median_ms:.2f}", f"{entry.images_per_s:.0f}"]
    return row


def of_spread(spread: Spread, factor: float, digits: int) -> list[str]:
    """Mean, standard deviation and the interval's bounds as cells, times `factor`; "-" where one seed has none."""
    values = (spread.mean, spread.sd, spread.low, spread.high)
    return ["-" if value is None else f"{factor * value:.{digits}f}" for value in values]


def of_attack(clean: Sequence[Report], attacked: Sequence[Report]) -> str:
    """Policies of both evaluations: accuracy and MACs, clean beside attacked, then the mean facts that changed."""
    before = {report.policy: report for report in clean}
    pairs = [(before[report.policy], report) for report in attacked if report.policy in before]
    rows = [["policy", "top-1 % clean", "attacked", "MMACs clean", "attacked"]]
    lines: list[str] = []
    for was, now in pairs:
        accuracy = [f"{100 * report.top1:.2f}" for report in (was, now)]
        rows.append([now.policy, *accuracy, *(f"{report.macs_mean / 1e6:.3f}" for report in (was, now))])
        for name in (name for name in now.facts if was.facts.get(name, now.facts[name]) != now.facts[name]):
            lines += [f"{now.policy}: {name}", f"  clean     {_numbers(was.facts[name])}"]
            lines += [f"  attacked  {_numbers(now.facts[name])}"]
    return "\n".join([align(rows), *lines])


def of_facts(report: Report, classes: Sequence[str]) -> str:
    """A family's facts under one policy: the mean of each value over all images, then over each class."""
    lines: list[str] = []
    for name, values in report.facts.items():
        lines.append(f"{report.policy}: {name}, mean over all images, then by class")
        lines.append(f"  {'all':<24} {_numbers(values)}")
        for label, row in zip(classes, report.facts_by_class[name], strict=False):
            if row is not None:
                lines.append(f"  {label[:24]:<24} {_numbers(row)}")
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    shown = " ".join(f"{value:.2f}" for value in values[:MOST_FACTS])
    return shown + (" ..." if len(values) > MOST_FACTS else "")


def of_pairs(pairs: Mapping[str, object]) -> str:
    """Names and values, one pair on each line."""
    width = max(map(len, pairs))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs.items())
