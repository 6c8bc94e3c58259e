"""A CUDA device that computes nothing, built with gcc, and what recipes ask of it.

torch's own CUDA code runs on it, so it shows on which device each tensor is, dtypes that do not fit, how many kernels
are launched and where the host waits, but no values and no times. Each program runs in a process of its own, into which
the library is preloaded; its output is kept for all test processes of a session.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
Run = Callable[..., Any]


def _headers() -> Path | None:
    """The folder of CUDA's headers, from its wheels or a toolkit."""
    site, files = Path(sysconfig.get_paths()["purelib"]), ("driver_types.h", "crt/host_defines.h")
    wheels = (*site.glob("nvidia/*/include"), site / "triton/backends/nvidia/include")
    found = (*wheels, *Path("/usr/local").glob("cuda*/include"))
    return next((folder for folder in found if all((folder / file).exists() for file in files)), None)


def _gcc(*arguments: object, **options: Any) -> None:
    subprocess.run(["gcc", "-shared", "-fPIC", *map(str, arguments)], check=True, **options)


def _build(folder: Path, headers: Path) -> None:
    """libnullgpu.so, and a libcuda.so.1 that leads to it."""
    (folder / "lib").mkdir()
    sources = (HERE / "nullgpu.c", HERE / "stubs.c")
    _gcc("-O1", "-w", f"-I{headers}", "-Wl,-soname,libnullgpu.so", "-o", folder / "libnullgpu.so", *sources, "-ldl")
    linked = ("-Wl,--no-as-needed", f"-L{folder}", "-lnullgpu", "-Wl,-rpath,$ORIGIN/..")
    driver = ("-Wl,-soname,libcuda.so.1", "-o", folder / "lib" / "libcuda.so.1", "-x", "c", "-", "-x", "none")
    _gcc(*driver, *linked, input=b"int nullgpu_libcuda;")


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a Python program of this folder on the null GPU: what it prints, from JSON; once for the same arguments."""
    headers = _headers()
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the null GPU with")
    if headers is None:
        pytest.skip("no CUDA headers (nvidia/*/include/driver_types.h) to build the null GPU with")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "nullgpu"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            _build(folder, headers)

    def run(program: str, *arguments: str, devices: int = 1, reads: bool = False) -> Any:
        name = sha256(repr((program, arguments, devices, reads)).encode()).hexdigest()[:16]
        output = folder / f"{program}-{name}.json"
        with FileLock(f"{output}.lock"):
            if not output.exists():
                output.write_text(_run(folder, program, arguments, devices, reads))
        return json.loads(output.read_text())

    return run


def _run(folder: Path, program: str, arguments: tuple[str, ...], devices: int, reads: bool) -> str:
    environment = {
        **os.environ,
        "LD_PRELOAD": str(folder / "libnullgpu.so"),
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "NULLGPU_DEVICES": str(devices),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
    }
    if reads:
        environment["NULLGPU_READS"] = "1"
    command = [sys.executable, str(HERE / f"{program}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.splitlines()[-1]
