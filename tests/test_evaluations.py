"""Stored evaluations: what is found is of this net, on these images, by its own recipe; nothing else replaces it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.deploy import evaluations, predicting
from pipeline.deploy.predicting import Choice
from pipeline.errors import ConfigError
from pipeline.evaluation.frontier import parse_budget
from pipeline.registry.catalogue import RUNS

QUICK = ["evaluation.latency_repeats=0"]


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(finished["convnet_aig"], tmp_path / "run")
    return tmp_path / "run"


def store(run: Path, name: str, **about: Any) -> Path:
    """An evaluation of the run that claims a top-1 of 1, newer than its own."""
    source, home = run / "evaluations" / "final", run / "evaluations" / name
    shutil.copytree(source, home)
    kept: Mapping[str, Any] = json.loads((source / "about.json").read_text())
    (home / "about.json").write_text(json.dumps({**kept, **about}))
    reports = json.loads((home / "reports.json").read_text())
    (home / "reports.json").write_text(json.dumps([{**report, "top1": 1.0} for report in reports]))
    return home


@pytest.mark.parametrize(
    "about",
    [{"sides": "sides16"}, {"attack": "fgsm"}, {"overrides": ["data.eval_side_px=16"]}, {"step": 5}, {"sha256": "0"}],
    ids=lambda about: next(iter(about)),
)
def test_only_an_evaluation_of_this_net_as_it_is_counts(run: Path, about: Mapping[str, Any]) -> None:
    before = evaluations.find(str(run)).newest.reports
    store(run, "other", **about)
    net = evaluations.find(str(run))
    assert net.newest.reports == before and predicting.load(str(run), device="cpu").reports == before
    assert evaluations.together([net])[0].reports == before


def test_a_newer_one_counts_and_a_part_does_not_stand_before_the_whole(run: Path) -> None:
    store(run, "part", policies=["gates-hard"])
    assert evaluations.find(str(run)).newest.reports[0].top1 < 1
    store(run, "again")
    assert evaluations.find(str(run)).newest.reports[0].top1 == 1


def test_what_an_override_changes_is_stored_apart_and_said(run: Path) -> None:
    plain = evaluations.evaluate(str(run), QUICK)
    changed = evaluations.evaluate(str(run), [*QUICK, "data.eval_side_px=16", "data.eval_resize_px=18"])
    assert changed.folder != plain.folder and changed.reports[0].macs_mean < plain.reports[0].macs_mean
    assert evaluations.find(str(run)).newest.reports[0].macs_mean == plain.reports[0].macs_mean
    part = evaluations.evaluate(str(run), [*QUICK, "evaluation.policies=[gates-hard]"])
    assert part.folder != plain.folder and json.loads((part.folder / "about.json").read_text())["policies"]


def test_a_folder_keeps_the_evaluation_that_it_holds(run: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / "kept"
    evaluations.evaluate(str(run), QUICK, out=home)
    evaluations.evaluate(str(run), QUICK, out=home)
    for source, policies in ((run, ["gates-hard"]), (finished["ranet"], None)):
        with pytest.raises(ConfigError, match="holds an evaluation of another kind"):
            evaluations.evaluate(str(source), QUICK, out=home, policies=policies)
    assert len(evaluations.load_reports(home)) > 1


def test_an_alias_that_moves_does_not_take_the_evaluation_along(
    finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished["convnet_aig"].parent, tmp_path / "runs")
    done = evaluations.evaluate("models:/gated@candidate", QUICK)
    assert done.folder.parent == RUNS / "evaluations" / "gated-1"
    stored = evaluations.find("models:/gated/1").evaluations
    assert done.folder in [each.folder for each in stored]


def test_nets_have_names_wherever_one_stands(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.chdir(run)
    (shown,) = evaluations.together([evaluations.find(".")])
    assert shown.name == "run"


# --- predicting with what is stored


def test_a_device_that_is_not_here_and_one_that_is_none_are_refused(run: Path) -> None:
    for device, said in (("gpu", "auto, cpu or cuda"), ("cuda", "torch sees no GPU here")):
        with pytest.raises(ConfigError, match=said):
            predicting.load(str(run), device=device)


def test_a_time_that_cannot_be_kept_is_used_all_the_same_and_a_late_one_is_said(
    run: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    found = predicting.load(str(run), device="cpu", cache=tmp_path / "file" / "below")
    pictures = sorted((finished["convnet_aig"].parents[1] / "images5" / "val").rglob("*.jpg"))[:2]
    choice = found.choose(parse_budget("10s"), None, pictures)
    assert choice.cost is not None and found.late(choice, pictures) is None
    early = replace(choice, budget=replace(parse_budget("10s"), amount=1e-6))
    assert "above the budget of 10s" in str(found.late(early, pictures))
    assert found.late(Choice(choice.policy, "no budget"), pictures) is None
    assert asdict(choice)["policy"] in found.policies


@pytest.mark.parametrize("text", ["5msmacs", "50%macs", "5smacs", "macs", "1ee"])
def test_nonsense_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="write MACs as"):
        parse_budget(text)
    assert parse_budget("2GMACs").amount == 2e9
