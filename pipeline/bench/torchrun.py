"""What each process of `torchrun -m pipeline.bench.torchrun SETTING OUT` does: the bare loop, measured."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed import destroy_process_group, init_process_group

from pipeline import ranks, run_config
from pipeline.bench import step


def main(order: str, path: str) -> None:
    """Writes rank 0's images/s of the global batch to `path`."""
    init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    plain = json.loads(Path(order).read_text(encoding="utf-8"))
    config = run_config.from_mapping(plain["recipe"], order)
    setting = step.LoopSetup(config, plain["num_classes"], plain["steps"], plain["warm"])
    rate = step.bare(setting)
    if ranks.rank() == 0:
        Path(path).write_text(json.dumps(rate))
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # DDP keeps gloo's threads alive beyond the group's end; one of them may abort an interpreter that ends
