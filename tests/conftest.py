"""What several tests share: real images, packed once a session, and a limit on threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

for library in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
):  # read when torch and numpy load, here and in workers, which share the cores
    os.environ.setdefault(library, "1")

NEEDS_DATA = "needs real images: set ADAPTNET_DATA to their folder"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("data") and not os.environ.get("ADAPTNET_DATA"):
        pytest.skip(NEEDS_DATA)


@pytest.fixture(scope="session")
def data_home() -> Path:
    """The folder of real images; skips the test where there is none."""
    home = os.environ.get("ADAPTNET_DATA")
    if not home:
        pytest.skip(NEEDS_DATA)
    if not Path(home).is_dir():
        pytest.fail(f"ADAPTNET_DATA (={home}): no such folder")
    return Path(home).absolute()


@pytest.fixture(scope="session")
def packed(data_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`packed("cifar10")`: that set of ADAPTNET_DATA as shards with an index, packed when first asked for."""
    from pipeline.data.pack import pack

    home = tmp_path_factory.mktemp("packed")

    def find(name: str) -> Path:
        pack(data_home / name, home / name)  # at once where it is done already
        return home / name

    return find
