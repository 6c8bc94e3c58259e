"""Turns YAML and dotted overrides into frozen pydantic models; refuses unknown keys, and keys that change nothing.

A mapping is validated as JSON in strict mode: a number is not a string, `true` is not 1, a list may be a tuple.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import pkgutil
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    ValidationInfo,
)
from pydantic import BeforeValidator as Before
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, to_jsonable_python

from pipeline.compat.yaml import MAX_DEPTH
from pipeline.compat.yaml import dump_yaml as dump_yaml
from pipeline.compat.yaml import parse_yaml as parse_yaml
from pipeline.compat.yaml import split_flow as split_flow
from pipeline.errors import ConfigError, JsonValue

LONGEST = 1_000_000_000  # a duration's number
RULE = "rule"  # the type of pydantic's error that `fault` makes
MAX_HINT_DEPTH = 3  # sections below one in which the key of a slip is looked for
MAX_SHOWN = 200  # characters of a value in a message
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Positive = Annotated[float, Field(gt=0, le=1e6)]  # upper bounds keep a slip from hanging the build of a net or a run
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Side = Annotated[int, Field(ge=1, le=8192)]  # px
STORED = "stored"  # in a validation's context: the values were in use before, so that they are not questioned


class Config(BaseModel):
    """A frozen section of a recipe; unknown keys are errors. Validators raise ValueError with the rule as text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def inert(cls, values: Mapping[str, JsonValue]) -> Mapping[str, str]:
        """The keys that change nothing under these values, each with the reason, e.g. "shuffle is not block".

        values: the section as in a recipe, with the defaults of the keys that it leaves out; nothing is validated yet.
        `validate` refuses such a key whatever its value, `as_mapping` leaves it out, and `live` drops it from a stored
        recipe. A key is dotted if it belongs to a nested section.
        """
        return {}


def is_stored(info: ValidationInfo) -> bool:
    """Whether a validation is of a recipe that this or an older version stored."""
    return bool((info.context or {}).get(STORED))


def meant(rule: Callable[[T], str | None]) -> AfterValidator:
    """For annotations: refuses a valid value that cannot be meant, with the reason that `rule` returns.

    Values of stored recipes are accepted.
    """

    def check(value: T, info: ValidationInfo) -> T:
        reason = None if is_stored(info) else rule(value)
        if reason is not None:
            raise ValueError(reason)
        return value

    return AfterValidator(check)


def each_once(values: tuple[object, ...]) -> str | None:
    """A rule for `meant`: no value occurs twice."""
    return None if len(set(values)) == len(values) else "each may occur once"


def fault(key: str, reason: str) -> PydanticCustomError:
    """An error about one key of a section, dotted below it, for validators of the whole section."""
    return PydanticCustomError(RULE, "{reason}", {"reason": reason, "key": key})


def _a_path(path: Path) -> str | None:
    text = str(path)
    if "\0" in text or len(text) > 4096 or any(len(part.encode(errors="replace")) > 255 for part in path.parts):
        return "no path can have such a name: a part has at most 255 bytes, the whole 4,096"
    return None


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("a path must not be empty")
    return value


FilePath = Annotated[Path, Before(_not_empty), meant(_a_path)]


class Duration(BaseModel):
    """A span of training: "500 steps", "2 epochs" or "10 minutes"."""

    model_config = ConfigDict(frozen=True)
    value: float
    unit: Literal["steps", "epochs", "minutes"]

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"


def _parse_duration(value: object) -> Any:
    if isinstance(value, Duration | Mapping):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(step|epoch|minute)s?\s*", str(value))
    if not match or not 0 < float(match[1]) <= LONGEST or (match[2] == "step" and not float(match[1]).is_integer()):
        raise ValueError(
            f'a duration is "N steps", "N epochs" or "N minutes" with N > 0, at most {LONGEST:,}; steps are whole'
        )
    return Duration(value=float(match[1]), unit=match[2] + "s")  # type: ignore[arg-type]


Span = Annotated[Duration, Before(_parse_duration), PlainSerializer(str, return_type=str)]  # a Duration in a config


