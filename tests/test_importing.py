"""External weights become a run that evaluates and registers like any other, or nothing remains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from raised import fails

from pipeline import run_config
from pipeline.data.toy import make
from pipeline.deploy import evaluations, export, importing
from pipeline.errors import CheckpointError, ConfigError
from pipeline.execution import launch
from pipeline.families.baseline import FAMILY as BASELINE
from pipeline.family import find
from pipeline.registry.model import describe, load_model
from pipeline.registry.resolve import resolve
from pipeline.run_config import RunConfig
from pipeline.runs.journal import read_all
from pipeline.weights import Loaded


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "toy", train=40, val=30, side_px=24)


def recipe(root: Path, *overrides: str) -> RunConfig:
    quiet = ["tracking.register=null", "evaluation.latency_repeats=0", "compute.workers=0"]
    return run_config.load("baseline/toy", [f"data.root={root}", *quiet, *overrides])


def weights(config: RunConfig, path: Path, num_classes: int = 10) -> dict[str, torch.Tensor]:
    """Saves a checkpoint as users of DataParallel do: prefixed names under state_dict. Returns the weights."""
    torch.manual_seed(1)
    net = BASELINE.build(config.family, num_classes)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}, path)
    return dict(net.state_dict())


def test_an_import_is_a_finished_run_that_evaluates_and_registers(images: Path, tmp_path: Path) -> None:
    config = recipe(images, "tracking.register=foreign")
    tensors = weights(config, tmp_path / "model.pth.tar")
    done = importing.import_weights(config, tmp_path / "model.pth.tar", tmp_path / "runs" / "foreign")
    assert done.result.finished and done.num_tensors == len(tensors) and done.loaded == Loaded([], [])
    assert done.file.entry == "state_dict" and list(done.file.others) == ["epoch"]
    assert done.result.version == "models:/foreign/1"
    again = evaluations.evaluate(str(tmp_path / "runs" / "foreign"), ["evaluation.latency_repeats=0"])
    assert [r.top1 for r in again.reports] == [r.top1 for r in done.result.reports]
    model = load_model(resolve("models:/foreign/1", f"sqlite:///{tmp_path}/runs/mlflow.db"))
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, tensors[name]), name
    with fails(ConfigError, "--run-dir", subject="foreign"):
        importing.import_weights(config, tmp_path / "model.pth.tar", tmp_path / "runs" / "foreign")


def test_class_names_replace_data_that_are_not_here(tmp_path: Path) -> None:
    config = recipe(tmp_path / "nowhere")
    weights(config, tmp_path / "model.pt", num_classes=3)
    done = importing.import_weights(config, tmp_path / "model.pt", tmp_path / "run", classes=["ant", "bee", "cat"])
    assert done.result.finished and list(done.result.reports) == []
    assert describe(resolve(str(tmp_path / "run"))).classes == ("ant", "bee", "cat")


@pytest.mark.parametrize("fault", ["another net", "other classes", "no weights", "pickled code"])
def test_weights_that_do_not_fit_are_refused_and_leave_nothing(images: Path, tmp_path: Path, fault: str) -> None:
    config, file = recipe(images), tmp_path / "model.pt"
    if fault == "another net":
        weights(recipe(images, "family.depth=20"), file)
    elif fault == "other classes":
        weights(config, file, num_classes=4)
    else:
        torch.save({"nothing": 1} if fault == "no weights" else {"net": find}, file)
    kind = ConfigError if fault in ("another net", "other classes") else CheckpointError
    with pytest.raises(kind):
        importing.import_weights(config, file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_foreign_net_is_imported_predicts_exports_and_is_fine_tuned(images: Path, tmp_path: Path) -> None:
    """Its run is like any other; what the weights expect otherwise, and what was left out, is said."""
    torch.manual_seed(1)
    theirs = torchvision.models.mnasnet0_5(num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    config = recipe(images, "family.net=torchvision:mnasnet0_5", "data.mean=[0.5,0.5,0.5]", "name=foreign")
    done = importing.import_weights(config, tmp_path / "theirs.pt", tmp_path / "run")
    assert done.loaded.left_out == [] and done.remark is not None and "data.mean=" in done.remark
    assert [report.policy for report in done.result.reports][:1] == ["native"]
    shown = load_model(resolve(str(tmp_path / "run")))
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(shown.net.eval()(x).logits, theirs.eval()(x))
    made = export.export(str(tmp_path / "run"), "native", out=tmp_path / "net.pt2")
    assert made.difference < 1e-4
    torch.save(torchvision.models.mnasnet0_5(num_classes=4).state_dict(), tmp_path / "other.pt")
    start = [f"training.start_from={tmp_path}/other.pt", "training.new_head=true", "training.epochs=0.5"]
    tuned = recipe(images, "family.net=torchvision:mnasnet0_5", "data.mean=[0.5,0.5,0.5]", *start)
    assert launch.train(tuned, tmp_path / "tuned").finished
    events = [entry for entry in read_all(tmp_path / "tuned" / "journal" / "rank0.jsonl") if "event" in entry]
    (started,) = [entry for entry in events if entry["event"] == "started-from"]
    assert set(started["left_out"]) == {"classifier.1.weight", "classifier.1.bias"}
    assert any("data.mean=" in str(entry.get("text")) for entry in events if entry["event"] == "warning")


def test_the_first_example_of_the_help_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no images and no ADAPTNET_DATA: a file of torchvision's and the names of its classes are enough."""
    from jobs import cli
    from jobs.verbs import models

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPTNET_DATA", raising=False)
    torch.save(torchvision.models.resnet50(num_classes=3).state_dict(), "resnet50.pth")
    Path("names.txt").write_text("ant\nbee\ncat\n")
    example = next(line.split() for line in (models.import_weights.__doc__ or "").splitlines() if "--classes" in line)
    with pytest.raises(SystemExit) as ended:
        cli.main(example[1:])
    assert ended.value.code in (None, 0)
    assert describe(resolve("runs/baseline-imagenet_resnet50-imported")).classes == ("ant", "bee", "cat")
