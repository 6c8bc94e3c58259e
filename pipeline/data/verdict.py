"""Whether an image can be used, decided in one way for checking, packing, training, evaluating and predicting.

`decodable` gives the decoder (DALI) only what it reads in one way, whole or in part, on a CPU or a GPU: PNG, simple
WebP and ordinary JPEG without EXIF but the orientation. Every other format is decoded by Pillow and passed on as BMP.
H, W are a picture's height and width in pixels.
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.data.image_headers import (
    MAX_BYTES,
    MAX_PIXELS,
    PILLOW,
    JpegHeader,
    exif_of,
    jpeg_header,
    kind,
    looks_whole,
    not_applied,
    orientation,
    png_exif,
    tiff_samples,
    upright_size,
)
from pipeline.data.store import open_file

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode
    from PIL.Image import Image

NO_FILE = "cannot be read: a folder, pipe, socket or device, not a file"
Pixels: TypeAlias = NDArray[np.uint8]
TOGETHER = 16  # images that are decoded at once: alone, each takes a fifth longer
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Pillow's Transpose that makes it upright


class DecodeError(RuntimeError):
    """The bytes are no image that can be used; the message is the reason."""


class WholeDecoder:
    """Decodes whole images to the pictures from which the loaders cut their windows. Not for threads."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None

    def fault(self, encoded: bytes) -> str | None:
        """Why these bytes cannot be used as an image, or None after decoding every pixel."""
        (picture,) = self.pictures([encoded])
        return str(picture) if isinstance(picture, DecodeError) else None

    def picture(self, encoded: bytes) -> Pixels:
        """The upright picture [H, W, 3]. Raises DecodeError."""
        (picture,) = self.pictures([encoded])
        if isinstance(picture, DecodeError):
            raise picture
        return picture

    def pictures(self, images: Sequence[bytes]) -> list[Pixels | DecodeError]:
        """The upright picture [H, W, 3] of each of at most TOGETHER images, or why there is none."""
        found: list[Pixels | DecodeError] = []
        ready = dict[int, bytes]()
        for position, encoded in enumerate(images):
            found.append(DecodeError("not decoded"))
            try:
                ready[position] = decodable(encoded)
            except DecodeError as error:
                found[position] = error
        for position, picture in zip(ready, self._decoded(list(ready.values())), strict=True):
            found[position] = picture
        return found

    def _decoded(self, ready: Sequence[bytes]) -> list[Pixels | DecodeError]:
        try:
            return list(self._together(ready)) if ready else []
        except DecodeError as error:
            if len(ready) == 1:
                return [error]
        return [outcome for each in ready for outcome in self._decoded([each])]

    def _together(self, ready: Sequence[bytes]) -> list[Pixels]:
        pipeline = self._pipeline or _whole_pipeline()
        self._pipeline = None  # an error leaves it unusable
        with decode_errors():
            pipeline.feed_input("encoded", [np.frombuffer(each, dtype=np.uint8) for each in ready])
            pipeline.schedule_run()
            (decoded,) = pipeline.share_outputs()
            pictures = [np.array(each) for each in decoded]
            pipeline.release_outputs()
        self._pipeline = pipeline
        return pictures