def read_mapping(path: Path) -> dict[str, JsonValue]:
    """The mapping in a YAML file. Raises ConfigError if the file cannot be read or has no mapping at its top."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason})", key="file", subject=path) from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        message = f"{path}: the file must hold a mapping of keys, not a {type(value).__name__}"
        raise ConfigError(message, key="file", subject=path)
    return value


def merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, JsonValue]:
    """`base` overridden by `over`: mappings are merged key by key, every other value is replaced."""
    merged = _json(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = (
            merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else cast(JsonValue, value)
        )
    return merged


def _json(mapping: Mapping[str, object]) -> dict[str, JsonValue]:
    """A copy, with values that are known to be those of JSON or YAML."""
    return cast(dict[str, JsonValue], dict(mapping))


def parse_override(text: str) -> dict[str, JsonValue]:
    """`a.b=c` as a nested mapping; c is YAML. Raises ConfigError if it has no `=` or an empty key."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        message = f"override {shortened(text)}: write it as section.key=value, e.g. training.epochs=3"
        raise ConfigError(message, key="override", subject=text)
    if len(keys) > MAX_DEPTH:
        message = f"override {shortened(text)}: a key has at most {MAX_DEPTH} parts"
        raise ConfigError(message, key="override", subject=text)
    nested: object = parse_yaml(value, f"override {shortened(text)}")
    for key in reversed(keys):
        nested = {key: nested}
    assert isinstance(nested, dict)
    return nested


def shortened(value: object) -> str:
    """A value as in JSON, cut to MAX_SHOWN characters, for messages."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text):,} characters)"


def interpolate(mapping: Mapping[str, object], known: Mapping[str, str | None]) -> dict[str, object]:
    """`${name}` in every string of `mapping` replaced from `known`. Raises ConfigError for a name unknown or None."""
    return {key: _interpolated(value, known, key) for key, value in mapping.items()}


def _interpolated(value: object, known: Mapping[str, str | None], place: str) -> object:
    if isinstance(value, dict):
        return {key: _interpolated(each, known, f"{place}.{key}") for key, each in value.items()}
    if isinstance(value, list):
        return [_interpolated(item, known, place) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{([^}]*)\}", lambda m: _lookup(m[1], known, f"{place} (={value})"), value)


def _lookup(name: str, known: Mapping[str, str | None], where: str) -> str:
    if name not in known:
        message = f"{where}: ${{{name}}}: no such variable; known: {', '.join(known)}"
        raise ConfigError(message, key=f"${{{name}}}", subject=name)
    value = known[name]
    if value is None:
        raise ConfigError(
            f"{where}: ${{{name}}} has no value here: set the environment variable ADAPTNET_DATA to the folder of your "
            "data sets, or set this key itself, e.g. data.root=/path/to/set",
            key=f"${{{name}}}",
            subject=name,
        )
    return value


def validate(model: type[M], mapping: Mapping[str, object], where: str, *, stored: bool = False) -> M:
    """`mapping` as a frozen `model`. Raises ConfigError with all faults: dotted key, value, rule, nearest known key.

    stored: the values were in use before, so that those that cannot be meant (see `meant`) are accepted.
    """
    inert = inert_keys(model, mapping)
    try:
        text = json.dumps(without(mapping, inert))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}", key=where) from None
    faults = [_inert_fault(mapping, key, why) for key, why in inert.items()]
    try:
        config = model.model_validate_json(text, strict=True, context={STORED: stored})
    except ValidationError as error:
        faults += [_fault(model, mapping, fault) for fault in _relevant(mapping, error)]
    if faults:
        lines = dict.fromkeys(f"  {fault.line}" for fault in faults)
        keys = tuple(dict.fromkeys(key for fault in faults for key in fault.keys))
        raise ConfigError("\n".join([f"{where}:", *lines]), keys=keys, subject=faults[0].value)
    return config


@dataclass(frozen=True)
class _Fault:
    """keys: dotted, "" for the whole, the first to change first; line: the sentence about it."""

    keys: tuple[str, ...]
    value: object
    line: str


def _inert_fault(mapping: Mapping[str, object], key: str, why: str) -> _Fault:
    value = at(mapping, key)
    return _Fault((key,), value, f"{key} (={shortened(value)}): changes nothing: {why}")


def _relevant(mapping: Mapping[str, object], error: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's faults, without those that only report that a value is not of a union's other type."""
    faults = [(tuple(_place(mapping, dict(fault))[0]), dict(fault)) for fault in error.errors(include_url=False)]
    ruled = {key for key, fault in faults if not str(fault["type"]).endswith("_type")}
    return [fault for key, fault in faults if key not in ruled or not str(fault["type"]).endswith("_type")]


