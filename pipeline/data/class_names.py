r"""Reads and writes classes.txt: one class per line, in the order of the labels.

A name that a line cannot hold as it is (a line break, a blank at its end, a leading quotation mark) is written as a
JSON string: "line\nbreak". Bytes that are not UTF-8 pass unchanged.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.naming import shown
from pipeline.errors import DataError, JsonValue

CLASSES = "classes.txt"
JSONS = ("classes.json", "class_names.json", "class_to_idx.json", "idx_to_class.json", "label_names.json")
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_classes(root: Path) -> tuple[str, ...]:
    """The classes in classes.txt; empty without the file.

    Raises DataError if it cannot be read, is empty, has an empty line between others, or contains a class twice.
    """
    path = root / CLASSES
    if not path.exists():
        return ()
    lines = _decoded(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    classes = tuple(_name(line) for line in lines)
    blank = next((number for number, name in enumerate(classes, 1) if not name), None)
    twice = sorted({name for name in classes if classes.count(name) > 1}) if len(set(classes)) < len(classes) else []
    if not classes:
        raise _fault(path, "empty", path)
    if blank is not None:
        raise _fault(path, f"line {blank} is empty, so the labels after it are in doubt", f"line {blank}")
    if twice:
        listed = ", ".join(map(shown, twice[:5]))
        raise _fault(path, f"contains twice: {listed}", listed)
    return classes


def write_classes(root: Path, classes: Sequence[str]) -> None:
    """Writes classes.txt, from which `read_classes` gives the same names."""
    (root / CLASSES).write_bytes(os.fsencode("".join(f"{_line(name)}\n" for name in classes)))


def read_classes_json(root: Path) -> tuple[str, ...]:
    """The classes in one of the files JSONS: a list, {class: label} or {label: class}; empty without one.

    Raises DataError if the file holds something else, or two files hold different classes.
    """
    read = {path: _from_json(path) for path in (root / name for name in JSONS) if path.is_file()}
    if len(set(read.values())) > 1:
        listed = ", ".join(path.name for path in read)
        raise DataError(f"{root}: {listed} name different classes; keep one", key=CLASSES, subject=listed)
    return next(iter(read.values()), ())


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
        text = content.decode(encoding) if encoding else os.fsdecode(content)
    except OSError as error:
        raise _fault(path, f"cannot be read ({error.strerror})", path) from None
    except UnicodeError as error:
        raise _fault(path, f"begins like {encoding}, but is not ({error})", path) from None
    if "\0" in text:
        raise _fault(path, "contains zero bytes, as UTF-16 does; save it as UTF-8", path)
    return text


def _name(line: str) -> str:
    line = line.strip()
    if line.startswith('"') and line.endswith('"') and len(line) > 1:
        try:
            name: str = json.loads(line)
        except ValueError:
            return line
        return name
    return line


def _line(name: str) -> str:
    plain = name and name == name.strip() and not name.startswith(('"', "\ufeff")) and "\n" not in name
    return name if plain and "\0" not in name else json.dumps(name, ensure_ascii=False).replace("\ufeff", "\\ufeff")


def _from_json(path: Path) -> tuple[str, ...]:
    try:
        stored: JsonValue = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _fault(path, f"cannot be read ({error})", path) from None
    labels = _labels(stored)
    if not labels or sorted(labels.values()) != list(range(len(labels))):
        raise _fault(path, "is no list of classes, nor {class: label} or {label: class} with labels from 0", path)
    return tuple(sorted(labels, key=lambda name: labels[name]))


def _labels(stored: JsonValue) -> dict[str, int]:
    """{class: label} of what a JSON file holds; empty if it is neither a list nor a mapping of classes."""
    if isinstance(stored, list):
        stored = {str(number): name for number, name in enumerate(stored)}
    if not isinstance(stored, dict):
        return {}
    if all(type(label) is int for label in stored.values()):
        return {name: label for name, label in stored.items() if isinstance(label, int)}
    names = {number: name for number, name in stored.items() if isinstance(name, str) and number.isdecimal()}
    return {name: int(number) for number, name in names.items()} if len(names) == len(stored) else {}


def _fault(path: Path, fault: str, subject: object) -> DataError:
    return DataError(f"{path}: {fault}; write one class per line", key=path.name, subject=subject)
