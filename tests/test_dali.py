"""Tests of the loaders: pixels depend on seed and step, odd images are right, bad ones are replaced."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Container
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from raised import fails
from torchvision.transforms import v2

from pipeline.compat.dali import operator_failure
from pipeline.data import crop_geometry
from pipeline.data.bad import BadImages
from pipeline.data.config import AugmentConfig, DataConfig
from pipeline.data.dali import Decoder, DecoderConfig, EvalLoader, TrainBatch, TrainLoader, decode
from pipeline.data.feed import TrainSource, read_ahead
from pipeline.data.index import ImageIndex, open_index
from pipeline.data.pack import pack
from pipeline.data.reader import Reader
from pipeline.data.stream import Stream
from pipeline.data.verdict import DecodeError
from pipeline.errors import ConfigError, DataError, UndecodableError
from tests import images

CPU = torch.device("cpu")
SHUFFLES = ("full", "block")
PHOTO = images.photo()
ODD = {
    "grey JPEG": images.grey_jpeg(PHOTO),
    "CMYK": images.cmyk_jpeg(PHOTO),
    "YCCK": images.ycck_jpeg(PHOTO),
    "palette": images.palette_png(PHOTO),
    "16-bit PNG": images.png_16_bit(PHOTO),
    "16-bit grey PNG": images.grey_png_16_bit(PHOTO),
    "PNG": images.png(),
    "RGBA PNG": images.encode(PHOTO.convert("RGBA"), "PNG"),
    "progressive 4:2:0": images.jpeg(subsampling=2, progressive=True),
    "WebP": images.encode(PHOTO, "WEBP", lossless=True),
    **{f"EXIF {turn}": images.turned_jpeg(PHOTO, turn) for turn in range(2, 9)},
}
AUGMENTS = {
    "random-resized": AugmentConfig(),
    "random-pad": AugmentConfig(crop="random-pad", pad_px=4),
    "none": AugmentConfig(crop="none"),
}


def upright(encoded: bytes, name: str = "") -> Image.Image:
    picture = Image.open(io.BytesIO(encoded))
    if name == "16-bit grey PNG":  # Pillow cuts 16 bits off at 255 where it should scale
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8), "L")
    return ImageOps.exif_transpose(picture).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images in three classes, of different sizes and, some of them, odd forms."""
    root = tmp_path_factory.mktemp("folder")
    odd = list(ODD.values())
    for number in range(37):
        path = root / f"class-{number % 3}" / f"{number:02d}.JPEG"  # a PNG or WebP too
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(
            odd[number // 2 % len(odd)] if number % 2 else images.jpeg(50 + 3 * number, 90 - number, number)
        )
    return root


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    packed = tmp_path_factory.mktemp("packed") / "set"
    assert pack(folder, packed, shard_bytes=20_000, workers=1).shards >= 5
    return packed


def loader(root: Path | ImageIndex, rank: int = 0, world: int = 1, **keys: Any) -> TrainLoader:
    index = root if isinstance(root, ImageIndex) else open_index(root)
    names = ("bad", "on_event", "start_step", "threads", "batch_size", "make_decoder")
    own = {name: keys.pop(name) for name in names if name in keys}
    data = {"side_px": 32, "max_bad_share": 0.2, "lanes": 4, "window": 4} | keys
    settings = {"seed": 5, "batch_size": 10, "device": CPU, "threads": 2} | own
    return TrainLoader(index, DataConfig(root=index.root, **data), rank=rank, world=world, **settings)


def batches(root: Path | ImageIndex, count: int, *where: int, **keys: Any) -> list[TrainBatch]:
    with loader(root, *where, **keys) as made:
        return list(islice(made, count))


def same(one: TrainBatch, other: TrainBatch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b)
        for a, b in zip(fields_of(one), fields_of(other), strict=True)
    )


def fields_of(batch: TrainBatch) -> list[object]:
    return [value for name, value in vars(batch).items() if name != "draws"] + list(batch.draws.values())