def _fault(model: type[BaseModel], mapping: Mapping[str, object], fault: dict[str, Any]) -> _Fault:
    path, value = _place(mapping, fault)
    if fault["type"] == NO_SUCH_KIND:
        path, value = [*path, "kind"], value["kind"]
    if fault["type"] == RULE:
        path = [*path, *fault["ctx"]["key"].split(".")]
        value = at(mapping, ".".join(path))
    line = _line(model, path, value, fault)
    key, named = ".".join(path), _named(value, fault)
    keys = tuple(f"{key}.{name}" if key else name for name in named)
    shown = None if fault["type"] == SECRET else at(value, named[0]) if named else value
    return _Fault((*keys, key) if key or not keys else keys, shown, line)


def _named(value: object, fault: dict[str, Any]) -> list[str]:
    """The keys of a section that the rule which it breaks names, in that order: "workers (=[3, 2]): ..." names one."""
    if fault["type"] != "value_error" or not isinstance(value, Mapping):
        return []
    words = re.findall(r"[A-Za-z]\w*(?:\.[\w-]+)*", str(fault["msg"]))
    return list(dict.fromkeys(word for word in words if has(value, word)))


def _line(model: type[BaseModel], path: list[str], value: object, fault: dict[str, Any]) -> str:
    key = ".".join(path) or "(the whole)"
    if fault["type"] == "extra_forbidden":
        known = sorted(_keys_at(model, path[:-1]))
        close = get_close_matches(path[-1], known, 1) or _below(model, path[:-1], path[-1])
        hint = f"; did you mean {' or '.join('.'.join([*path[:-1], each]) for each in close)}?" if close else ""
        return f"{key}: no such key; known: {', '.join(known)}{hint}"
    if fault["type"] == "missing":
        return f"{key}: this key is required"
    rule = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if fault["type"] == "string_type" and isinstance(value, bool | int | float):
        rule = f"in YAML this is a {'truth value' if isinstance(value, bool) else 'number'}; quote it to give a text"
    if fault["type"] == "model_type" and path and not isinstance(value, Mapping):
        rule = _a_section(key, _models_at(model, path), value)
    if isinstance(value, dict) or fault["type"] == SECRET:
        return f"{key}: {rule}" if path or not _named(value, fault) else rule
    return f"{key} (={shortened(value)}): {rule}"


def _below(model: type[BaseModel], path: Sequence[str], key: str) -> list[str]:
    """Where `key` is in the sections below `path`, relative to it: at the least depth at which it exists."""
    sections = [[name] for name in sorted(_keys_at(model, path))]
    for _ in range(MAX_HINT_DEPTH):
        found = [".".join([*each, key]) for each in sections if key in _keys_at(model, [*path, *each], inside=True)]
        if found:
            return found[:3]
        sections = [[*each, name] for each in sections for name in sorted(_keys_at(model, [*path, *each], inside=True))]
    return []


def _a_section(key: str, models: Sequence[type[BaseModel]], value: object) -> str:
    """The rule that a section breaks that was given as one value, with a key that it has."""
    kinds = [kind_of(each) for each in models if "kind" in each.model_fields]
    if kinds:
        kind = value if value in kinds else "KIND"
        return f"this is a section of keys; write {key}.kind={kind}; kinds: {', '.join(kinds)}"
    known = sorted({name for each in models for name in each.model_fields})
    return f"this is a section of keys; set one of them, e.g. {key}.{known[0]}=VALUE; known: {', '.join(known)}"


def _place(mapping: Mapping[str, object], fault: dict[str, Any]) -> tuple[list[str], Any]:
    """The key that one of pydantic's faults is about, and its value, None if it is missing."""
    path, value = _follow(mapping, fault["loc"])
    return ([*path, str(fault["loc"][-1])], None) if fault["type"] == "missing" else (path, value)


def _follow(mapping: object, loc: Sequence[str | int]) -> tuple[list[str], Any]:
    """The part of pydantic's `loc` that consists of keys of the mapping (unions add branches), and the value there."""
    path: list[str] = []
    for part in loc:
        if isinstance(mapping, dict) and isinstance(part, str):
            if part not in mapping:
                continue
            path.append(part)
            mapping = mapping[part]
        elif isinstance(mapping, list) and isinstance(part, int) and part < len(mapping):
            path.append(str(part))
            mapping = mapping[part]
    return path, mapping


