"""Encoded images for tests: one picture in each format that a data set may contain, and files that are no images."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A smooth RGB picture with an edge and no symmetry, so that a turn, a flip or swapped channels are visible."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    phase = np.random.default_rng(seed).uniform(0, np.pi, 3)
    waves = [np.sin(x / 19 + phase[0]), np.cos(y / 23 + phase[1]), np.sin((x + 2 * y) / 31 + phase[2])]
    pixels = np.stack([127 + 100 * wave for wave in waves], axis=-1)
    pixels[: height // 3, : width // 4] = (230, 40, 60)
    return Image.fromarray(pixels.astype(np.uint8), "RGB")


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}) | options)
    return buffer.getvalue()


def jpeg(width: int = 96, height: int = 64, seed: int = 0, **options: object) -> bytes:
    return encode(photo(width, height, seed), **options)


def png(width: int = 96, height: int = 64, seed: int = 0) -> bytes:
    """A PNG; data sets also contain some that are named .JPEG."""
    return encode(photo(width, height, seed), "PNG")


def grey_jpeg(image: Image.Image) -> bytes:
    return encode(image.convert("L"))


def cmyk_jpeg(image: Image.Image) -> bytes:
    """A CMYK JPEG with Adobe's marker and transform 0; values are inverted, as in Adobe's files."""
    return encode(_inks(image))


def ycck_jpeg(image: Image.Image) -> bytes:
    """A CMYK JPEG with Adobe's marker and transform 2: the first three channels are YCbCr."""
    cyan, magenta, yellow, black = _inks(image).split()
    inks = Image.merge("RGB", [cyan, magenta, yellow]).convert("YCbCr").split()
    stored = encode(Image.merge("CMYK", [*(band.point(lambda v: 255 - v) for band in inks), black]))
    at = stored.index(b"Adobe") + 11
    assert stored[at] == 0
    return stored[:at] + b"\x02" + stored[at + 1 :]


def _inks(image: Image.Image) -> Image.Image:
    """The picture in CMYK with as much black as possible, which exposes decoders that ignore black."""
    pixels = np.asarray(image).astype(np.float64)
    brightest = np.maximum(pixels.max(axis=-1, keepdims=True), 1)
    inks = np.concatenate([255 * (1 - pixels / brightest), 255 - brightest], axis=-1)
    return Image.fromarray(inks.round().astype(np.uint8), "CMYK")


def palette_png(image: Image.Image) -> bytes:
    return encode(image.quantize(256), "PNG")


def png_16_bit(image: Image.Image) -> bytes:
    """RGB with 16 bits per channel; the high byte is that of the picture."""
    return _png(np.asarray(image).astype(np.uint16) * 256 + 128, colour=2)


def grey_png_16_bit(image: Image.Image) -> bytes:
    return _png(np.asarray(image.convert("L")).astype(np.uint16)[..., None] * 256 + 128, colour=0)


def turned_jpeg(image: Image.Image, orientation: int) -> bytes:
    """A JPEG that the EXIF `orientation` turns into `image`."""
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image if stored is None else image.transpose(stored), exif=exif.tobytes())


def truncated_jpeg(width: int = 96, height: int = 64, seed: int = 0) -> bytes:
    """A JPEG without its last quarter: a crop of its intact upper part decodes."""
    whole = jpeg(width, height, seed)
    return whole[: len(whole) * 3 // 4]


def garbled_jpeg(width: int = 96, height: int = 64, seed: int = 0) -> bytes:
    """A JPEG with some bytes overwritten in the middle: decoders report no error."""
    whole = bytearray(jpeg(width, height, seed))
    middle = len(whole) * 2 // 3
    whole[middle : middle + 16] = bytes(16)
    return bytes(whole)


def bomb_png(side: int = 30_000) -> bytes:
    """A file of a few bytes whose header claims side x side pixels."""
    return _png(np.zeros((1, 1, 3), dtype=np.uint8), colour=2, claim=(side, side))


EMPTY = b""
TEXT = b"404 not found\n"
GIF = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


def _png(pixels: NDArray[np.generic], colour: int, claim: tuple[int, int] | None = None) -> bytes:
    height, width = claim or pixels.shape[:2]
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def rgb_tiff(bits: int, form: int, side: int = 4) -> bytes:
    """An uncompressed TIFF of three samples a pixel; form: 1 for integers, 3 for floats. Pillow writes none."""
    data = bytes(side * side * 3 * bits // 8)
    short, long, after = 3, 4, 8 + len(data)
    bits_at, form_at = after, after + 6
    tags = [(256, short, 1, side), (257, short, 1, side), (258, short, 3, bits_at), (259, short, 1, 1)]
    tags += [(262, short, 1, 2), (273, long, 1, 8), (277, short, 1, 3), (278, short, 1, side)]
    tags += [(279, long, 1, len(data)), (339, short, 3, form_at)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    lists = struct.pack("<6H", *[bits] * 3, *[form] * 3)
    return b"II*\0" + struct.pack("<I", after + 12) + data + lists + struct.pack("<H", len(tags)) + entries + bytes(4)
