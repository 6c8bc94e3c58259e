"""README.md, guides and help texts: commands parse, recipes resolve, and the map of folders matches the tree."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from jobs import cli
from pipeline import recipes, run_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "infra" / "docs").glob("*.md"))}
PAGES = "\n".join([README, *GUIDES.values()])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].rstrip() for block in blocks("sh") for line in block.splitlines()]
    return [line.partition(" #")[0].rstrip() for line in lines if line]


def leaves(command: TyperCommand | TyperGroup, *words: str) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    """Each command with the words that select it: (("data", "pack"), command)."""
    if not hasattr(command, "list_commands"):
        yield words, command
        return
    context = command.context_class(command, info_name=" ".join(("adaptnet", *words)))
    for name in command.list_commands(context):
        yield from leaves(command.get_command(context, name), *words, name)


VERBS = dict(leaves(get_command(cli.app)))


def parse(line: str) -> None:
    """Fails unless `adaptnet` accepts the verb, the options and the arguments, and the recipe resolves."""
    words = shlex.split(line)[1:]
    if words == ["--help"]:
        return
    verb = next((verb for verb in VERBS if verb == tuple(words[: len(verb)])), None)
    assert verb, f"{line}: no such verb"
    rest = words[len(verb) :]
    try:
        values = VERBS[verb].make_context(line, list(rest)).params
    except typer.Exit:  # an option that prints and exits, like --list
        return
    recipe = values.get("recipe")
    if recipe and not recipe.endswith(".yaml"):
        assert recipe in recipes.names(), f"{line}: no such recipe"
        overrides, batch_size = values.get("overrides") or (), values.get("batch_size")
        if batch_size is not None:
            overrides = run_config.with_batch_size(recipe, overrides, batch_size)
        run_config.load(recipe, overrides, data_home="/data")


def test_ci_runs_the_marked_blocks() -> None:
    """CI runs the adaptnet commands of each block that follows the comment; other blocks need your images."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (function,) = re.findall(r"^readme_commands\(\) \{.*?^\}$", script, re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", f"{function}\nreadme_commands"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    marked = re.findall(r"^<!-- CI runs [^\n]*-->\n```sh\n(.*?)^```", PAGES, re.DOTALL | re.MULTILINE)
    lines = [line.partition(" #")[0].rstrip() for block in marked for line in block.splitlines()]
    assert done.stdout.splitlines() == [line for line in lines if line.startswith("adaptnet ")]
    assert len(marked) == PAGES.count("<!-- CI runs") > 1


def test_each_line_of_a_block_is_an_adaptnet_command_a_make_target_or_the_activation() -> None:
    for line in commands():
        assert re.match(r"adaptnet |make [a-z-]+$|source \.venv/bin/activate$", line), line


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("adaptnet")])
def test_each_command_parses(line: str) -> None:
    parse(line)


def test_each_command_in_prose_names_a_verb_or_a_make_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", PAGES, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"make ([a-z-]+)", " ".join(re.findall(r"`([^`]+)`", prose))):
        assert re.search(rf"^[a-z -]*\b{target}\b[a-z -]*:", makefile, re.MULTILINE), f"make {target}: no such target"
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


def test_the_map_of_folders_matches_the_tree() -> None:
    """Every entry exists and is described in at most six words; every package has an entry."""
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


def test_each_command_of_infras_readme_parses() -> None:
    """tests/slurm/test_jobs.py runs the first block; test_plan checks the figures of the plan in the second.

    Others are of scripts, such as the acceptance run of a GPU.
    """
    text = (ROOT / "infra" / "README.md").read_text(encoding="utf-8")
    first, second, *_ = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.partition("  #")[0].partition(" |")[0].strip() for line in (first + second).splitlines()]
    for line in lines:
        if line.startswith("adaptnet"):
            parse(line)
    assert [line.split()[1] for line in lines if line.startswith("adaptnet")][-1] == "plan"
    assert second.count("\n") == 1


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("adaptnet submit train")])
def test_each_submitted_training_would_be_accepted(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[1:]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, *([] if "--dry-run" in words else ["--dry-run"])])
    assert not ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_each_verb_that_asks_a_tracking_server_honours_the_users_environment(words: tuple[str, ...]) -> None:
    """Or its help says that each run's own server is asked."""
    for param in VERBS[words].params:
        if param.name == "uri":
            assert param.envvar == "MLFLOW_TRACKING_URI" or re.search(r"default: .*\brun\b", param.help)
