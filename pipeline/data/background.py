"""Prepares a loader's batches in a background thread, and finds the images to blame when decoding fails."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.feed import Request
from pipeline.data.in_memory import Item, Whole
from pipeline.data.reader import Reader
from pipeline.data.verdict import DecodeError

IN_DECODER = 2  # batches in the decoder besides the one that is taken out
READY = 2  # decoded batches that wait for the training


class BatchDecoder(Protocol):
    """Takes in batches and returns them decoded in the same order; unusable after an error."""

    def put(self, images: Sequence[Item], geometry: CropGeometry) -> None:
        """Starts to decode a batch. Raises DecodeError."""

    def take(self) -> Tensor:
        """Waits for the oldest batch: uint8 [b, S, S, 3]. Raises DecodeError."""

    def close(self) -> None:
        """Frees the decoder's threads and memory."""


@dataclass(frozen=True)
class DecodedBatch:
    """A decoded batch: images uint8 [b, S, S, 3]."""

    request: Request
    images: Tensor


@dataclass(frozen=True)
class LoaderFailure:
    """The error that ended the background thread.

    requests: the batches that were in the decoder if it is a DecodeError, oldest first.
    """

    error: BaseException
    requests: Sequence[Request] = ()

    def bad_rows(self, decoder: Callable[[], BatchDecoder]) -> list[tuple[int, str]]:
        """(row, reason) of the images to blame, in the first batch that has any; `decoder` makes one for single images.

        Each image is decoded alone. Re-raises the error if no image is to blame.
        """
        for request in self.requests:
            blamed = list(_undecodable(request, _encoded(request), decoder))
            if blamed:
                return blamed
        raise self.error

    def not_whole(self, decoder: Callable[[], BatchDecoder]) -> set[int]:
        """Rows of the images that were to be decoded whole, for the memory, and cannot be."""
        whole = [
            {at: each for at, each in enumerate(request.images) if isinstance(each, Whole)} for request in self.requests
        ]
        found = (_undecodable(*both, decoder) for both in zip(self.requests, whole, strict=True))
        return {row for each in found for row, _ in each}


def _encoded(request: Request) -> dict[int, bytes]:
    """The images that were decoded, by position; those from memory were not."""
    encoded = {at: each.encoded if isinstance(each, Whole) else each for at, each in enumerate(request.images)}
    return {at: each for at, each in encoded.items() if isinstance(each, bytes)}


def _undecodable(
    request: Request, images: Mapping[int, Item], new_decoder: Callable[[], BatchDecoder]
) -> Iterator[tuple[int, str]]:
    """(row, reason) of those of the images, given by position, that do not decode."""
    decoder = new_decoder()
    try:
        for position, image in images.items():
            try:
                decoder.put([image], request.geometry.only(position))
                decoder.take()
            except DecodeError as error:
                yield int(request.rows[position]), str(error)
                decoder.close()
                decoder = new_decoder()
    finally:
        decoder.close()


class Background:
    """A thread that reads and decodes `requests` and keeps READY batches ready.

    It creates the decoder by `decoder` and owns it and the reader; `close` ends all three. `device` is where batches
    go: a thread starts on the first GPU, and would make a context there.
    """

    def __init__(
        self, requests: Iterator[Request], reader: Reader, decoder: Callable[[], BatchDecoder], device: torch.device
    ) -> None:
        self._requests, self._reader, self._decoder, self._device = requests, reader, decoder, device
        self._ready: queue.Queue[DecodedBatch | LoaderFailure | None] = queue.Queue(READY)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaptnet-loader", daemon=True)
        self._thread.start()

    def get(self) -> DecodedBatch | LoaderFailure | None:
        """The next batch, or None after the last one. Nothing follows None or a failure."""
        return self._ready.get()

    def fill(self) -> None:
        """Waits until READY batches are ready, or nothing more comes."""
        while self._thread.is_alive() and not self._ready.full():
            time.sleep(0.01)

    def close(self) -> None:
        """Ends the thread, the decoder and the reader; waits for them."""
        self._closing.set()
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        in_decoder: deque[Request] = deque()
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with closing(self._decode(in_decoder)) as batches:
                while not self._closing.is_set() and (batch := next(batches, None)) is not None:
                    self._hand_over(batch)
            self._hand_over(None)
        except BaseException as error:  # whatever the error is, the caller must not wait forever
            self._hand_over(LoaderFailure(error, tuple(in_decoder) if isinstance(error, DecodeError) else ()))

    def _hand_over(self, item: DecodedBatch | LoaderFailure | None) -> None:
        while not self._closing.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                break

    def _decode(self, in_decoder: deque[Request]) -> Generator[DecodedBatch]:
        with closing(self._decoder()) as decoder:
            for request in self._requests:
                in_decoder.append(request)
                decoder.put(request.images, request.geometry)
                if len(in_decoder) > IN_DECODER:
                    yield _take(decoder, in_decoder)
            while in_decoder:
                yield _take(decoder, in_decoder)


def _take(decoder: BatchDecoder, in_decoder: deque[Request]) -> DecodedBatch:
    images = decoder.take()
    return DecodedBatch(in_decoder.popleft(), images)
