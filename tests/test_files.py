"""Atomic writes: whenever a writer dies, a reader finds the old content or the new one."""

from __future__ import annotations

import ast
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from disks import full_disk

from pipeline.runs import files

ROOT = Path(__file__).parents[1]
OLD, NEW = "old " * 50_000, "new " * 60_000


class Crash(BaseException):
    """Simulates a process that ends at this point."""


@contextmanager
def crash_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ends the block at the call `number` into the system of those that change the disk; lists the calls before."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            if len(calls) == number:
                raise Crash(name)
            calls.append(name)
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch, suppress(Crash):
        for name in ("fsync", "replace", "rename"):
            patch.setattr(os, name, counted(name))
        yield calls


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text(text)
    (folder / "inner" / "b.txt").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", range(4))
def test_a_crash_at_any_point_leaves_the_old_file_or_the_new_one(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    path.write_text(OLD)
    with crash_at(number, monkeypatch) as calls:
        files.write_text(path, NEW)
    assert path.read_text() == (NEW if "replace" in calls else OLD)
    assert number < 3 or calls == ["fsync", "replace", "fsync"]  # content, then name, then the folder
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("number", range(7))
def test_a_crash_at_any_point_leaves_no_folder_or_a_whole_one(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "folder"
    with crash_at(number, monkeypatch) as calls, files.whole_folder(path) as aside:
        fill(aside, NEW)
    assert path.exists() == ("rename" in calls)
    assert number < 6 or calls == ["fsync"] * 4 + ["rename", "fsync"]  # 2 files and their 2 folders, then the name
    assert not path.exists() or content(path) == {"a.txt": NEW, "inner/b.txt": NEW}
    assert {each.name for each in path.parent.iterdir()} <= {"folder"}


@pytest.mark.parametrize("number", range(8))
def test_a_crash_while_a_folder_is_replaced_loses_neither(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = tmp_path / "folder", tmp_path / ".new"
    fill(path, OLD)
    fill(new, NEW)
    with crash_at(number, monkeypatch) as calls:
        files.move_folder(new, path, replace=True)
    whole = [content(each)["inner/b.txt"] for each in tmp_path.iterdir()]
    assert path.exists() or calls.count("rename") == 1  # between the two renames the old one has a hidden name
    assert NEW in whole and (OLD in whole or path.exists())
    assert number < 7 or whole == [NEW]


def test_nothing_remains_of_a_file_or_a_folder_whose_writer_raises(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text(OLD)
    with pytest.raises(ValueError), files.whole_file(tmp_path / "file.txt") as aside:
        aside.write_text("half")
        raise ValueError
    with pytest.raises(ValueError), files.whole_folder(tmp_path / "folder") as aside:
        fill(aside, "half")
        raise ValueError
    assert content(tmp_path) == {"file.txt": OLD}
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.runs import files

with files.whole_folder(Path(sys.argv[1])) as aside:
    (aside / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_destination_as_it_was(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "folder"], cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "folder").exists()
    fill(tmp_path / "made", NEW)
    files.move_folder(tmp_path / "made", tmp_path / "folder")
    assert content(tmp_path / "folder")["a.txt"] == NEW


def test_readers_see_whole_files_while_two_writers_race(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    values = [{"value": text} for text in (OLD, NEW)]
    files.write_json(path, values[0])
    ended = threading.Event()

    def write(value: dict[str, str]) -> None:
        while not ended.is_set():
            files.write_json(path, value)

    writers = [threading.Thread(target=write, args=(value,)) for value in values]
    for writer in writers:
        writer.start()
    try:
        read = [json.loads(path.read_text(encoding="utf-8")) for _ in range(50)]
    finally:
        ended.set()
        for writer in writers:
            writer.join()
    assert all(value in values for value in read)
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


def test_the_first_of_two_writers_of_a_folder_wins(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(FileExistsError), files.whole_folder(path) as second:
        with files.whole_folder(path) as first:
            fill(first, OLD)
        fill(second, NEW)
    assert content(path) == {"a.txt": OLD, "inner/b.txt": OLD}
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with files.whole_folder(tmp_path / "folder") as aside:
        fill(aside, NEW)
    assert content(tmp_path / "folder")["a.txt"] == NEW


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text(OLD)
    with full_disk(), pytest.raises(OSError):
        files.write_text(tmp_path / "file.txt", NEW)
    with full_disk(), pytest.raises(OSError), files.whole_folder(tmp_path / "folder") as aside:
        fill(aside, NEW)
    assert content(tmp_path) == {"file.txt": OLD}


def test_a_replaced_file_keeps_its_permissions_and_new_ones_follow_the_umask(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    files.write_text(secret, OLD)
    secret.chmod(0o600)
    before = os.umask(0o027)
    try:
        files.write_text(secret, NEW)
        files.write_text(tmp_path / "new.txt", NEW)
        with files.whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"secret.txt": 0o600, "new.txt": 0o640, "folder": 0o750}


RENAMES = {("os", "replace"), ("os", "rename"), ("os", "renames"), ("shutil", "move")}


def renames(path: Path) -> Iterator[str]:
    """Calls that rename files: os.replace and the like, and Path's methods, recognised by their single argument."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        of_path = node.func.attr in ("replace", "rename") and len(node.args) == 1 and not node.keywords
        if (owner, node.func.attr) in RENAMES or of_path:
            yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_no_other_module_renames_files() -> None:
    sources = [path for top in ("pipeline", "jobs", "tuning") for path in sorted((ROOT / top).rglob("*.py"))]
    found = [call for path in sources if path != Path(files.__file__) for call in renames(path)]
    assert not found
    assert len(list(renames(Path(files.__file__)))) == 4
