"""Format, upright size and faults of encoded images, read without decoding."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageOps

from pipeline.data.image_headers import MAX_PIXELS, kind, looks_whole, tiff_samples, upright_size
from pipeline.data.pack import shrink
from pipeline.data.verdict import WholeDecoder
from tests import images

PHOTO = images.photo()
DECODER = WholeDecoder()
GOOD = {
    "jpeg": images.jpeg(),
    "progressive": images.jpeg(progressive=True),
    "png": images.png(),
    "grey": images.grey_jpeg(PHOTO),
    "cmyk": images.cmyk_jpeg(PHOTO),
    "ycck": images.ycck_jpeg(PHOTO),
    "palette": images.palette_png(PHOTO),
    "16 bit": images.png_16_bit(PHOTO),
    "16 bit grey": images.grey_png_16_bit(PHOTO),
    "webp": images.encode(PHOTO, "WEBP"),
    "bmp": images.encode(PHOTO, "BMP"),
    "tiff": images.encode(PHOTO, "TIFF"),
    **{f"orientation {turn}": images.turned_jpeg(PHOTO, turn) for turn in range(1, 9)},
}


def exif_6(form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return images.encode(PHOTO.transpose(Image.Transpose.ROTATE_90), form, exif=exif.tobytes())


@pytest.mark.parametrize("name", GOOD)
def test_a_good_image_has_no_fault_and_its_upright_size(name: str) -> None:
    assert DECODER.fault(GOOD[name]) is None
    assert upright_size(GOOD[name]) == (PHOTO.height, PHOTO.width)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_the_exif_orientation_is_applied_in_every_format_in_which_the_decoder_applies_it(form: str) -> None:
    assert upright_size(exif_6(form)) == (PHOTO.height, PHOTO.width)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (images.EMPTY, "empty file"),
        (images.TEXT, "not an image"),
        (images.GIF[:-4], "does not decode as GIF"),
        (b"%PDF-1.7 ", "not a readable format: PDF"),
        (images.truncated_jpeg(), "truncated JPEG"),
        (images.png()[:-20], "truncated PNG"),
        (images.bomb_png(), "absurd size: 30000 x 30000"),
        (b"\xff\xd8\xff\xd9", "truncated JPEG"),
        (b"\xff\xd8\xff\xda\x00\x02\xff\xd9", "not an image (its jpeg header gives no size)"),
        (images.png()[:200] + bytes(200) + images.png()[400:], "does not decode"),
    ],
)
def test_a_bad_image_has_a_reason(encoded: bytes, reason: str) -> None:
    assert reason in str(DECODER.fault(encoded))


def test_a_truncation_anywhere_is_found_without_decoding() -> None:
    thumbnail = images.jpeg(16, 16)  # it has an end marker of its own
    exif = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    whole = images.jpeg()
    with_thumbnail = whole[:2] + exif + whole[2:]
    assert looks_whole(with_thumbnail) is None
    for end in range(len(with_thumbnail) - 1):
        assert looks_whole(with_thumbnail[:end]), end
    assert looks_whole(with_thumbnail[:-1])


def test_bytes_after_the_end_are_not_a_fault() -> None:
    assert looks_whole(images.jpeg() + bytes(500)) is None
    assert looks_whole(images.png() + bytes(500)) is None


def test_the_head_of_a_file_gives_the_size_or_none() -> None:
    padded = images.jpeg()[:2] + b"\xff\xe2\x40\x02" + bytes(0x4000) + images.jpeg()[2:]
    assert upright_size(padded[:1000], partial=True) is None
    assert upright_size(padded) == (64, 96)


def test_the_format_is_recognised_by_the_bytes() -> None:
    assert kind(images.png()) == "png"
    assert kind(images.jpeg()) == "jpeg"
    assert kind(images.GIF) == "gif"
    assert MAX_PIXELS < 30_000**2


@pytest.mark.parametrize("name", GOOD)
def test_shrink_gives_the_right_picture_with_the_requested_side(name: str) -> None:
    small = Image.open(io.BytesIO(shrunk(GOOD[name], 32)))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (48, 32))
    expected = PHOTO.convert("L").convert("RGB") if "grey" in name else PHOTO
    difference = abs(_pixels(small) - _pixels(expected.resize((48, 32), Image.Resampling.LANCZOS)))
    assert difference.mean() < (6 if name == "palette" else 3)


def test_shrink_returns_small_upright_images_unchanged_and_turns_the_rest() -> None:
    assert shrunk(GOOD["jpeg"], 64) == GOOD["jpeg"]
    turned = Image.open(io.BytesIO(shrunk(GOOD["orientation 6"], 64)))
    assert turned.size == PHOTO.size == ImageOps.exif_transpose(turned).size


def shrunk(encoded: bytes, side: int) -> bytes:
    return shrink(encoded, DECODER.picture(encoded), side, 95)


def _pixels(image: Image.Image):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.asarray(image.convert("RGB")).astype(np.int16)


@pytest.mark.parametrize(("form", "numbers"), [(1, "integers"), (3, "floats")])
def test_the_pixels_of_a_tiff_are_described(form: int, numbers: str) -> None:
    tiff = images.rgb_tiff(bits=32, form=form)
    assert kind(tiff) == "tiff" and tiff_samples(tiff) == f"3 samples of 32-bit {numbers}"
    assert tiff_samples(tiff[:-40]) is tiff_samples(images.jpeg()) is None
