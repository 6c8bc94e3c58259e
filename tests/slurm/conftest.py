"""Clusters that tests share: each is brought up once per session, and has no jobs when a test begins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_slurm import RealSlurm, real_slurm


@pytest.fixture(scope="session")
def lo_session() -> Iterator[RealSlurm]:
    with real_slurm("lo") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def netns_session() -> Iterator[RealSlurm]:
    with real_slurm("netns") as cluster:
        yield cluster


@pytest.fixture
def lo(lo_session: RealSlurm) -> Iterator[RealSlurm]:
    """Two nodes that are plain processes on loopback."""
    yield lo_session
    lo_session.clear()


@pytest.fixture
def netns(netns_session: RealSlurm) -> Iterator[RealSlurm]:
    """Two nodes with a network, PIDs and mounts of their own; root only."""
    yield netns_session
    netns_session.clear()


@pytest.fixture(params=["lo", "netns"])
def cluster(request: pytest.FixtureRequest) -> RealSlurm:
    """Each of them, for what must hold on both."""
    found: RealSlurm = request.getfixturevalue(request.param)
    return found
