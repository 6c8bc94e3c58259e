"""One verdict: checking, packing, training, evaluating and predicting use the same images and the same pixels."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from raised import fails

from pipeline.data.check import check
from pipeline.data.config import DataConfig
from pipeline.data.dali import EvalLoader, TrainLoader, decode
from pipeline.data.image_headers import HEAD_BYTES, upright_size
from pipeline.data.index import ImageIndex, open_index
from pipeline.data.pack import pack
from pipeline.data.verdict import WholeDecoder, decodable
from pipeline.errors import UndecodableError
from tests import images

PHOTO = images.photo()
GREY = PHOTO.convert("L")
SIDEWAYS = PHOTO.transpose(Image.Transpose.ROTATE_90)  # EXIF 6 turns it into PHOTO
CPU = torch.device("cpu")


def exif(orientation: int, magic: bytes = b"MM\0*", form: bytes = b"\0\3") -> bytes:
    value = struct.pack(">HH", orientation, 0) if form == b"\0\3" else struct.pack(">I", orientation)
    return b"Exif\0\0" + magic + b"\0\0\0\x08\0\1\x01\x12" + form + b"\0\0\0\1" + value + bytes(4)


def with_app1(encoded: bytes, *blocks: bytes) -> bytes:
    """A JPEG with more segments after its start marker."""
    return (
        encoded[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(each) + 2) + each for each in blocks) + encoded[2:]
    )


def without_adobe(encoded: bytes) -> bytes:
    at = encoded.index(b"\xff\xee")
    return encoded[:at] + encoded[at + 2 + int.from_bytes(encoded[at + 2 : at + 4], "big") :]


def chunk(name: bytes, body: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ wrong)


def with_chunk(png: bytes, name: bytes, body: bytes, *, before: bytes = b"IDAT", wrong: int = 0) -> bytes:
    at = png.index(before) - 4
    return png[:at] + chunk(name, body, wrong) + png[at:]


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    return images.encode(image, form, **options)


def noise(width: int, height: int) -> Image.Image:
    """A picture that no format compresses."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bmp_555(image: Image.Image) -> bytes:
    pixels = np.asarray(image).astype(np.uint16) >> 3
    rows = (pixels[::-1, :, 0] << 10 | pixels[::-1, :, 1] << 5 | pixels[::-1, :, 2]).astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, image.width, image.height, 1, 16, 0, len(rows), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + header + rows


def turned(form: str, **options: object) -> bytes:
    return encoded(SIDEWAYS, form, exif=exif(6), **options)


