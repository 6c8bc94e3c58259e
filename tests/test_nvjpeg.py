"""Which of the two nvJPEGs of the environment nvImageCodec gets."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

ASKS = """
import {first}
import torchvision, ctypes
nvjpeg = ctypes.CDLL("libnvjpeg.so.13")
number = ctypes.c_int()
for part in range(3):
    nvjpeg.nvjpegGetProperty(part, ctypes.byref(number))
    print(number.value)
"""


def found(first: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", ASKS.format(first=first)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_nvjpeg_of_dali_is_loaded_and_not_the_older_one_of_torchvision() -> None:
    assert found("pipeline") == version("nvidia-nvjpeg").split(".")[:3]
