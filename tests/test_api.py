"""`import adaptnet`: every form of a net and of an image gives one answer; wrong arguments name what is wrong."""

from __future__ import annotations

import doctest
import importlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from inspect import signature
from operator import attrgetter
from pathlib import Path

import adaptnet
import numpy as np
import pytest
import torch
from PIL import Image
from raised import fails

from jobs.verbs import data as data_verb
from pipeline import config as configs
from pipeline import run_config
from pipeline.api import datasets, runs
from pipeline.data.config import DataConfig
from pipeline.data.index import open_index, open_splits
from pipeline.errors import ConfigError, DataError, UndecodableError
from pipeline.evaluation.evaluate import load_reports
from pipeline.evaluation.frontier import parse_budget
from pipeline.registry.resolve import pull_version, resolve

SEEDED = (datasets.open, data_verb.info)


@pytest.fixture(scope="module")
def home(finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `runs/toy`, its images `images` and one of them as `picture.jpg`."""
    home = tmp_path_factory.mktemp("api")
    shutil.copytree(finished["convnet_aig"], home / "runs" / "toy")
    (home / "images").symlink_to(finished["convnet_aig"].parents[1] / "images5")
    shutil.copyfile(next(iter(sorted((home / "images" / "val").rglob("*.jpg")))), home / "picture.jpg")
    return home


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield home


@pytest.fixture(scope="module")
def model(home: Path) -> adaptnet.Model:
    return adaptnet.load(home / "runs" / "toy", device="cpu")


def test_the_import_takes_only_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import adaptnet; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = {name.partition(".")[0] for name in done.stdout.split()}
    assert added <= {"adaptnet", *sys.stdlib_module_names}


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(hasattr(adaptnet, name) for name in dir(adaptnet))
    with pytest.raises(AttributeError):
        adaptnet.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", ["adaptnet", "pipeline.api.models", "pipeline.api.runs", "pipeline.api.image_sets"])
def test_the_examples_of_the_docstrings_are_true(name: str, here: Path, model: adaptnet.Model) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    names = {"adaptnet": adaptnet, "model": model}
    failed, tried = doctest.testmod(importlib.import_module(name), extraglobs=names, optionflags=flags)
    assert failed == 0 and tried > 0


def test_the_readmes_programs_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """README's is run; what it names is here under the same name. Of the guide's the names must exist."""
    root = Path(__file__).parents[1]
    text = "".join((root / name).read_text(encoding="utf-8") for name in ("README.md", "infra/docs/python.md"))
    first, *others = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for missing, present in (("runs/convnet_aig-toy", "runs/toy"), ("cat.png", "picture.jpg"), ("80%", "100%")):
        assert missing in first
        first = first.replace(missing, present)
    exec(compile(first, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) > 1
    assert others
    for name in re.findall(r"\badaptnet((?:\.\w+)+)\(", "".join(others)):
        assert callable(attrgetter(name.removeprefix("."))(adaptnet))


def test_each_form_of_an_image_gives_the_same_answer(here: Path, model: adaptnet.Model) -> None:
    content = Path("picture.jpg").read_bytes()
    answers = [model.predict(each) for each in ("picture.jpg", Path("picture.jpg"), content)]
    assert answers[0] == answers[1] == answers[2]
    assert [each.labels for each in model.predict(["picture.jpg", content])] == [answers[0].labels] * 2
    image = Image.open("picture.jpg")
    pixels = np.asarray(image.convert("RGB"))
    of_pixels = [model.predict(each) for each in (image, pixels, pixels.astype(np.int64))]
    assert of_pixels[0] == of_pixels[1] == of_pixels[2]
    assert dict(zip(of_pixels[0].labels, of_pixels[0].probabilities, strict=True)) == pytest.approx(
        dict(zip(answers[0].labels, answers[0].probabilities, strict=True)), abs=0.02
    ), "two decoders of JPEG differ by at most a level or two"


def test_a_turned_image_is_upright_in_each_form(here: Path, model: adaptnet.Model) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 48, 3), dtype=np.uint8))
    exif = picture.getexif()
    exif[274] = 6  # orientation: turn by 90 degrees
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    assert model.predict(buffer.getvalue()) == model.predict(Image.open(buffer))


def test_an_empty_list_has_no_answers(model: adaptnet.Model) -> None:
    assert model.predict([]) == []


def test_run_checkpoint_version_pulled_folder_and_zoo_are_one_net(
    here: Path, finished: dict[str, Path], model: adaptnet.Model, tmp_path: Path
) -> None:
    uri = f"sqlite:///{finished['convnet_aig'].parent / 'mlflow.db'}"
    pull_version("models:/gated@candidate", tmp_path / "pulled", uri)
    sources = ["runs/toy", Path("runs/toy"), resolve("runs/toy"), tmp_path / "pulled", "models:/gated@candidate"]
    nets = [adaptnet.load(each, uri=uri, device="cpu") for each in sources]
    nets.append(adaptnet.load("zoo:pulled", zoo=tmp_path, device="cpu"))
    expected = model.predict("picture.jpg")
    assert [net.predict("picture.jpg") for net in nets] == [expected] * len(nets)
    assert all(net.frontier() == model.frontier() for net in nets)


def test_the_budget_chooses_the_most_accurate_policy_of_the_frontier(here: Path, model: adaptnet.Model) -> None:
    points = model.frontier()
    assert [point.top1 for point in points] == sorted({point.top1 for point in points})
    assert {point.policy for point in points} <= set(model.policies)
    for point in points:
        budget = f"{point.macs * 1.000001:.0f}"
        assert parse_budget(budget).unit == "macs"
        assert model.predict("picture.jpg", budget=budget) == model.predict("picture.jpg", policy=point.policy)
        assert model.predict("picture.jpg", budget=float(budget)).policy == point.policy


def test_a_checkpoint_without_an_evaluation_answers_but_has_no_budget(here: Path) -> None:
    best = resolve("runs/toy")
    other = next(path for path in sorted(best.parent.iterdir()) if path.name != best.name and path.is_dir())
    net = adaptnet.load(other, device="cpu")
    assert net.predict("picture.jpg").policy == net.policies[0]
    for call in (net.frontier, lambda: net.predict("picture.jpg", budget="50%")):
        with fails(ConfigError, "source"):
            call()


@pytest.mark.parametrize(
    ("images", "settings", "kind", "key"),
    [
        (3, {}, ConfigError, "images"),
        ({"picture.jpg"}, {}, ConfigError, "images"),
        ([None], {}, ConfigError, "image"),
        (np.zeros((2, 2), np.uint8), {}, ConfigError, "image"),
        (np.zeros((2, 2, 3), np.float32) + 0.5, {}, ConfigError, "image"),
        ("nothing.jpg", {}, UndecodableError, "images"),
        (b"no image", {}, UndecodableError, "images"),
        ("picture.jpg", {"policy": "none"}, ConfigError, "evaluation.policies"),
        ("picture.jpg", {"budget": "fast"}, ConfigError, "budget"),
        ("picture.jpg", {"budget": "1G", "policy": "gates-hard"}, ConfigError, "budget"),
        ("picture.jpg", {"top": 0}, ConfigError, "top"),
        ("picture.jpg", {"batch_size": True}, ConfigError, "batch_size"),
    ],
)
def test_a_wrong_argument_is_named(
    images: object, settings: dict[str, object], kind: type, key: str, here: Path, model: adaptnet.Model
) -> None:
    with fails(kind, key):
        model.predict(images, **settings)  # type: ignore[call-overload]


def test_an_image_that_pillow_cannot_finish_is_named_by_its_position(here: Path, model: adaptnet.Model) -> None:
    content = Path("picture.jpg").read_bytes()
    truncated, closed = Image.open(io.BytesIO(content[: len(content) // 2])), Image.open("picture.jpg")
    closed.close()
    for call in (model.predict, model.tensor):
        with fails(UndecodableError, "images", subject="1, 2") as caught:
            call([content, truncated, closed])
        assert set(caught.value.reasons) == {1, 2} and caught.value.num_images == 3


def test_an_unreadable_image_is_named_by_its_position(here: Path, model: adaptnet.Model) -> None:
    with fails(UndecodableError, "images", subject="1") as caught:
        model.predict(["picture.jpg", "nothing.jpg", "picture.jpg"])
    assert set(caught.value.reasons) == {1} and caught.value.num_images == 3


@pytest.mark.parametrize("source", ["runs/nothing", "picture.jpg", "zoo:nothing", "models:/nothing@here", 3, None])
def test_a_wrong_source_is_named(source: object, here: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(adaptnet.AdaptNetError) as caught:
        adaptnet.load(source, uri=uri)  # type: ignore[arg-type]
    assert caught.value.key


def test_the_module_can_be_fine_tuned(here: Path) -> None:
    net = adaptnet.load("runs/toy", device="cpu")
    images = adaptnet.datasets.open("images")
    some = [images.train[row] for row in range(0, len(images.train), 20)]
    pixels = net.tensor([each.content for each in some])
    labels = torch.tensor([net.classes.index(each.label) for each in some])
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(net.module(pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_tensor_is_what_the_evaluation_sees(here: Path, model: adaptnet.Model) -> None:
    with torch.no_grad():
        logits = model.module(model.tensor(["picture.jpg"])).logits
    best = model.classes[int(logits.argmax())]
    assert model.predict("picture.jpg").label == best


def test_overrides_are_those_of_the_command() -> None:
    given = {"training": {"epochs": 3, "precision": "fp32"}, "data.root": Path("a b: c"), "name": "x"}
    texts = ["training.epochs=3", "training.precision=fp32", "data.root='a b: c'", "name=x"]
    assert run_config.load("baseline/toy", runs.as_overrides(given)) == run_config.load("baseline/toy", texts)
    for text in ("\U0001f600 ä\u4e2d", "a\x85b\u2028c\x7f\ufeff\ufffe", 'tab\tquote"\\'):
        (override,) = runs.as_overrides({"data.root": text})
        assert configs.parse_override(override) == {"data": {"root": text}}
    for value in (object(), float("nan"), {1, 2}):
        with fails(ConfigError, "training.epochs"):
            runs.as_overrides({"training": {"epochs": value}})


def test_a_training_ends_with_reports_and_a_net_that_loads(here: Path, tmp_path: Path) -> None:
    result = adaptnet.train(
        "baseline/toy",
        run_dir=tmp_path / "run",
        data={"root": here / "images"},
        training={"epochs": 1, "batch_size": 32},
        compute={"workers": 0},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db", "register": None},
        evaluation={"latency_repeats": 1, "latency_batches": [1]},
    )
    assert result.finished and result.reports == load_reports(result.run_dir / "evaluations" / "final")
    assert adaptnet.load(result.run_dir).predict("picture.jpg").macs > 0


def test_a_split_holds_the_images_of_its_folder(here: Path) -> None:
    images = datasets.open("images")
    files = sorted(str(path.relative_to("images")) for path in Path("images/val").rglob("*.jpg"))
    assert sorted(each.name for each in images.val) == files
    assert all(Path("images", each.name).read_bytes() == each.content for each in images.val)
    assert all(each.label == Path(each.name).parent.name for each in images.val)
    assert images.classes == tuple(open_index(Path("images")).classes)
    assert images.val[-1] == images.val[len(images.val) - 1]
    with pytest.raises(IndexError):
        images.val[len(images.val)]


def test_a_drawn_val_split_is_that_of_a_training_by_default(here: Path, tmp_path: Path) -> None:
    assert [signature(each).parameters["seed"].default for each in SEEDED] == [
        run_config.RunConfig.model_fields["seed"].default
    ] * 2
    shutil.copytree(here / "images" / "train", tmp_path / "images")
    images = datasets.open(tmp_path / "images", index=tmp_path / "index")
    config = DataConfig(root=tmp_path / "images", index=tmp_path / "index")
    drawn = open_splits(config, run_config.load("baseline/toy", data_home="/d").seed).val
    assert [each.name for each in images.val] == [drawn.file(row) for row in range(len(drawn))]


def test_a_folder_without_images_and_an_unknown_setting_are_named(tmp_path: Path) -> None:
    with fails(DataError, "data.root"):
        datasets.open(tmp_path)
    with fails(ConfigError, "side"):
        datasets.open(tmp_path, side=3)