def merged(shares: list[TrainBatch]) -> dict[str, torch.Tensor]:
    """One global batch of several ranks' shares, in the order of its positions."""
    order = np.argsort(np.concatenate([share.positions for share in shares]))
    names = ("images", "labels", "rows", "positions")
    fields = [{**{name: getattr(share, name) for name in names}, **share.draws} for share in shares]
    return {name: torch.cat([torch.as_tensor(each[name]) for each in fields])[order] for name in fields[0]}


# --- the stream of batches


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("crop", AUGMENTS)
def test_a_restart_at_any_step_resumes_bitwise(folder: Path, shards: Path, shuffle: str, crop: str) -> None:
    root = shards if shuffle == "block" else folder
    keys = {"shuffle": shuffle, "augment": AUGMENTS[crop]}
    whole = batches(root, 8, **keys)
    for start in (1, 4, 7):
        again = batches(root, 8 - start, start_step=start, threads=1, **keys)
        assert all(same(a, b) for a, b in zip(whole[start:], again, strict=True))
    assert whole[0].images.shape == (10, 32, 32, 3) and whole[0].images.dtype == torch.uint8
    assert [batch.step for batch in whole] == list(range(8)) and whole[4].epoch == 1


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_global_batches_are_the_same_for_1_2_and_4_ranks(shards: Path, shuffle: str) -> None:
    alone = batches(shards, 5, shuffle=shuffle)
    assert np.array_equal(np.sort(np.concatenate([b.positions for b in alone])), np.arange(50))
    for world in (2, 4):
        shares = [batches(shards, 5, rank, world, shuffle=shuffle) for rank in range(world)]
        for step, whole in enumerate(alone):
            found, expected = merged([share[step] for share in shares]), merged([whole])
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_batches_count_when_they_are_returned_not_when_they_are_prepared(folder: Path) -> None:
    whole = batches(folder, 6)
    made = loader(folder)
    first = list(islice(made, 3))
    made.close()  # some more batches are ready by now
    rest = list(islice(made, 3))
    made.close()
    assert all(same(a, b) for a, b in zip(whole, first + rest, strict=True))


def test_windows_are_torchvisions_crops_of_pillows_pictures(folder: Path) -> None:
    index = open_index(folder)
    for crop, augment in AUGMENTS.items():
        with loader(index, augment=augment, batch_size=37) as made:
            batch, plan = next(made), made.stream.plan(0, 0, 1)
        for position, row in enumerate(plan.rows):
            encoded = (folder / index.file(row)).read_bytes()
            name = next((name for name, odd in ODD.items() if odd == encoded), "")
            picture = torch.from_numpy(np.array(upright(encoded, name))).permute(2, 0, 1)
            y, x, height, width = plan.windows[position].tolist()
            if crop == "random-pad":
                expected = v2.functional.crop(picture, y, x, height, width)
            else:
                expected = v2.functional.resized_crop(picture, y, x, height, width, [32, 32], antialias=True)
            difference = (batch.images[position].permute(2, 0, 1).int() - expected.int()).abs()
            assert difference.max() <= (1 if name in ("CMYK", "YCCK") else 0), (crop, name)


def test_the_side_changes_by_epoch_without_a_new_decoder(folder: Path) -> None:
    built: list[DecoderConfig] = []

    def decoder(config: DecoderConfig) -> Decoder:
        built.append(config)
        return Decoder(config)

    found = batches(folder, 11, side_px=24, side_schedule=((1, 32), (2, 48)), make_decoder=decoder)
    assert {batch.epoch: batch.images.shape[1] for batch in found} == {0: 24, 1: 32, 2: 48} and len(built) == 1
    (fixed,) = batches(folder, 1, start_step=5, side_px=32)
    (changed,) = batches(folder, 1, start_step=5, side_px=24, side_schedule=((1, 32), (2, 48)))
    assert same(fixed, changed)


