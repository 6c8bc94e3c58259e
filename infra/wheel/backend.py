"""The build backend (PEP 517) that pyproject.toml names: setuptools, on a tree whose packages are all in `adaptnet`.

A wheel must not take the names `pipeline`, `jobs` and `tuning`, which other distributions may have. So it is built from
a copy of the checkout that holds them as `adaptnet.pipeline` and so on, with their imports rewritten; the files PUBLIC
of `pipeline/api` are also those of `adaptnet`. Where a module is named in a text, the code itself asks
`pipeline.installation` for the name. An editable install leaves the checkout as it is.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_editable as build_editable
from setuptools.build_meta import get_requires_for_build_editable as get_requires_for_build_editable
from setuptools.build_meta import get_requires_for_build_wheel as get_requires_for_build_wheel
from setuptools.build_meta import prepare_metadata_for_build_editable as prepare_metadata_for_build_editable

Settings = Mapping[str, str | list[str] | None] | None

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "jobs", "tuning")
API = Path("pipeline") / "api"
PUBLIC = ("__init__.py", "__main__.py", "datasets.py", "py.typed")  # of API, which are also files of `adaptnet`
FILES = ("infra/ray/serve.yaml", "infra/ray/sites", "infra/slurm/sites", "constraints.txt")  # which our code reads
PROJECT = ("pyproject.toml", "README.md", "LICENSE")
SOURCE = (*PROJECT, "Makefile", "constraints.txt", *PACKAGES, "infra")  # of a source distribution
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
TABLES = re.compile(r"^\[tool\.setuptools\].*?(?=^\[tool\.(?!setuptools))", re.DOTALL | re.MULTILINE)
PACKAGED = """[tool.setuptools.packages.find]
include = ["adaptnet*"]

[tool.setuptools.package-data]
"*" = ["*"]

"""


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Builds the wheel into the folder `wheel_directory`; returns its name."""
    place = os.path.abspath(wheel_directory)
    with _inside_staged():
        name: str = build_meta.build_wheel(place, config_settings)
    return name


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """Writes the wheel's metadata into the folder `metadata_directory`; returns the name of its folder there."""
    place = os.path.abspath(metadata_directory)
    with _inside_staged():
        name: str = build_meta.prepare_metadata_for_build_wheel(place, config_settings)
    return name


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Packs the source into the folder `sdist_directory`, from which the same wheel can be built; returns its name."""
    with tempfile.TemporaryDirectory(prefix="adaptnet-sdist-") as scratch:
        metadata = Path(scratch) / prepare_metadata_for_build_wheel(scratch) / "METADATA"
        top = metadata.parent.name.removesuffix(".dist-info")
        folder = Path(scratch) / top
        for name in SOURCE:
            _copy(ROOT / name, folder / name)
        shutil.copyfile(metadata, folder / "PKG-INFO")
        with tarfile.open(Path(sdist_directory) / f"{top}.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as packed:
            packed.add(folder, top)
    return f"{top}.tar.gz"


@contextmanager
def _inside_staged() -> Iterator[None]:
    """The working directory is a staged copy of the checkout."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="adaptnet-wheel-") as scratch:
        stage(ROOT, Path(scratch))
        os.chdir(scratch)
        try:
            yield
        finally:
            os.chdir(before)


def stage(root: Path, folder: Path) -> None:
    """Writes the tree of the checkout `root` into `folder` as the wheel has it, with its pyproject.toml."""
    package = folder / "adaptnet"
    for name in (*PACKAGES, *FILES):
        _copy(root / name, package / name)
    for name in PROJECT:
        _copy(root / name, folder / name)
    for name in PUBLIC:
        shutil.copyfile(root / API / name, package / name)
    for path in package.rglob("*.py"):
        path.write_text(rewritten(path.read_text(encoding="utf-8"), str(path)), encoding="utf-8")
    for path in package.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"(?m)^(\s*import_path: )(?=jobs\.)", r"\1adaptnet.", text), encoding="utf-8")
    project = folder / "pyproject.toml"
    project.write_text(_packaged(project.read_text(encoding="utf-8")), encoding="utf-8")


def _packaged(text: str) -> str:
    """pyproject.toml with the packages of a staged tree, built by plain setuptools."""
    text, tables = TABLES.subn(PACKAGED, text)
    text, backends = re.subn(r'build-backend = "backend"\nbackend-path = .*\n', "", text)
    assert (tables, backends) == (1, 1), "pyproject.toml has one [tool.setuptools] and names this backend"
    return text


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=IGNORED)
    else:
        shutil.copyfile(source, target)


def rewritten(source: str, name: str = "source") -> str:
    """The Python text with its imports of our packages as those of `adaptnet`; nothing else is changed.

    Raises ValueError for `import pipeline.x` without `as`, which binds the name `pipeline`.
    """
    lines = source.splitlines(keepends=True)
    for node in sorted(_imports(source), key=lambda node: (node.lineno, node.col_offset), reverse=True):
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        text = "".join(lines[first:last])
        lines[first:last] = [_adapted(node, text, f"{name}:{node.lineno}")]
    return "".join(lines)


def _imports(source: str) -> Iterator[ast.Import | ast.ImportFrom]:
    """The statements that import one of our packages."""
    for node in ast.walk(ast.parse(source)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.Import | ast.ImportFrom) and any(map(_is_ours, names)):
            yield node


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _adapted(node: ast.Import | ast.ImportFrom, text: str, place: str) -> str:
    """The lines of one import statement, each of which holds no other statement but after it."""
    ours = "|".join(PACKAGES)
    if isinstance(node, ast.ImportFrom):
        return re.sub(rf"\bfrom(\s+)(?=({ours})\b)", r"from\1adaptnet.", text, count=1)
    if len(node.names) == 1 and node.names[0].asname:
        return re.sub(rf"\bimport(\s+)(?=({ours})\b)", r"import\1adaptnet.", text, count=1)
    if len(node.names) == 1 and "." not in node.names[0].name:
        return re.sub(rf"\bimport\s+({ours})\b", r"from adaptnet import \1", text, count=1)
    raise ValueError(f"{place}: write `from package import module`, or `import package.module as name`: {text.strip()}")
