"""Rules of the source itself: one class per name, short functions, documented names, every error with a key."""

from __future__ import annotations

import ast
import os
import statistics
from collections import defaultdict
from functools import cache
from pathlib import Path

import sources

from pipeline import errors
from pipeline.errors import AdaptNetError

ONE_NAME_TWO_CLASSES: frozenset[str] = frozenset()  # what may be defined in more than one module
LONGEST, NINE_IN_TEN, MEDIAN = 60, 16, 6  # lines of a function's body, without its docstring
MOST_ANY = 150
OBVIOUS_LINES = 3  # a function this short may be documented by its name and types alone
GOLDEN = Path(__file__).parent / "golden" / "messages.txt"
KINDS = frozenset(
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, AdaptNetError)
)


def test_each_class_name_is_defined_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path, node in sources.classes():
        places[node.name].append(f"{path}:{node.lineno}")
    twice = {name: found for name, found in places.items() if len(found) > 1 and name not in ONE_NAME_TWO_CLASSES}
    assert not twice, "\n".join(f"{name}: {', '.join(found)}" for name, found in twice.items())


def test_functions_are_short() -> None:
    found = sorted((sources.length(node), f"{path}:{node.lineno} {node.name}") for path, node in sources.functions())
    lengths = [length for length, _ in found]
    assert lengths[-1] <= LONGEST, found[-1]
    assert lengths[int(0.9 * len(lengths))] <= NINE_IN_TEN
    assert statistics.median(lengths) <= MEDIAN


def test_public_names_are_documented_unless_name_and_types_say_all() -> None:
    bare = [
        f"{path}:{node.lineno} {name}"
        for path, name, node in sources.public_definitions()
        if ast.get_docstring(node) is None and not _obvious(node) and not _documented_by_its_protocol(name)
    ]
    assert not bare, "\n".join(bare)


def _obvious(node: ast.ClassDef | sources.FunctionNode) -> bool:
    return not isinstance(node, ast.ClassDef) and sources.length(node) <= OBVIOUS_LINES


def _documented_by_its_protocol(name: str) -> bool:
    """A method of the same name is documented in a class that others implement or extend."""
    _, dot, method = name.rpartition(".")
    return bool(dot) and method in _documented_methods()


@cache
def _documented_methods() -> frozenset[str]:
    methods = (
        method
        for _, node in sources.classes()
        for method in node.body
        if isinstance(method, sources.FunctionNode) and ast.get_docstring(method) is not None
    )
    return frozenset(method.name for method in methods)


def test_any_is_rare_and_in_no_public_signature() -> None:
    places = [f"{path}:{line}" for path, line in sources.mentions("Any")]
    assert len(places) <= MOST_ANY
    wrong = [
        f"{path}:{node.lineno} {name}"
        for path, name, node in sources.public_definitions()
        if isinstance(node, sources.FunctionNode) and _any_in_signature(node)
    ]
    assert not wrong, "\n".join(wrong)


def _any_in_signature(function: sources.FunctionNode) -> bool:
    arguments = function.args
    annotations = [each.annotation for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    annotations += [each.annotation for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return any(
        isinstance(node, ast.Name) and node.id == "Any"
        for annotation in (*annotations, function.returns)
        if annotation is not None
        for node in ast.walk(annotation)
    )


def test_each_error_of_ours_names_what_it_is_about() -> None:
    bare = [f"{each.path}:{each.line}" for each in sources.messages(KINDS) if not each.key and _needs_a_key(each)]
    assert not bare, "\n".join(bare)


def _needs_a_key(message: sources.Message) -> bool:
    """A DivergedError and an UndecodableError bring their own."""
    return message.kind not in ("DivergedError", "UndecodableError") and str(message.path) != "pipeline/errors.py"


def test_the_sentences_of_all_errors_are_those_of_the_golden_file() -> None:
    """To read them side by side. UPDATE_GOLDEN=1 writes the file anew."""
    lines: list[str] = []
    for each in sources.messages(KINDS):
        if str(each.path) != "pipeline/errors.py" and each.sentence:
            lines += [f"{each.path} {each.kind} [{each.key}]", f"    {each.sentence!r}"]
    text = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "UPDATE_GOLDEN=1 pytest tests/test_source_rules.py writes it"
