"""Makes a loader's batches ahead of their use, in a thread; says which images were at fault when decoding fails."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.feed import Request
from pipeline.data.reader import Reader

IN_DECODER = 2  # batches put into the decoder beside the one that is taken out
READY = 2  # decoded batches that wait to be asked for


class BatchDecoder(Protocol):
    """Takes batches in and gives them out in the same order; of no more use after a RuntimeError."""

    def put(self, encoded: Sequence[bytes], geometry: CropGeometry) -> None: ...

    def take(self) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class DecodedBatch:
    """A decoded batch: images uint8 [b, S, S, 3]."""

    request: Request
    images: Tensor


@dataclass(frozen=True)
class LoaderFailure:
    """The thread has ended by `error`; `request` were in the decoder, oldest first, if it was the decoder's."""

    error: BaseException
    request: Sequence[Request] = ()

    def bad_rows(self, alone: Callable[[], BatchDecoder]) -> list[tuple[int, str]]:
        """(row, reason) of the images that cannot be decoded, each tried alone, in the first batch that has any.

        Raises the error where there are none: then it was not for the images.
        """
        for request in self.request:
            found = [(int(request.rows[position]), reason) for position, reason in _faults(request, alone)]
            if found:
                return found
        raise self.error


def _faults(request: Request, alone: Callable[[], BatchDecoder]) -> Iterator[tuple[int, str]]:
    decoder = alone()
    try:
        for position, encoded in enumerate(request.encoded):
            try:
                decoder.put([encoded], request.geometry.only(position))
                decoder.take()
            except RuntimeError as error:
                yield position, reason_of(error)
                decoder.close()
                decoder = alone()
    finally:
        decoder.close()


def reason_of(error: RuntimeError) -> str:
    """What DALI says of one image, without where in its pipeline it says so."""
    said = str(error).rpartition("encountered:")[2].strip().splitlines()
    return "does not decode" + (f": {said[0]}" if said and not said[0].startswith("Failed to decode sample") else "")


class Background:
    """The thread. It owns the decoder, made in it, and the reader; `close` ends all of them."""

    def __init__(self, request: Iterator[Request], reader: Reader, decoder: Callable[[], BatchDecoder]) -> None:
        self._asked, self._reader, self._decoder = request, reader, decoder
        self._ready: queue.Queue[DecodedBatch | LoaderFailure | None] = queue.Queue(READY)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaptnet-loader", daemon=True)
        self._thread.start()

    def get(self) -> DecodedBatch | LoaderFailure | None:
        """The next batch; None after the last. Nothing comes after None or a failure."""
        return self._ready.get()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        in_decoder: deque[Request] = deque()
        try:
            with closing(self._make(in_decoder)) as made:
                while not self._closing.is_set() and (batch := next(made, None)) is not None:
                    self._hand_over(batch)
            self._hand_over(None)
        except BaseException as error:  # whatever it is, the caller must not wait for ever
            self._hand_over(LoaderFailure(error, tuple(in_decoder) if isinstance(error, RuntimeError) else ()))

    def _hand_over(self, item: DecodedBatch | LoaderFailure | None) -> None:
        while not self._closing.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                break

    def _make(self, in_decoder: deque[Request]) -> Generator[DecodedBatch]:
        with closing(self._decoder()) as decoder:
            for request in self._asked:
                in_decoder.append(request)
                decoder.put(request.encoded, request.geometry)
                if len(in_decoder) > IN_DECODER:
                    yield _take(decoder, in_decoder)
            while in_decoder:
                yield _take(decoder, in_decoder)


def _take(decoder: BatchDecoder, in_decoder: deque[Request]) -> DecodedBatch:
    images = decoder.take()
    return DecodedBatch(in_decoder.popleft(), images)