def test_block_shuffle_reads_the_set_once_over_four_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pages of 4 KiB, through a cache that holds a tenth of the set on each rank."""
    for number in range(400):
        path = tmp_path / "folder" / f"class-{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.jpeg(60, 50, number))
    pack(tmp_path / "folder", tmp_path / "packed", shard_bytes=100_000, workers=1)
    index = open_index(tmp_path / "packed")
    size = sum((index.root / shard).stat().st_size for shard in index.shards or ())
    read = {
        shuffle: sum(bytes_read(index, shuffle, rank, size // 10, monkeypatch) for rank in range(4))
        for shuffle in SHUFFLES
    }
    assert read["block"] <= 1.05 * size
    assert read["full"] > 1.2 * size


def bytes_read(index: ImageIndex, shuffle: Any, rank: int, cache: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that `rank` of 4 reads from storage in an epoch, ahead of their use or not."""
    page, cached, missed = 4096, OrderedDict[tuple[str, int], None](), 0

    def touch(number: int, offset: int, length: int) -> None:
        nonlocal missed
        for at in range(offset // page, -(-(offset + length) // page)):
            key = (os.readlink(f"/proc/self/fd/{number}"), at)
            missed += key not in cached
            cached[key] = None
            cached.move_to_end(key)
            if len(cached) * page > cache:
                cached.popitem(last=False)

    pread = os.pread
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda n, length, offset: (touch(n, offset, length), pread(n, length, offset))[1])
        patch.setattr(os, "posix_fadvise", lambda n, offset, length, advice: touch(n, offset, length))
        config = DataConfig(root=index.root, shuffle=shuffle, lanes=4, window=2)
        reader = Reader(index, threads=1)
        source = TrainSource(Stream(index, config, seed=0, batch_size=4), reader, BadImages(index, 0), rank, 4)
        assert len(list(read_ahead(source, range(len(index) // 4), 2))) == 100
        reader.close()
    return page * missed


# --- odd and bad images


def test_odd_images_are_decoded_as_pillow_decodes_them() -> None:
    config = DataConfig(root=Path("nowhere"), eval_side_px=64, eval_resize_px=64)
    found = decode(list(ODD.values()), config, CPU)
    for name, encoded, picture in zip(ODD, ODD.values(), found, strict=True):
        expected = np.asarray(upright(encoded, name).crop((16, 0, 80, 64))).astype(int)
        assert np.abs(picture.numpy() - expected).max() <= (1 if name in ("CMYK", "YCCK") else 0), name


def undecodable(encoded: bytes) -> bytes:
    """A JPEG with start and end, but a damaged Huffman table: only decoding shows it."""
    broken = bytearray(encoded)
    broken[broken.find(b"\xff\xc4") + 5] = 200
    return bytes(broken)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> tuple[ImageIndex, ImageIndex]:
    """(the set, a copy in which images 12, the last of its class, and 20 were damaged after the index was built)."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken = open_index(copy)
    for row, damage in ((12, lambda encoded: encoded[:-40]), (20, undecodable)):
        path = copy / broken.file(row)
        path.write_bytes(damage(path.read_bytes()))
    return open_index(folder), broken


def test_bad_images_are_replaced_and_all_others_stay_the_same(damaged: tuple[ImageIndex, ImageIndex]) -> None:
    good, broken = damaged
    events: list[dict[str, Any]] = []
    expected = batches(good, 8)
    with loader(broken, on_event=lambda kind, **facts: events.append({"kind": kind, **facts})) as made:
        found = list(islice(made, 8))
        assert sorted(row for row, _ in made.bad.state()["rows"]) == [12, 20]
    plan = [made.stream.plan(step, 0, 1) for step in range(8)]
    for a, b, planned in zip(expected, found, plan, strict=True):
        untouched = ~np.isin(planned.rows, [12, 20])
        assert torch.equal(a.images[untouched], b.images[untouched]) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.draws["flip"], b.draws["flip"]) and np.array_equal(
            b.rows[untouched], planned.rows[untouched]
        )
        assert (b.rows[planned.rows == 12] == 0).all() and (b.rows[planned.rows == 20] == 21).all()
    assert {event["file"]: (event["kind"], event["reason"]) for event in events} == {
        broken.file(12): ("bad-image", "truncated JPEG (no end marker)"),  # even if its window is intact
        broken.file(20): ("bad-image", "does not decode"),
    }
    assert len(events) == 2 and all(0 <= event["pause_s"] < 5 for event in events)


def test_a_restart_with_known_bad_images_resumes_bitwise(damaged: tuple[ImageIndex, ImageIndex]) -> None:
    _, broken = damaged
    with loader(broken) as made:
        whole = []
        for step, batch in enumerate(islice(made, 8)):
            whole.append(batch)
            if step == 3:
                state = made.bad.state()
    bad = BadImages(broken, 0.2)
    bad.merge(state)
    assert all(same(a, b) for a, b in zip(whole[4:], batches(broken, 4, start_step=4, bad=bad), strict=True))


def test_a_bad_image_that_one_rank_finds_is_replaced_on_the_other_too(
    damaged: tuple[ImageIndex, ImageIndex],
) -> None:
    _, broken = damaged
    alone = batches(broken, 8)
    shares = [loader(broken, rank, 2) for rank in range(2)]
    for step in range(8):
        found = merged([next(share) for share in shares])
        for share in shares:  # as the trainer does when it logs; batches that were ready are prepared again
            for other in shares:
                share.bad.merge(other.bad.state())
        assert torch.equal(found["images"], merged([alone[step]])["images"])
    for share in shares:
        share.close()


def test_a_bad_image_of_another_rank_is_replaced_in_batches_that_were_ready(folder: Path) -> None:
    with loader(folder) as made:
        next(made)
        time.sleep(0.5)  # the next ones are ready
        row = int(made.stream.plan(1, 0, 1).rows[3])
        made.bad.add(row, "found by another rank")
        batch = next(made)
    assert batch.rows[3] == made.bad.replacement(row) != row
    bad = BadImages(made.index, 0.2)
    bad.merge(made.bad.state())
    assert same(batch, *batches(folder, 1, start_step=1, bad=bad))


def test_a_class_without_a_good_image_ends_the_run(tmp_path: Path) -> None:
    known = background_threads(tries=1)
    for name, encoded in {"a": images.jpeg(), "b": images.jpeg()[:-40]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.jpg").write_bytes(encoded)
    with fails(DataError, "data.root", subject="b"):
        batches(tmp_path, 3, batch_size=2, max_bad_share=1.0)
    assert not background_threads(known)


def test_a_missing_file_and_an_image_without_a_size_are_replaced_and_reported(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "class-1/04.JPEG").write_bytes(images.TEXT)
    index = open_index(copy)
    gone = next(row for row in range(len(index)) if index.file(row) == "class-0/06.JPEG")
    (copy / index.file(gone)).unlink()
    named: dict[str, str] = {}
    with loader(index, on_event=lambda kind, **facts: named.update({facts["file"]: facts["reason"]})) as made:
        rows = np.concatenate([batch.rows for batch in islice(made, 4)])
    assert named["class-0/06.JPEG"].startswith("cannot be read: No such file")
    assert "header" in named["class-1/04.JPEG"] and len(named) == 2
    assert gone not in rows


def test_too_many_bad_images_end_the_run(damaged: tuple[ImageIndex, ImageIndex]) -> None:
    known = background_threads(tries=1)
    _, broken = damaged
    with fails(DataError, "data.max_bad_share", subject=0.03):
        batches(broken, 8, max_bad_share=0.03)
    assert not background_threads(known)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), DecodeError("no image is to blame")])
def test_an_error_without_an_image_to_blame_is_raised_as_it_is(folder: Path, error: RuntimeError) -> None:
    known = background_threads(tries=1)
    takes: list[int] = []

    class FailingOnce(Decoder):
        def take(self) -> torch.Tensor:
            takes.append(1)
            if len(takes) == 3:
                raise error
            return super().take()

    with pytest.raises(type(error)) as raised:
        batches(folder, 8, make_decoder=FailingOnce)
    assert raised.value is error and not background_threads(known)


def test_only_an_operators_failure_counts_as_a_decode_error() -> None:
    decoder = Decoder(DecoderConfig(CPU, gpu=False, threads=1, most=1))
    geometry = DataConfig(root=Path("nowhere"), side_px=32).eval_geometry(np.array([[48, 64]], dtype=np.int32))
    with pytest.raises(DecodeError):
        decoder.put([undecodable(images.jpeg(64, 48))], geometry)
        decoder.take()
    decoder.close()
    assert operator_failure(RuntimeError("CUDA error: out of memory")) is None
    assert (
        operator_failure(RuntimeError("Error in CPU operator `resize`,\nencountered:\n\nno such size"))
        == "no such size"
    )


# --- evaluation


def walk(index: ImageIndex, rank: int = 0, world: int = 1, batch_size: int = 5, **data: Any) -> EvalLoader:
    config = DataConfig(root=index.root, **{"side_px": 32, "eval_resize_px": 40} | data)
    return EvalLoader(index, config, batch_size=batch_size, rank=rank, world=world, device=CPU, threads=2)


def evaluated(index: ImageIndex, world: int = 1) -> tuple[dict[int, torch.Tensor], list[str]]:
    found: dict[int, torch.Tensor] = {}
    unreadable = []
    for rank in range(world):
        made = walk(index, rank, world)
        for _ in range(2):  # it can be iterated again
            shown = [
                (int(row), picture) for batch in made for row, picture in zip(batch.rows, batch.images, strict=True)
            ]
        assert not found.keys() & dict(shown).keys() and len(dict(shown)) == len(shown)
        assert len(made) == -(-len(made.rows) // 5)
        found |= dict(shown)
        unreadable += made.unreadable
    return found, unreadable


def test_every_image_is_evaluated_once_for_any_number_of_ranks(damaged: tuple[ImageIndex, ImageIndex]) -> None:
    good, broken = damaged
    expected, none = evaluated(good)
    assert sorted(expected) == list(range(37)) and not none
    for world in (1, 2, 3):
        found, unreadable = evaluated(broken, world)
        assert sorted(found) == [row for row in range(37) if row not in (12, 20)]
        assert sorted(unreadable) == sorted([broken.file(12), broken.file(20)])
        assert all(torch.equal(found[row], expected[row]) for row in found)
    assert torch.cat([batch.labels for batch in walk(good)]).tolist() == good.label.tolist()


@pytest.mark.parametrize("resize", ["torch", "dali"])
@pytest.mark.parametrize(("side", "resized"), [(32, 40), (33, 33), (64, 64), (31, 50)])
def test_evaluation_has_the_pixels_of_torchvisions_centre_crop(side: int, resized: int, resize: Any) -> None:
    """resize="dali" is the graph of a GPU, run on the CPU: its resize may round differently, its windows may not."""
    encoded = [images.jpeg(width, height) for width, height in ((97, 64), (64, 97), (33, 33), (40, 20), (350, 41))]
    config = DataConfig(root=Path("nowhere"), eval_side_px=side, eval_resize_px=resized)
    pictures = [torch.from_numpy(np.array(upright(each))).permute(2, 0, 1) for each in encoded]
    sizes = np.array([picture.shape[1:] for picture in pictures], dtype=np.int32)
    decoder = Decoder(DecoderConfig(CPU, gpu=False, threads=2, most=8, resize=resize))
    decoder.put(encoded, config.eval_geometry(sizes))
    found = decoder.take().permute(0, 3, 1, 2)
    decoder.close()
    theirs = v2.Compose([v2.Resize(resized, antialias=True), v2.CenterCrop(side)])
    for ours, picture in zip(found, pictures, strict=True):
        difference = (ours.int() - theirs(picture).int()).abs()
        assert difference.max() <= {"torch": 0, "dali": 2}[resize]


@pytest.mark.parametrize("resize", ["torch", "dali"])
def test_bicubic_images_are_torchvisions(resize: Any) -> None:
    """DALI's resize, which a GPU uses, keeps fractions between its two passes, where torch rounds."""
    encoded = images.jpeg(97, 64)
    config = DataConfig(root=Path("nowhere"), eval_side_px=32, eval_resize_px=40, interpolation="bicubic")
    asked = DecoderConfig.of(config, CPU, threads=1, most=1)
    decoder = Decoder(dataclasses.replace(asked, resize=resize))
    decoder.put([encoded], config.eval_geometry(np.array([[64, 97]], dtype=np.int32)))
    found = decoder.take().permute(0, 3, 1, 2)[0]
    decoder.close()
    picture = torch.from_numpy(np.array(upright(encoded))).permute(2, 0, 1)
    theirs = v2.Compose([v2.Resize(40, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32)])(picture)
    bilinear = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(32)])(picture)
    assert (found.int() - theirs.int()).abs().max() <= {"torch": 0, "dali": 2}[resize]
    assert (bilinear.int() - theirs.int()).abs().max() > 4


@pytest.mark.parametrize("resize", ["torch", "dali"])
@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3, 0, 1), (3, 0)])
def test_a_batch_without_images_changes_no_other(sizes: tuple[int, ...], resize: Any) -> None:
    """As one of which no image decodes."""
    config = DataConfig(root=Path("nowhere"), side_px=32, eval_resize_px=32)
    decoder = Decoder(DecoderConfig(CPU, gpu=False, threads=2, most=3, resize=resize))
    for size in sizes:
        encoded = [images.png(32, 32, seed) for seed in range(size)]
        decoder.put(encoded, config.eval_geometry(np.full((size, 2), 32, dtype=np.int32)))
        expected = np.array([np.array(upright(each)) for each in encoded], dtype=np.uint8).reshape(size, 32, 32, 3)
        assert np.array_equal(decoder.take().numpy(), expected)
    assert not decoder._fed
    decoder.close()


