"""The project's source as syntax trees: classes, functions, names, error messages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "tuning", "jobs", "infra")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[Path, ast.Module]:
    """Each source file by its path below the repository, in order."""
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def classes() -> Iterator[tuple[Path, ast.ClassDef]]:
    for path, tree in trees().items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def functions() -> Iterator[tuple[Path, FunctionNode]]:
    for path, tree in trees().items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, FunctionNode))


def length(function: FunctionNode) -> int:
    """Lines of a function's body, without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def public_definitions() -> Iterator[tuple[Path, str, ast.ClassDef | FunctionNode]]:
    """Modules' functions and classes, and these classes' methods, whose names have no leading underscore."""
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | FunctionNode) and not node.name.startswith("_"):
                yield path, node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from (
                        (path, f"{node.name}.{method.name}", method)
                        for method in node.body
                        if isinstance(method, FunctionNode) and not method.name.startswith("_")
                    )


def mentions(name: str) -> Iterator[tuple[Path, int]]:
    """Where a name is used other than in an import: (path, line)."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if (isinstance(node, ast.Name) and node.id == name) or (
                isinstance(node, ast.Attribute) and node.attr == name
            ):
                yield path, node.lineno


@dataclass(frozen=True)
class Message:
    """One error that the code can raise: class, key, sentence with {placeholders}."""

    path: Path
    line: int
    kind: str
    key: str
    sentence: str


def messages(kinds: frozenset[str]) -> Iterator[Message]:
    """Every call of one of the classes `kinds`, in the order of the source."""
    for path, tree in trees().items():
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and _called(node) in kinds)
        for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
            given = {each.arg: each.value for each in call.keywords}
            key = given.get("key", given.get("keys"))
            sentence = template(_assigned(tree, call)) if call.args else ""
            yield Message(path, call.lineno, _called(call), template(key) if key is not None else "", sentence)


def _assigned(tree: ast.Module, call: ast.Call) -> ast.expr:
    """The first argument; where it is a local variable, the value that this was last assigned above the call."""
    name = call.args[0]
    values = [
        node.value
        for node in ast.walk(tree)
        if isinstance(name, ast.Name) and isinstance(node, ast.Assign) and node.lineno <= call.lineno
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id == name.id and call.lineno - node.lineno < 30
    ]
    return max(values, key=lambda value: value.lineno, default=name)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def template(value: ast.expr) -> str:
    """A text as the source writes it, expressions in braces."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(template(part) for part in value.values)
    if isinstance(value, ast.FormattedValue):
        return "{" + ast.unparse(value.value) + "}"
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return template(value.left) + template(value.right)
    return "{" + ast.unparse(value) + "}"
