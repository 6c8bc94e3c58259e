"""The wheel: built from this checkout, installed alone, it takes no name but `adaptnet`, and its command works."""

from __future__ import annotations

import ast
import os
import site
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import zipfile
from email.parser import Parser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
HOOK = "import sys; sys.path.insert(0, sys.argv[1]); import backend; print(getattr(backend, sys.argv[2])(sys.argv[3]))"
SMALL = ("data.root=toy", "training.epochs=1", "training.batch_size=32", "evaluation.latency_repeats=1")
NAMES = ("pipeline", "jobs", "tuning", "infra")
CLEAN = """
import adaptnet, importlib.util, sys
assert not [name for name in {names} if importlib.util.find_spec(name)]
assert adaptnet.__file__.startswith({home!r}), adaptnet.__file__
assert adaptnet.AdaptNetError.__module__ == "adaptnet.pipeline.errors"
print(adaptnet.__version__, "ranet/toy" in adaptnet.families()["ranet"])
"""


def _backend() -> ModuleType:
    spec = spec_from_file_location("wheel_backend", ROOT / "infra" / "wheel" / "backend.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BACKEND = _backend()


def _built(hook: str, home: Path) -> Path:
    """What a hook of the backend builds, in a process of its own, as pip calls it."""
    command = [sys.executable, "-c", HOOK, str(ROOT / "infra" / "wheel"), hook, str(home)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return home / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built("build_wheel", tmp_path_factory.mktemp("wheel"))


class Installed:
    """An environment with the wheel; its other packages are those of this one. Commands run in an empty folder."""

    def __init__(self, wheel: Path, home: Path) -> None:
        self.here, self.bin = home / "here", home / "venv" / "bin"
        self.site = home / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True, timeout=300)
        (self.site / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")  # not what a .pth there adds
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet", "--no-deps"]
        pip += ["--no-index", "--no-compile", "--disable-pip-version-check", "--force-reinstall", wheel]
        subprocess.run(pip, check=True, timeout=300)
        for folder in (self.here, home / "home"):
            folder.mkdir()
        kept = ("PATH", "TMPDIR", "OMP_NUM_THREADS", "LANG", "LC_ALL")
        self.environment = {key: os.environ[key] for key in kept if key in os.environ} | {"HOME": str(home / "home")}

    def run(self, *command: object, code: int = 0) -> str:
        program, *arguments = map(str, command)
        done = subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.here,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_only_imports_are_rewritten_and_the_rest_stays_as_it_is() -> None:
    source = textwrap.dedent('''
        """from pipeline import errors"""
        from pipeline.errors import (  # pipeline
            AdaptNetError,
        )
        from pipeline import config as configs
        import jobs
        if True:
            import pipeline.family as families; x = 1
            from tuning import config  # from tuning import config
        import pipelines, jobs_of_others
        from .pipeline import own
        from pipelined import other
        text = "pipeline.errors"
    ''')
    expected = textwrap.dedent('''
        """from pipeline import errors"""
        from adaptnet.pipeline.errors import (  # pipeline
            AdaptNetError,
        )
        from adaptnet.pipeline import config as configs
        from adaptnet import jobs
        if True:
            import adaptnet.pipeline.family as families; x = 1
            from adaptnet.tuning import config  # from tuning import config
        import pipelines, jobs_of_others
        from .pipeline import own
        from pipelined import other
        text = "pipeline.errors"
    ''')
    assert BACKEND.rewritten(source) == expected
    for refused in ("import pipeline.errors\n", "import os, jobs\n"):
        with pytest.raises(ValueError):
            BACKEND.rewritten(refused)


def test_the_staged_tree_imports_nothing_of_ours_by_its_old_name(tmp_path: Path) -> None:
    BACKEND.stage(ROOT, tmp_path)
    files = {path.relative_to(tmp_path): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.py")}
    assert len(files) > 300 and {path.parts[0] for path in files} == {"adaptnet"}
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in modules if name.partition(".")[0] in NAMES], f"{path}:{node.lineno}"
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"] == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "build-backend" not in project["build-system"]


def test_the_wheel_holds_one_package_its_data_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(packed.read(f"{info}/METADATA").decode())
        assert packed.read(f"{info}/top_level.txt").split() == [b"adaptnet"]
        assert packed.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert {name.partition("/")[0] for name in names} == {"adaptnet", info}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert wheel.name.startswith(f"adaptnet-{metadata['Version']}-")
    data = {
        str(path.relative_to(ROOT))
        for top in ("pipeline", "jobs", "tuning")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"adaptnet/{name}" for name in data} <= set(names)
    assert "adaptnet/py.typed" in names and "adaptnet/infra/slurm/sites/example.yaml" in names


def test_the_installed_package_takes_no_other_name(installed: Installed) -> None:
    code = CLEAN.format(names=NAMES, home=str(installed.site))
    version, found = installed.run("python", "-c", code).split()
    assert version[0].isdigit() and found == "True"


def test_a_public_module_has_the_same_classes_by_each_of_its_names(installed: Installed) -> None:
    code = (
        "import adaptnet.datasets; from {}.api import image_sets; import adaptnet as a; from importlib import reload\n"
    )
    code += "assert a.datasets.ImageSet is image_sets.ImageSet and a.datasets.open is image_sets.open\n"
    code += "print(reload(a).datasets is adaptnet.datasets)"
    assert installed.run("python", "-c", code.format("adaptnet.pipeline")).split() == ["True"]
    command = [sys.executable, "-c", code.format("pipeline")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300).stdout == b"True\n"


def test_the_installed_command_starts(installed: Installed) -> None:
    assert "train" in installed.run("adaptnet", "--help")
    assert "convnet_aig/toy" in installed.run("adaptnet", "train", "--list")
    assert "zoo" in installed.run("python", "-m", "adaptnet", "models", "list", "--zoo")
    job = ("submit", "train", "baseline/toy", "--site", "example", "--dry-run")
    assert "#SBATCH" in installed.run("adaptnet", *job), "the sites are installed"


@pytest.mark.long
def test_a_wheel_of_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(_built("build_sdist", tmp_path)) as packed:
        packed.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (folder / "PKG-INFO").is_file()
    command = [sys.executable, "-c", HOOK, str(folder / "infra" / "wheel"), "build_wheel", str(tmp_path)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(tmp_path / wheel.name) as again:
        assert {each.filename: each.CRC for each in ours.infolist()} == {
            each.filename: each.CRC for each in again.infolist()
        }


@pytest.mark.long
@pytest.mark.ray
def test_workers_of_ray_import_the_installed_package(installed: Installed) -> None:
    installed.run("adaptnet", "data", "toy", "toy", "--classes", 3, "--train", 90, "--val", 30)
    text = installed.run("adaptnet", "train", "baseline/toy", *SMALL, "compute.workers=2", "name=several")
    assert "finished at step" in text


@pytest.mark.long
def test_the_installed_command_trains_predicts_and_runs_jobs_of_its_snapshot(installed: Installed) -> None:
    assert "DALI" in installed.run("adaptnet", "doctor")
    installed.run("adaptnet", "data", "toy", "toy", "--classes", 3, "--train", 90, "--val", 30)
    installed.run(
        "adaptnet", "train", "baseline/toy", *SMALL, "compute.workers=0", "name=mine", "tracking.register=null"
    )
    installed.run("adaptnet", "models", "register", "runs/mine", "m")
    picture = min((installed.here / "toy" / "val").rglob("*.jpg"))
    line = installed.run("adaptnet", "predict", "runs/mine", picture, "--budget", "100%")
    assert str(picture) in line
    answer = f"import adaptnet; print(adaptnet.load('runs/mine').predict({str(picture)!r}).label)"
    assert installed.run("python", "-c", answer).strip() in line
    of_zoo = installed.site / "adaptnet" / "pipeline" / "zoo" / "nets" / "mine"
    installed.run("adaptnet", "models", "pull", "models:/m@candidate", of_zoo)
    assert "zoo:mine" in installed.run("adaptnet", "models", "list", "--zoo")
    again = installed.run("adaptnet", "predict", "zoo:mine", picture, "--budget", "100%")
    assert again.splitlines()[-1] == line.splitlines()[-1]
    assert "zoo:mine" in installed.run("adaptnet", "evaluate", "zoo:mine", "data.root=toy")
    installed.run("adaptnet", "report", "zoo:mine", "--no-track")
    assert (installed.here / "report" / "index.html").is_file()
    job = ("compute.workers=0", "name=job", "tracking.register=null", "--where", "local", "--time", "10m")
    installed.run("adaptnet", "submit", "train", "baseline/toy", *SMALL, *job)
    assert "finished at step" in installed.run("adaptnet", "jobs", "logs", "job", "-f")
    (code,) = (installed.here / "runs" / "job").rglob("code-*")
    assert {path.name for path in code.iterdir() if path.is_dir()} == {"adaptnet"}
    loads = "import mlflow, pandas; net = mlflow.pyfunc.load_model('models:/m@candidate'); print(net.predict({!r}))"
    installed.environment["MLFLOW_TRACKING_URI"] = "sqlite:///runs/mlflow.db"
    assert "label" in installed.run("python", "-c", loads.format([str(picture)]))
