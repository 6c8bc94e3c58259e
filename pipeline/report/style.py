"""The look of the report's drawings: colours, sizes, and the canvas that they are drawn on.

One unit of a drawing is one CSS pixel at its natural size. INK and PALETTE are placeholders: the SVG replaces them by
currentColor and CSS variables, so that the page's theme decides.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.report import cells

INK = "#1b1b1f"
# The colour-blind safe palette of Okabe and Ito (jfly.uni-koeln.de/color), without yellow and black, which is the ink
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "D", "^", "v", "P", "X", "<", ">", "p", "*", "h", "8")
DASHES: tuple[Literal["-"] | tuple[float, tuple[float, ...]], ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
)
SMALL, GREY = 4.5, 0.45  # size in px and opacity of background marks, which are grey in any theme
FAINT = 0.6  # opacity of a faded point's label
NEUTRAL_MARKER = "s"  # marker of a neutral series, which is drawn in ink
COLOURS_OF_VALUES = "viridis"  # from dark blue to light yellow, with rising lightness
WIDTH, HEIGHT = 640, 400  # px of a figure; the size of a heat map depends on its cells
NARROW = 330  # px of a figure on a phone
FONT = 13  # px; what is drawn in one width only scrolls sideways before the page scales this below 11
LETTER = 0.58 * FONT  # px, mean width of a letter
KEY = 60  # px of a legend's entry besides its name
LINE = 22  # px, height of a legend's line
MOST_MARKED = 40  # points of a joined series with markers
MOST_SPOTS = 2000  # points of a figure that show their numbers under the pointer
LABEL_CHARS = 30
MARKER = 8  # px
PNG_DPI = 144
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "legend.frameon": False,
    "legend.fontsize": FONT,
    "font.size": FONT,
    "font.family": "DejaVu Sans",
    "axes.titlesize": FONT,
    "svg.fonttype": "none",
    "svg.hashsalt": "adaptnet",
    "lines.markersize": MARKER,
    "lines.linewidth": 1.8,
}
Look: TypeAlias = dict[str, Any]  # keyword arguments of Matplotlib


@contextmanager
def style() -> Iterator[None]:
    """Applies the look within the block."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page uses the browser's fonts
        yield


def new_canvas(width: float, height: float, legend: float = 0.0) -> Canvas:
    """A canvas of width x (height + legend) px, with the legend's part at the bottom."""
    figure = Canvas(figsize=(width / 72, (height + legend) / 72), dpi=72)
    share = legend / (height + legend)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, share, 1, 1 - share)))
    return figure


def short(text: str, most: int = LABEL_CHARS) -> str:
    """The text with at most so many characters, as a page can hold them."""
    text = cells.text(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def png(figure: Canvas) -> bytes:
    """The drawing as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=PNG_DPI, facecolor="white")
    return file.getvalue()
