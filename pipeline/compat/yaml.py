"""Reads and writes YAML by the rules of YAML 1.2's core schema, within bounds that no recipe reaches.

`010` is ten, `0o10` is eight, and `1:30`, `yes`, `on`, `0b1` and dates are texts; PyYAML follows YAML 1.1, where they
are other things. Beyond the core schema `_` may separate the digits of a number, and `<<` merges mappings. Every key is
a text, as it is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

from pipeline.errors import ConfigError

MAX_CHARS = 200_000
MAX_DEPTH = 32  # mappings and lists within one another
MAX_VALUES = 10_000  # with those of each alias counted again
MAX_DIGITS = 40
TOO_DEEP = f"more than {MAX_DEPTH} mappings and lists within one another"
TOO_MANY = f"more than {MAX_VALUES:,} values, with those of aliases counted again"
TAG = "tag:yaml.org,2002:"
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INT = re.compile(rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULL = ("", "~", "null", "Null", "NULL")
_IMPLICIT: dict[str, re.Pattern[str]] = {  # in this order
    "null": re.compile("|".join(map(re.escape, _NULL))),
    "bool": re.compile("|".join(_BOOL)),
    "int": _INT,
    "float": re.compile(f"{_FLOAT.pattern}|{_SPECIAL.pattern}"),
}


def parse_yaml(text: str, where: str) -> object:
    """The value of a YAML text; `where` names the text in errors. Raises ConfigError."""
    try:
        if len(text) > MAX_CHARS:
            raise yaml.YAMLError(f"it has {len(text):,} characters, more than {MAX_CHARS:,}")
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML's scanner converts escapes and versions
        raise ConfigError(f"{where}: not valid YAML: {error}", key="yaml", subject=where) from None


def split_flow(text: str, where: str) -> list[str]:
    """The items of `text` as in a YAML list without its brackets: "[1,2],'a,b',c" has three.

    Raises ConfigError for text that is no such list; `where` names the option that it is the value of.
    """
    parse_yaml(f"[{text}]", f"{where} (={text})")
    depth, cuts = 0, [0]
    for token in yaml.scan(f"[{text}]"):
        depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
        depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
        if isinstance(token, yaml.FlowEntryToken) and depth == 1:
            cuts.append(token.end_mark.index - 1)  # of `text`, which has one character less before it
    items = [
        text[start:end].strip().rstrip(",").strip() for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)
    ]
    return [item for item in items if item]


class _PythonParser(Reader, Scanner, Parser):
    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)


if TYPE_CHECKING or not yaml.__with_libyaml__:
    _EventParser = _PythonParser
else:
    from yaml.cyaml import CParser as _EventParser  # ten times as fast


class _Loader(Composer, SafeConstructor, Resolver, _EventParser):
    """PyYAML's parser with the core schema; what is too deep, too large, recursive or given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        _EventParser.__init__(self, text)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = self._num_nodes = 0

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        if kind is ScalarNode and implicit[0]:
            if value == "<<":
                return f"{TAG}merge"
            return next((TAG + name for name, pattern in _IMPLICIT.items() if pattern.fullmatch(value)), f"{TAG}str")
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth, self._num_nodes = self._depth + 1, self._num_nodes + 1
        if self._depth > MAX_DEPTH or self._num_nodes > MAX_VALUES:
            raise yaml.YAMLError(f"{_place(parent)}{TOO_DEEP if self._depth > MAX_DEPTH else TOO_MANY}")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Node | None:
        node: Node | None = super().get_single_node()
        if node is not None and _extent(node, {}, []).values > MAX_VALUES:
            raise yaml.YAMLError(TOO_MANY)
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, MappingNode):
            raise yaml.YAMLError(f"{_place(node)}a mapping is expected here")
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise yaml.YAMLError(f"{_place(key)}a key must be a text")
            if key.value in seen:
                raise yaml.YAMLError(f"{_place(key)}the key {key.value!r} occurs twice")
            seen.add(key.value)
        self.flatten_mapping(node)
        return {_text(key): self.construct_object(value, deep=True) for key, value in node.value}


class _Extent(NamedTuple):
    values: int
    depth: int


