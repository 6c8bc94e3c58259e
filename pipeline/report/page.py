"""The page: one HTML file with its style, script, drawings and images inside, which loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files

from pipeline.figures import Bars, Figure, Gallery, HeatMap, Lines, Table
from pipeline.report import cells
from pipeline.report.cells import Sheet
from pipeline.report.draw import picture
from pipeline.report.thumbnails import Thumbnail

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Shown:
    """A figure with the content of its files and of its place on the page; `images` {row: image} of a gallery."""

    figure: Figure
    sheet: Sheet
    svg: str = ""
    narrow: str = ""  # the drawing for a phone, if it has its own
    png: bytes = b""
    images: Mapping[int, Thumbnail] | None = None


@dataclass(frozen=True)
class Section:
    """A heading and the figures under it."""

    name: str
    title: str
    figures: Sequence[Figure]


def drawn(figure: Figure, images: Mapping[int, Thumbnail], contact: bytes = b"") -> Shown:
    """The figure with its numbers and, if it has one, its picture; `contact` is a gallery's as PNG."""
    sheet = cells.sheet(figure, {row: image.file for row, image in images.items()})
    if isinstance(figure, Lines | Bars | HeatMap):
        drawing = picture(figure)
        return Shown(figure, sheet, drawing.svg, drawing.narrow, drawing.png)
    return Shown(figure, sheet, png=contact, images=images if isinstance(figure, Gallery) else None)


def page(title: str, facts: Sequence[str], sections: Sequence[tuple[Section, Sequence[Shown]]], footer: str) -> str:
    """The whole page, with every text escaped."""
    head = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_html(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<style>\n{_part('page.css')}</style>\n</head>\n<body>\n"
    )
    lead = "".join(f"<p>{_html(fact)}</p>\n" for fact in facts)
    body = "".join(_section(section, figures) for section, figures in sections)
    return (
        f"{head}<header>\n<h1>{_html(title)}</h1>\n{lead}</header>\n{_contents(sections)}<main>\n{body}</main>\n"
        f'<footer><p>{_html(footer)}</p></footer>\n<div id="tip" role="status" hidden></div>\n'
        f"<script>\n{_part('page.js')}</script>\n</body>\n</html>\n"
    )


@cache
def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _html(text: str) -> str:
    return escape(cells.text(text))


def _contents(sections: Sequence[tuple[Section, Sequence[Shown]]]) -> str:
    items = []
    for section, figures in sections:
        inner = "".join(f"<li>{_link(shown.figure.name, shown.figure.title)}</li>" for shown in figures)
        items.append(f"<li>{_link(section.name, section.title)}\n<ul>{inner}</ul></li>\n")
    return f'<nav aria-label="Contents">\n<h2>Contents</h2>\n<ol>\n{"".join(items)}</ol>\n</nav>\n'


def _link(name: str, title: str) -> str:
    return f'<a href="#{_html(name)}">{_html(title)}</a>'


def _section(section: Section, figures: Sequence[Shown]) -> str:
    inner = "".join(map(_figure, figures))
    return f'<section id="{_html(section.name)}">\n<h2>{_html(section.title)}</h2>\n{inner}</section>\n'


def _figure(shown: Shown) -> str:
    figure = shown.figure
    name, table = _html(figure.name), _table(shown.sheet)
    caption = f"<figcaption>{_html(figure.caption)}</figcaption>\n" if figure.caption else ""
    side = ' class="beside"' if isinstance(figure, Lines | Bars) else ""  # caption beside the drawing on wide screens
    opening = f'<figure id="{name}"{side}>\n<h3>{_html(figure.title)}</h3>\n'
    if isinstance(figure, Table):
        return f"{opening}{_box(figure.title, table)}{caption}</figure>\n"
    seen = _gallery(figure, shown.images or {}) if isinstance(figure, Gallery) else _box(figure.title, _drawing(shown))
    numbers = _box(f"Numbers of: {figure.title}", table)
    details = f"<details>\n<summary>Numbers (figures/{name}.csv)</summary>\n{numbers}</details>\n"
    return f"{opening}{seen}{caption}{details}</figure>\n"


def _drawing(shown: Shown) -> str:
    """The drawing, or those for two widths of which the page shows one."""
    if not shown.narrow:
        return shown.svg
    return f'<div class="wide">{shown.svg}</div>\n<div class="narrow">{shown.narrow}</div>'


def _box(title: str, inner: str) -> str:
    """A box that scrolls sideways if its content is wider than the screen."""
    return f'<div class="box" tabindex="0" role="region" aria-label="{_html(title)}">\n{inner}</div>\n'


def _table(sheet: Sheet) -> str:
    numeric = [_numeric([row[place] for row in sheet.rows]) for place in range(len(sheet.columns))]
    head = "".join(f'<th scope="col"{_kind(n)}>{escape(c)}</th>' for c, n in zip(sheet.columns, numeric, strict=True))
    lines = []
    for row in sheet.rows:
        parts = []
        for place, (text, is_number) in enumerate(zip(row, numeric, strict=True)):
            tag = 'th scope="row"' if place < sheet.num_heads else "td"
            parts.append(f"<{tag}{_kind(is_number)}>{escape(text)}</{tag[:2]}>")
        lines.append(f"<tr>{''.join(parts)}</tr>\n")
    return (
        f'<table data-heads="{sheet.num_heads}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n'
        "</table>\n"
    )


def _numeric(column: Sequence[str]) -> bool:
    filled = [text for text in column if text]
    return bool(filled) and all(text.lstrip("-").replace(".", "", 1).replace("e-", "", 1).isdigit() for text in filled)


def _kind(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _gallery(figure: Gallery, images: Mapping[int, Thumbnail]) -> str:
    parts = []
    for heading, group in figure.groups.items():
        inner = "".join(_item(images.get(row), row, text) for row, text in group)
        parts.append(f'<h4>{_html(heading)}</h4>\n<ul class="gallery">\n{inner}</ul>\n')
    return "".join(parts)


def _item(thumbnail: Thumbnail | None, row: int, text: str) -> str:
    if thumbnail is not None and thumbnail.jpeg:
        name, file = _html(f"{thumbnail.file}: {text}"), _html(thumbnail.file)
        return f'<li><img src="{thumbnail.uri}" alt="{name}" title="{file}"><span>{_html(text)}</span></li>\n'
    name = thumbnail.file if thumbnail else f"row {row}"
    return f'<li><span class="absent">{_html(name)}</span><span>{_html(text)}</span></li>\n'
