"""Stored reports: what is written is read again, and files from before policies had a kind and settings are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import family as families
from pipeline.config import validate
from pipeline.evaluation import reports_v1
from pipeline.evaluation.evaluate import load_reports
from pipeline.family import Latency, Report

# An entry of reports.json as written by bc067e3.
OLD = {
    "policy": "full-16px",
    "num_images": 30,
    "top1": 0.5,
    "top5": 0.9,
    "ece": 0.1,
    "macs_mean": 3e7,
    "macs_p95": 4e7,
    "full_share": 0.75,
    "latency": [
        {"batch": 1, "median_ms": 2.0, "p95_ms": 3.0, "images_per_s": 500.0, "device": "cpu", "threads": 2,
         "waited_share": 0.25}
    ],
    "facts": {"residuals": [2.0]},
    "facts_by_class": {"residuals": [[2.0], None]},
    "top1_by_class": [0.5, None],
    "unreadable": ["a.jpg"],
    "calibration": {},
}  # fmt: skip
FAMILIES = {
    "arrn": {"resolutions_px": [16, 12]},
    "baseline": {"resolutions_px": [16]},
    "convnet_aig": {"thresholds": [0.25, 0.7], "scaled": ["rate", "prob"], "depth": 20},
    "ranet": {"budgets": [0.35, 1.0, 2e7]},
    "shape_adaptor": {"side_px": 32},
}


def test_a_report_of_format_1_is_read_with_kind_and_settings_from_its_name(tmp_path: Path) -> None:
    (tmp_path / "reports.json").write_text(json.dumps([OLD]))
    (report,) = load_reports(tmp_path)
    assert (report.kind, report.settings) == ("resolution", {"side_px": 16, "full": True})
    assert report.relative_macs == 0.75
    assert report.latency == [Latency(1, 2.0, 3.0, 500.0, "cpu", 2, 0.25)]
    assert report.facts_by_class == OLD["facts_by_class"] and report.unreadable == ["a.jpg"]


def test_a_latency_without_a_waited_share_is_read(tmp_path: Path) -> None:
    entry = {key: value for key, value in OLD["latency"][0].items() if key != "waited_share"}  # type: ignore[attr-defined]
    assert Latency.from_json(entry).waited_share == 0.0


def test_what_a_report_writes_it_reads() -> None:
    report = reports_v1.read(OLD)  # type: ignore[arg-type]
    assert reports_v1.read(json.loads(json.dumps(report.to_json()))) == report
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("name", FAMILIES)
def test_the_name_of_each_policy_gives_the_kind_and_settings_that_it_has(name: str) -> None:
    family = families.find(name)
    config = validate(family.config, {"name": name, **FAMILIES[name]}, "test")
    with torch.device("meta"):
        net = torch.nn.Linear(1, 1)
    for policy in family.policies(config, net):
        kind, settings = reports_v1.identity(policy.name)
        assert kind == policy.kind
        assert settings == policy.settings


@pytest.mark.parametrize("name", FAMILIES)
def test_kind_and_settings_of_a_policy_are_its_own(name: str) -> None:
    family = families.find(name)
    config = validate(family.config, {"name": name, **FAMILIES[name]}, "test")
    policies = family.policies(config, torch.nn.Linear(1, 1))
    assert len({(policy.kind, *sorted(policy.settings.items())) for policy in policies}) == len(policies)


def test_a_policy_at_another_side_is_of_kind_resized() -> None:
    settings = {"policy": "budget-0.5", "side_px": 12, "up_again": True}
    assert reports_v1.identity("budget-0.5@12px-and-up") == ("resized", settings)


def test_an_unknown_name_has_no_kind() -> None:
    assert reports_v1.identity("low") == ("", {})
