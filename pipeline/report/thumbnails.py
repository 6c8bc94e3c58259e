"""Small copies of evaluated images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.index import ImageIndex
from pipeline.data.reader import Reader

SIDE_PX = 96  # the longer side, at most
QUALITY = 85
THREADS = 4


@dataclass(frozen=True)
class Thumbnail:
    """A small image and the name of its file; `jpeg` is empty if the image cannot be read."""

    file: str
    jpeg: bytes = b""

    @property
    def uri(self) -> str:
        """The image as a data URI."""
        return "data:image/jpeg;base64," + base64.b64encode(self.jpeg).decode()

    def pixels(self) -> NDArray[np.uint8]:
        """The decoded image, [H, W, 3] u8."""
        return np.asarray(Image.open(io.BytesIO(self.jpeg)))


def thumbnails(images: ImageIndex | None, rows: Iterable[int]) -> dict[int, Thumbnail]:
    """{row: its image, upright} for the rows that the split has; empty if there is no split."""
    if images is None:
        return {}
    wanted = sorted({row for row in rows if 0 <= row < len(images)})
    reader = Reader(images, THREADS)
    try:
        read = reader.start(wanted).result()
    finally:
        reader.close()
    return {row: Thumbnail(images.file(row), _small(image.encoded)) for row, image in zip(wanted, read, strict=True)}


def _small(encoded: bytes) -> bytes:
    """The image as a small JPEG; empty if the bytes are no image."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return b""
    small.thumbnail((SIDE_PX, SIDE_PX))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