def test_small_images_keep_their_pixels() -> None:
    encoded = [images.png(32, 32, seed) for seed in range(3)]
    config = DataConfig(root=Path("nowhere"), side_px=32, eval_resize_px=32)
    expected = np.stack([np.array(upright(each)) for each in encoded])
    assert np.array_equal(decode(encoded, config, "cpu").numpy(), expected)


def test_an_extremely_long_image_is_evaluated_in_its_middle_within_bounds() -> None:
    config = DataConfig(root=Path("nowhere"), side_px=32, eval_resize_px=32)
    found = config.eval_geometry(np.array([[2, 50_000]], dtype=np.int32))
    assert found.sizes.tolist() == [[32, 32 * crop_geometry.LONGEST]]
    assert found.windows.tolist() == [[0, 25_000 - crop_geometry.LONGEST, 2, 2 * crop_geometry.LONGEST]]


@pytest.mark.data
def test_evaluation_pixels_are_torchvisions_on_imagenet(imagenet: ImageIndex) -> None:
    """Mean absolute difference of pixels in 0..1, before mean and std, over all images: at most 2/255."""
    theirs = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    differences: list[float] = []
    made = walk(imagenet, batch_size=32, side_px=224, eval_resize_px=None)
    for batch in made:
        pictures = [torch.from_numpy(np.array(upright(read(imagenet, row)))).permute(2, 0, 1) for row in batch.rows]
        expected = torch.stack([theirs(picture) for picture in pictures])
        found = batch.images.permute(0, 3, 1, 2)
        differences += ((found.float() - expected.float()).abs() / 255).mean(dim=(1, 2, 3)).tolist()
    assert not made.unreadable and len(differences) == len(imagenet)
    print(f"\nmean |difference| {255 * np.mean(differences):.4f}/255, worst image {255 * max(differences):.4f}/255")
    assert np.mean(differences) <= 2 / 255


