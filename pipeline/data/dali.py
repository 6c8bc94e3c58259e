"""Loaders of decoded images by DALI: TrainLoader, EvalLoader and `decode`; the CPU or the GPU decodes.

A background thread reads ahead, passes batches of encoded bytes and crops (crop_geometry.py) to DALI, and keeps a few
decoded batches ready. On a GPU, DALI does all of it. On a CPU, DALI decodes the window, and torch's antialiased uint8
resize works image by image in threads: it gives torchvision's pixels and is faster than DALI's (bench/loader.py).
b images of a rank's batch, S their side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline import ranks
from pipeline.data import augment
from pipeline.data.background import Background, BatchDecoder, DecodedBatch, LoaderFailure
from pipeline.data.bad import NO_SIZE, BadImages
from pipeline.data.config import DataConfig
from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.feed import EvalSource, Request, TrainSource, read_ahead
from pipeline.data.image_headers import upright_size
from pipeline.data.in_memory import Item, Kept, NotKept, Whole, chosen, unresized
from pipeline.data.index import ImageIndex
from pipeline.data.philox import Ints
from pipeline.data.reader import Reader
from pipeline.data.stream import Stream
from pipeline.data.verdict import DecodeError, Pixels, decodable, decode_errors
from pipeline.errors import ConfigError, UndecodableError

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.backend import TensorGPU
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.types import DALIDataType

RESIZED_PER_TASK = 8  # images


OnEvent: TypeAlias = Callable[..., None]  # (kind of event, **details)


@dataclass(frozen=True)
class TrainBatch:
    """One rank's share of a step. `rows` are the images that are shown, replacements of bad ones included."""

    step: int
    epoch: int
    images: Tensor  # uint8 [b, S, S, 3] on the device
    labels: Tensor  # [b] i64 on the device
    draws: Mapping[
        str, Tensor
    ]  # of each operation of data.augment, on the device or, where it asks for it, on the host
    rows: Ints  # [b]
    positions: Ints  # [b], in the endless stream


@dataclass(frozen=True)
class DecodedEvalBatch:
    """Some images of an evaluation."""

    images: Tensor  # uint8 [b, S, S, 3] on the device
    labels: Tensor  # [b] i64 on the device
    rows: Ints  # [b]


