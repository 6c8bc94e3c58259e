"""A gallery as one PNG: the images in rows under each heading."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from textwrap import wrap

from matplotlib.axes import Axes

from pipeline.figures import Gallery
from pipeline.report import cells
from pipeline.report.style import new_canvas, png, short, style
from pipeline.report.thumbnails import Thumbnail

ACROSS = 8  # images in a row, at most
COLUMN, ROW = 112, 152  # px
HEADING = 0.25  # height of a heading, in rows


def contact_sheet(figure: Gallery, images: Mapping[int, Thumbnail]) -> bytes:
    """The gallery as PNG; an image that is not available is replaced by its file name."""
    across = max(1, min(ACROSS, max((len(group) for group in figure.groups.values()), default=1)))
    heights = [h for group in figure.groups.values() for h in (HEADING, *[1.0] * ceil(len(group) / across))] or [1.0]
    with style():
        sheet = new_canvas(max(320, across * COLUMN), sum(heights) * ROW)
        grid = sheet.add_gridspec(len(heights), across, height_ratios=heights)
        line = 0
        for heading, group in figure.groups.items():
            axes = sheet.add_subplot(grid[line, :])
            axes.axis("off")
            axes.text(0, 0, cells.text(heading), fontweight="bold")
            for number, (row, text) in enumerate(group):
                place = grid[line + 1 + number // across, number % across]
                _image(sheet.add_subplot(place), images.get(row), row, text)
            line += 1 + ceil(len(group) / across)
        return png(sheet)


def _image(axes: Axes, thumbnail: Thumbnail | None, row: int, text: str) -> None:
    axes.axis("off")
    axes.set_title("\n".join(wrap(short(text, 64), 18)[:4]), fontsize=10)
    if thumbnail is not None and thumbnail.jpeg:
        axes.imshow(thumbnail.pixels())
    else:
        axes.text(0.5, 0.5, short(thumbnail.file if thumbnail else f"row {row}", 14), ha="center", fontsize=9)
