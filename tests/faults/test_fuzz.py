"""2,400 random inputs over keys, files, folders, tars and requests (make test-faults): each is accepted, or refused
with exit code 2 and a sentence, within seconds, and nothing is left half-done. A few of them are part of make test.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fuzz
import pytest

from jobs import cli
from pipeline import config as configs
from pipeline import run_config
from pipeline.data import toy
from pipeline.data.check import check
from pipeline.data.index import open_index
from pipeline.data.pack import pack
from pipeline.errors import AdaptNetError
from pipeline.execution import launch
from pipeline.registry.model import load_model
from pipeline.registry.requests import parse_request
from pipeline.registry.resolve import resolve

WITHIN_S = 5  # of this process' time, so that other processes do not count
RECIPES = ("baseline/toy", "convnet_aig/toy", "arrn/toy", "ranet/toy", "shape_adaptor/toy")
SMALL = (
    *("training.epochs=0.5", "training.batch_size=8", "training.schedule.warmup_epochs=0", "family.depth=8"),
    *("data.side_px=16", "evaluation.latency_repeats=0", "compute.workers=0", "tracking.register=null"),
    *("tracking.uri=http://127.0.0.1:9", "tracking.patience_s=0", "name=fuzz"),
)
faults = pytest.mark.faults
Answer = TypeVar("Answer")
Printed = pytest.CaptureFixture[str]


def answered(capsys: Printed, *words: str) -> None:
    """Runs a command in this process: it ends with 0, or with 2 and a sentence, soon."""
    began = time.process_time()
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main(list(words))
    printed = capsys.readouterr()
    assert ended.value.code in (0, None, 2), f"{words}: {ended.value.code}\n{printed.err[-2000:]}"
    assert "Traceback" not in printed.err and len(printed.err) < 20_000, words
    assert time.process_time() - began < WITHIN_S, words


def keys_of(recipe: str) -> list[str]:
    return list(configs.flat(configs.as_mapping(run_config.load(recipe, data_home="/data"))))


@pytest.mark.parametrize(("first", "last"), [(0, 40), pytest.param(40, 1100, marks=faults)])
def test_an_override_is_taken_or_refused(
    capsys: Printed, monkeypatch: pytest.MonkeyPatch, first: int, last: int
) -> None:
    monkeypatch.setenv("ADAPTNET_DATA", "/data")
    known = {recipe: keys_of(recipe) for recipe in RECIPES}
    for seed in range(first, last):
        draw = random.Random(seed)
        recipe = draw.choice(RECIPES)
        overrides = [fuzz.override(draw, known[recipe]).replace("\0", "") for _ in range(draw.randint(1, 3))]
        answered(capsys, "train", recipe, "--show", "--", *overrides)


@pytest.mark.parametrize(("first", "last"), [(0, 20), pytest.param(20, 400, marks=faults)])
def test_a_recipe_file_is_read_or_refused(capsys: Printed, tmp_path: Path, first: int, last: int) -> None:
    written = configs.dump_yaml(configs.as_mapping(run_config.load("convnet_aig/toy", data_home="/data"))).encode()
    path = tmp_path / "recipe.yaml"
    for seed in range(first, last):
        path.write_bytes(fuzz.mutated(random.Random(seed), written))
        answered(capsys, "train", str(path), "--show")


@pytest.mark.parametrize(("first", "last"), [(0, 10), pytest.param(10, 250, marks=faults)])
def test_a_shard_is_indexed_or_refused_and_nothing_is_left_half_done(tmp_path: Path, first: int, last: int) -> None:
    images = toy.make(tmp_path / "toy", num_classes=2, train=2, val=2, side_px=16, seed=1)
    image = next(images.rglob("*.jpg")).read_bytes()
    for seed in range(first, last):
        root, index = tmp_path / f"set{seed}", tmp_path / f"index{seed}"
        root.mkdir()
        (root / "train-000000.tar").write_bytes(fuzz.shard(random.Random(seed), image))
        began = time.process_time()
        refused_or(lambda root=root, index=index: len(open_index(root, index).label))
        assert time.process_time() - began < WITHIN_S, seed
        assert not list(index.glob(".*")), seed


@pytest.mark.parametrize(("first", "last"), [(0, 3), pytest.param(3, 120, marks=faults)])
def test_check_and_pack_agree_on_a_root_with_odd_files(tmp_path: Path, first: int, last: int) -> None:
    """What check calls good is packed, and nothing else; every file that may be an image is named or counted."""
    for seed in range(first, last):
        root, packed = tmp_path / f"odd{seed}", tmp_path / f"packed{seed}"
        fuzz.root(random.Random(seed), root)
        began = time.process_time()
        checked, report = (
            answer_of(lambda root=root: check(root, workers=1)),
            answer_of(lambda root=root, packed=packed: pack(root, packed, workers=1)),
        )
        assert time.process_time() - began < 2 * WITHIN_S, seed
        if report is None:
            assert not packed.exists() or not list(packed.rglob("*.tar")), f"seed {seed}: half-done"
            assert checked is None or checked.images == len(checked.bad), f"seed {seed}: good by one verdict only"
        else:
            assert checked is not None, f"seed {seed}: good by one verdict only"
            of_images = [name for name, _ in checked.bad]
            assert sorted(of_images) == sorted(name for name, _ in report.set_aside), seed
            assert checked.left_out == report.left_out, seed
            assert not list(packed.glob(".*")), seed
            shutil.rmtree(packed)
        shutil.rmtree(root)


@faults
def test_a_training_on_a_root_with_odd_files_replaces_what_check_calls_bad(tmp_path: Path) -> None:
    for seed in range(12):
        root = tmp_path / f"odd{seed}"
        fuzz.root(random.Random(seed), root, images=40)
        checked = answer_of(lambda root=root: check(root, workers=1))
        config = run_config.load("baseline/toy", [*SMALL, f"data.root={root}", "data.max_bad_share=1", "seed=0"])
        run_dir = tmp_path / f"run{seed}"
        if answer_of(lambda config=config, run_dir=run_dir: launch.train(config, run_dir)) is None:
            continue
        assert checked is not None, seed
        path = run_dir / "bad_images.json"
        replaced = {each["file"] for each in json.loads(path.read_text())} if path.exists() else set()
        assert replaced <= {name for name, _ in checked.bad}, f"seed {seed}: bad in training only"


def answer_of(call: Callable[[], Answer]) -> Answer | None:
    """What the call returns; None if it raises an error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except AdaptNetError as error:
            assert str(error)
            return None


def refused_or(call: Callable[[], object]) -> None:
    """Calls; only an error of ours may be raised."""
    try:
        call()
    except AdaptNetError as error:
        assert str(error)


@faults
def test_a_request_is_answered_or_refused(tmp_path: Path) -> None:
    images = toy.make(tmp_path / "toy", num_classes=2, train=32, val=16, side_px=16, seed=1)
    launch.train(run_config.load("baseline/toy", [*SMALL, f"data.root={images}"]), tmp_path / "run")
    model = load_model(resolve(str(tmp_path / "run")))
    image = base64.b64encode(next(images.rglob("*.jpg")).read_bytes()).decode()
    for seed in range(250):
        began = time.process_time()
        body = fuzz.request(random.Random(seed), {"images": [image]})
        refused_or(lambda body=body: parse_request(model, body))  # type: ignore[arg-type]
        assert time.process_time() - began < WITHIN_S, seed