class TrainLoader:
    """This rank's share of every batch from `start_step` on, without end.

    Pixels are a pure function of the seed, the step, the images and which of them are known as bad. A bad image is
    replaced by `BadImages.replacement`, with the window and the draws of the image that it replaces. If decoding fails,
    the background thread ends, the images to blame are found, and the loader resumes at the same step. A batch counts
    as used when it is returned, not when it is prepared. Raises DataError above `data.max_bad_share`.
    """

    def __init__(
        self,
        index: ImageIndex,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world: int,
        device: torch.device,
        threads: int,
        start_step: int = 0,
        bad: BadImages | None = None,
        on_event: OnEvent | None = None,
        read_latency_s: float = 0.0,
        make_decoder: Callable[[DecoderConfig], BatchDecoder] | None = None,
    ) -> None:
        """batch_size counts the images of all ranks; read_latency_s is added to each read, for benchmarks.

        make_decoder: DALI's by default. Raises ConfigError where a rank would get no image.
        """
        self.index, self.config, self.device = index, config, device
        self.stream = Stream(index, config, seed=seed, batch_size=batch_size)
        self.bad = BadImages(index, config.max_bad_share) if bad is None else bad
        self._step, self._rank, self._world, self._latency_s = start_step, rank, world, read_latency_s
        self._on_event, self._new_decoder = on_event, make_decoder or Decoder
        self._named: set[int] = set()
        decoder_config = DecoderConfig.of(config, device, threads, self.stream.most_rows(rank, world))
        self._on_cpu, self._decoder_config = replace(decoder_config, gpu=False), decoder_config
        self._pictures = chosen(index, config.in_memory, gpu=decoder_config.gpu)
        self._thread: Background | None = None

    def __iter__(self) -> Iterator[TrainBatch]:
        return self

    def __next__(self) -> TrainBatch:
        decoded, pause_s = self._next_decoded()
        plan, rows = decoded.request.plan, decoded.request.rows
        assert plan is not None and plan.step == self._step
        for row, reason in decoded.request.unreadable:
            self.bad.add(row, reason)
        self._report(plan.rows[plan.rows != rows], pause_s)
        self._step += 1
        return TrainBatch(
            step=plan.step,
            epoch=plan.epoch,
            images=_handed_over(decoded.images, self.device),
            labels=_labels(self.index, rows, self.device),
            draws=augment.placed(self.config.augment, plan.draws, self.device),
            rows=rows,
            positions=plan.positions,
        )

    def _next_decoded(self) -> tuple[DecodedBatch, float]:
        """The next batch without images that are known as bad, and how long decode errors have delayed it, in s."""
        stopped_at = None
        while True:
            decoded = self._background().get()
            assert isinstance(decoded, DecodedBatch | LoaderFailure)  # the stream has no end
            if isinstance(decoded, LoaderFailure):
                stopped_at = stopped_at or time.monotonic()
                self.close()
                self._learn(decoded)
            elif any(int(row) in self.bad for row in decoded.request.rows):  # found by another rank since
                self.close()
            else:
                return decoded, 0.0 if stopped_at is None else time.monotonic() - stopped_at

    def _learn(self, failure: LoaderFailure) -> None:
        """Remembers what the failure says of its images: they do not stay in memory, or they are bad."""
        if not self._forgets(failure):
            for row, reason in failure.bad_rows(self._single):
                self.bad.add(row, reason)

    def _forgets(self, failure: LoaderFailure) -> bool:
        """Whether the failure is about what was to stay in memory, and does not any more: images, or the whole set."""
        if self._pictures is None:
            return False
        if isinstance(failure.error, NotKept):
            if self.config.in_memory is True:
                raise ConfigError(
                    "data.in_memory (=true): of what a GPU decodes only lossless pictures that are not resized stay in "
                    "memory; set data.in_memory=auto, or data.decoder=cpu",
                    key="data.in_memory",
                    subject=True,
                )
            self._pictures = None
            return True
        refused = failure.not_whole(self._single)
        for row in refused:
            self._pictures.refuse(row)
        return bool(refused)

    def _decoder(self) -> BatchDecoder:
        return self._new_decoder(self._decoder_config if self._pictures is None else self._on_cpu)

    def _single(self) -> BatchDecoder:
        """A decoder of single images."""
        return self._new_decoder((self._decoder_config if self._pictures is None else self._on_cpu).single())

    def fill(self) -> None:
        """Waits until the next batches are decoded: then the loader has the memory that it needs."""
        self._background().fill()

    def close(self) -> None:
        """Ends the background thread and frees its decoder; the next batch starts it again. Pictures stay in memory."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _background(self) -> Background:
        if self._thread is None:
            reader = Reader(self.index, self.config.io_threads, self._latency_s)
            known = BadImages(self.index, max_share=1.0)
            known.merge(self.bad.state())
            source = TrainSource(self.stream, reader, known, self._rank, self._world, self._pictures)
            requests = read_ahead(source, count(self._step), self.config.read_ahead)
            self._thread = Background(requests, reader, self._decoder, self.device)
        return self._thread

    def _report(self, rows: Ints, pause_s: float) -> None:
        """Reports each bad row once."""
        for row in {int(row) for row in rows} - self._named:
            self._named.add(row)
            if self._on_event is not None:
                self._on_event("bad-image", file=self.index.file(row), reason=self.bad.reason(row), pause_s=pause_s)


class EvalLoader:
    """Every image of an index once over all ranks, as evaluation sees it; can be iterated repeatedly.

    Unreadable images are left out. After an iteration `unreadable` lists those of this rank's share.
    """

    def __init__(
        self,
        index: ImageIndex,
        config: DataConfig,
        *,
        batch_size: int,
        rank: int,
        world: int,
        device: torch.device,
        threads: int,
        bad: BadImages | None = None,
    ) -> None:
        """batch_size counts this rank's images; bad: images that are known as unreadable."""
        self.index, self.config, self.device, self.batch_size = index, config, device, batch_size
        self.rows = np.arange(len(index))[ranks.shard(len(index), rank, world)]
        self._decoder_config = DecoderConfig.of(config, device, threads, batch_size)
        self._lost = {int(row): NO_SIZE for row in self.rows[index.height[self.rows] == 0]}
        if bad is not None:
            self._lost |= {int(row): bad.reason(int(row)) for row in self.rows if int(row) in bad}

    @property
    def unreadable(self) -> list[str]:
        """Files of this rank's unreadable images, as far as they are known."""
        return [self.index.file(row) for row in sorted(self._lost)]

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[DecodedEvalBatch]:
        number = 0
        while number < len(self):
            thread = self._background(number)
            try:
                while isinstance(decoded := thread.get(), DecodedBatch):
                    number += 1
                    self._lost |= dict(decoded.request.unreadable)
                    if len(decoded.request.rows):
                        yield self._batch(decoded)
            finally:
                thread.close()
            if isinstance(decoded, LoaderFailure):
                self._lost |= dict(decoded.bad_rows(lambda: Decoder(self._decoder_config.single())))

    def _background(self, number: int) -> Background:
        reader = Reader(self.index, self.config.io_threads)
        source = EvalSource(self.index, self.config, reader, self.rows, self.batch_size, dict(self._lost))
        requests = read_ahead(source, range(number, len(self)), self.config.read_ahead)
        return Background(requests, reader, lambda: Decoder(self._decoder_config), self.device)

    def _batch(self, decoded: DecodedBatch) -> DecodedEvalBatch:
        rows = decoded.request.rows
        return DecodedEvalBatch(_handed_over(decoded.images, self.device), _labels(self.index, rows, self.device), rows)


