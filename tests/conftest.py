"""Fixtures that several test files share, and a limit on threads."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # importing torch must wait for the variables below
    from ray_here import Head

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read when torch and numpy are imported, also in workers
    os.environ.setdefault(variable, "1")

NEEDS_DATA = "needs real images: set ADAPTNET_DATA to their folder"


def pytest_configure() -> None:
    """Ctrl-C works in tests behind `&` or nohup too, which start with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests that use `finished` to the end, so that one of two processes runs them and trains its nets."""
    items.sort(key=lambda item: "finished" in getattr(item, "fixturenames", ()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("data") and not os.environ.get("ADAPTNET_DATA"):
        pytest.skip(NEEDS_DATA)


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The session's Ray cluster, with two CPUs."""
    from ray_here import head

    with head(tmp_path_factory.mktemp("ray")) as started:
        yield started


@pytest.fixture(scope="session")
def data_home() -> Path:
    """The folder of real images; skips the test if there is none."""
    home = os.environ.get("ADAPTNET_DATA")
    if not home:
        pytest.skip(NEEDS_DATA)
    if not Path(home).is_dir():
        pytest.fail(f"ADAPTNET_DATA (={home}): no such folder")
    return Path(home).absolute()


@pytest.fixture(scope="session")
def packed(data_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`packed("cifar10")`: that set of ADAPTNET_DATA as shards with an index, packed on first use."""
    from pipeline.data.pack import pack

    home = tmp_path_factory.mktemp("packed")

    def find(name: str) -> Path:
        pack(data_home / name, home / name)  # returns at once if this set is packed already
        return home / name

    return find


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs by family, trained in this process on one toy set; `elsewhere` saw other images.

    They are in HOME/runs beside their database; HOME/images5 is the set. The gated net is registered as `gated`.
    """
    from mlflow_here import database

    from pipeline import run_config
    from pipeline.data import toy
    from pipeline.execution import launch

    home = tmp_path_factory.mktemp("finished")
    (home / "runs").mkdir()
    shutil.copyfile(database().path, home / "runs" / "mlflow.db")
    sets = {
        seed: toy.make(home / f"images{seed}", num_classes=4, train=160, val=60, side_px=32, seed=seed)
        for seed in (5, 6)
    }
    runs = {
        "convnet_aig": ("convnet_aig/toy", 5, ["family.depth=8", "tracking.register=gated"]),
        "ranet": ("ranet/toy", 5, ["data.held_out=0.2", "tracking.register=null"]),
        "elsewhere": ("convnet_aig/toy", 6, ["family.depth=8", "tracking.register=null"]),
    }
    small = ["training.batch_size=32", "training.epochs=2", "compute.workers=0", "checkpoint.every=5 steps"]
    for name, (recipe, seed, overrides) in runs.items():
        latency = ["evaluation.latency_repeats=2", "evaluation.latency_batches=[1]", "checkpoint.keep_last=5"]
        config = run_config.load(recipe, [f"data.root={sets[seed]}", *small, *latency, *overrides])
        launch.train(config, home / "runs" / name)
    return {name: home / "runs" / name for name in runs}
