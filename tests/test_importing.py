"""External weights become a run that evaluates and registers like any other, or nothing remains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from raised import fails

from pipeline import run_config
from pipeline.data.toy import make
from pipeline.deploy import evaluations, importing
from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.baseline import FAMILY as BASELINE
from pipeline.family import find
from pipeline.registry.model import describe, load_model
from pipeline.registry.resolve import resolve
from pipeline.run_config import RunConfig
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
