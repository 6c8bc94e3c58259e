"""YAML and dotted overrides into frozen pydantic models; an unknown key is refused by name with the nearest known one.

A mapping is validated as JSON in strict mode: a number is not a string, `true` is not 1, a list may be a tuple.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError
from pydantic import BeforeValidator as Before

from pipeline.errors import ConfigError, JsonValue

M = TypeVar("M", bound=BaseModel)


class Config(BaseModel):
    """A frozen section of a recipe; unknown keys are errors. Validators raise ValueError with the rule in words."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Duration(BaseModel):
    """A span of training: "500 steps", "2 epochs" or "10 minutes"."""

    model_config = ConfigDict(frozen=True)
    value: float
    unit: Literal["steps", "epochs", "minutes"]

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"


def _parse_duration(value: Any) -> Any:
    if isinstance(value, Duration | Mapping):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(step|epoch|minute)s?\s*", str(value))
    if not match or float(match[1]) <= 0:
        raise ValueError('a duration is "N steps", "N epochs" or "N minutes" with N > 0')
    return Duration(value=float(match[1]), unit=match[2] + "s")  # type: ignore[arg-type]


Span = Annotated[Duration, Before(_parse_duration), PlainSerializer(str, return_type=str)]  # a Duration in a config


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a float (YAML 1.2's rule; PyYAML wants 3.0e-4), and a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


_FLOAT_WITH_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(*_FLOAT_WITH_EXPONENT)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError naming `where`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}", key="yaml", subject=where) from None


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """`mapping` as YAML text that `parse_yaml` reads back equal."""
    text: str = yaml.dump(json.loads(json.dumps(mapping)), Dumper=_Dumper, sort_keys=False, width=120)
    return text


class _Dumper(yaml.SafeDumper):
    """Short lists of numbers stay on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = all(not isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


_Dumper.add_implicit_resolver(*_FLOAT_WITH_EXPONENT)  # so that the text "3e-4" is quoted


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if it cannot be read or is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, this is {type(value).__name__}")
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` laid on top, mappings merged key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=c` as a nested mapping; c is YAML. Raises ConfigError if it has no `=` or an empty key."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {text!r}: write it as section.key=value, e.g. training.epochs=3")
    nested: Any = parse_yaml(value, f"override {text!r}")
    for key in reversed(keys):
        nested = {key: nested}
    assert isinstance(nested, dict)
    return nested


def interpolate(value: Any, known: Mapping[str, str | None]) -> Any:
    """`${name}` in every string of `value` replaced from `known`. Raises ConfigError for a name unknown or None."""
    if isinstance(value, dict):
        return {key: interpolate(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, known) for item in value]
    return re.sub(r"\$\{([^}]*)\}", lambda m: _lookup(m[1], known), value) if isinstance(value, str) else value


def _lookup(name: str, known: Mapping[str, str | None]) -> str:
    if name not in known:
        raise ConfigError(f"${{{name}}}: nothing of that name can be filled in; known: {', '.join(known)}")
    value = known[name]
    if value is None:
        raise ConfigError(
            f"${{{name}}} has no value here: set the environment variable ADAPTNET_DATA to the folder of your data "
            "sets, or give the key itself, e.g. data.root=/path/to/set"
        )
    return value


def validate(model: type[M], mapping: Mapping[str, Any], where: str) -> M:
    """`mapping` as a frozen `model`. Raises ConfigError with every fault: dotted key, value, rule, nearest key."""
    try:
        text = json.dumps(mapping)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}", key=where) from None
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        found = _telling(mapping, error)
        faults = dict.fromkeys(_fault(model, mapping, fault) for fault in found)
        keys = tuple(dict.fromkeys(".".join(_follow(mapping, fault["loc"])[0]) for fault in found))
        value = _follow(mapping, found[0]["loc"])[1] if found else None
        raise ConfigError(
            "\n".join([f"{where}:", *(f"  {line}" for line in faults)]), keys=keys, subject=value
        ) from None


def _telling(mapping: Mapping[str, Any], error: ValidationError) -> list[dict[str, Any]]:
    """Its faults, without those that say only that a value is not of a union's other type."""
    faults = [(tuple(_follow(mapping, fault["loc"])[0]), dict(fault)) for fault in error.errors(include_url=False)]
    ruled = {key for key, fault in faults if not str(fault["type"]).endswith("_type")}
    return [fault for key, fault in faults if key not in ruled or not str(fault["type"]).endswith("_type")]


def _fault(model: type[BaseModel], mapping: Mapping[str, Any], fault: dict[str, Any]) -> str:
    path, found = _follow(mapping, fault["loc"])
    key = ".".join(path) or "(the whole)"
    if fault["type"] == "extra_forbidden":
        known = sorted(_keys_at(model, path[:-1]))
        close = get_close_matches(path[-1], known, 1)
        nested = [f"{name}.{path[-1]}" for name in known if path[-1] in _keys_at(model, [*path[:-1], name])]
        close = close or nested[:1]
        hint = f"; did you mean {'.'.join([*path[:-1], close[0]])}?" if close else ""
        return f"{key}: no such key; known: {', '.join(known)}{hint}"
    if fault["type"] == "missing":
        return f"{key}: this key must be given"
    rule = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{key}: {rule}" if isinstance(found, dict) else f"{key} (={json.dumps(found)}): {rule}"


def _follow(mapping: Any, loc: Sequence[str | int]) -> tuple[list[str], Any]:
    """The part of pydantic's `loc` that names keys of the mapping (unions add their branches), and the value there."""
    path: list[str] = []
    for position, part in enumerate(loc):
        if isinstance(mapping, dict) and isinstance(part, str):
            if part not in mapping and position < len(loc) - 1:
                continue
            path.append(part)
            mapping = mapping.get(part)
        elif isinstance(mapping, list) and isinstance(part, int) and part < len(mapping):
            path.append(str(part))
            mapping = mapping[part]
    return path, mapping


def _keys_at(model: type[BaseModel], path: Sequence[str]) -> set[str]:
    models: list[type[BaseModel]] = [model]
    for part in path:
        models = [
            inner
            for outer in models
            if part in outer.model_fields
            for inner in _models_in(outer.model_fields[part].annotation)
        ] or models
    return {key for each in models for key in each.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple, dict):
        for inner in get_args(annotation):
            yield from _models_in(inner)


def section(recipe: Mapping[str, Any], name: str) -> dict[str, JsonValue]:
    """The section `name` of a stored recipe; empty if the recipe has none."""
    found = recipe.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def as_mapping(config: BaseModel) -> dict[str, Any]:
    """`config` as plain values, as they would stand in YAML."""
    mapping: dict[str, Any] = config.model_dump(mode="json")
    return mapping


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    pairs: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        pairs.update(flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return pairs


def fingerprint(mapping: Mapping[str, Any]) -> str:
    """16 hex digits that are equal for equal mappings."""
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:16]
