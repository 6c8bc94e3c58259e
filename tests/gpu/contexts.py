"""Prints which of 8 GPUs have a context after each part of the work of the rank on the fourth, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nvidia.dali.plugin.pytorch as dali_torch
import torch
from null_gpu import contexts

from pipeline.data import toy
from pipeline.data.config import DataConfig
from pipeline.data.dali import Decoder, EvalLoader, TrainLoader
from pipeline.data.index import open_splits

DEVICE = torch.device("cuda", 3)
seen: dict[str, list[int]] = {}


class Pictures:
    """What DALI gives: it runs on no null GPU."""

    def shape(self) -> list[int]:
        return [2, 8, 8, 3]


class OnGpu(Decoder):
    """A decoder on the GPU from its first allocation on, but for DALI's pipeline, which decodes on the CPU."""

    def take(self):
        decoded = super().take()
        self._stream = torch.cuda.Stream(DEVICE)
        self._copied_on_gpu(Pictures())
        return decoded


def main() -> None:
    dali_torch.feed_ndarray = lambda pictures, images, cuda_stream: images
    torch.cuda.set_device(DEVICE)  # as Ray does in the thread that trains
    folder = toy.make(Path(sys.argv[1]), num_classes=2, train=32, val=16, side_px=16)
    config = DataConfig(root=folder, side_px=16, decoder="cpu")
    splits = open_splits(config, seed=1)
    common = {"rank": 3, "world": 8, "device": DEVICE, "threads": 1}
    with TrainLoader(splits.train, config, seed=1, batch_size=16, make_decoder=OnGpu, **common) as loader:
        next(loader)
    seen["training batches"] = contexts()
    for _ in EvalLoader(splits.val, config, batch_size=2, **common):
        pass
    seen["evaluation batches"] = contexts()
    print(json.dumps(seen))


main()