def read_image(path: str, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of an image, by default those of a whole file. Raises DecodeError if they cannot be read."""
    try:
        descriptor = open_file(path)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DecodeError(NO_FILE)
            length = status.st_size if length is None else length
            if length > MAX_BYTES:
                raise DecodeError(f"absurd size: {length:,} bytes, above the limit of {MAX_BYTES:,}")
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror}") from None


def decodable(encoded: bytes) -> bytes:
    """The picture in bytes that the decoder reads in one way; an ordinary image as it is.

    Raises DecodeError for bytes that are not a complete image of a known format and of a possible size.
    """
    form = kind(encoded)
    header = jpeg_header(encoded) if form == "jpeg" else None
    size = header.upright if header else upright_size(encoded)
    unread = _tiff_fault(encoded) if form == "tiff" and size is None else None
    reason = looks_whole(encoded) or unread or _size_fault(form, size)
    if reason:
        raise DecodeError(reason)
    if header is not None:
        return _tidied_jpeg(encoded, header) if header.ordinary else _as_bmp(encoded, "jpeg")
    if form == "png":
        return _tidied_png(encoded)
    return encoded if form == "webp" and _is_simple_webp(encoded) else _as_bmp(encoded, str(form))


def _tiff_fault(encoded: bytes) -> str | None:
    """Why Pillow does not open a TIFF, if that is for its kind of pixels."""
    samples = tiff_samples(encoded)
    if samples is None or samples.endswith(" 8-bit integers"):
        return None
    return (
        f"TIFF of {samples} a pixel; read are 8 bits, grey of 16 bits, and one 32-bit float between 0 and 1: convert it"
    )


def _size_fault(form: str | None, size: tuple[int, int] | None) -> str | None:
    if size is None:
        return f"not an image (its {form} header gives no size)"
    if size[0] * size[1] > MAX_PIXELS:
        return f"absurd size: {size[1]} x {size[0]}, above the limit of {MAX_PIXELS:,} pixels"
    return None


def _tidied_jpeg(encoded: bytes, header: JpegHeader) -> bytes:
    if header.tidy or header.scan is None:
        return encoded
    exif = b"Exif\0\0" + exif_of(header.orientation)
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif if header.orientation > 1 else b""
    kept = [encoded[start:end] for start, end in header.kept]
    return b"".join([b"\xff\xd8", segment, *kept, encoded[header.scan :]])


def _tidied_png(encoded: bytes) -> bytes:
    blocks = list(png_exif(encoded))
    if not blocks:
        return encoded
    turn, parts, at = orientation(encoded), list[bytes](), 33  # the header chunk ends there
    for start, end in blocks:
        parts.append(encoded[at : start - 8])
        at = end + 4
    exif = b"eXIf" + exif_of(turn)
    chunk = (len(exif) - 4).to_bytes(4, "big") + exif + zlib.crc32(exif).to_bytes(4, "big") if turn > 1 else b""
    return b"".join([encoded[:33], chunk, *parts, encoded[at:]])


def _is_simple_webp(encoded: bytes) -> bool:
    """Whether the file consists of one complete picture without metadata."""
    return encoded[12:16] in (b"VP8 ", b"VP8L") and 20 + int.from_bytes(encoded[16:20], "little") in (
        len(encoded),
        len(encoded) - 1,
    )


def _as_bmp(encoded: bytes, form: str) -> bytes:
    """The first picture of an image as Pillow reads it, upright, in 24 bits a pixel."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(encoded), formats=[PILLOW[form]]) as image:
            image.load()
            turn = _TURNS.get(not_applied(image))
            picture = _rgb(image) if turn is None else _rgb(image).transpose(Image.Transpose(turn))
        picture.save(buffer, "BMP")
    except Exception as error:  # on damaged data Pillow's plugins raise anything
        raise DecodeError(f"does not decode as {PILLOW[form]}: {error}") from error
    return buffer.getvalue()


def _rgb(image: Image) -> Image:
    """The image in 8-bit RGB without alpha. Of 16 bits the high byte is used; fractions are between 0 and 1."""
    from PIL.Image import fromarray

    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        image = fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "F":
        image = fromarray((np.nan_to_num(np.asarray(image)).clip(0, 1) * 255).round().astype(np.uint8))
    elif image.mode == "I":
        raise ValueError("32-bit or signed integers, of which no range is known; convert it to 8 or 16 bits")
    return image.convert("RGB")


@contextmanager
def decode_errors() -> Iterator[None]:
    """Raises DecodeError in place of what a DALI operator reports of its data; other errors pass."""
    from pipeline.compat.dali import operator_failure

    try:
        yield
    except RuntimeError as error:
        failure = operator_failure(error)
        if failure is None:
            raise
        raise DecodeError(f"does not decode: {failure}" if failure else "does not decode") from error


def _whole_pipeline() -> Pipeline:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=TOGETHER, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def pipeline() -> DataNode:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", jpeg_fancy_upsampling=True)  # as in dali.py

    built = pipeline()
    built.build()
    return built