def read(index: ImageIndex, row: int) -> bytes:
    path, offset, length = index.location(int(row))
    with open(path, "rb") as file:
        return os.pread(file.fileno(), length, offset)


@pytest.fixture
def imagenet(tmp_path: Path) -> ImageIndex:
    if "ADAPTNET_DATA" not in os.environ:
        pytest.skip("ADAPTNET_DATA is not set")
    pack(Path(os.environ["ADAPTNET_DATA"]) / "imagenet-sample", tmp_path / "packed", workers=1)
    return open_index(tmp_path / "packed")


# --- decode, settings, the end


def test_decode_names_the_positions_that_cannot_be_decoded() -> None:
    config = DataConfig(root=Path("nowhere"), side_px=32)
    encoded = [
        images.jpeg(),
        images.TEXT,
        images.jpeg(),
        undecodable(images.jpeg()),
        images.truncated_jpeg(),
        images.bomb_png(),
    ]
    with fails(UndecodableError, "images", subject="1, 3, 4, 5") as raised:
        decode(encoded, config, CPU)
    assert raised.value.num_images == 6 and set(raised.value.reasons) == {1, 3, 4, 5}
    assert decode([], config, CPU).shape == (0, 32, 32, 3)


def test_a_gpu_decoder_without_a_gpu_is_refused(folder: Path) -> None:
    with fails(ConfigError, "data.decoder", subject="gpu"):
        loader(folder, decoder="gpu")


