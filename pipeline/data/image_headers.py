"""Reads an encoded image without decoding it: its format, its upright size and whether it is complete.

Upright means after the EXIF orientation. Its only rules are those here: the decoder gets images without any other EXIF
(verdict.py).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})  # lower case; matched in any case
MAX_PIXELS = 178_956_970  # 512 MiB of RGB; a larger image is a mistake or an attack
MAX_BYTES = 1 << 30  # of an encoded image: more than any of MAX_PIXELS needs
HEAD_BYTES = 1 << 14  # enough for the size of nearly every image
PILLOW = {  # our name of a format -> Pillow's
    "avif": "AVIF",
    "bmp": "BMP",
    "gif": "GIF",
    "jpeg": "JPEG",
    "jpeg2000": "JPEG2000",
    "pnm": "PPM",
    "tiff": "TIFF",
    "webp": "WEBP",
}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # with + offsets have 64 bits
_SHORT, _BITS_PER_SAMPLE, _SAMPLE_FORMAT = 3, 258, 339  # a type and two tags of TIFF
_SAMPLE_FORMATS = {1: "integers", 2: "signed integers", 3: "floats"}
_JPEG2000 = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")
HEIC_WAY_OUT = "(convert it to JPEG, e.g. with heif-convert)"
HEIC_BRANDS = ("heic", "heix", "hevc", "mif1", "msf1")
_UNREAD = {  # formats that are named in messages, by their first bytes
    b"%PDF": "PDF",
    b"8BPS": "PSD",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\1\0": "ICO",
    b"qoif": "QOI",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"DDS ": "DDS",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"<!DOCTYPE": "HTML",
    b"<!doctype": "HTML",
    b"<html": "HTML",
    b"\x1f\x8b": "gzip",
    b"PK\3\4": "zip",
    b"\x1a\x45\xdf\xa3": "WebM or Matroska",
    b"version https://git-lfs": "a Git LFS pointer",
    b"\x93NUMPY": "npy",
}
_NO_PAYLOAD = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xD9)})
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # EXIF types


def kind(encoded: bytes) -> str | None:
    """The format by the first bytes: "png" or a key of PILLOW; None for anything else."""
    if encoded[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "webp"
    if encoded[:4] in _TIFF:
        return "tiff"
    if encoded[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if encoded[:4] == _JPEG2000[0] or encoded[:12] == _JPEG2000[1]:
        return "jpeg2000"
    if encoded[4:8] == b"ftyp" and encoded[8:12] in (b"avif", b"avis"):
        return "avif"
    if encoded[:1] == b"P" and encoded[1:2] in b"123456" and encoded[2:3].isspace():
        return "pnm"
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
        return _not_an_image(encoded)
    if form == "jpeg" and not _has_jpeg_end(encoded):
        return "truncated JPEG (no end marker)"
    if form == "png" and b"IEND" not in encoded[-64:] and b"IEND" not in encoded:
        return "truncated PNG (no end chunk)"
    return None


def _not_an_image(encoded: bytes) -> str:
    start = encoded[:64].lstrip()
    if start[4:8] == b"ftyp":
        brand = start[8:12].decode("ascii", "replace")
        heic = f"not a readable format: HEIC {HEIC_WAY_OUT}"
        return heic if brand in HEIC_BRANDS else "a video, not an image"
    name = next((name for first, name in _UNREAD.items() if start.startswith(first)), None)
    return f"not a readable format: {name}" if name else "not an image (unknown first bytes)"


def upright_size(encoded: bytes, *, partial: bool = False) -> tuple[int, int] | None:
    """(height, width) in pixels after the EXIF orientation, or None if the bytes do not contain it.

    partial: `encoded` is the first part of a file; None then means that more is needed, or that it is not an image.
    """
    form = kind(encoded)
    if form == "jpeg":
        return jpeg_header(encoded).upright
    if form == "png":
        blocks = list(png_exif(encoded))
        if partial and not blocks and b"IEND" not in encoded:
            return None  # EXIF may follow the pixels
        size, turn = _png_size(encoded), _exif_orientation(encoded[slice(*blocks[0])]) if blocks else 1
        return size[::-1] if size and turn >= 5 else size
    return None if form is None else _size_by_pillow(encoded, PILLOW[form])


def orientation(encoded: bytes) -> int:
    """The EXIF orientation of a JPEG or PNG, 1 to 8; 1 if it has none, and for other formats."""
    form = kind(encoded)
    if form == "jpeg":
        return jpeg_header(encoded).orientation
    blocks = png_exif(encoded) if form == "png" else ()
    return next((_exif_orientation(encoded[start:end]) for start, end in blocks), 1)


def exif_of(orientation: int) -> bytes:
    """The shortest EXIF block with an orientation."""
    return b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1" + bytes([0, orientation]) + bytes(6)


@dataclass(frozen=True)
class JpegHeader:
    """What a JPEG contains before the data of its first scan."""

    size: tuple[int, int] | None  # height and width as stored
    ordinary: bool  # 8 bits a sample, coded by Huffman, not lossless: what every decoder reads
    orientation: int
    kept: tuple[tuple[int, int], ...]  # (start, end) of the segments that are not EXIF, before the first scan
    tidy: bool  # they are all, and nothing is between them
    scan: int | None  # where the segment of the first scan begins

    @property
    def upright(self) -> tuple[int, int] | None:
        """Height and width after the EXIF orientation."""
        return self.size[::-1] if self.size and self.orientation >= 5 else self.size


def jpeg_header(encoded: bytes) -> JpegHeader:
    """The header of a JPEG, as far as `encoded` contains it."""
    size, ordinary, orientation, scan = None, False, 0, None
    kept, after, tidy = [], 2, True
    for marker, start, end in _jpeg_segments(encoded):
        exif = marker == 0xE1 and encoded[start : start + 4] == b"Exif"
        tidy, after = tidy and not exif and start - 4 == after, end
        if marker == 0xDA:
            scan = start - 4
            break
        if exif:
            orientation = orientation or _exif_orientation(encoded[start + 6 : end])
            continue
        kept.append((start - 4, end))
        if marker in _JPEG_FRAMES and end - start >= 6 and size is None:
            precision, height, width = struct.unpack_from(">BHH", encoded, start)
            size = (height, width) if height and width else None
            ordinary = precision == 8 and marker <= 0xC2
    return JpegHeader(size, ordinary, orientation or 1, tuple(kept), tidy, scan)


def not_applied(image: Image) -> int:
    """The EXIF orientation of an image that Pillow has opened, 1 for TIFF, where Pillow applies it."""
    exif = image.info.get("exif", b"")
    return 1 if image.format == "TIFF" else _exif_orientation(exif.removeprefix(b"Exif\0\0"))


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
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if at + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(tiff) - 11), 12):
        tag, form = struct.unpack_from(order + "HH", tiff, entry)
        if tag == 0x0112:
            value = struct.unpack_from(order + _INTEGERS[form], tiff, entry + 8)[0] if form in _INTEGERS else 1
            return value if 1 <= value <= 8 else 1
    return 1


def tiff_samples(tiff: bytes) -> str | None:
    """What a TIFF stores of a pixel, for people: "3 samples of 32-bit floats"; None if its first 4 GiB do not say."""
    order, found = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4]), dict[int, tuple[int, ...]]()
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, form, number = struct.unpack_from(order + "HHI", tiff, entry)
            if tag in (_BITS_PER_SAMPLE, _SAMPLE_FORMAT) and form == _SHORT:
                place = entry + 8 if number <= 2 else struct.unpack_from(order + "I", tiff, entry + 8)[0]
                found[tag] = struct.unpack_from(f"{order}{min(number, 16)}H", tiff, place)
    except struct.error:
        return None
    bits, forms = found.get(_BITS_PER_SAMPLE), found.get(_SAMPLE_FORMAT, (1,))
    if not bits or not forms:
        return None
    plural = "" if len(bits) == 1 else "s"
    return f"{len(bits)} sample{plural} of {max(bits)}-bit {_SAMPLE_FORMATS.get(forms[0], 'data')}"


def _png_size(encoded: bytes) -> tuple[int, int] | None:
    if len(encoded) < 24:
        return None
    width, height = struct.unpack_from(">II", encoded, 16)
    return (height, width) if height and width else None


def png_exif(encoded: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the content of each complete eXIf chunk; the first one counts."""
    if b"eXIf" in encoded:
        yield from ((start, end) for name, start, end in _png_chunks(encoded) if name == b"eXIf")


def _png_chunks(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end of payload) of each complete chunk in `encoded`."""
    at = 8
    while at + 8 <= len(encoded):
        (length,) = struct.unpack_from(">I", encoded, at)
        if at + 8 + length > len(encoded):
            return
        yield encoded[at + 4 : at + 8], at + 8, at + 8 + length
        at += 12 + length


def _size_by_pillow(encoded: bytes, form: str) -> tuple[int, int] | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded), formats=[form]) as image:
            return (image.width, image.height) if not_applied(image) >= 5 else (image.height, image.width)
    except Exception:  # on damaged headers Pillow's plugins raise anything, such as struct.error
        return None
