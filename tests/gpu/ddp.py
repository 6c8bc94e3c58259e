"""Steps under DistributedDataParallel of two ranks on the null GPU, as JSON: kernels, waits, warnings, collectives.

The process group is of this rank alone: its collectives are done at once and change nothing. Weights are not compared
between the ranks.

usage: python ddp.py RECIPE[,key=value...]...   with nullgpu's library preloaded
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from dataclasses import asdict
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as torch_ddp
from null_gpu import Counts
from torch._C._distributed_c10d import HashStore, _create_work_from_future
from torch.futures import Future

from pipeline import ranks

collectives: Counter[str] = Counter()


class Done(dist.ProcessGroup):
    """A group of two ranks in which every collective is over when it begins."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._size = size

    def _done(self, name: str, tensors: Any) -> Any:
        first = tensors[0]
        while isinstance(first, list | tuple):
            first = first[0]
        collectives[f"{name} on {first.device.type}"] += 1
        future: Future[Any] = Future()
        future.set_result(tensors)
        return _create_work_from_future(future)

    def allreduce(self, tensors: Any, options: Any = None) -> Any:
        return self._done("all-reduce", tensors)

    def broadcast(self, tensors: Any, options: Any = None) -> Any:
        return self._done("broadcast", tensors)

    def allgather(self, outputs: Any, tensors: Any, options: Any = None) -> Any:
        return self._done("all-gather", tensors)

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return "done"


def main() -> None:
    torch.cuda.set_device(measure.DEVICE)
    dist.Backend.register_backend("done", lambda store, rank, size, timeout: Done(rank, size), devices=["cuda", "cpu"])
    dist.init_process_group("done", rank=0, world_size=2, store=HashStore())
    torch_ddp._verify_param_shape_across_processes = lambda *_, **__: None  # gathers, which changes nothing here
    ranks.gather = lambda value: [value] * 2  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for word in sys.argv[1:]:
        recipe, *overrides = word.split(",")
        collectives.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps = measure.measured(recipe, tuple(overrides), policies=False)
        said = sorted({str(each.message).splitlines()[0] for each in caught})
        found[word] = {**steps, "said": said, "collectives": dict(collectives)}
    print(json.dumps(found, default=lambda value: asdict(value) if isinstance(value, Counts) else str(value)))


main()
