"""What of a trained net may leave this machine: its recipe and facts without the places of files here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from pipeline import config as configs
from pipeline.errors import JsonValue

OF_THE_MACHINE = ("compute", "logging", "tracking")  # sections of a recipe that change nothing that is learned
PLACES = {"data": ("index",), "checkpoint": ("storage",)}  # keys that only say where this machine keeps files
SOURCES = {"data": ("root",), "training": ("start_from",)}  # keys of files or folders, whose last part is a name
NAMED = ("models:", "zoo:", "torchvision:")  # sources that have the same name on every machine
LOCAL = re.compile(r"(?:~?/|[A-Za-z]:[\\/]|[A-Za-z][\w+.-]*:/).*", re.DOTALL)  # an absolute path, or a URI of a place


def recipe(stored: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The recipe without the sections and keys of this machine; of a path only its last part remains."""
    kept = {key: value for key, value in stored.items() if key not in OF_THE_MACHINE}
    for section, keys in PLACES.items():
        if section in kept:
            kept[section] = {key: value for key, value in configs.section(kept, section).items() if key not in keys}
    for section, keys in SOURCES.items():
        if section in kept:
            kept[section] = _with_names(configs.section(kept, section), keys)
    training = configs.section(kept, "training")
    if isinstance(teacher := training.get("teacher"), dict):
        kept["training"] = {**training, "teacher": _with_names(teacher, ("source",))}
    return {key: without_places(value) for key, value in kept.items()}


def _with_names(section: Mapping[str, JsonValue], keys: tuple[str, ...]) -> dict[str, JsonValue]:
    found = {key: name_of(value) for key in keys if isinstance(value := section.get(key), str)}
    return {**section, **found}


def without_places(value: JsonValue) -> JsonValue:
    """The value with each text in it that is an absolute path, or a URI of a place, as its last part."""
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return name_of(value) if isinstance(value, str) and LOCAL.fullmatch(value) else value


def name_of(source: str) -> str:
    """The last part of a path; a source that has the same name on every machine stays."""
    return source if source.startswith(NAMED) else PurePath(source.replace("\\", "/")).name or "unknown"
