"""The reader with a storage that fails, returns short reads or ends early."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from images import jpeg

from pipeline.data import reader as readers
from pipeline.data.index import ImageIndex, open_index
from pipeline.data.reader import Reader


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    """Eight images of two classes in one shard."""
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number in range(8):
            for suffix, content in (("jpg", jpeg(seed=number)), ("cls", str(number % 2).encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return open_index(tmp_path, tmp_path / "index")


class Storage:
    """An os.pread that first fails `times` times with `code`, and returns at most `most` bytes per call."""

    def __init__(self, times: int, code: int, most: int) -> None:
        self.left, self.code, self.most, self.pread = times, code, most, os.pread
        self.numbers: list[int] = []

    def __call__(self, number: int, length: int, offset: int) -> bytes:
        self.numbers.append(number)
        if self.left:
            self.left -= 1
            raise OSError(self.code, os.strerror(self.code))
        return self.pread(number, min(length, self.most), offset)


def read(index: ImageIndex, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> readers.Read:
    """Row 3, read from `storage`."""
    reader = Reader(index, threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", storage)
        found = reader.read(3)
    reader.close()
    return found


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of this thread, which take no time; threads that other tests left go on sleeping."""
    found: list[float] = []
    here, sleep = threading.get_ident(), time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: found.append(s) if threading.get_ident() == here else sleep(s))
    return found


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_storage_that_fails_for_some_time_costs_no_image(
    index: ImageIndex, monkeypatch: pytest.MonkeyPatch, pauses: list[float], code: int
) -> None:
    whole = read(index, Storage(0, 0, 1 << 30), monkeypatch)
    assert whole.reason is None and whole.encoded[:2] == b"\xff\xd8"
    assert read(index, Storage(len(readers.RETRIED_AFTER_S), code, 1 << 30), monkeypatch) == whole
    assert tuple(pauses) == readers.RETRIED_AFTER_S


def test_a_storage_that_keeps_failing_gives_a_reason_and_no_exception(
    index: ImageIndex, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    found = read(index, Storage(99, errno.EIO, 1 << 30), monkeypatch)
    assert found == readers.Read(b"", f"cannot be read: {os.strerror(errno.EIO)}")
    assert len(pauses) == len(readers.RETRIED_AFTER_S)


def test_a_missing_file_is_not_retried(index: ImageIndex, pauses: list[float]) -> None:
    (index.root / "train-0.tar").unlink()
    reader = Reader(index, threads=1)
    assert reader.read(0).reason == f"cannot be read: {os.strerror(errno.ENOENT)}"
    reader.close()
    assert pauses == []


def test_short_reads_are_joined_and_a_truncated_file_is_found(
    index: ImageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(index, Storage(0, 0, 1 << 30), monkeypatch)
    assert read(index, Storage(0, 0, 100), monkeypatch) == whole
    path, offset, length = index.location(3)
    os.truncate(path, offset + length // 2)
    cut = read(index, Storage(0, 0, 1 << 30), monkeypatch)
    assert cut.encoded == whole.encoded[: length // 2] and cut.reason is not None


def test_a_dropped_file_stays_open_for_the_reads_under_way(index: ImageIndex) -> None:
    reader = Reader(index, threads=4, most_open=0)  # every file is dropped at once
    rows = np.arange(8).repeat(16)
    found = reader.start(rows).result()
    reader.close()
    assert [each.reason for each in found] == [None] * len(rows)
    assert len({each.encoded for each in found}) == 8


def counted(reader: Reader, rows: list[int], storage: Storage, monkeypatch: pytest.MonkeyPatch) -> list[readers.Read]:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", storage)
        return reader.start(rows).result()


@pytest.mark.parametrize(
    ("rows", "reads"), [([0, 1, 2, 3], 1), ([3, 1, 0, 2], 1), ([2, 2, 3], 1), ([7], 1), ([0, 4, 1, 5, 1], 2)]
)
def test_neighbours_in_a_shard_are_read_at_once_and_are_the_same_images(
    index: ImageIndex, monkeypatch: pytest.MonkeyPatch, rows: list[int], reads: int
) -> None:
    monkeypatch.setattr(readers, "RUN_GAP", 2048)  # a label lies between two images, but images are longer than that
    reader, storage = Reader(index, threads=2), Storage(0, 0, 1 << 30)
    found = counted(reader, rows, storage, monkeypatch)
    assert found == [reader.read(row) for row in rows]
    reader.close()
    assert len(storage.numbers) == reads


def test_a_run_that_cannot_be_read_at_once_is_read_image_by_image(
    index: ImageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, storage = Reader(index, threads=1), Storage(1, errno.EIO, 1 << 30)
    found = counted(reader, [0, 1, 2, 3], storage, monkeypatch)
    assert found == [reader.read(row) for row in range(4)]
    assert len(storage.numbers) == 1 + 4
    path, offset, length = index.location(3)
    os.truncate(path, offset + length // 2)
    cut = reader.start([0, 1, 2, 3]).result()
    reader.close()
    assert [read.reason is None for read in cut] == [True, True, True, False]
    assert cut[:3] == found[:3] and cut[3].encoded == found[3].encoded[: length // 2]


def test_runs_are_read_in_parts_of_bounded_bytes(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(index, threads=2)
    whole = reader.start(list(range(8))).result()
    monkeypatch.setattr(readers, "RUN_BYTES", int(index.length[:2].sum()) + 2048)
    storage = Storage(0, 0, 1 << 30)
    assert counted(reader, list(range(8)), storage, monkeypatch) == whole
    reader.close()
    assert len(storage.numbers) >= 4
