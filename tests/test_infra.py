"""The definitions of the container images, checked line by line, because no engine is available to build them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jobs.ray import render as ray_render

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
APPTAINER = ROOT / "infra" / "docker" / "adaptnet.def"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}


@dataclass(frozen=True)
class Line:
    """One instruction of the Dockerfile, with its continuation lines joined."""

    word: str
    rest: str


@cache
def instructions() -> list[Line]:
    text = "\n".join(line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", text)
    return [Line(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def those(word: str) -> list[str]:
    return [line.rest for line in instructions() if line.word == word]


def stages() -> list[list[Line]]:
    found: list[list[Line]] = []
    for line in instructions():
        if line.word == "FROM":
            found.append([])
        if found:
            found[-1].append(line)
    return found


def copied() -> list[str]:
    """The files and folders that are copied from the checkout."""
    return [source for rest in those("COPY") if not rest.startswith("--from") for source in rest.split()[:-1]]


@cache
def sections() -> dict[str, str]:
    """The sections of the Apptainer definition; "" is its header."""
    found = {"": ""}
    name = ""
    for line in APPTAINER.read_text(encoding="utf-8").splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
        elif not line.strip().startswith("#"):
            found[name] = found.get(name, "") + line.strip() + "\n"
    return found


def test_the_dockerfile_uses_only_instructions_that_are_checked_here() -> None:
    assert {line.word for line in instructions()} <= KNOWN


def test_every_copied_source_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in ignored, "everything else is ignored"
    assert sorted(copied()) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert copied() and all((ROOT / source).exists() for source in copied())


def test_the_image_contains_every_package_and_the_files_that_they_read() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages | {
        "infra",
        "pyproject.toml",
        "constraints.txt",
        PROJECT["readme"],
        *PROJECT["license-files"],
    } == set(copied())


def test_the_base_is_one_exact_version_in_every_stage() -> None:
    (base,) = (rest.removeprefix("BASE=") for rest in those("ARG"))
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.04", base)
    assert [rest.split(" AS ")[0] for rest in those("FROM")] == ["${BASE}"] * 2
    assert f"From: {base}\n" in sections()[""]
    major = base.partition(":")[2].split(".")[0]
    assert ray_render.pins()["cuda-toolkit"].split(".")[0] == major, "torch was built for another CUDA"


def test_the_final_stage_copies_only_the_output_of_the_build_stage() -> None:
    build, final = stages()
    name = build[0].rest.split(" AS ")[1]
    places = [line.rest for line in build if line.word == "WORKDIR"]
    (taken,) = (line.rest.split() for line in final if line.word == "COPY")
    assert taken == [f"--from={name}", *places, *places]


@pytest.mark.parametrize("path", [DOCKERFILE, APPTAINER, ROOT / "infra" / "venv.sh"], ids=lambda path: path.name)
def test_no_package_index_is_hard_coded(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text and "index-url" not in text and "find-links" not in text


def test_python_packages_are_installed_by_the_script_that_make_venv_runs() -> None:
    """infra/venv.sh installs with constraints.txt; nothing else installs Python packages. CI runs it first."""
    (line,) = (rest for rest in those("RUN") if "venv.sh" in rest)
    assert re.fullmatch(r"EXTRAS=[a-z,]+ infra/venv\.sh", line)
    assert re.search(r"^EXTRAS=[a-z,]+ infra/venv\.sh$", sections()["post"], re.MULTILINE)
    for text in (*those("RUN"), sections()["post"]):
        assert not re.search(r"\b(pip3?|uv|conda|easy_install)\b +(pip +)?install", text)
    script = (ROOT / "infra" / "venv.sh").read_text(encoding="utf-8")
    installs = re.findall(r'^.*(?:pip|"\$uv" pip) install.*$', script, re.MULTILINE)
    assert len(installs) == 3 and all("--constraint constraints.txt" in line for line in installs)
    assert 'put --no-build-isolation --editable ".[$extras]"' in script
    assert "step 480 make venv" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "infra/venv.sh" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_extras_that_are_installed_exist() -> None:
    texts = (*those("RUN"), sections()["post"])
    named = {extra for text in texts for found in re.findall(r"EXTRAS=(\S+)", text) for extra in found.split(",")}
    assert named == {"cluster", "aws", "gcp"} and named <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_every_direct_requirement_is_pinned_in_constraints(extra: str) -> None:
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    pinned = {_normal(name) for name in ray_render.pins()}
    for text in wanted:
        need = Requirement(text)
        if need.name == "adaptnet":  # each of its own extras is a case of this test
            continue
        assert _normal(need.name) in pinned, f"{need.name} of {extra or 'the project'}"
        for each in map(Requirement, (requires(need.name) or ()) if need.extras else ()):
            here = each.marker is None or any(each.marker.evaluate({"extra": given}) for given in need.extras)
            assert not here or _normal(each.name) in pinned, f"{each.name} of {text}"


def test_pinned_versions_are_within_the_bounds_of_pyproject() -> None:
    pins = {_normal(name): pin for name, pin in ray_render.pins().items()}
    for need in map(Requirement, PROJECT["dependencies"]):
        assert need.specifier.contains(pins[_normal(need.name)]), need


def test_the_newest_versions_are_tried_of_exactly_the_libraries_with_bounds() -> None:
    done = subprocess.run(
        [ROOT / "infra" / "newest.sh", "--show"],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
        capture_output=True,
        text=True,
    )
    needs = [Requirement(line) for line in done.stdout.splitlines()]
    bounded = {need.name for need in map(Requirement, PROJECT["dependencies"]) if "<" in str(need.specifier)}
    assert {need.name for need in needs if not need.specifier} == bounded
    assert {need.name for need in map(Requirement, PROJECT["dependencies"])} <= {need.name for need in needs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_image_runs_as_the_non_root_user_that_the_kubernetes_files_name() -> None:
    final = stages()[-1]
    words = [line.word for line in final]
    (user,) = (line.rest for line in final if line.word == "USER")
    assert int(user) == ray_render.USER_ID != 0, "Kubernetes recognises a non-root user only by number"
    assert any(f"useradd --create-home --uid {user} " in rest for rest in those("RUN"))
    assert "RUN" not in words[words.index("USER") :]


def test_the_entry_point_is_adaptnet_and_any_shell_finds_it() -> None:
    assert those("ENTRYPOINT") == ['["adaptnet"]'] and "adaptnet" in PROJECT["scripts"]
    (place,) = {line.rest for line in stages()[0] if line.word == "WORKDIR"}
    assert any(rest.startswith(f"PATH={place}/.venv/bin:") for rest in those("ENV"))
    for name in ("adaptnet", "ray"):
        assert any(f"{place}/.venv/bin/{name} " in rest and rest.endswith("/usr/local/bin/") for rest in those("RUN"))
    assert 'exec adaptnet "$@"' in sections()["runscript"] and f"PATH={place}/.venv/bin:" in sections()["environment"]


def test_the_build_steps_are_valid_shell_and_remove_package_lists() -> None:
    for text in (*those("RUN"), sections()["post"], sections()["test"], sections()["runscript"]):
        done = subprocess.run(["sh", "-n", "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "apt-get install" in text:
            assert "--yes --no-install-recommends" in text and "rm -rf /var/lib/apt/lists/*" in text


def test_the_apptainer_image_contains_the_same_files_as_the_docker_image() -> None:
    pairs = [line.split() for line in sections()["files"].splitlines() if line]
    assert sorted(source for source, _ in pairs) == sorted(copied())
    assert all(target == f"/opt/adaptnet/{source}" for source, target in pairs)
    wanted = re.findall(r"apt-get install --yes --no-install-recommends +([a-z0-9+ -]+)", sections()["post"])
    assert {"g++", "python3", "python3-dev", "python3-venv", "ca-certificates"} == set(wanted[0].split())
