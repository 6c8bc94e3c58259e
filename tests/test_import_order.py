"""The order in which modules may import one another, read from the source; who may use which service."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# A module imports only from layers to the left of its own; `pipeline` is the package itself.
ORDER = """errors installation | compat | pipeline config | ranks cost figures weights | runs | data | family | blocks |
exits | families | training | tracking | recipes | run_config | evaluation | zoo | registry | execution | deploy |
report | bench | tuning | jobs | api"""
PLACE = {name: place for place, names in enumerate(ORDER.split("|")) for name in names.split()}
FAMILY_MAY = {"errors", "config", "ranks", "cost", "figures", "weights", "family", "blocks", "exits"}
FAMILY_MAY_OUTSIDE = {"torch", "torchvision", "numpy", "pydantic", *sys.stdlib_module_names}
DOORS = {  # what only these modules import; a benchmark also calls the peers that it measures
    "nvidia": {"pipeline.compat.dali", "pipeline.data.dali", "pipeline.data.verdict", "pipeline.bench"},
    "mlflow": {"pipeline.compat.mlflow", "pipeline.tracking", "pipeline.registry", "pipeline.bench"},
    "torch.distributed": {"pipeline.ranks", "pipeline.bench"},
    "ray": {
        "pipeline.compat",
        "pipeline.execution",
        "pipeline.bench",
        "tuning",
        "jobs.verbs.serve",
        "jobs.ray.scheduler",
    },
    "timm": {"pipeline.compat.timm"},
    "submitit": {"pipeline.compat.submitit", "jobs.slurm", "jobs.local", "jobs.schedulers"},
}
SOURCES = sorted(path for top in ("pipeline", "tuning", "jobs") for path in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The word in ORDER: what follows `pipeline`, or the top-level package."""
    top, *rest = module.split(".")
    return rest[0] if top == "pipeline" and rest else top


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions too; `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it whole"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


ALL = [(module_of(path), found) for path in SOURCES for found in imports(path)]
OURS = [(module, found) for module, found in ALL if found.split(".")[0] in {"pipeline", "tuning", "jobs", "tests"}]


def test_every_module_has_a_place() -> None:
    assert {part_of(module_of(path)) for path in SOURCES} - {"pipeline"} <= set(PLACE)


def test_nothing_imports_from_a_layer_to_its_right() -> None:
    end = len(PLACE)
    wrong = [
        f"{module} imports {found}"
        for module, found in OURS
        if part_of(module) != part_of(found) and PLACE.get(part_of(found), end) >= PLACE[part_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_a_family_imports_torch_and_the_seam_and_no_other_family() -> None:
    wrong = [
        f"{module} imports {found}"
        for module, found in ALL
        if within(module, "pipeline.families") and not _family_may(module, found)
    ]
    assert not wrong, "\n".join(wrong)


def _family_may(module: str, found: str) -> bool:
    top = found.split(".")[0]
    if top != "pipeline":
        return top in FAMILY_MAY_OUTSIDE
    doors = (*(f"pipeline.compat.{each}" for each in ("torch", "torchvision", "timm")), ".".join(module.split(".")[:3]))
    return part_of(found) in FAMILY_MAY or any(within(found, door) for door in doors)


@pytest.mark.parametrize("service", DOORS)
def test_each_outside_service_has_one_door(service: str) -> None:
    users = {module for module, found in ALL if within(found, service)}
    assert {user for user in users if not any(within(user, door) for door in DOORS[service])} == set()


def test_nothing_below_jobs_prints_or_parses_arguments() -> None:
    library = [path for path in SOURCES if path.is_relative_to(ROOT / "pipeline")]
    calls = [
        f"{path}:{node.lineno}"
        for path in library
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls
    assert not [pair for pair in ALL if within(pair[0], "pipeline") and pair[1].split(".")[0] in {"argparse", "typer"}]


def test_modules_of_ours_are_named_in_texts_only_where_the_name_is_that_of_the_installation() -> None:
    """In a wheel `pipeline.x` is called adaptnet.pipeline.x: code asks `installation.module` for the name."""
    known = {module_of(path) for path in SOURCES if "." in module_of(path)}
    bare = [
        f"{path}:{node.lineno} {node.value}"
        for path in SOURCES
        for tree in [ast.parse(path.read_text(encoding="utf-8"))]
        for allowed in [_told_to_module(tree) | _values_of(tree, "_PLACES")]
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in allowed
        if node.value.split(":")[0] in known or node.value.rstrip(".") in known
    ]
    assert not bare, "\n".join(bare)


def _told_to_module(tree: ast.Module) -> set[int]:
    """The texts within the arguments of `module(...)`, by identity."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return {id(each) for call in calls if call.func.id == "module" for each in ast.walk(call)}  # type: ignore[attr-defined]


def _values_of(tree: ast.Module, name: str) -> set[int]:
    """The texts within what a module assigns to a name, by identity."""
    made = [node for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name]
    return {id(each) for node in made for each in ast.walk(node)}


BARE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Bare:  # finds what Python's own finder does, but for what is hidden
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in hidden else PathFinder.find_spec(name, path, target)

hidden = set(sys.argv[2:])
sys.meta_path = [BuiltinImporter, FrozenImporter, Bare]
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]

import importlib, pkgutil
import pipeline.families, pipeline.training
for package in (pipeline.families, pipeline.training):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

import tiny
from pipeline.training.step import Meter, train_step
current = tiny.fresh(tiny.training())
train_step(tiny.plan(current.net, tiny.training()), current, next(tiny.batches(0)), Meter())
print("step", current.step)
"""


def test_families_and_training_run_where_only_torch_torchvision_numpy_pydantic_and_yaml_are() -> None:
    bare = _with_requirements({"torch", "torchvision", "numpy", "pydantic", "pyyaml"})
    hidden = {
        module
        for module, owners in packages_distributions().items()
        if not bare & {_normal(owner) for owner in owners} and module not in ("pipeline", "jobs", "tuning")
    }
    assert {"ray", "mlflow", "safetensors", "torchmetrics", "typer", "psutil"} <= hidden
    done = subprocess.run([sys.executable, "-c", BARE, ROOT, *hidden], capture_output=True, text=True, timeout=600)
    assert done.stdout == "step 1\n", done.stderr


def _with_requirements(names: set[str]) -> set[str]:
    """Distributions and all that they need here, by normal name."""
    found: set[str] = set()
    due = set(names)
    while due:
        found.add(name := due.pop())
        needs = map(Requirement, distribution(name).requires or ())
        due |= {_normal(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})}
        due -= found
    return found


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_listing_and_packing_images_does_without_torch() -> None:
    """Its import takes longer than indexing a small set."""
    code = "import sys, pipeline.data.config, pipeline.data.index, pipeline.data.pack; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_recipe_is_read_and_planned_without_the_libraries_that_only_nets_and_runs_need() -> None:
    """Each of them takes as long to import as torch; a remembered plan is printed within two seconds."""
    code = (
        "import sys; from pipeline import family, run_config; from pipeline.bench import advice, measured, plan;"
        "[family.find(name) for name in family.names()];"
        "print(sorted({'torchvision', 'torch._dynamo', 'triton', 'nvidia', 'mlflow', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
