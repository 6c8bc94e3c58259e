"""The label of an image in a shard, from the text beside it: KEY.cls, KEY.json or KEY.txt.

A text is an integer from 0 or the name of a class. What is neither is refused with the text, never guessed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.class_names import CLASSES
from pipeline.data.naming import shown
from pipeline.errors import DataError, JsonValue

SIDECARS = (".cls", ".json", ".txt")  # in the order in which they are asked
MOST_BYTES = 1 << 16  # of a sidecar; a label is shorter
_KEYS = (  # of a JSON object; the first that it has is the label
    *("label", "cls", "class", "class_id", "class_index", "class_idx", "label_id", "target"),
    *("class_name", "label_name", "category", "synset", "wnid"),
)
_INTEGER = re.compile(r"([+-]?\d{1,9})(\.0{1,9})?")
_SHOWN = 40  # characters of a text in a reason
NO_LABEL = "wrong label: its JSON has none"


class LabelReader:
    """Turns the texts beside images into labels of `classes`."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._position = {name: label for label, name in enumerate(classes)}
        self._known: dict[bytes, int | str] = {}

    def read(self, content: bytes) -> int | str:
        """The integer in a text, which may be beyond the classes, or the reason why there is none."""
        if len(content) > _SHOWN:
            return self._parsed(content)
        if content not in self._known:
            self._known[content] = self._parsed(content)
        return self._known[content]

    def _parsed(self, content: bytes) -> int | str:
        text = _text(content)
        if text is None:
            return f"wrong label: {content[:_SHOWN]!r} is no text"
        if not text.startswith(("{", "[", '"')):
            return self._of_text(text)
        try:
            return self._of_json(json.loads(text))
        except (ValueError, RecursionError):
            return self._of_text(text)

    def _of_text(self, text: str) -> int | str:
        if text in self._position and not text.isdecimal():
            return self._position[text]
        number = _INTEGER.fullmatch(text)
        return int(number[1]) if number else f"wrong label: {text[:_SHOWN]!r} is neither an integer nor a class"

    def _of_json(self, value: JsonValue) -> int | str:
        if isinstance(value, dict):
            key = next((key for key in _KEYS if value.get(key) is not None), None)
            return NO_LABEL if key is None else self._of_json(value[key])
        if isinstance(value, list) and len(value) == 1:
            return self._of_json(value[0])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        return self._of_text(value.strip()) if isinstance(value, str) else f"wrong label: {str(value)[:_SHOWN]!r}"


def _text(content: bytes) -> str | None:
    """The text in a sidecar without blanks, zero bytes or a byte order mark around it; None if it is no UTF-8."""
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8").strip("\0 \t\r\n")
    except UnicodeDecodeError:
        return None


def check_from_zero(root: Path, split: str | None, counts: Mapping[int, int], classes: Sequence[str]) -> None:
    """Raises DataError if the labels of a split count from 1: none is 0, and most that are too large are the number of
    classes. counts: how many images have each label."""
    beyond = sum(count for label, count in counts.items() if not 0 <= label < len(classes))
    next_one = counts.get(len(classes), 0)
    part = f" of {split}" if split else ""
    if not counts.get(0) and next_one > beyond - next_one:
        raise DataError(
            f"{root}: the labels{part} count from 1: none is 0 (class {shown(classes[0])}), and {next_one:,} are "
            f"{len(classes)}, although the last class is {len(classes) - 1}. A label is a 0-based line of {CLASSES}: "
            f"subtract 1 from each label, or write a first line into {CLASSES} for a class 0 that has no images",
            key=CLASSES,
            subject=len(classes),
        )
