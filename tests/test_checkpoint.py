"""Tests of checkpoints: stored completely or not at all; the newest complete one counts; errors lose nothing stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from raised import fails

from pipeline.config import validate
from pipeline.errors import CheckpointError, ConfigError, ResourceError
from pipeline.training import checkpoint, state
from pipeline.training.checkpoint import Checkpointer, LocalStorage
from pipeline.training.config import CheckpointConfig


def saver(folder: Path, **settings: object) -> Checkpointer:
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpointer(LocalStorage(folder), folder, CheckpointConfig(**settings))  # type: ignore[arg-type]


def save(to: Checkpointer, step: int, **metrics: float) -> None:
    current = tiny.fresh(tiny.training(ema_decay=0.9))
    current.step = step
    to.save(current, tiny.meta(step, **metrics), {"bad": {}}, wait=True)


def newest(folder: Path) -> tuple[str | None, list[str]]:
    passed: list[str] = []
    return checkpoint.newest_good(LocalStorage(folder), lambda name, why: passed.append(name)), passed


def test_a_round_trip_is_bitwise_and_needs_no_pickle(tmp_path: Path) -> None:
    current = tiny.fresh(tiny.training(ema_decay=0.9))
    current.step, current.images_seen = 7, 56
    saver(tmp_path).save(current, tiny.meta(7), {"bad": {"rows": [[1, "empty"]]}}, wait=True)
    other = tiny.fresh(tiny.training(ema_decay=0.9))
    torch.nn.init.zeros_(other.net.head.weight)
    mapping = checkpoint.read(tmp_path / "step-00000007")
    state.restore(other, mapping)
    theirs = tiny.tensors(other)
    assert all(torch.equal(theirs[name], value) for name, value in tiny.tensors(current).items())
    assert (other.step, other.images_seen, mapping["bad"]) == (7, 56, {"rows": [[1, "empty"]]})


def test_a_damaged_checkpoint_is_neither_the_best_nor_removed(tmp_path: Path) -> None:
    to = saver(tmp_path, keep_last=9, keep_best=9)
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6)):
        save(to, step, top1=score)
    (tmp_path / "step-00000004" / "meta.json").write_text("{")
    weights = tmp_path / "step-00000002" / "net.safetensors"
    stored = weights.read_bytes()
    weights.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
    name, passed = newest(tmp_path)
    assert (name, passed) == ("step-00000003", ["step-00000004"])
    for damaged in (passed, []):
        again = Checkpointer(LocalStorage(tmp_path), tmp_path, CheckpointConfig(keep_best=9), damaged)
        assert again.best_whole() == again.best() == "step-00000003"


def test_a_storage_belongs_to_one_run_folder(tmp_path: Path) -> None:
    runs = [tmp_path / home / "run" for home in "ab"]
    for run_dir in runs:
        run_dir.mkdir(parents=True)
    for uri in (str(tmp_path / "store"), f"file://{tmp_path}/remote"):
        config = CheckpointConfig(storage=uri)
        for _ in range(2):
            checkpoint.claim_storage(checkpoint.open_storage(config, runs[0]), runs[0])
        with fails(ConfigError, "checkpoint.storage"):
            checkpoint.claim_storage(checkpoint.open_storage(config, runs[1]), runs[1])
    with fails(ResourceError, "checkpoint.storage", "file:///proc/nope"):
        checkpoint.open_storage(CheckpointConfig(storage="file:///proc/nope"), runs[0])


@pytest.mark.parametrize("uri", ["s3://KEY:hidden@bucket/runs", "s3://KEY@bucket", "gs://b/x?secret=hidden"])
def test_credentials_in_a_storage_are_refused(uri: str) -> None:
    with fails(ConfigError, "storage"):
        validate(CheckpointConfig, {"storage": uri}, "checkpoint")


def test_the_state_may_change_while_it_is_written(tmp_path: Path) -> None:
    current, to = tiny.fresh(tiny.training()), saver(tmp_path)
    before = current.net.head.weight.detach().clone()
    to.save(current, tiny.meta(0), {"bad": {}}, wait=False)
    with torch.no_grad():
        current.net.head.weight.zero_()
    to.wait()
    assert torch.equal(checkpoint.read(tmp_path / "step-00000000")["net"]["head.weight"], before)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "unfinished"])
def test_the_newest_undamaged_checkpoint_is_used(tmp_path: Path, harm: str) -> None:
    to = saver(tmp_path)
    save(to, 1)
    save(to, 2)
    victim = tmp_path / "step-00000002"
    if harm == "unfinished":
        (victim / "COMPLETE.json").unlink()
        assert newest(tmp_path) == ("step-00000001", [])
        return
    weights = victim / "net.safetensors"
    content = bytearray(weights.read_bytes())
    if harm == "remove":
        weights.unlink()
    else:
        content[-1] ^= 1
        weights.write_bytes(content if harm == "flip" else content[:-5])
    assert newest(tmp_path) == ("step-00000001", ["step-00000002"])
    (tmp_path / "step-00000001" / "state.pt").write_bytes(b"")
    with fails(CheckpointError, "checkpoints"):
        newest(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    to = saver(tmp_path, keep_last=2, keep_best=1)
    for step, top1 in enumerate([0.1, 0.9, 0.5, 0.4, 0.3], 1):
        save(to, step, top1=top1)
    assert to.storage.names() == ["step-00000002", "step-00000004", "step-00000005"]
    assert to.best() == "step-00000002"
    again = saver(tmp_path, keep_last=1, keep_best=1)  # another process knows the scores too
    save(again, 6, top1=0.2)
    assert again.storage.names() == ["step-00000002", "step-00000006"]


def test_a_storage_by_uri_works_like_a_folder(tmp_path: Path) -> None:
    config = CheckpointConfig(storage=f"local://{tmp_path}/far", keep_last=1, keep_best=0)
    storage = checkpoint.open_storage(config, tmp_path / "run")
    to = Checkpointer(storage, tmp_path / "staging", config)
    save(to, 1)
    save(to, 2)
    assert storage.names() == ["step-00000002"]
    assert storage.meta("step-00000002").step == 2
    folder = checkpoint.open_storage(config, tmp_path / "run").fetch("step-00000002")
    checkpoint.verify(folder)  # the copy outlives the storage that fetched it
    (folder / "net.safetensors").write_bytes(b"")
    assert checkpoint.read(storage.fetch("step-00000002"))["step"] == 2
    (tmp_path / "file").touch()
    elsewhere = checkpoint.RemoteStorage(f"local://{tmp_path}/far/run", tmp_path / "file" / "no-folder")
    checkpoint.verify(elsewhere.fetch("step-00000002"))
    save(to, 3)
    assert list((tmp_path / "run" / "fetched").iterdir()) == []
    assert not list((tmp_path / "staging").iterdir())


ENDLESS = """
import sys, pathlib, itertools
sys.path.insert(0, {tests!r})
import test_checkpoint as t, torch
to = t.far(pathlib.Path({folder!r}))
current = t.tiny.fresh(t.tiny.training())
for current.step in itertools.count(1):
    extra = {{"bad": {{}}, "weight": torch.full((2_000_000,), 1.0 * current.step)}}
    to.save(current, t.tiny.meta(current.step), extra, wait=True)
    print(current.step, flush=True)
