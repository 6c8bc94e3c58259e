"""Freed memory is kept for the next step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GIVEN_BACK = """
import sys
import psutil, torch
from pipeline.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
resident = lambda: psutil.Process().memory_info().rss
parts = [torch.ones(6 << 20) for _ in range(8)]  # 192 MiB
before = resident()
del parts
print((before - resident()) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has this setting")
def test_memory_that_a_step_frees_stays_with_the_process() -> None:
    assert _given_back("kept") < 10
    assert _given_back("plain") > 100  # what the setting is for


def _given_back(mode: str) -> int:
    """MiB."""
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)
