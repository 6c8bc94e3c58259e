"""JPEG decoding on the GPU: does it survive, how fast is it, are the pixels right, are broken files named."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.gpu import photographs
from infra.gpu.environment import wait
from infra.gpu.run import Run
from pipeline.data.config import DataConfig
from pipeline.data.dali import EvalLoader, TrainLoader, decode
from pipeline.data.index import ImageIndex, open_index
from pipeline.errors import UndecodableError

Array: TypeAlias = NDArray[Any]
BATCH = 64
FEEDS: tuple[tuple[str, int, dict[str, object]], ...] = (  # words, threads, keys under data:
    ("", 16, {}),
    (", not fancy", 16, {"fancy_upsampling": False}),
    (", hardware 0.9", 16, {"hw_decoder_load": 0.9}),
    (", 8 threads", 8, {}),
)


@dataclass(frozen=True)
class Way:
    """A way to decode. gpu: DALI's mixed decoder; roi: only a window is decoded, else a slice is taken after it."""

    name: str
    roi: bool = True
    gpu: bool = True
    fancy: bool = True
    hardware: float = 0.65  # hw_decoder_load
    threads: int = 4


def ways() -> Iterator[Way]:
    """What is tried for crashes."""
    for roi, name in ((True, "ROI"), (False, "whole, then slice")):
        plain = Way(name, roi=roi)
        yield plain
        yield replace(plain, name=f"{name}, hardware 0", hardware=0.0)
        yield replace(plain, name=f"{name}, hardware 0.9", hardware=0.9)
        yield replace(plain, name=f"{name}, no fancy upsampling", fancy=False)


class Turn:
    """A DALI pipeline of one way: windows of 7/8 of each side, resized to 224 px on the decoder's device."""

    def __init__(self, run: Run, way: Way, batch: int, *, resize: bool = True) -> None:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = way.gpu and not run.small
        hardware: dict[str, Any] = {"hw_decoder_load": way.hardware} if on_gpu else {}
        settings: dict[str, Any] = {
            "device": "mixed" if on_gpu else "cpu",
            "jpeg_fancy_upsampling": way.fancy,
            **hardware,
        }
        window: dict[str, Any] = {"rel_start": (1 / 16, 1 / 16), "rel_shape": (7 / 8, 7 / 8), "axis_names": "HW"}

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=batch, num_threads=way.threads, device_id=0 if on_gpu else None, prefetch_queue_depth=1
        )
        def pipeline() -> Any:
            given = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            if way.roi:
                pictures = fn.decoders.image_slice(given, **window, **settings)
            else:
                pictures = fn.decoders.image(given, **settings)
                pictures = fn.slice(pictures, **window)
            return fn.resize(pictures, size=(224.0, 224.0), antialias=True) if resize else pictures

        self._batch = batch
        self.pipeline = pipeline()
        self.pipeline.build()

    def over(self, encoded: list[Array]) -> Iterator[Sequence[Array]]:
        """Decodes batches, the next one while the caller looks at the last."""
        batches = [encoded[at : at + self._batch] for at in range(0, len(encoded), self._batch)]
        self._put(batches[0])
        for following in [*batches[1:], None]:
            if following is not None:
                self._put(following)
            (pictures,) = self.pipeline.share_outputs()
            yield pictures
            self.pipeline.release_outputs()
        wait()

    def _put(self, batch: list[Array]) -> None:
        self.pipeline.feed_input("encoded", batch)
        self.pipeline.schedule_run()


def _encoded(run: Run) -> list[Array]:
    return [np.frombuffer(each, dtype=np.uint8) for each in photographs.encoded(run.data)]


def _index(run: Run, root: Path | None = None) -> ImageIndex:
    return open_index(root or run.data, run.work / "index")


def _config(run: Run, root: Path | None = None, **keys: object) -> DataConfig:
    side_px = 64 if run.small else 224
    return DataConfig(root=root or run.data, index=run.work / "index", side_px=side_px, **keys)  # type: ignore[arg-type]


def _batch(run: Run) -> int:
    return 8 if run.small else BATCH


def _threads(run: Run) -> int:
    return 2 if run.small else min(16, len(os.sched_getaffinity(0)))


def loader(run: Run, batch_size: int, threads: int, **keys: object) -> TrainLoader:
    """The loader of a training on one GPU; keys: those under `data:`."""
    return TrainLoader(
        _index(run),
        _config(run, **keys),  # type: ignore[arg-type]
        seed=1,
        batch_size=batch_size,
        rank=0,
        world=1,
        device=run.device,
        threads=threads,
    )


def roi(run: Run) -> None:
    """Our loader, which decodes windows on the GPU, over all images fifty times."""
    run.case("our loader, images", lambda: _roi(run))