def _keys_at(model: type[BaseModel], path: Sequence[str], *, inside: bool = False) -> set[str]:
    """The keys of the section at `path`; of one that is no section those of the last above it, none if `inside`."""
    return {key for each in _models_at(model, path, inside=inside) for key in each.model_fields}


def _models_at(model: type[BaseModel], path: Sequence[str], *, inside: bool = False) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [model]
    for part in path:
        found = [
            inner
            for outer in models
            if part in outer.model_fields
            for inner in _models_in(outer.model_fields[part].annotation)
            if not (inside and get_origin(outer.model_fields[part].annotation) is dict)  # its keys are names
        ]
        models = found if found or inside else models
    return models


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple, dict):
        for inner in get_args(annotation):
            yield from _models_in(inner)


def section(recipe: Mapping[str, object], name: str) -> dict[str, JsonValue]:
    """The section `name` of a stored recipe; empty if the recipe has none."""
    found = recipe.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def as_mapping(config: BaseModel) -> dict[str, JsonValue]:
    """`config` as plain values, as in YAML, without the keys that change nothing; `validate` reads it back equal."""
    mapping: dict[str, Any] = config.model_dump(mode="json")
    return without(mapping, inert_keys(type(config), mapping))


# ---- sections of several kinds, and keys that change nothing

NO_SUCH_KIND = "no_such_kind"
SECRET = "secret"  # type of a fault whose value must not be shown


def kinds_in(package: str, base: type[M]) -> tuple[type[M], ...]:
    """Imports every module of a package; returns the subclasses of `base`, sorted by their `kind`."""
    found = importlib.import_module(package)
    for module in pkgutil.iter_modules(found.__path__):
        importlib.import_module(f"{package}.{module.name}")
    return tuple(sorted(base.__subclasses__(), key=kind_of))


def kind_of(model: type[BaseModel]) -> str:
    """The one value that a model's key `kind` may have."""
    (kind,) = get_args(model.model_fields["kind"].annotation)
    return str(kind)