def background_threads(known: Container[int] = (), tries: int = 2400) -> dict[int, str]:
    """Our threads and DALI's by system id, but those `known`, that do not end within two minutes.

    The system still lists a thread shortly after its end.
    """
    for _ in range(tries):
        ours = {thread.native_id or 0: thread.name for thread in threading.enumerate() if "adaptnet" in thread.name}
        dali = {}
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                dali[int(task.name)] = (task / "comm").read_text().strip()
        found = ours | {number: name for number, name in dali.items() if "DALI" in name}
        found = {number: name for number, name in found.items() if number not in known}
        if not found:
            break
        time.sleep(0.05)
    return found


def test_no_thread_or_file_remains_when_a_loader_ends_at_any_time(folder: Path) -> None:
    known = background_threads(tries=1)  # of other tests
    list(islice(loader(folder), 0))
    assert not background_threads(known)  # nothing starts before it is asked for
    for count in (1, 3, 30):
        batches(folder, count)
    with pytest.raises(KeyError), loader(folder) as made:
        next(made)
        raise KeyError
    index = open_index(folder)
    evaluation = iter(walk(index, batch_size=2))
    next(evaluation)
    evaluation.close()  # type: ignore[attr-defined]
    assert not background_threads(known)
    assert not [path for path in Path("/proc/self/fd").iterdir() if path.resolve().suffix == ".JPEG"]


def test_keys_of_a_gpus_decoder_reach_it_and_change_nothing_on_a_cpu() -> None:
    keys: dict[str, Any] = {"fancy_upsampling": False, "hw_decoder_load": 0.9}
    plain, set_ = (DataConfig(root=Path("nowhere"), side_px=48, eval_resize_px=48, **each) for each in ({}, keys))
    on_gpu = DecoderConfig.of(set_, torch.device("cuda", 1), threads=2, most=4)
    assert on_gpu == DecoderConfig(torch.device("cuda", 1), True, 2, 4, fancy_upsampling=False, hw_decoder_load=0.9)
    encoded = [images.jpeg(64, 48, subsampling=2)]
    assert torch.equal(decode(encoded, plain, "cpu"), decode(encoded, set_, "cpu"))