def decode(encoded: Sequence[bytes], config: DataConfig, device: torch.device | str, threads: int = 1) -> Tensor:
    """Images from any source with the pixels of evaluation: uint8 [B, S, S, 3] on the device.

    Raises UndecodableError naming the positions that cannot be decoded.
    """
    decoding = Decoding(config, device, threads, most=max(1, len(encoded)))
    try:
        return decoding(encoded)
    finally:
        decoding.close()


class Decoding:
    """`decode` with one decoder for many calls, each of at most `most` images; threads take turns."""

    def __init__(self, config: DataConfig, device: torch.device | str, threads: int, most: int) -> None:
        self.most, self._config, self._device = most, config, torch.device(device)
        self._decoder_config = DecoderConfig.of(config, self._device, threads, most)
        self._decoder: Decoder | None = None
        self._lock = Lock()

    def __call__(self, encoded: Sequence[bytes]) -> Tensor:
        """Images uint8 [B, S, S, 3] on the device. Raises UndecodableError naming the positions that do not decode."""
        reasons, usable = dict[int, str](), dict[int, bytes]()
        for position, each in enumerate(encoded):
            try:
                usable[position] = decodable(each)
            except DecodeError as error:
                reasons[position] = str(error)
        sizes = np.array([upright_size(each) for each in usable.values()], dtype=np.int32).reshape(-1, 2)
        request = Request(
            rows=np.array(list(usable), dtype=np.int64),
            images=list(usable.values()),
            geometry=self._config.eval_geometry(sizes),
        )
        images = torch.empty(0, self._config.side_for_eval, self._config.side_for_eval, 3, dtype=torch.uint8)
        with self._lock:
            try:
                images = self._take(request) if usable else images
            except DecodeError as error:
                self.close()
                failure = LoaderFailure(error, [request])
                reasons |= dict(failure.bad_rows(lambda: Decoder(self._decoder_config.single())))
        if reasons:
            raise UndecodableError(len(encoded), reasons)
        return _handed_over(images, self._device)

    def _take(self, request: Request) -> Tensor:
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            if self._decoder is None:
                self._decoder = Decoder(self._decoder_config)
            self._decoder.put(request.images, request.geometry)
            return self._decoder.take()

    def close(self) -> None:
        """Frees the decoder; the next call makes another."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


# --- from bytes to pixels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderConfig:
    """Where a decoder works and with which resources."""

    device: torch.device
    gpu: bool  # decodes on the GPU
    threads: int
    most: int  # images of a batch
    resize: Literal["torch", "dali"] | None = None  # None: torch on a CPU, DALI on a GPU

    fancy_upsampling: bool = True
    hw_decoder_load: float = 0.65  # used if `gpu`
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @classmethod
    def of(cls, config: DataConfig, device: torch.device, threads: int, most: int) -> DecoderConfig:
        """What a run's keys under `data:` ask for. Raises ConfigError where the device does not fit them."""
        gpu = _on_gpu(config, device)
        asked = (config.fancy_upsampling, config.hw_decoder_load, config.interpolation)
        return cls(device, gpu, threads, most, None, *asked)

    def single(self) -> DecoderConfig:
        """The same for batches of one image."""
        return replace(self, most=1, threads=1)

    @property
    def pinned(self) -> bool:
        """Whether images are in pinned memory, for the copy to the GPU."""
        return self.device.type == "cuda" and not self.gpu


