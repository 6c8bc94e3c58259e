"""What a run says when Ray cannot give it what it asks for."""

from __future__ import annotations

import socket
import time

import pytest

from pipeline.cluster import cluster, demand
from pipeline.errors import ResourceError
from pipeline.run_config import ComputeConfig


def test_nobody_at_the_address_is_said_within_the_patience() -> None:
    with socket.socket() as taken:  # a port of ours on which nothing listens
        taken.bind(("127.0.0.1", 0))
        compute = ComputeConfig(address=f"127.0.0.1:{taken.getsockname()[1]}", start_patience_s=1.0)
        start = time.monotonic()
        with (
            pytest.raises(ResourceError, match=r"no Ray cluster can be reached.*start_patience_s \(=1\)"),
            cluster(compute),
        ):
            raise AssertionError("it is not there")
        assert time.monotonic() - start < 20


def test_what_workers_need_is_summed() -> None:
    compute = ComputeConfig(cpus_per_worker=1.5)
    assert demand(compute, 4, gpu=False) == {"CPU": 6.0}
    assert demand(compute, 4, gpu=True) == {"CPU": 6.0, "GPU": 4.0}
    assert demand(compute.model_copy(update={"gpus_per_worker": 0.5}), 4, gpu=True) == {"CPU": 6.0, "GPU": 2.0}


def test_more_workers_than_cpus_are_refused_with_the_numbers() -> None:
    with (
        pytest.raises(ResourceError, match=r"workers \(=4000\) x cpus_per_worker \(=1\) needs 4000 CPUs"),
        cluster(ComputeConfig(workers=4000)),
    ):
        raise AssertionError("no machine has as many")
