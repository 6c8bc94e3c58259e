"""One process of `torchrun -m pipeline.bench.torchrun SETUP OUT`: measures the bare loop."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed import destroy_process_group, init_process_group

from pipeline import ranks, run_config
from pipeline.bench import step


def main(setup_file: str, path: str) -> None:
    """Runs the bare loop of `setup_file`; rank 0 writes the images/s of the global batch to `path`. Collective."""
    init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    plain = json.loads(Path(setup_file).read_text(encoding="utf-8"))
    config = run_config.from_mapping(plain["recipe"], setup_file, stored=True)
    setup = step.LoopSetup(config, plain["num_classes"], plain["steps"], plain["warm"])
    rate = step.bare(setup)
    if ranks.rank() == 0:
        Path(path).write_text(json.dumps(rate))
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive the process group; one of them may abort an interpreter that exits normally
