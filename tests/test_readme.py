"""What README.md and the help texts say is so: commands exist, recipes resolve, files are where the map has them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from jobs import cli
from pipeline import recipes, run_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WHERE = {  # each command line of the README: the file that runs it, or why none does
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "source .venv/bin/activate": "a shell's own",
    "adaptnet --help": ".ci/run",
    "adaptnet train convnet_aig/toy --show": ".ci/run",
    "adaptnet data check /data/photos": "tests/test_jobs_data.py",
    "adaptnet data pack /data/photos packed/photos": "tests/test_jobs_data.py",
    "adaptnet data info packed/photos": "tests/test_jobs_data.py",
    "adaptnet train baseline/flowers_mobilenetv3 data.root=packed/photos name=mine tracking.register=mine": "too long",
    "adaptnet evaluate runs/mine": "after the one before; Makefile evaluates the demo's run",
    "adaptnet data pack /data/imagenet packed/imagenet": "needs ImageNet",
    "adaptnet train convnet_aig/imagenet_50 data.root=packed/imagenet compute.workers=8": "needs ImageNet",
    "adaptnet evaluate runs/convnet_aig-imagenet_50": "needs ImageNet",
    "adaptnet report runs/convnet_aig-toy --out report": ".ci/run",
    "adaptnet compare runs/convnet_aig-toy models:/aig-toy@candidate": ".ci/run",
    "adaptnet predict models:/aig-toy@candidate runs/toy-data/val/00-disc --budget 80%": ".ci/run",
    "adaptnet export models:/aig-toy@candidate --policy all-open --format onnx": ".ci/run",
    "adaptnet submit train convnet_aig/imagenet_50 data.root=packed/imagenet --site example --dry-run": ".ci/run",
    "adaptnet submit train convnet_aig/toy --where local --time 30m": ".ci/run",
    "adaptnet jobs list": ".ci/run",
    "adaptnet plan convnet_aig/imagenet_50 data.root=packed/imagenet --nodes 2 --images 1281167": ".ci/run",
    "adaptnet sweep --list": ".ci/run",
    "adaptnet sweep toy": "tests/test_sweep.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].rstrip() for block in blocks("sh") for line in block.splitlines()]
    return [line.partition(" #")[0].rstrip() for line in lines if line]


def leaves(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb with its words: (("data", "pack"), command)."""
    if not hasattr(command, "list_commands"):
        yield words, command
        return
    context = command.context_class(command, info_name=" ".join(("adaptnet", *words)))
    for name in command.list_commands(context):
        yield from leaves(command.get_command(context, name), *words, name)


VERBS = dict(leaves(get_command(cli.app)))


def parse(line: str) -> None:
    """Fails unless the line's verb, flags and arguments are ones that `adaptnet` takes, and its recipe resolves."""
    words = shlex.split(line)[1:]
    if words == ["--help"]:
        return
    verb = next((verb for verb in VERBS if verb == tuple(words[: len(verb)])), None)
    assert verb, f"{line}: no such verb"
    rest = words[len(verb) :]
    try:
        found = VERBS[verb].make_context(line, list(rest)).params
    except typer.Exit:  # an option that answers by itself, like --list
        return
    recipe = found.get("recipe")
    if recipe and not recipe.endswith(".yaml"):
        assert recipe in recipes.names(), f"{line}: no such recipe"
        run_config.load(recipe, found.get("overrides") or (), data_home="/data")


def test_each_command_is_listed_with_what_runs_it() -> None:
    assert commands() == list(WHERE)
    for line, where in WHERE.items():
        if where == ".ci/run":
            assert line in (ROOT / where).read_text(encoding="utf-8"), f"{where} does not run {line}"
        assert (ROOT / where).is_file() or " " in where, f"{line}: no file {where}"


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("adaptnet")])
def test_each_command_parses(line: str) -> None:
    parse(line)


def test_each_command_in_a_sentence_names_a_verb_or_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"make ([a-z]+)", " ".join(re.findall(r"`([^`]+)`", prose))):
        assert f"\n{target}:" in makefile, f"make {target}: no such target"
    for line in re.findall(r"`(adaptnet [^`<]+)`", prose):
        parse(line.replace("RECIPE", "convnet_aig/toy"))


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_each_verb_shows_examples_that_parse(words: tuple[str, ...]) -> None:
    command = VERBS[words]
    examples = [line.strip() for line in command.help.splitlines() if line.startswith("  adaptnet ")]
    own = [line for line in examples if line.startswith(" ".join(("adaptnet", *words)))]
    assert own, f"adaptnet {' '.join(words)} --help: no example of its own"
    for line in examples:
        parse(line)
    context = command.context_class(command, info_name="adaptnet")
    assert own[0] in command.get_help(context), "the example is not shown on a line of its own"


def test_the_folder_map_is_the_tree() -> None:
    """Every entry exists and says what it is in at most six words; every package of the tree has an entry."""
    (block,) = blocks("text")
    named, folders = set(), [ROOT]
    for line in block.splitlines():
        entry, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*folders[: depth + 1]][-1] / entry
        assert path.exists(), f"{entry}: in the README's map, not in the tree"
        assert len(words.split()) <= 6, f"{entry}: more than six words"
        folders[depth + 1 :] = [path]
        named.add(path)
    packages = [path.parent for top in ("pipeline", "jobs", "tuning") for path in (ROOT / top).rglob("__init__.py")]
    missing = [path for path in packages if path not in named]
    assert not missing, f"not in the README's map: {', '.join(str(path.relative_to(ROOT)) for path in missing)}"


def test_each_command_of_infras_readme_parses_and_is_run_somewhere() -> None:
    """The first block is run as it stands by tests/slurm/test_jobs.py; the plan's figures are checked by test_plan."""
    text = (ROOT / "infra" / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.partition("  #")[0].partition(" |")[0].strip() for line in (first + second).splitlines()]
    for line in lines:
        if line.startswith("adaptnet"):
            parse(line)
    assert [line.split()[1] for line in lines if line.startswith("adaptnet")][-1] == "plan"
    assert second.count("\n") == 1
