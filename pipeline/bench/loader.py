"""Training images/s of our loader, of DALI's own file reader with the same operators, and of torchvision's DataLoader.

All three decode, crop a random-resized window, resize it with antialiasing, flip half of the images and return uint8
batches, on the same CPUs and from the page cache. They take turns A B C A B C …. `index_only` measures an index alone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from pipeline.bench.rows import BenchRow, compare, interleave
from pipeline.data import augment
from pipeline.data import index as indexes
from pipeline.data.config import DataConfig
from pipeline.data.dali import TrainLoader
from pipeline.data.index import ImageIndex, open_index
from pipeline.data.stream import Stream

BATCH, SIDE = 64, 224
MOST_IMAGES = 2048  # images of the set that are copied to single files for the two peers
WARM = 12  # batches at the start of a turn that are not timed: more than any loader prefetches
OURS, WITHOUT_LATENCY = "ours", "ours without latency"
NATIVE, TORCHVISION = "DALI file reader", "torchvision DataLoader"
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000


def loader(
    root: Path, *, read_latency_s: float = 0.0, seconds: float = 8.0, rounds: int = 5, threads: int = 2
) -> list[BenchRow]:
    """Compares our loader with both peers on `threads` CPUs; with `read_latency_s` added to each read, against itself.

    `seconds` is the length of one turn.
    """
    index = open_index(root).subset(slice(0, MOST_IMAGES))
    with ExitStack() as stack, _on_cpus(threads):
        if read_latency_s:
            makers = {OURS: _ours(index, threads, read_latency_s), WITHOUT_LATENCY: _ours(index, threads, 0.0)}
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="adaptnet-bench-")))
            files = _loose(index, folder)
            makers = {
                OURS: _ours(index, threads, 0.0),
                NATIVE: _native(files, threads),
                TORCHVISION: _torchvision(files, threads),
            }
        runs = {name: _rate(stack.enter_context(maker), seconds) for name, maker in makers.items()}
        return compare(interleave(runs, rounds), OURS)


def _rate(batches: Iterator[Tensor], seconds: float) -> Callable[[], float]:
    """A function that measures the images/s of one turn, after it has drained the batches prefetched meanwhile."""

    def run() -> float:
        for _ in range(WARM):
            next(batches)
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            images += len(next(batches))
        return images / (time.perf_counter() - started)

    return run


@contextmanager
def _on_cpus(count: int) -> Iterator[None]:
    """Pins this thread and its children to `count` of its CPUs; torch runs on one thread, as in a worker."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(before)[:count])
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


@contextmanager
def _ours(index: ImageIndex, threads: int, read_latency_s: float) -> Iterator[Iterator[Tensor]]:
    config = DataConfig(root=index.root, side_px=SIDE, in_memory=False)
    made = TrainLoader(
        index,
        config,
        seed=0,
        batch_size=BATCH,
        rank=0,
        world=1,
        device=torch.device("cpu"),
        threads=threads,
        read_latency_s=read_latency_s,
    )
    with made:
        yield (augment.apply_to_uint8(config.augment, batch.images, batch.draws) for batch in made)


@contextmanager
def _native(files: list[tuple[str, int]], threads: int) -> Iterator[Iterator[Tensor]]:
    """DALI's file reader with its fused random crop, as in NVIDIA's examples, and its own iterator for torch."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, seed=0)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[object, object]:
        encoded, label = fn.readers.file(
            files=[path for path, _ in files], labels=[label for _, label in files], random_shuffle=True
        )
        images = fn.decoders.image_random_crop(encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), label

    made = DALIGenericIterator(pipeline(), ["images", "labels"])
    yield (batch[0]["images"] for batch in made)


@contextmanager
def _torchvision(files: list[tuple[str, int]], threads: int) -> Iterator[Iterator[Tensor]]:
    from torch.utils.data import DataLoader, RandomSampler

    from pipeline.compat import torch_data

    dataset = Photographs(files)
    endless = RandomSampler(dataset, replacement=True, num_samples=1 << 40)
    made = DataLoader(dataset, BATCH, sampler=endless, num_workers=threads, multiprocessing_context="spawn")
    batches = iter(made)
    yield (images for images, _ in batches)
    torch_data.shut_down_workers(batches)


class Photographs(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Items (image uint8 [3, S, S], label), decoded and augmented by torchvision v2."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        from torchvision.transforms import v2

        self.files = files
        self.transform = v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        from torchvision.io import ImageReadMode, decode_image, read_file

        path, label = self.files[position]
        return self.transform(decode_image(read_file(path), ImageReadMode.RGB)), label


def _loose(index: ImageIndex, folder: Path) -> list[tuple[str, int]]:
    """Copies each image to a file of its own; (path, label) of each."""
    files = []
    for row in range(len(index)):
        path, offset, length = index.location(row)
        copy = folder / f"{row}.jpg"
        with open(path, "rb") as source:
            copy.write_bytes(os.pread(source.fileno(), length, offset))
        files.append((str(copy), int(index.label[row])))
    return files


# --- the index --------------------------------------------------------------------------------------------------


def index_only(images: int = IMAGENET_IMAGES, classes: int = IMAGENET_CLASSES) -> list[BenchRow]:
    """A worker's costs of an index of a synthetic set: seconds to open it, memory, seconds for an epoch's order."""
    with TemporaryDirectory(prefix="adaptnet-bench-") as folder:
        made = indexes.synthetic(images, classes, Path(folder))
        with multiprocessing.get_context("spawn").Pool(1) as worker:
            costs = worker.apply(_index_costs, (made,))
        shutil.rmtree(made.folder)
    units = {"load": "s", "memory added": "MB", "epoch order, full": "s", "epoch order, block": "s"}
    return [BenchRow(f"index of {images:,} images: {name}", costs[name], unit) for name, unit in units.items()]


def _index_costs(index: ImageIndex) -> dict[str, float]:
    """Measures in a process that has done nothing else."""
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    started = time.perf_counter()
    assert int(index.offset[-1]) >= 0 and int(np.max(index.height)) > 0 and len(index.classes) > 0
    load_s = time.perf_counter() - started
    orders = {}
    for shuffle in ("full", "block"):
        config = DataConfig(root=index.root, shuffle=shuffle)
        stream = Stream(index, config, seed=0, batch_size=1024)
        stream.plan(0, 0, 1)
        started = time.perf_counter()
        stream.order(1)
        orders[f"epoch order, {shuffle}"] = time.perf_counter() - started
    return {"load": load_s, "memory added": (process.memory_info().rss - before) / 1e6, **orders}
