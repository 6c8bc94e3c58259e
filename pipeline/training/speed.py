"""How fast a training computes: multiply-accumulates a second, their share of what the device reaches, memory.

A step counts as three forward passes of its images, since a backward pass computes twice what a forward pass does. The
peak is that of square matrix products in the run's precision, measured once for each device and then remembered.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline import cost
from pipeline.runs.files import read_json, write_json
from pipeline.training.plan import TrainingPlan, precision_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.training.step import MicroBatch

PASSES = 3  # forward passes that a step counts as
ROWS = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is timed
TRIES, MOST_S = 8, 0.5  # products that are timed, and after how many seconds no further one is
CPU_INFO = Path("/proc/cpuinfo")


class Speed:
    """Counts the images of a training since the last log point."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan
        self._images: dict[int, int] = {}  # of all ranks, by their side in pixels

    def count(self, micros: Sequence[MicroBatch]) -> None:
        """Adds the images of a step, given as this rank's micro-batches."""
        side = micros[0].images.shape[-1]
        self._images[side] = self._images.get(side, 0) + self._plan.batch_size

    def flush(self, seconds: float) -> dict[str, float]:
        """Values of a log point whose images took `seconds`; then no image is counted.

        time/macs_per_s: of all ranks. time/macs_share_of_peak: of the measured peak of their devices. Either is left
        out if it is not known. memory/peak_bytes: the most that this rank has had allocated.
        """
        macs, peak, images = self._plan.macs, self._plan.peak_macs_per_s, self._images
        values = {"memory/peak_bytes": float(peak_bytes(self._plan.device))}
        if images and all(side in macs for side in images):
            rate = PASSES * sum(macs[side] * count for side, count in images.items()) / seconds
            values["time/macs_per_s"] = rate
            values |= {"time/macs_share_of_peak": rate / peak} if peak else {}
        self._images = {}
        return values


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors have had on a GPU; on a CPU the most that the process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def macs_by_side(net: nn.Module, sides: Sequence[int], device: torch.device) -> Mapping[int, int]:
    """MACs of one image's forward pass for each side in pixels; the net is not changed.

    Collective, since the first forward pass of a net may be.
    """
    return {side: cost.measure(deepcopy(net), torch.zeros(1, 3, side, side, device=device)).macs for side in sides}


def matrix_peak(device: torch.device, *, autocast: bool, folder: Path | None = None) -> float:
    """The MACs a second that this process reaches in matrix products, in the precision of a run with `autocast`.

    folder: where peaks are remembered by device, precision and threads; None: in the user's cache. Measuring takes less
    than a second.
    """
    key = _key(device, precision_of(device, autocast=autocast))
    path = (folder or Path.home() / ".cache" / "adaptnet" / "peaks") / f"{key}.json"
    known = _remembered(path)
    if known is None:
        known = _measured(device, torch.bfloat16 if autocast else torch.float32)
        with suppress(OSError):  # a read-only home: it is measured again
            write_json(path, {"macs_per_s": known})
    return known


def _key(device: torch.device, precision: str) -> str:
    """The file name of a peak."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()} {torch.get_num_threads()} threads"
    )
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{name} {precision} torch {torch.__version__}").strip("-")[:200]


def _cpu() -> str:
    """The name of the processor."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _remembered(path: Path) -> float | None:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    rate = found.get("macs_per_s") if isinstance(found, dict) else None
    return rate if isinstance(rate, float) and rate > 0 else None


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few products."""
    rows, generator = ROWS[device.type], torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, rows, generator=generator).to(device, dtype) for _ in range(2))
    with _tf32(device):
        _seconds(a, b)
        started, best = time.perf_counter(), _seconds(a, b)
        for _ in range(TRIES - 1):
            if time.perf_counter() - started > MOST_S:
                break
            best = min(best, _seconds(a, b))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return rows**3 / best


def _seconds(a: Tensor, b: Tensor) -> float:
    """Of a product; on a CPU those that each thread computed, so that other programs change nothing."""
    if a.device.type == "cpu":
        used = time.process_time()
        a @ b
        return max(time.process_time() - used, 1e-9) / torch.get_num_threads()
    start = time.perf_counter()
    a @ b
    torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """Computes products in TF32 where convolutions do."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
