"""The model card states what is stored and nothing else; a pushed folder loads like any other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow_here import finish, run_folder
from PIL import Image
from raised import fails

from jobs.cli import main
from pipeline import config as configs
from pipeline import family as families
from pipeline.deploy import evaluations, model_card, predicting
from pipeline.errors import CheckpointError, ConfigError
from pipeline.family import Report
from pipeline.registry import public
from pipeline.registry.model import describe, load_model
from pipeline.registry.resolve import resolve
from pipeline.runs.records import Meta
from pipeline.training import checkpoint, weights_file

REPORTS = [
    Report("gates-hard", 50, 0.9, None, 0.01, 3e7, 4e7, 0.6, kind="gates", settings={"gates": "hard"}),
    Report("gates-sampled", 50, 0.8, None, 0.02, 2e7, 4e7, 0.4, kind="gates", settings={"gates": "sampled"}),
]

TEXTS = (".md", ".yaml", ".json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of a small gated net with an evaluation; nothing is trained."""
    folder, recipe = run_folder(tmp_path / "runs" / "aig")
    data = {"root": "/data/shapes", "side_px": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
    recipe |= {"name": "aig", "family": {"name": "convnet_aig", "depth": 8}, "data": data}
    (folder / "config.yaml").write_text(configs.dump_yaml({"recipe": recipe}))
    family = families.find("convnet_aig")
    net = family.build(configs.validate(family.config, recipe["family"], "family"), 5)
    meta = Meta(step=7, recipe=recipe, fingerprint={"seed": 1}, classes=tuple("abcde"))
    checkpoint.write(folder / "checkpoints" / "step-00000007", {"net": net.state_dict(), "step": 7}, meta)
    home = folder / "evaluations" / "final"
    home.mkdir(parents=True)
    (home / "reports.json").write_text(json.dumps([report.to_json() for report in REPORTS]))
    (home / "about.json").write_text(json.dumps({"step": 7, "data": "abc", "root": "/data/shapes"}))
    finish(folder, best="step-00000007")
    return folder


def front_matter(card: str) -> Mapping[str, Any]:
    match = re.match(r"---\n(.*?)^---\n", card, re.DOTALL | re.MULTILINE)
    assert match
    found = configs.parse_yaml(match[1], "card")
    assert isinstance(found, dict)
    return found


def test_the_figures_of_a_card_are_those_that_are_stored(run: Path) -> None:
    reports = evaluations.find(str(run)).newest.reports
    card = model_card.card(str(run))
    (results,) = front_matter(card)["model-index"][0]["results"]
    assert [each["value"] for each in results["metrics"]] == [round(report.top1, 6) for report in reports]
    for report in reports:
        error = (report.top1 * (1 - report.top1) / report.num_images) ** 0.5
        assert f"| {report.policy} | {100 * report.top1:.2f} ± {100 * error:.2f} |" in card


def test_a_net_without_an_evaluation_has_a_card_without_figures(run: Path) -> None:
    shutil.rmtree(run / "evaluations")
    card = model_card.card(str(run))
    assert front_matter(card)["model-index"][0]["results"] == [] and "±" not in card


@pytest.mark.parametrize(
    ("licence", "stated"),
    [
        (None, {"license": "other"}),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("ours alone", {"license": "other", "license_name": "ours alone"}),
    ],
)
def test_a_licence_is_the_hubs_identifier_or_other_with_its_name(
    run: Path, licence: str | None, stated: Mapping[str, str]
) -> None:
    found = front_matter(model_card.card(str(run), licence=licence))
    assert {key: value for key, value in found.items() if key.startswith("license")} == stated
    assert found["library_name"] == "adaptnet" and "convnet_aig" in found["tags"]


def test_a_pushed_folder_is_the_same_net_everywhere(run: Path, tmp_path: Path) -> None:
    folder = model_card.push(str(run), tmp_path / "hub", licence="mit", note="drawn shapes")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["README.md", "model.safetensors", "recipe.yaml", "config.json", "card.json", "reports"]
    )
    before, after = load_model(resolve(str(run))), load_model(folder)
    for name, value in before.net.state_dict().items():
        assert torch.equal(value, after.net.state_dict()[name]), name
    assert predicting.load(str(folder), device="cpu").reports == evaluations.find(str(run)).newest.reports
    assert torch.equal(weights_file.read(folder).tensors["fc.weight"], before.net.state_dict()["fc.weight"])
    config = json.loads((folder / "config.json").read_text())
    assert [config["id2label"][str(label)] for label in range(len(before.classes))] == list(before.classes)
    card = (folder / "README.md").read_text()
    assert model_card.card(str(folder)) == card, "the folder holds all that its card states"
    assert "drawn shapes" in card and "tracking" not in (folder / "recipe.yaml").read_text()
    again = model_card.push(str(folder), tmp_path / "again")
    assert (again / "README.md").read_text() == card and describe(again).step == describe(folder).step