def one_of(models: Sequence[type[BaseModel]], default: str) -> object:
    """The type of a section whose model is selected by its key `kind`, `default` if it has none.

    It is a discriminated union of pydantic, for annotations.
    """

    def kind(value: object) -> str:
        return str(value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", default))

    known = sorted(map(kind_of, models))
    discriminator = Discriminator(
        kind, custom_error_type=NO_SUCH_KIND, custom_error_message=f"no such kind; known: {', '.join(known)}"
    )
    members = tuple(Annotated[model, Tag(kind_of(model))] for model in models)
    return Annotated[Union[members], discriminator, Kinds(default)]  # noqa: UP007


@dataclass(frozen=True)
class Kinds:
    """Marks a union of `one_of`; default: the kind of a section that names none."""

    default: str


def inert_keys(model: type[BaseModel], mapping: Mapping[str, object]) -> dict[str, str]:
    """The keys of `mapping` that change nothing, dotted, each with the reason: of another kind, or of `Config.inert`.

    The mapping may be incomplete or wrong in other ways.
    """
    found = {key: why for key, why in _inert_of(model, mapping).items() if has(mapping, key)}
    for name, value in mapping.items():
        field = model.model_fields.get(name)
        if field is not None and name not in found:
            inner = _inert_within(_Field(field.annotation, field.metadata), value)
            found |= {f"{name}.{key}": why for key, why in inner.items() if f"{name}.{key}" not in found}
    return found


def _inert_of(model: type[BaseModel], mapping: Mapping[str, object]) -> Mapping[str, str]:
    if not issubclass(model, Config):
        return {}
    defaults = {name: _default(field) for name, field in model.model_fields.items() if not field.is_required()}
    try:
        return model.inert({**defaults, **_json(mapping)})
    except (TypeError, ValueError, KeyError, AttributeError):  # a value of a wrong type, which validation refuses
        return {}


def _default(field: FieldInfo) -> JsonValue:
    value = field.get_default(call_default_factory=True, validated_data={})
    plain: JsonValue = to_jsonable_python(value)
    return plain


@dataclass(frozen=True)
class _Field:
    annotation: object
    metadata: Sequence[object] = ()


def _inert_within(field: _Field, value: object) -> dict[str, str]:
    """Like `inert_keys`, for a field's value: a section, or a list or mapping of sections."""
    if get_origin(field.annotation) is Annotated:
        annotation, *metadata = get_args(field.annotation)
        return _inert_within(_Field(annotation, metadata), value)
    if isinstance(value, Mapping) and get_origin(field.annotation) is dict:
        item = _Field(get_args(field.annotation)[1])
        return {f"{name}.{key}": why for name, each in value.items() for key, why in _inert_within(item, each).items()}
    if isinstance(value, list) and get_origin(field.annotation) in (list, tuple):
        item = _Field(get_args(field.annotation)[0])
        return {f"{n}.{key}": why for n, each in enumerate(value) for key, why in _inert_within(item, each).items()}
    models = list(_models_in(field.annotation))
    if not isinstance(value, Mapping) or not models:
        return {}
    chosen = _chosen(models, field.metadata, value)
    if chosen is None:
        return {}
    return (_of_other_kinds(chosen, models, value) if len(models) > 1 else {}) | inert_keys(chosen, value)


def _chosen(
    models: Sequence[type[BaseModel]], metadata: Sequence[object], value: Mapping[str, object]
) -> type[BaseModel] | None:
    """The model of a section; None if its kind does not exist."""
    default = next((each.default for each in metadata if isinstance(each, Kinds)), None)
    if default is None:
        return models[0] if len(models) == 1 else None
    kind = value.get("kind", default)
    return next((model for model in models if kind_of(model) == kind), None)


def _of_other_kinds(
    chosen: type[BaseModel], models: Sequence[type[BaseModel]], value: Mapping[str, object]
) -> dict[str, str]:
    owners = {key: [kind_of(m) for m in models if key in m.model_fields] for key in value}
    return {
        key: f"kind {kind_of(chosen)} does not use it; kind: {' and kind: '.join(kinds)} uses it"
        for key, kinds in owners.items()
        if kinds and key not in chosen.model_fields
    }


def live(model: type[BaseModel], mapping: Mapping[str, object]) -> dict[str, JsonValue]:
    """A stored mapping without the keys that change nothing; older versions stored those with their defaults."""
    return without(mapping, inert_keys(model, mapping))


def lay(model: type[BaseModel], base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, JsonValue]:
    """`merge`, without the keys of `base` that `over` makes inert; keys that `over` sets stay, to be refused.

    So a recipe with kind: sgd and a momentum takes the override kind=adamw, but not kind=adamw with momentum=0.3.
    """
    merged = merge(base, over)
    before, given = inert_keys(model, base), flat(over)
    made = [key for key in inert_keys(model, merged) if key not in before]
    return without(merged, [key for key in made if not any(f"{each}.".startswith(f"{key}.") for each in given)])


def without(mapping: Mapping[str, object], keys: Iterable[str]) -> dict[str, JsonValue]:
    """A copy without these dotted keys; a section that becomes empty remains."""
    copied = copy.deepcopy(_json(mapping))
    for key in keys:
        *path, last = key.split(".")
        holder = at(copied, ".".join(path)) if path else copied
        if isinstance(holder, dict):
            holder.pop(last, None)
    return copied


def at(mapping: object, key: str) -> object:
    """The value at a dotted key; a list's items by their number. None where there is none; "" is the whole."""
    for part in key.split(".") if key else ():
        if isinstance(mapping, Mapping):
            mapping = mapping.get(part)
        else:
            mapping = mapping[int(part)] if isinstance(mapping, list) and part.isdecimal() else None
    return mapping


def has(mapping: Mapping[str, object], key: str) -> bool:
    """Whether `mapping` has the dotted key, whatever its value."""
    *path, last = key.split(".")
    holder = at(mapping, ".".join(path))
    return isinstance(holder, Mapping) and last in holder


def flat(mapping: Mapping[str, object], prefix: str = "") -> dict[str, JsonValue]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are not flattened."""
    pairs: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        pairs.update(flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return pairs


def nested(flat_mapping: Mapping[str, object]) -> dict[str, JsonValue]:
    """{"a.b": 1} -> {"a": {"b": 1}}: undoes `flat`."""
    whole: dict[str, JsonValue] = {}
    for key, value in flat_mapping.items():
        *path, last = key.split(".")
        branch: dict[str, object] = {last: value}
        for part in reversed(path):
            branch = {part: branch}
        whole = merge(whole, branch)
    return whole


def validate_stored(model: type[M], mapping: Mapping[str, object], where: str) -> M:
    """`validate` of a section that this or an older version stored, with keys that change nothing left out."""
    return validate(model, live(model, mapping), where, stored=True)


def fingerprint(mapping: Mapping[str, object]) -> str:
    """16 hex digits that are equal for equal mappings."""
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:16]
