"""Turns a Matplotlib drawing into SVG for a page: ids of its own, the theme's colours, and spots that show numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from matplotlib.figure import Figure as Canvas

from pipeline.report.style import INK, PALETTE

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
Box = tuple[float, float, float, float]  # x, y, width, height in px from the top left


@dataclass(frozen=True)
class Spot:
    """A box that shows `text` under the pointer, or (`key`) a legend's entry that isolates its group."""

    box: Box
    text: str
    group: str = ""
    series: int = 0
    key: bool = False


@dataclass
class Drawing:
    """A canvas of 72 units an inch, the groups of its series, and its spots."""

    canvas: Canvas
    groups: Sequence[str] = ()  # group of each series
    spots: list[Spot] = field(default_factory=list)


def svg(name: str, drawing: Drawing) -> str:
    """The drawing as an SVG element. `name` begins each id, so that one page can hold several drawings."""
    file = io.StringIO()
    drawing.canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(_themed(file.getvalue()))
    _rename(root, name)
    for unwanted in [child for child in root if child.tag == f"{{{SVG}}}metadata"]:
        root.remove(unwanted)
    _mark(root, name, drawing.groups)
    _add_spots(root, drawing.spots)
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    root.attrib |= {"class": "drawing", "width": f"{width:g}", "height": f"{height:g}"}
    root.attrib["style"] = f"--width: {width:g}px"
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(text: str) -> str:
    """Replaces the placeholder colours by those of the page's theme."""
    text = text.replace(INK, "currentColor")
    for number, colour in enumerate(PALETTE):
        text = text.replace(colour, f"var(--c{number}, {colour})")
    return text


def _rename(root: ElementTree.Element, name: str) -> None:
    """Puts the figure's name before each id and each reference to one."""
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.attrib[key] = f"{name}-{value}"
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.attrib[key] = f"#{name}-{value[1:]}"
            else:
                element.attrib[key] = re.sub(r"url\(#", f"url(#{name}-", value)


def _mark(root: ElementTree.Element, name: str, groups: Sequence[str]) -> None:
    """Adds its group to each series' marks, line and entry in the legend; adds a class to a heat map's cells."""
    for element in root.iter():
        match = re.fullmatch(rf"{re.escape(name)}-(series|key)-(\d+)(-\w+)?", element.attrib.get("id", ""))
        if match and int(match[2]) < len(groups) and groups[int(match[2])]:
            element.attrib["data-group"] = groups[int(match[2])]
        if element.attrib.get("id") == f"{name}-cells":
            element.attrib["class"] = "cells"


def _add_spots(root: ElementTree.Element, spots: Sequence[Spot]) -> None:
    layer = ElementTree.SubElement(root, f"{{{SVG}}}g", {"class": "spots"})
    for spot in spots:
        x, y, width, height = (f"{side:.1f}" for side in spot.box)
        look = {"x": x, "y": y, "width": width, "height": height, "rx": "3"}
        if spot.key and not spot.group:
            continue
        about = {"data-group": spot.group} if spot.group else {}
        if spot.key:
            title = f"{spot.text}: show only {spot.group}"
            about |= {"class": "key", "role": "button", "tabindex": "0", "aria-pressed": "false", "aria-label": title}
        else:
            about |= {"class": "spot", "data-text": spot.text}
        ElementTree.SubElement(layer, f"{{{SVG}}}rect", look | about)