class Decoder:
    """Turns encoded images into uint8 [b, S, S, 3]; batches come out in the order in which they were put in.

    A DecodeError leaves it unusable: close it and make another.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.in_dali = config.gpu or config.resize == "dali"
        self._pipeline = _pipeline(config, self.in_dali)
        self._threads = ThreadPoolExecutor(config.threads, "adaptnet-resize") if not self.in_dali else None
        self._stream = torch.cuda.Stream(config.device) if config.gpu else None  # type: ignore[no-untyped-call]
        self._batches: deque[tuple[Sequence[Item], CropGeometry]] = deque()
        self._fed: deque[list[Pixels]] = deque()  # what DALI reads of the batches that it decodes

    def put(self, images: Sequence[Item], geometry: CropGeometry) -> None:
        """Starts to decode a batch. Only without a resize by DALI may it hold more than bytes."""
        self._batches.append((images, geometry))
        if isinstance(images, Kept) or not len(geometry):
            return
        encoded, windows = _to_decode(images, geometry)
        with decode_errors():
            feed = self._pipeline.feed_input
            self._fed.append([np.frombuffer(each, dtype=np.uint8) for each in encoded])
            feed("encoded", self._fed[-1])
            feed("start", np.ascontiguousarray(windows[:, :2]))
            feed("shape", np.ascontiguousarray(windows[:, 2:]))
            if self.in_dali:
                feed("size", geometry.sizes.astype(np.float32))
                feed("origin", geometry.origins)
                feed("square", np.full_like(geometry.origins, geometry.side_px))
            self._pipeline.schedule_run()

    def take(self) -> Tensor:
        """Waits for the oldest batch."""
        images, geometry = self._batches.popleft()
        if not len(geometry):
            return torch.empty(0, geometry.side_px, geometry.side_px, 3, dtype=torch.uint8, device=self.config.device)
        if isinstance(images, Kept):
            return self._from_memory(images, geometry)
        with decode_errors():
            (pictures,) = self._pipeline.share_outputs()
            if self.config.gpu:
                squares = self._copied_on_gpu(pictures.as_tensor())
            elif self.in_dali:
                squares = from_dlpack(pictures.as_tensor()).clone()
            else:
                decoded = (np.asarray(picture) for picture in pictures)
                squares = self._squares(_windows(images, decoded, geometry), geometry)
            self._pipeline.release_outputs()
            self._fed.popleft()
        return squares

    def close(self) -> None:
        """Frees the pipeline and the threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        del self._pipeline

    def _from_memory(self, images: Kept, geometry: CropGeometry) -> Tensor:
        squares = images.squares(geometry)
        if squares is None:
            return self._squares(_windows(images, (), geometry), geometry)
        return torch.from_numpy(squares).pin_memory() if self.config.pinned else torch.from_numpy(squares)

    def _copied_on_gpu(self, pictures: TensorGPU) -> Tensor:
        """A finished copy that torch owns, so that DALI may reuse its buffers."""
        assert self._stream is not None
        from nvidia.dali.plugin.pytorch import feed_ndarray

        with torch.cuda.stream(self._stream):  # a stream of its own does not wait for the net
            images = torch.empty(pictures.shape(), dtype=torch.uint8, device=self.config.device)
            feed_ndarray(pictures, images, cuda_stream=self._stream)
            self._stream.synchronize()
        return images

    def _squares(self, pictures: Sequence[Pixels], geometry: CropGeometry) -> Tensor:
        side, everything = geometry.side_px, range(len(pictures))
        images = torch.empty(len(pictures), side, side, 3, dtype=torch.uint8, pin_memory=self.config.pinned)
        squares, sizes, origins = images.numpy(), geometry.sizes.tolist(), geometry.origins.tolist()

        def cut(positions: Sequence[int]) -> None:
            for at in positions:
                _cut(_resized(pictures[at], sizes[at], self.config.interpolation), origins[at], squares[at])

        if unresized(geometry):
            cut(everything)
            return images
        assert self._threads is not None
        parts = [everything[at : at + RESIZED_PER_TASK] for at in everything[::RESIZED_PER_TASK]]
        deque(self._threads.map(cut, parts), maxlen=0)
        return images


