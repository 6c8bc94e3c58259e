#!/usr/bin/env bash
# Runs the quick tests on the newest released versions of the libraries whose private parts or formats we use: Ray,
# MLflow, torch, torchvision, DALI and submitit. Every other package that pyproject.toml names stays at the version of
# constraints.txt; what these packages require in turn is whatever fits.
#
#   infra/newest.sh              installs into .venv-newest (made anew, about 7 GB), prints the versions, runs the tests
#   infra/newest.sh --show       prints the requirements and exits; PYTHON names an interpreter with `packaging`
#   infra/newest.sh -k launch    passes further arguments to pytest
#
# Quick tests are those of `make test` that do not start Ray; none starts a server. The check that the libraries still
# have the private parts that we use runs at the import of each module of pipeline/compat, so the tests include it.
# Exits with a status other than 0 if a package cannot be installed or a test fails.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "newest: $*" >&2; }

# One requirement on each line: without a version for the newest ones, with that of constraints.txt for the others.
requirements() {
    "${PYTHON:-.venv/bin/python}" - <<'P'
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

NEWEST = {"ray", "mlflow", "torch", "torchvision", "nvidia-dali-cuda130", "submitit"}
pins = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
dev = [*extras["dev"], *extras["onnx"], *extras["optuna"], *extras["server"], *extras["tensorboard"]]
texts = [*project["dependencies"], *dev, "setuptools"]
needs = [Requirement(text) for text in texts]
for need in sorted({str(need): need for need in needs if need.name != "adaptnet"}.values(), key=lambda need: need.name):
    name = need.name + (f"[{','.join(sorted(need.extras))}]" if need.extras else "")
    pin = pins[re.sub(r"[-_.]+", "-", need.name).lower()]
    print(name if need.name in NEWEST else f"{name}=={pin}")
P
}

if [ "${1:-}" = --show ]; then requirements && exit; fi

infra/venv.sh
unset PYTHON

home=.venv-newest python=.venv-newest/bin/python
rm -rf "$home"
.venv/bin/python -m venv "$home"
requirements >"$home/requirements.txt"
if .venv/bin/uv --version >/dev/null 2>&1; then
    put() { .venv/bin/uv pip install --quiet --python "$python" "$@"; }
else
    put() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
fi
say "installing the newest versions into $home"
put --requirement "$home/requirements.txt" || { say "these requirements cannot be installed together" && exit 1; }
put --no-build-isolation --no-deps --editable .

"$python" - <<'P'
from importlib.metadata import version
from pathlib import Path

pins = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)
print(f"{'package':<22}{'constraints.txt':<18}newest")
for name in ("ray", "mlflow", "torch", "torchvision", "nvidia-dali-cuda130", "submitit"):
    print(f"{name:<22}{pins[name]:<18}{version(name)}")
P
exec "$python" -m pytest -m "not ray and not slurm and not browser and not server and not faults and not long" -n 2 "$@"
