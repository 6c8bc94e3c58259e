"""Runs a function in two processes that form a gloo process group."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Body = Callable[[int, Path], None]


def run(body: Body, folder: Path) -> None:
    """Calls body(rank, folder) in two processes and raises the error of either. `body` must be a module's function."""
    mp.spawn(_rank, (body, folder), nprocs=2)


def _rank(rank: int, body: Body, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    body(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # DDP keeps threads of gloo alive after the group is destroyed. One that frees a tensor while the interpreter shuts
    # down aborts the process, so skip the shutdown.
    os._exit(0)