RATIONAL = b"Exif\0\0II*\0\x08\0\0\0\1\0\x1a\1\n\0\1\0\0\0\x1a\0\0\0" + bytes(4) + b"\xff" * 4 + bytes(4)
JPEG, PNG, STORED = images.jpeg(), images.png(), encoded(SIDEWAYS, "JPEG")
GOOD = {
    "grey JPEG": images.grey_jpeg(PHOTO),
    "progressive 4:2:0": images.jpeg(subsampling=2, progressive=True),
    "restart markers": images.jpeg(restart_marker_blocks=3),
    "CMYK": images.cmyk_jpeg(PHOTO),
    "CMYK without Adobe's marker": without_adobe(images.cmyk_jpeg(PHOTO)),
    "YCCK": images.ycck_jpeg(PHOTO),
    "RGB JPEG": encoded(PHOTO, "JPEG", keep_rgb=True),
    **{f"EXIF {turn}": images.turned_jpeg(PHOTO, turn) for turn in range(1, 9)},
    "EXIF 1, then 6": with_app1(JPEG, exif(1), exif(6)),
    "EXIF 6, then 1": with_app1(STORED, exif(6), exif(1)),
    "EXIF as a long integer": with_app1(STORED, exif(6, form=b"\0\4")),
    "EXIF of another magic": with_app1(JPEG, exif(6, magic=b"MM\0+")),
    "EXIF 0": with_app1(JPEG, exif(0)),
    "EXIF that breaks off": with_app1(JPEG, exif(6)[:17]),
    "EXIF with a rational of -1/0": with_app1(JPEG, RATIONAL),
    "stray bytes between segments": JPEG[:20] + b"\0\0\0" + JPEG[20:],
    "palette": images.palette_png(PHOTO),
    "16-bit PNG": images.png_16_bit(PHOTO),
    "16-bit grey PNG": images.grey_png_16_bit(PHOTO),
    "grey and alpha": encoded(PHOTO.convert("LA"), "PNG"),
    "RGBA": encoded(PHOTO.convert("RGBA"), "PNG"),
    "1-bit PNG": encoded(PHOTO.convert("1"), "PNG"),
    "interlaced text PNG": with_chunk(PNG, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
    "broken ICC profile": with_chunk(PNG, b"iCCP", b"icc\0\0" + b"not compressed", before=b"IDAT"),
    "wrong CRC of a text": with_chunk(PNG, b"tEXt", b"Comment\0text", wrong=1),
    "PNG, EXIF before the pixels": turned("PNG"),
    "PNG, EXIF after the pixels": with_chunk(encoded(SIDEWAYS, "PNG"), b"eXIf", exif(6)[6:], before=b"IEND"),
    "PNG, EXIF after many pixels": with_chunk(encoded(noise(96, 64), "PNG"), b"eXIf", exif(3)[6:], before=b"IEND"),
    "WebP": encoded(PHOTO, "WEBP"),
    "WebP, EXIF": turned("WEBP"),
    "lossless WebP, EXIF": turned("WEBP", lossless=True),
    "WebP, alpha": encoded(PHOTO.convert("RGBA"), "WEBP"),
    "WebP, moving": encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]),
    "BMP": encoded(PHOTO, "BMP"),
    "15-bit BMP": bmp_555(PHOTO),
    "TIFF": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "1-bit TIFF": encoded(PHOTO.convert("1"), "TIFF"),
    "16-bit TIFF": encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 256 + 7), "TIFF"),
    "float TIFF": encoded(Image.fromarray((np.asarray(GREY) / 255).astype(np.float32)), "TIFF"),
    "CMYK TIFF": encoded(PHOTO.convert("CMYK"), "TIFF"),
    "TIFF, turned": encoded(SIDEWAYS, "TIFF", exif=exif(6)[6:]),
    "GIF": encoded(PHOTO, "GIF"),
    "PPM": encoded(PHOTO, "PPM"),
    "JPEG 2000": encoded(PHOTO, "JPEG2000"),
    "AVIF": encoded(PHOTO, "AVIF", quality=100),
}
TIFF = encoded(PHOTO, "TIFF", compression="tiff_lzw")
BAD = {
    "empty": b"",
    "text": images.TEXT,
    "HTML": b"<!DOCTYPE html><html></html>",
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(40),
    "truncated JPEG": images.truncated_jpeg(),
    "Huffman table": JPEG[: JPEG.find(b"\xff\xc4") + 5] + b"\xc8" + JPEG[JPEG.find(b"\xff\xc4") + 6 :],
    "truncated PNG": PNG[:-20],
    "wrong CRC of the pixels": PNG[: PNG.index(b"IEND") - 5] + b"\0" + PNG[PNG.index(b"IEND") - 4 :],
    "bomb": images.bomb_png(),
    "truncated TIFF": TIFF[: len(TIFF) * 3 // 4],
    "TIFF with a damaged lower strip": TIFF.replace(TIFF[len(TIFF) * 3 // 4 : len(TIFF) * 3 // 4 + 40], b"\xff" * 40),
    "32-bit TIFF": encoded(Image.fromarray(np.asarray(GREY).astype(np.int32)), "TIFF"),
    "TIFF of three floats": images.rgb_tiff(bits=32, form=3),
    "TIFF of three 32-bit integers": images.rgb_tiff(bits=32, form=1),
    "truncated WebP": GOOD["WebP"][:-30],
    "truncated BMP": GOOD["BMP"][:-3000],
    "truncated GIF": GOOD["GIF"][:-300],
    "truncated PPM": GOOD["PPM"][:-300],
    "truncated AVIF": GOOD["AVIF"][:-300],
}


def expected(name: str) -> NDArray[np.int16]:
    """The picture by Pillow; what it is must not matter."""
    if name == "PNG, EXIF after many pixels":
        return np.asarray(noise(96, 64).transpose(Image.Transpose.ROTATE_180)).astype(np.int16)
    if ("grey" in name and "alpha" not in name) or name in ("16-bit TIFF", "float TIFF"):
        return np.asarray(GREY.convert("RGB")).astype(np.int16)
    if "1-bit" in name:
        return np.asarray(PHOTO.convert("1").convert("RGB")).astype(np.int16)
    return np.asarray(GREY.convert("RGB") if name == "grey and alpha" else PHOTO).astype(np.int16)


@pytest.fixture(scope="module")
def decoder() -> WholeDecoder:
    return WholeDecoder()


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_image_has_the_right_picture_and_its_header_the_right_size(name: str, decoder: WholeDecoder) -> None:
    picture = decoder.picture(GOOD[name])
    assert picture.shape == (64, 96, 3) and upright_size(GOOD[name]) == (64, 96)
    assert upright_size(GOOD[name][:HEAD_BYTES], partial=len(GOOD[name]) > HEAD_BYTES) in (None, (64, 96))
    if name != "CMYK without Adobe's marker":  # whose inks may be meant either way
        assert np.abs(picture - expected(name)).mean() < 6


@pytest.mark.parametrize("name", ["grey JPEG", "progressive 4:2:0", "palette", "RGBA", "WebP"])
def test_ordinary_images_are_decoded_from_their_own_bytes(name: str) -> None:
    assert decodable(GOOD[name]) is GOOD[name]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All odd images, good and bad, in one class of train; the name of a file does not tell its format."""
    root = tmp_path_factory.mktemp("mixed")
    for split, every in (("train", GOOD | BAD), ("val", GOOD | BAD)):
        for number, content in enumerate(every.values()):
            path = root / split / "a" / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


FAULTY = {f"{number:03d}" for number in range(len(GOOD), len(GOOD) + len(BAD))}


def stems(names: list[str]) -> set[str]:
    return {Path(name).stem for name in names}


def test_every_part_leaves_out_the_same_images(mixed: Path, tmp_path: Path) -> None:
    checked, packed = check(mixed, workers=1), pack(mixed, tmp_path / "packed", workers=1)
    assert len(checked.bad) == len(packed.set_aside) == 2 * len(FAULTY)
    assert stems([name for name, _ in checked.bad]) == stems([name for name, _ in packed.set_aside]) == FAULTY
    index = open_index(mixed)
    assert trained_without(index) == evaluated(index)[1] == FAULTY
    clean = open_index(tmp_path / "packed")
    assert trained_without(clean) == evaluated(clean)[1] == set()
    with fails(UndecodableError, "images") as raised:
        decode(list((GOOD | BAD).values()), DataConfig(root=mixed, side_px=32), CPU)
    assert set(raised.value.reasons) == set(range(len(GOOD), len(GOOD) + len(BAD)))


def trained_without(index: ImageIndex) -> set[str]:
    """Images of train that three epochs of random crops replace."""
    config = DataConfig(root=index.root, side_px=16, max_bad_share=1.0)
    train = index.subset(slice(0, index.meta.num_train))
    with TrainLoader(train, config, seed=0, batch_size=20, rank=0, world=1, device=CPU, threads=1) as loader:
        for _ in range(3 * len(train) // 20 + 1):
            next(loader)
        return stems([each["file"] for each in loader.bad.report()])


def evaluated(index: ImageIndex) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The pixels of each image of val by its stem, and the images that are left out."""
    config = DataConfig(root=index.root, side_px=64, eval_resize_px=64)
    val = index.subset(slice(index.meta.num_train, len(index)))
    loader = EvalLoader(val, config, batch_size=8, rank=0, world=1, device=CPU, threads=1)
    found = {
        Path(val.file(int(row))).stem: image
        for batch in loader
        for row, image in zip(batch.rows, batch.images, strict=True)
    }
    return found, stems(loader.unreadable)


def test_a_picture_is_the_same_loose_packed_and_shrunk(mixed: Path, tmp_path: Path, decoder: WholeDecoder) -> None:
    for name, side in (("packed", None), ("shrunk", 32)):
        pack(mixed, tmp_path / name, side=side, quality=95, workers=1)
    roots = (mixed, tmp_path / "packed", tmp_path / "shrunk")
    loose, packed, shrunk = (evaluated(open_index(root))[0] for root in roots)
    assert loose.keys() == packed.keys() == shrunk.keys() and len(loose) == len(GOOD)
    for stem, (name, content) in zip(sorted(loose), GOOD.items(), strict=True):
        picture = decoder.picture(content)
        assert np.array_equal(loose[stem].numpy(), picture[:, 16:80]), name
        assert torch.equal(loose[stem], packed[stem]), name
        small = (
            Image.fromarray(picture)
            .resize((48, 32), Image.Resampling.LANCZOS)
            .resize((96, 64), Image.Resampling.BILINEAR)
        )
        difference = np.abs(shrunk[stem].numpy() - np.asarray(small)[:, 16:80].astype(int))
        assert difference.mean() < (20 if "many" in name else 8), name  # many pixels are noise, which JPEG blurs


def test_a_picture_that_is_too_long_for_jpeg_is_shrunk_too(tmp_path: Path) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    scroll = Image.new("L", (30, 80_000), 77)
    (tmp_path / "set/a/scroll.png").write_bytes(encoded(scroll, "PNG"))
    (tmp_path / "set/a/other.jpg").write_bytes(images.jpeg())
    report = pack(tmp_path / "set", tmp_path / "out", side=29, workers=1)
    index = open_index(tmp_path / "out")
    assert report.set_aside == () and sorted(index.height.tolist()) == [29, 77_333]
    assert check(tmp_path / "out", workers=1).bad == ()


def test_pipes_and_huge_files_do_not_hang_a_check_or_a_loader(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.jpeg(seed=number))
    index = open_index(tmp_path / "set")
    pipe, huge = tmp_path / "set/a/0.jpg", tmp_path / "set/b/1.jpg"  # since the index was built
    pipe.unlink()
    os.mkfifo(pipe)
    os.truncate(huge, 1 << 36)
    config = DataConfig(root=index.root, side_px=16, max_bad_share=1.0)
    with TrainLoader(index, config, seed=0, batch_size=4, rank=0, world=1, device=CPU, threads=1) as loader:
        next(loader)
        assert stems([each["file"] for each in loader.bad.report()]) == {"0"}
    assert {"1"} == stems([name for name, _ in check(tmp_path / "set", workers=1).bad])