def _roi(run: Run) -> None:
    rounds = 2 if run.small else 50
    steps = -(-len(_index(run)) // BATCH) * rounds
    start = time.perf_counter()
    with loader(run, min(BATCH, len(_index(run))), threads=4) as batches:
        images = sum(len(batch.images) for batch in islice(batches, steps))
        bad = len(batches.bad)
        wait()
    run.row("our loader, images", float(images), "images", f"{images / (time.perf_counter() - start):.0f} images/s")
    run.row("our loader, images called bad", float(bad))


def whole(run: Run) -> None:
    """Each way over all images ten times; 1 if it survived."""
    encoded = _encoded(run)
    for way in ways():
        run.case(way.name, partial(_survives, run, way, encoded))


def _survives(run: Run, way: Way, encoded: list[Array]) -> None:
    turn, start, rounds = Turn(run, way, _batch(run)), time.perf_counter(), 1 if run.small else 10
    for _ in range(rounds):
        for _pictures in turn.over(encoded):
            pass
    rate = rounds * len(encoded) / (time.perf_counter() - start)
    run.row(way.name, 1.0, "", f"no error; {rate:.0f} images/s")


def rates(run: Run) -> None:
    """Decoded images/s by threads, on the CPU and on the GPU, whole or windows."""
    encoded = _encoded(run)
    for threads in (1, 2) if run.small else (1, 4, 8, 16):
        for gpu in (True, False):
            for roi_only in (True, False):
                words = f"{'GPU' if gpu else 'CPU'}, {'ROI' if roi_only else 'whole'}, {threads} threads"
                way = Way(words, roi=roi_only, gpu=gpu, threads=threads)
                run.case(words, partial(_rate, run, way, encoded))
    for hardware in (0.0, 0.9):
        way = Way(f"GPU, whole, 8 threads, hardware {hardware:g}", roi=False, hardware=hardware, threads=8)
        run.case(way.name, partial(_rate, run, way, encoded))
    for roi_only in (True, False):
        way = Way(f"GPU, {'ROI' if roi_only else 'whole'}, 8 threads, not fancy", roi=roi_only, fancy=False, threads=8)
        run.case(way.name, partial(_rate, run, way, encoded))


def _rate(run: Run, way: Way, encoded: list[Array]) -> None:
    turn = Turn(run, way, _batch(run))
    for _pictures in turn.over(encoded):
        pass
    seconds, images = 0.0, 0
    start = time.perf_counter()
    while seconds < (0.1 if run.small else 1.0):
        images += sum(len(pictures) for pictures in turn.over(encoded))
        seconds = time.perf_counter() - start
    run.row(way.name, images / seconds, "images/s")


# --- from JPEG to trained step -----------------------------------------------------------------------------------


def feed(run: Run) -> None:
    """Images/s of the loader alone, of ResNet-50's step alone, and of both; then with other ways to decode."""
    run.case("nvJPEG", lambda: run.row("nvJPEG that nvImageCodec gets", _nvjpeg()))
    for words, threads, keys in FEEDS[: 2 if run.small else None]:
        run.case(f"loader and step{words}", partial(_feed, run, words, threads, keys))


def _nvjpeg() -> str:
    import torchvision  # noqa: F401  # carries another nvJPEG

    found = ctypes.CDLL("libnvjpeg.so.13")
    numbers = [ctypes.c_int() for _ in range(3)]
    for part, number in enumerate(numbers):
        found.nvjpegGetProperty(part, ctypes.byref(number))
    return ".".join(str(number.value) for number in numbers)


def _feed(run: Run, words: str, most_threads: int, keys: Mapping[str, object]) -> None:
    from infra.gpu.speed import EAGER, MILD, loaded_stepper, setup_of

    batch = 8 if run.small else 256
    setup = setup_of(run, "baseline/imagenet_resnet50", batch, run.small, EAGER, MILD)
    take, step = loaded_stepper(setup, _config(run))
    steps, threads = 2 if run.small else 16, min(most_threads, _threads(run))
    with loader(run, batch, threads, **keys) as batches:
        alone = batch / seconds_each(lambda: next(batches), steps)
        held = next(batches)
        trained = batch / seconds_each(lambda: step(take(held)), steps)
        both = batch / seconds_each(lambda: step(take(next(batches))), steps)
    run.row(f"loader alone{words}", alone, "images/s", f"{threads} threads, images from the page cache")
    run.row(f"step alone{words}", trained, "images/s", f"ResNet-50, batch {batch}, with normalisation and flips")
    run.row(f"loader and step{words}", both, "images/s", f"the limit is the {'loader' if alone < trained else 'step'}")
    run.row(f"step with loader over step alone or loader alone{words}", both / min(alone, trained))


def seconds_each(work: Callable[[], object], steps: int) -> float:
    """Seconds of one call after four."""
    for _ in range(4):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        work()
    wait()
    return (time.perf_counter() - start) / steps


# --- broken images -----------------------------------------------------------------------------------------------


def broken(run: Run) -> None:
    """Two broken JPEGs among 30 good ones: both loaders name them, and replace them with good images of their class."""
    root = run.work / "broken"
    if not root.exists():
        _break(run, root)
    run.case("CPU", lambda: _named(run, root, "CPU", torch.device("cpu")))
    run.case("GPU", lambda: _named(run, root, "GPU", run.device))
    run.case("GPU, evaluation", lambda: _named_in_evaluation(run, root))
    run.case("noise in the codes", lambda: _scan(run))


def _break(run: Run, root: Path) -> None:
    good = photographs.encoded(run.data)
    for at in range(32):
        place = root / f"class-{at % 2}" / f"{at:02d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        content = good[at % len(good)]
        if at == 9:
            content = content[: len(content) // 3]
        if at == 20:
            content = huffman_damaged(content)
        place.write_bytes(content)


def huffman_damaged(jpeg: bytes) -> bytes:
    """A JPEG with start, size and end, but a damaged Huffman table: only decoding shows it."""
    at = _first_table(jpeg) + 5
    return jpeg[:at] + b"\xc8" + jpeg[at + 1 :]


def _first_table(jpeg: bytes) -> int:
    """The place of the first Huffman table of the image itself: a thumbnail inside another segment has its own."""
    at = 2
    while jpeg[at : at + 2] != b"\xff\xc4":
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return at


def scan_damaged(jpeg: bytes) -> bytes:
    """A JPEG with noise in the second half of its pixels' codes."""
    half = len(jpeg) // 2
    noise = np.random.default_rng(0).integers(0, 255, len(jpeg) - half - 2, dtype=np.uint8).tobytes()
    return jpeg[:half] + noise + jpeg[-2:]


def _scan(run: Run) -> None:
    """What the two decoders say of noise; libjpeg-turbo only warns of it."""
    jpeg = scan_damaged(photographs.encoded(run.data)[0])
    for name, device in (("CPU", torch.device("cpu")), ("GPU", run.device)):
        try:
            decode([jpeg], _config(run), device)
            said = "decoded"
        except UndecodableError as error:
            said = str(error)
        run.row(f"noise in the codes, {name}", said)


def _named(run: Run, root: Path, name: str, device: torch.device) -> None:
    index, found = _index(run, root), list[str]()
    made = TrainLoader(
        index,
        _config(run, root, max_bad_share=1.0),
        seed=1,
        batch_size=16,
        rank=0,
        world=1,
        device=device,
        threads=2,
        on_event=lambda kind, **details: found.append(f"{details['file']}: {details['reason']}"),
    )
    with made as batches:
        images = sum(len(batch.images) for batch in islice(batches, 6))
        bad = batches.bad
        count = float(len(bad))
    run.row(name, count, "named", "; ".join(found) + f"; {images} images in their places")


def _named_in_evaluation(run: Run, root: Path) -> None:
    index = _index(run, root)
    batches = EvalLoader(
        index,
        _config(run, root, max_bad_share=1.0),
        batch_size=16,
        rank=0,
        world=1,
        device=run.device,
        threads=2,
    )
    images = sum(len(batch.rows) for batch in batches)
    run.row(
        "GPU, evaluation", float(len(batches.unreadable)), "named", f"{', '.join(batches.unreadable)}; {images} others"
    )


# --- pixels ------------------------------------------------------------------------------------------------------


def pixels(run: Run) -> None:
    """The differences between the CPU's and the GPU's pixels, in levels of 0..255."""
    encoded = _encoded(run)[:BATCH]
    for roi_only in (False, True):
        for fancy in (True, False):
            name = f"{'ROI' if roi_only else 'whole'}, {'fancy' if fancy else 'not fancy'}"
            run.case(name, partial(_pixels, run, name, Way(name, roi=roi_only, fancy=fancy), encoded))
    run.case("evaluation", lambda: _evaluated_pixels(run))


def _pixels(run: Run, name: str, way: Way, encoded: list[Array]) -> None:
    pictures = [_decoded(Turn(run, each, BATCH, resize=False), encoded) for each in (replace(way, gpu=False), way)]
    differences(run, name, [np.abs(a.astype(np.int16) - b.astype(np.int16)) for a, b in zip(*pictures, strict=True)])


def _decoded(turn: Turn, encoded: list[Array]) -> list[Array]:
    on_cpu = (batch.as_cpu() if hasattr(batch, "as_cpu") else batch for batch in turn.over(encoded))
    return [np.array(picture) for batch in on_cpu for picture in batch]


def differences(run: Run, name: str, found: list[Array]) -> None:
    """Rows of the mean and the largest difference over all pixels, by channel in the remark."""
    flat = np.concatenate([each.reshape(-1, 3) for each in found])
    means, most = flat.mean(axis=0), flat.max(axis=0)
    run.row(
        f"{name}, mean difference", float(means.max()), "levels", f"R, G, B: {', '.join(f'{m:.3f}' for m in means)}"
    )
    run.row(f"{name}, largest difference", float(most.max()), "levels", f"R, G, B: {', '.join(map(str, most))}")


def _evaluated_pixels(run: Run) -> None:
    encoded = photographs.encoded(run.data)[:BATCH]
    cpu, gpu = (_evaluated(run, encoded, device) for device in (torch.device("cpu"), run.device))
    differences(run, "evaluation", [(cpu.short() - gpu.short()).abs().numpy()])


def _evaluated(run: Run, encoded: list[bytes], device: torch.device) -> Tensor:
    return decode(encoded, _config(run), device, threads=4).cpu()
