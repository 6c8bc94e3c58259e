"""Two processes with a gloo group, for laws that say what ranks owe each other."""

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
    """Calls body(rank, folder), a function of a module, in two processes; raises what one of them raises."""
    mp.spawn(_rank, (body, folder), nprocs=2)


def _rank(rank: int, body: Body, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    body(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # DDP keeps gloo's threads alive beyond the group's end, and one that still drops a tensor while the interpreter
    # is being taken down aborts the process: so it is not taken down.
    os._exit(0)