def _to_decode(images: Sequence[Item], geometry: CropGeometry) -> tuple[list[bytes], NDArray[np.int32]]:
    """The images that are not in memory, and the window of each that is decoded, [b, 4]."""
    encoded, windows = list[bytes](), list[int]()
    for image, window in zip(images, geometry.windows.tolist(), strict=True):
        if isinstance(image, bytes):
            encoded.append(image)
            windows += window
        elif isinstance(image, Whole):
            encoded.append(image.encoded)
            windows += [0, 0, image.height, image.width]
    return encoded, np.array(windows, dtype=np.int32).reshape(-1, 4)


def _windows(images: Sequence[Item], decoded: Iterable[Pixels], geometry: CropGeometry) -> list[Pixels]:
    """The windows [h, w, 3] of all images, some of them decoded; a picture that was decoded whole is kept."""
    fresh, found = iter(decoded), []
    for image, (y, x, height, width) in zip(images, geometry.windows.tolist(), strict=True):
        if isinstance(image, bytes):
            found.append(next(fresh))
        else:
            picture = image.keep(next(fresh)) if isinstance(image, Whole) else image
            found.append(picture[y : y + height, x : x + width])
    return found


def _resized(picture: Pixels, size: list[int], mode: str) -> Pixels:
    """A picture [h, w, 3] at another (height, width)."""
    if list(picture.shape[:2]) == size:
        return picture
    planes = torch.from_numpy(picture)[None].permute(0, 3, 1, 2)  # channels_last, and is resized as such
    resized: Pixels = F.interpolate(planes, size=size, mode=mode, antialias=True).permute(0, 2, 3, 1)[0].numpy()
    return resized


def _cut(picture: Pixels, origin: list[int], square: Pixels) -> None:
    """Copies the part of a picture [h, w, 3] at `origin` (y, x) into `square` [S, S, 3], with zeros beyond its edges.

    By numpy, since torch would split each small copy among all CPUs.
    """
    (y, x), side, (height, width, _) = origin, len(square), picture.shape
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + side, height), min(x + side, width)
    if bottom - top < side or right - left < side:
        square[:] = 0
    if top < bottom and left < right:
        square[top - y : bottom - y, left - x : right - x] = picture[top:bottom, left:right]


def _pipeline(config: DecoderConfig, in_dali: bool) -> Pipeline:
    from nvidia.dali import fn, pipeline_def, types

    device_id = config.device.index or 0 if config.gpu else None
    depth = 2 if config.gpu else 1  # on a GPU the next batch is decoded while the last one is copied

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=config.most, num_threads=config.threads, device_id=device_id, prefetch_queue_depth=depth
    )
    def pipeline() -> DataNode:
        def given(name: str, dtype: DALIDataType, *, no_copy: bool = False) -> DataNode:
            return fn.external_source(name=name, dtype=dtype, ndim=1, no_copy=no_copy)

        pictures = fn.decoders.image_slice(
            given("encoded", types.UINT8, no_copy=True),  # DALI copies while it holds the GIL
            start=given("start", types.INT32),
            shape=given("shape", types.INT32),
            axis_names="HW",
            device="mixed" if config.gpu else "cpu",
            jpeg_fancy_upsampling=config.fancy_upsampling,  # torchvision and Pillow do it
            hw_decoder_load=config.hw_decoder_load if config.gpu else None,
        )
        if not in_dali:
            return pictures
        kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[config.interpolation]
        pictures = fn.resize(pictures, size=given("size", types.FLOAT), interp_type=kind, antialias=True)
        return fn.slice(
            pictures,
            start=given("origin", types.INT32),
            shape=given("square", types.INT32),
            axis_names="HW",
            out_of_bounds_policy="pad",
            fill_values=0,
        )

    built = pipeline()
    built.build()
    return built


def _on_gpu(config: DataConfig, device: torch.device) -> bool:
    if config.decoder == "gpu" and device.type != "cuda":
        raise ConfigError(
            "data.decoder (=gpu) needs a run on a GPU: set compute.device=cuda, or data.decoder=auto",
            key="data.decoder",
            subject=config.decoder,
        )
    return device.type == "cuda" and config.decoder != "cpu"


def _handed_over(images: Tensor, device: torch.device) -> Tensor:
    """The images on the device. Their memory is not reused by another stream while the caller's still reads it."""
    if images.is_cuda:
        images.record_stream(torch.cuda.current_stream(images.device))
    return images.to(device, non_blocking=True)


def _labels(index: ImageIndex, rows: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(index.label[rows].astype(np.int64)).to(device, non_blocking=True)
