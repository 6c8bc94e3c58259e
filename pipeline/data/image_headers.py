"""Reads an encoded image without decoding it: its format, its upright size and whether it is complete.

Upright means after the EXIF orientation, which viewers and the decoder apply.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})  # lower case; matched in any case
MAX_PIXELS = 178_956_970  # 512 MiB of RGB; a larger image is a mistake or an attack
HEAD_BYTES = 1 << 14  # enough for the size of nearly every image
_NO_PAYLOAD = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xD9)})
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers


def kind(encoded: bytes) -> str | None:
    """The format by the first bytes: "jpeg", "png", "webp", "bmp" or "tiff"; None for anything else."""
    if encoded[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "webp"
    if encoded[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    return "bmp" if encoded[:2] == b"BM" else None


def looks_whole(encoded: bytes) -> str | None:
    """Why `encoded` cannot be a complete image, or None; takes a few microseconds.

    A JPEG needs an end marker after the start of its scan, a PNG an IEND chunk. That finds every truncation, also where
    the decoder would not notice because its window ends above the break. Damage within the image is not found, and
    bytes after its end are allowed.
    """
    if not encoded:
        return "empty file"
    form = kind(encoded)
    if form is None:
        return "not an image (unknown first bytes)"
    if form == "jpeg" and not _has_jpeg_end(encoded):
        return "truncated JPEG (no end marker)"
    if form == "png" and b"IEND" not in encoded[-64:] and b"IEND" not in encoded:
        return "truncated PNG (no end chunk)"
    return None


def upright_size(encoded: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels after the EXIF orientation, or None if the bytes do not contain it.

    `encoded` may be the first part of a file; None then means that more is needed, or that it is not an image.
    """
    form = kind(encoded)
    if form == "jpeg":
        size = _jpeg_size(encoded)
    elif form == "png":
        size = _png_size(encoded)
    else:
        return None if form is None else _size_by_pillow(encoded)
    return size[::-1] if size and orientation(encoded) >= 5 else size


def orientation(encoded: bytes) -> int:
    """The EXIF orientation of a JPEG or PNG, 1 to 8; 1 if it has none."""
    if kind(encoded) == "png":
        chunks = _png_chunks(encoded)
        return next((_exif_orientation(encoded[start:end]) for name, start, end in chunks if name == b"eXIf"), 1)
    for marker, start, end in _jpeg_segments(encoded):
        if marker == 0xE1 and encoded[start : start + 6] == b"Exif\0\0":
            return _exif_orientation(encoded[start + 6 : end])
    return 1


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    for marker, start, end in _jpeg_segments(encoded):
        if marker in _JPEG_FRAMES and end - start >= 5:
            height, width = struct.unpack_from(">HH", encoded, start + 1)
            return (height, width) if height and width else None
    return None


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end of payload) of each complete segment in `encoded`, up to the start of the first scan."""
    at, size = 2, len(encoded)
    while at + 4 <= size:
        marker = encoded[at + 1]
        if encoded[at] != 0xFF or marker in _NO_PAYLOAD:  # stray bytes, which decoders skip too
            at += 1 if encoded[at] != 0xFF or marker == 0xFF else 2
            continue
        end = at + 2 + (encoded[at + 2] << 8) + encoded[at + 3]
        if end > size:
            return
        yield marker, at + 4, end
        if marker in (0xD9, 0xDA):
            return
        at = end


def _has_jpeg_end(encoded: bytes) -> bool:
    """Whether an end marker follows the start of the scan; a thumbnail before it has an end marker of its own."""
    scan = next((end for marker, _, end in _jpeg_segments(encoded) if marker == 0xDA), None)
    if scan is None:
        return False
    return encoded.find(b"\xff\xd9", max(scan, len(encoded) - 64)) >= 0 or encoded.find(b"\xff\xd9", scan) >= 0


def _exif_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if at + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(tiff) - 11), 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
    return 1


def _png_size(encoded: bytes) -> tuple[int, int] | None:
    if len(encoded) < 24:
        return None
    width, height = struct.unpack_from(">II", encoded, 16)
    return (height, width) if height and width else None


def _png_chunks(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end of payload) of each complete chunk in `encoded`."""
    at = 8
    while at + 8 <= len(encoded):
        (length,) = struct.unpack_from(">I", encoded, at)
        if at + 8 + length > len(encoded):
            return
        yield encoded[at + 4 : at + 8], at + 8, at + 8 + length
        at += 12 + length


def _size_by_pillow(encoded: bytes) -> tuple[int, int] | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            turned = image.format == "WEBP" and image.getexif().get(0x0112, 1) >= 5  # Pillow itself applies it to TIFF
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # on damaged headers Pillow's plugins raise anything, such as struct.error
        return None