"""


def far(folder: Path) -> Checkpointer:
    config = CheckpointConfig(storage=f"local://{folder}/far", keep_last=3, keep_best=0)
    return Checkpointer(checkpoint.open_storage(config, folder / "run"), folder / "staging", config)


@pytest.mark.faults
@pytest.mark.parametrize("pause_s", [0.0, 0.01, 0.02, 0.03])
def test_a_writer_killed_during_an_upload_leaves_the_newest_complete_one(tmp_path: Path, pause_s: float) -> None:
    code = ENDLESS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    done = [int(writer.stdout.readline()) for _ in range(4)][-1]
    time.sleep(pause_s)
    writer.kill()
    writer.wait()
    done = max([done, *map(int, writer.stdout.read().split())])
    again = far(tmp_path)
    name = checkpoint.newest_good(again.storage, lambda name, why: pytest.fail(f"{name} counted and is damaged: {why}"))
    assert name in (f"step-{done:08d}", f"step-{done + 1:08d}")  # the last may have ended before it was said
    found = checkpoint.read(again.storage.fetch(name))
    assert torch.equal(found["weight"], torch.full((2_000_000,), 1.0 * found["step"]))
    assert list((tmp_path / "staging").iterdir()) == []
    save(again, done + 2)
    assert again.storage.names()[-1] == f"step-{done + 2:08d}"


def test_an_unknown_scheme_is_refused_with_a_reason(tmp_path: Path) -> None:
    with fails(ResourceError, "checkpoint.storage", "nowhere://x/run"):
        checkpoint.open_storage(CheckpointConfig(storage="nowhere://x"), tmp_path / "run")


FULL = """
import sys, pathlib
sys.path.insert(0, {tests!r})
import test_checkpoint as t
from pipeline.errors import ResourceError
folder = pathlib.Path({folder!r})
to = t.saver(folder)
t.save(to, 1)
(folder / "ballast").write_bytes(b"0" * (folder.stat().st_blksize * 0))
left = __import__("shutil").disk_usage(folder).free
(folder / "ballast").write_bytes(b"0" * max(0, left - 4096))
try:
    t.save(to, 2)
except ResourceError as error:
    print(error.key)
print(to.storage.names(), sorted(p.name for p in folder.iterdir()))
"""


def test_a_full_disk_is_one_error_and_loses_no_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        code = FULL.format(tests=str(Path(__file__).parent), folder=str(disk))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.stdout.splitlines()[0] == "checkpoint.storage", done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "['step-00000001'] ['ballast', 'step-00000001']"


def test_another_recipe_is_refused_by_its_differing_keys() -> None:
    saved, now = (
        {"training.epochs": 3, "seed": 1, "family.depth": 8},
        {"training.epochs": 5, "seed": 2, "family.depth": 8},
    )
    with fails(CheckpointError, "training.epochs", "runs/x") as caught:
        checkpoint.check_fingerprint(saved, now, ["seed"], "runs/x")
    assert caught.value.keys == ("training.epochs",)
    assert checkpoint.check_fingerprint(saved, now, ["seed", "training.epochs"], "x") == ["seed", "training.epochs"]
    seen: list[float] = []
    extended = checkpoint.check_fingerprint(saved, now, ["seed"], "x", lambda before: seen.append(before))  # type: ignore[func-returns-value]
    assert (extended, seen) == (["seed", "training.epochs"], [3])
    with fails(CheckpointError, "training.epochs", "runs/x"):
        checkpoint.check_fingerprint(saved, now, ["seed"], "runs/x", lambda before: "the curve is fixed")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    path = tmp_path / "step-00000001" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with fails(CheckpointError, "meta.json", 99):
        checkpoint.read_meta(tmp_path / "step-00000001")