def _extent(node: Node, known: dict[int, _Extent], above: list[int]) -> _Extent:
    """A node's values and depth, with those of each alias counted again.

    Raises YAMLError for a node that contains itself or is too deep.
    """
    if id(node) in above:
        raise yaml.YAMLError(f"{_place(node)}an alias refers to what contains it")
    if len(above) > MAX_DEPTH:
        raise yaml.YAMLError(f"{_place(node)}{TOO_DEEP}")
    if id(node) not in known:
        inner = [_extent(each, known, [*above, id(node)]) for each in _inner(node)]
        known[id(node)] = _Extent(1 + sum(e.values for e in inner), 1 + max((e.depth for e in inner), default=0))
    if len(above) + known[id(node)].depth > MAX_DEPTH + 1:
        raise yaml.YAMLError(f"{_place(node)}{TOO_DEEP}")
    return known[id(node)]


def _inner(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _place(node: Node | None) -> str:
    return f"line {node.start_mark.line + 1}: " if node is not None and node.start_mark else ""


def _text(node: ScalarNode) -> str:
    text = str(node.value)
    if not re.fullmatch(r"[^\0\ud800-\udfff]*", text):
        raise yaml.YAMLError(f"{_place(node)}a text with a NUL or half a surrogate pair")
    return text


def _number(node: ScalarNode, pattern: re.Pattern[str], kind: str) -> str:
    if not isinstance(node, ScalarNode) or not pattern.fullmatch(node.value):
        raise yaml.YAMLError(f"{_place(node)}{str(node.value)[:60]!r} is no {kind}")
    if len(node.value) > MAX_DIGITS:
        raise yaml.YAMLError(f"{_place(node)}a number of {len(node.value):,} characters; at most {MAX_DIGITS}")
    return str(node.value).replace("_", "")


def _scalar(node: Node) -> ScalarNode:
    if not isinstance(node, ScalarNode):
        raise yaml.YAMLError(f"{_place(node)}a single value is expected here")
    return node


def _construct_int(loader: _Loader, node: ScalarNode) -> int:
    text = _number(node, _INT, "whole number")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


def _construct_float(loader: _Loader, node: ScalarNode) -> float:
    return float(_number(node, _IMPLICIT["float"], "number").lower().replace(".inf", "inf").replace(".nan", "nan"))


def _construct_bool(loader: _Loader, node: ScalarNode) -> bool:
    if _scalar(node).value not in _BOOL:
        raise yaml.YAMLError(f"{_place(node)}{str(node.value)[:60]!r} is neither true nor false")
    return _BOOL[node.value]


def _construct_null(loader: _Loader, node: ScalarNode) -> None:
    if _scalar(node).value not in _NULL:
        raise yaml.YAMLError(f"{_place(node)}{str(node.value)[:60]!r} is not null")


def _construct_list(loader: _Loader, node: SequenceNode) -> list[Any]:
    return list(loader.construct_sequence(node, deep=True))


def _refuse_tag(loader: _Loader, node: Node) -> None:
    raise yaml.YAMLError(f"{_place(node)}{str(node.tag).replace(TAG, '!!')[:60]} is not supported")


def _construct_str(loader: _Loader, node: Node) -> str:
    return _text(_scalar(node))


def _construct_map(loader: _Loader, node: MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.yaml_constructors = {
    f"{TAG}null": _construct_null,
    f"{TAG}bool": _construct_bool,
    f"{TAG}int": _construct_int,
    f"{TAG}float": _construct_float,
    f"{TAG}str": _construct_str,
    f"{TAG}seq": _construct_list,
    f"{TAG}map": _construct_map,
    None: _refuse_tag,
}


def dump_yaml(mapping: Mapping[str, object]) -> str:
    """`mapping` as YAML text that `parse_yaml` reads back equal."""
    text: str = yaml.dump(json.loads(json.dumps(mapping)), Dumper=_Dumper, sort_keys=False, width=120)
    return text


class _Dumper(yaml.SafeDumper):
    """Short lists of numbers stay on one line; a text that YAML 1.1 or 1.2 reads as something else is quoted."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> SequenceNode:
        flat = all(not isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


for _name in ("int", "float"):
    _Dumper.add_implicit_resolver(TAG + _name, re.compile(f"^(?:{_IMPLICIT[_name].pattern})$"), list("-+.0123456789"))
