"""MLflow shows a run's net, data sets, figures and description, each once, whatever is repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow_here import database, finish, run_folder, sole_run, write_steps

from pipeline.evaluation.from_weights import metrics_of
from pipeline.family import Report
from pipeline.runs import provenance
from pipeline.runs.journal import Journal
from pipeline.tracking import connect, resolve_uri, sync
from pipeline.tracking.description import MARK, description, is_charted, shortened

NET = {"family": "tiny", "parameters": 201098, "macs": 12_345_678, "side_px": 32}
DATA = {
    "root": "/data/toy",
    "classes": 10,
    "train_images": 1500,
    "val_images": 500,
    "train": "0123456789abcdef",
    "val": "fedcba9876543210",
}
STARTED: dict[str, Any] = {
    "total_steps": 188,
    "workers": 2,
    "device": "a CPU",
    "precision": "fp32",
    "epochs": 8.0,
    "batch_size": 64,
    "net": NET,
    "data": DATA,
}
FINAL = {"final/open/top1": 0.654, "final/open/gmacs": 0.0062, "final/open/ece": 0.01, "final/open/loss": 1.1}
NOTE = "mlflow.note.content"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of `adaptnet train tiny/toy`, beside a database."""
    (tmp_path / "runs").mkdir()
    shutil.copyfile(database().path, tmp_path / "runs" / "mlflow.db")
    run_dir, _ = run_folder(tmp_path / "runs" / "a", upload_checkpoints=False)
    (run_dir / "environment.json").write_text(json.dumps({"command": ["adaptnet", "train", "tiny/toy", "seed=1"]}))
    journal = Journal(run_dir / "journal")
    journal.event("started", step=0, **STARTED)
    write_steps(run_dir, 0, 3)
    journal.metrics(3, FINAL)
    Journal(run_dir / "journal", "driver").event("driver-ended", status="FINISHED")
    finish(run_dir, step=3)
    return run_dir


def test_a_run_shows_its_net_its_data_and_its_figures_once(run_dir: Path) -> None:
    for _ in range(3):
        sync(run_dir)
        ledger = json.loads((run_dir / "tracking.json").read_text())
        ledger |= {"files": {}, "offsets": {}}  # as if the sender had died before it noted what it had sent
        (run_dir / "tracking.json").write_text(json.dumps(ledger))
    client = connect(resolve_uri(None, run_dir))
    run = sole_run(client)
    assert (run.data.params["net.parameters"], run.data.params["net.macs"]) == ("201098", "12345678")
    assert run.data.tags["adaptnet.recipe"] == "tiny/toy" and run.data.tags["adaptnet.precision"] == "fp32"
    used = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert len(run.inputs.dataset_inputs) == 2 and set(used) == {"training", "validation"}
    assert (used["training"].name, used["training"].digest) == ("toy", DATA["train"])
    assert json.loads(used["validation"].profile)["num_images"] == 500
    assert {key for key in run.data.metrics if key.startswith("final/")} == {"final/open/top1", "final/open/gmacs"}
    assert "ece 0.01" in run.data.tags["adaptnet.final.open"] and "loss 1.1" in run.data.tags["adaptnet.final.open"]
    assert "| open | 65.40 | 6.200 |" in run.data.tags[NOTE] and "**tiny/toy**" in run.data.tags[NOTE]
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_description_that_a_person_has_changed_stays(run_dir: Path) -> None:
    run_id, client = sync(run_dir).run_id, connect(resolve_uri(None, run_dir))
    for text, stays in (("mine", True), ("", False), (f"old figures\n\n{MARK}", False)):
        client.set_tag(run_id, NOTE, text)
        sync(run_dir)
        assert (client.get_run(run_id).data.tags[NOTE] == text) == stays


def test_the_note_of_the_folder_comes_before_a_description(run_dir: Path) -> None:
    (run_dir / "note.md").write_text("the answer")
    run_id, client = sync(run_dir).run_id, connect(resolve_uri(None, run_dir))
    assert client.get_run(run_id).data.tags[NOTE] == "the answer"


def test_an_experiment_of_a_kind_that_a_person_has_chosen_keeps_it(run_dir: Path) -> None:
    client = connect(resolve_uri(None, run_dir))
    experiment = client.create_experiment("adaptnet", artifact_location=run_dir.parent.as_uri())
    sync(run_dir)
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "custom_model_development"
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "genai_development")
    (run_dir / "tracking.json").unlink()
    sync(run_dir)
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "genai_development"


def test_a_run_of_an_earlier_version_has_no_description_of_its_setup() -> None:
    assert description("a", {}, {}) == ""
    assert (
        description("a", {"event": "started", "workers": 2}, {"final/a/top1": 0.5, "final/a/gmacs": 1}).count("|") == 12
    )


@pytest.mark.parametrize(
    ("key", "charted"),
    [("train/loss", True), ("eval/a/ece", True), ("final/a/b/top1", True), ("final/a/ece", False), ("final", True)],
)
def test_what_is_measured_once_is_no_chart_but_what_runs_are_sorted_by(key: str, charted: bool) -> None:
    assert is_charted(key) == charted


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        ("adaptnet train a/b seed=1", "a/b"),
        ("python -m jobs.cli train my.yaml", "my.yaml"),
        ("adaptnet train --seeds 3 a/b", None),
        ("adaptnet sweep toy", None),
        ("adaptnet train", None),
        ("", None),
    ],
)
def test_the_recipe_is_what_the_command_trained(command: str, recipe: str | None) -> None:
    assert provenance.recipe_of({"command": command.split()}) == recipe


def test_a_loss_that_is_known_is_a_metric() -> None:
    report = Report("a", 1, 1.0, None, 0.0, 1.0, 1.0, 1.0, loss=0.5)
    assert metrics_of([report])["eval/a/loss"] == 0.5
    assert "eval/a/loss" not in metrics_of([Report("a", 1, 1.0, None, 0.0, 1.0, 1.0, 1.0)])


def test_a_shortened_description_keeps_whole_lines_and_its_mark() -> None:
    text = "\n".join(f"line {number}" for number in range(100)) + f"\n\n{MARK}"
    short = shortened(text, 300)
    assert len(short) <= 300 and short.endswith(f"\n\n{MARK}") and shortened(text, len(text)) == text
    lines = short.removesuffix(f"\n\n{MARK}").splitlines()
    assert lines and lines == text.splitlines()[: len(lines)]
    assert shortened("a person's words " * 50, 300) == ("a person's words " * 50)[:300]
