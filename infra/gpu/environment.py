"""Versions, the GPU's own rates, and which GPUs a worker opens."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable

import torch

from infra.gpu.run import Run

PACKAGES = ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "pydantic", "numpy", "torchvision")


def environment(run: Run) -> None:
    """Says what is here, then measures the GPU's rates."""
    gpu = torch.cuda.is_available()
    _tell(run, gpu=gpu, gpus=torch.cuda.device_count() if gpu else 0, dali=_dali_imports())
    run.case("versions", lambda: _versions(run, gpu))
    if gpu and not run.small:
        run.case("driver", lambda: run.row("driver", _driver()))
        for name, dtype, tf32 in (
            ("bf16", torch.bfloat16, True),
            ("TF32", torch.float32, True),
            ("fp32", torch.float32, False),
        ):
            run.case(f"matrix product {name}", lambda n=name, d=dtype, t=tf32: _matrix(run, n, d, t))  # type: ignore[misc]
        run.case("device copy", lambda: _copy(run))


def _tell(run: Run, **facts: object) -> None:
    with open(run.rows, "a", encoding="utf-8") as file:
        file.write(json.dumps({"facts": facts}) + "\n")


def _dali_imports() -> bool:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


def _versions(run: Run, gpu: bool) -> None:
    run.row("python, torch", f"{platform.python_version()}, {torch.__version__}")
    for name in PACKAGES:
        try:
            run.row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            run.row(name, "not installed")
    if gpu:
        run.row(
            "GPU",
            torch.cuda.get_device_name(0),
            detail=f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB",
        )
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        run.row("cuDNN", str(cudnn))
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        run.row("NCCL", ".".join(map(str, nccl)))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def _matrix(run: Run, name: str, dtype: torch.dtype, tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    side = 8192
    left, right = (torch.randn(side, side, device=run.device, dtype=dtype) for _ in range(2))
    seconds = timed(lambda: left @ right, repeats=10 if name == "bf16" else 5)
    run.row(f"matrix product {name}", 2 * side**3 / seconds / 1e12, "TFLOP/s")


def _copy(run: Run) -> None:
    source = torch.empty(2**32, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    run.row("device copy", 2 * 2**32 / timed(lambda: target.copy_(source)) / 1e12, "TB/s", "read and written")


def timed(work: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of one call, the mean of `repeats` after three."""
    for _ in range(3):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats


def wait() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def contexts(run: Run) -> None:
    """Which GPUs a loader and steps on the last GPU open; of interest only where there are several."""
    count = torch.cuda.device_count()
    if count < 2:
        run.row("GPUs that a worker opens", "one GPU here: nothing to tell apart")
        return
    torch.ones(1, device=torch.device("cuda", count - 1))
    command = ["nvidia-smi", "--query-compute-apps=gpu_bus_id", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    run.row("GPUs that a worker opens", float(len(set(found))))