def test_neither_card_nor_pushed_folder_names_a_place_of_this_machine(run: Path, tmp_path: Path) -> None:
    """Every absolute path that a run may hold is below /secret or tmp_path."""
    step = run / "checkpoints" / "step-00000007"
    meta, family = checkpoint.read_meta(step), families.find("convnet_aig")
    teacher = {"kind": "trained", "source": "/secret/runs/teacher"}
    recipe = dict(meta.recipe) | {
        "data": {**configs.section(meta.recipe, "data"), "root": "/secret/shapes", "index": "/secret/index"},
        "training": {"start_from": "/secret/weights/first.pt", "teacher": teacher},
        "checkpoint": {"storage": "file:///secret/storage", "keep_last": 3},
        "compute": {"address": "secret:6379"},
        "logging": {},
        "tracking": {"uri": "sqlite:////secret/mlflow.db"},
    }
    shutil.rmtree(step)
    net = family.build(configs.validate(family.config, configs.section(recipe, "family"), "family"), 5)
    fingerprint = {"seed": 1, "training.teacher.source": "/secret/runs/teacher"}
    changed = Meta(step=7, recipe=recipe, fingerprint=fingerprint, classes=meta.classes)
    checkpoint.write(step, {"net": net.state_dict(), "step": 7}, changed)
    (run / "evaluations" / "final" / "about.json").write_text(
        json.dumps({"step": 7, "data": "abc", "root": "/secret/shapes"})
    )
    (run / "environment.json").write_text(json.dumps({"git": {"commit": "c0ffee", "branch": "b", "dirty": True}}))
    folder = model_card.push(str(run), tmp_path / "hub")
    again = model_card.push(str(folder), tmp_path / "again")
    texts = {path: path.read_text() for home in (folder, again) for path in home.rglob("*.*") if path.suffix in TEXTS}
    assert len(texts) == 10
    for path, text in {**texts, Path("card"): model_card.card(str(run))}.items():
        assert "secret" not in text and str(tmp_path) not in text, path
        assert path.name != "card" or "commit c0ffee with uncommitted changes." in text
    stored = configs.read_mapping(folder / "recipe.yaml")
    assert stored["checkpoint"] == {"keep_last": 3} and configs.section(stored, "data")["root"] == "shapes"
    assert configs.section(stored, "training") == {
        "start_from": "first.pt",
        "teacher": {"kind": "trained", "source": "teacher"},
    }
    assert (folder / "README.md").read_text() == (again / "README.md").read_text() == model_card.card(str(run))
    assert load_model(again).classes == meta.classes


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("models:/net@champion", "models:/net@champion"),
        ("torchvision:resnet50", "torchvision:resnet50"),
        ("zoo:net", "zoo:net"),
        ("runs/net/", "net"),
        ("s3://bucket/runs/net", "net"),
        ("/", "unknown"),
    ],
)
def test_of_a_source_the_name_stays_that_others_can_use(source: str, name: str) -> None:
    assert public.name_of(source) == name


def test_the_example_of_a_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_card.push(str(run), tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), (200, 10, 10)).save("image.jpg")
    (program,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(program, "README.md", "exec"), {})


def test_a_pushed_folder_is_whole_or_not_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with fails(ConfigError, "--to", subject="taken"):
        model_card.push(str(run), tmp_path / "taken")
    folder = model_card.push(str(run), tmp_path / "hub")
    (folder / "model.safetensors").write_bytes(b"other")
    with fails(CheckpointError, "model.safetensors"):
        describe(folder)


def test_a_name_is_its_newest_version_and_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert model_card.reference_of("here") == "here" and model_card.reference_of("aig") == "models:/aig/latest"
    assert model_card.reference_of("models:/aig@champion") == "models:/aig@champion"


def test_the_commands_write_the_card_and_the_folder(run: Path, tmp_path: Path) -> None:
    for words in (["card", str(run), "--out", str(tmp_path / "c.md")], ["push", str(run), "--to", str(tmp_path / "f")]):
        with pytest.raises(SystemExit) as ended:
            main(["models", *words])
        assert ended.value.code in (None, 0)
    assert (tmp_path / "c.md").read_text() == (tmp_path / "f" / "README.md").read_text()
