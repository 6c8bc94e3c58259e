"""Stored evaluations: those found are of this net, on these images, by its own recipe; no other replaces them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from raised import fails

from pipeline.deploy import evaluations, predicting
from pipeline.deploy.predicting import Choice
from pipeline.errors import ConfigError
from pipeline.evaluation.frontier import parse_budget
from pipeline.registry.catalogue import RUNS

QUICK = ["evaluation.latency_repeats=0"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(finished["convnet_aig"], tmp_path / "run")
    return tmp_path / "run"


def store(run: Path, name: str, **about: Any) -> Path:
    """An evaluation of the run that claims a top-1 of 1, newer than its own."""
    source, home = run / "evaluations" / "final", run / "evaluations" / name
    shutil.copytree(source, home)
    about_final: Mapping[str, Any] = json.loads((source / "about.json").read_text())
    (home / "about.json").write_text(json.dumps({**about_final, **about}))
    reports = json.loads((home / "reports.json").read_text())
    (home / "reports.json").write_text(json.dumps([{**report, "top1": 1.0} for report in reports]))
    return home


@pytest.mark.parametrize(
    "about",
    [{"sides": "sides16"}, {"attack": "fgsm"}, {"overrides": ["data.eval_side_px=16"]}, {"step": 5}, {"sha256": "0"}],
    ids=lambda about: next(iter(about)),
)
def test_only_evaluations_of_the_unchanged_net_count(run: Path, about: Mapping[str, Any]) -> None:
    before = evaluations.find(str(run)).newest.reports
    store(run, "other", **about)
    net = evaluations.find(str(run))
    assert net.newest.reports == before and predicting.load(str(run), device="cpu").reports == before
    assert evaluations.together([net])[0].reports == before


def test_a_newer_evaluation_counts_but_not_a_partial_one(run: Path) -> None:
    store(run, "part", policies=["gates-hard"])
    assert evaluations.find(str(run)).newest.reports[0].top1 < 1
    store(run, "again")
    assert evaluations.find(str(run)).newest.reports[0].top1 == 1


def test_an_evaluation_with_overrides_is_stored_separately(run: Path) -> None:
    plain = evaluations.evaluate(str(run), QUICK)
    changed = evaluations.evaluate(str(run), [*QUICK, "data.eval_side_px=16", "data.eval_resize_px=18"])
    assert changed.folder != plain.folder and changed.reports[0].macs_mean < plain.reports[0].macs_mean
    assert evaluations.find(str(run)).newest.reports[0].macs_mean == plain.reports[0].macs_mean
    part = evaluations.evaluate(str(run), [*QUICK, "evaluation.policies=[gates-hard]"])
    assert part.folder != plain.folder and json.loads((part.folder / "about.json").read_text())["policies"]


def test_an_evaluation_of_another_kind_replaces_nothing(run: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / "first"
    evaluations.evaluate(str(run), QUICK, out=home)
    evaluations.evaluate(str(run), QUICK, out=home)
    for source, policies in ((run, ["gates-hard"]), (finished["ranet"], None)):
        with fails(ConfigError, "--out", subject=home):
            evaluations.evaluate(str(source), QUICK, out=home, policies=policies)
    assert len(evaluations.load_reports(home)) > 1


def test_an_evaluation_stays_with_its_version_when_the_alias_moves(
    finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished["convnet_aig"].parent, tmp_path / "runs")
    done = evaluations.evaluate("models:/gated@candidate", QUICK)
    assert done.folder.parent == RUNS / "evaluations" / "gated-1"
    stored = evaluations.find("models:/gated/1").evaluations
    assert done.folder in [each.folder for each in stored]


def test_nets_have_names_in_any_working_directory(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.chdir(run)
    (shown,) = evaluations.together([evaluations.find(".")])
    assert shown.name == "run"


# --- predicting with what is stored


@pytest.mark.parametrize("device", ["gpu", pytest.param("cuda", marks=NO_GPU)])
def test_an_unknown_or_missing_device_is_refused(run: Path, device: str) -> None:
    with fails(ConfigError, "--device", subject=device):
        predicting.load(str(run), device=device)


def test_a_time_that_cannot_be_stored_is_used_and_one_that_is_exceeded_is_reported(
    run: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    found = predicting.load(str(run), device="cpu", cache=tmp_path / "file" / "below")
    pictures = sorted((finished["convnet_aig"].parents[1] / "images5" / "val").rglob("*.jpg"))[:2]
    choice = found.choose(parse_budget("10s"), None, pictures)
    assert choice.cost is not None and found.late(choice, pictures) is None
    early = replace(choice, budget=replace(parse_budget("10s"), amount=1e-6))
    assert "10s" in str(found.late(early, pictures))
    assert found.late(Choice(choice.policy, "no budget"), pictures) is None
    assert asdict(choice)["policy"] in found.policies


@pytest.mark.parametrize("text", ["5msmacs", "50%macs", "5smacs", "macs", "1ee"])
def test_a_malformed_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_budget(text)
    assert parse_budget("2GMACs").amount == 2e9
