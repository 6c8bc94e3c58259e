"""Freed memory is kept for the next step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import random, resource, sys
import torch
from pipeline.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
rng = random.Random(1)
def step():
    parts = [torch.ones(size << 18) for size in rng.sample(range(1, 31), 15)]  # of 1 to 30 MiB, 232 MiB in the mean
    rng.shuffle(parts)
    while parts:
        parts.pop()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has this setting")
def test_a_step_takes_few_pages_from_the_kernel_that_the_steps_before_it_had() -> None:
    kept, plain = (_faults(mode) for mode in ("kept", "plain"))
    assert kept < plain / 10, f"{kept} page faults against {plain}"


def _faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)
