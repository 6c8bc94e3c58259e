"""Tests of the records of a run: what is written is read back, and files from before format numbers are still read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from raised import fails

from pipeline.errors import CheckpointError, JsonValue
from pipeline.runs import records
from pipeline.runs.records import About, Attempt, Meta, Record, Status

RECORDS: list[Record] = [
    Status(True, 7, {"seed": 1}, "step-00000005", "step-00000007"),
    Status(finished=False, trials="2 finished", best_trial="t-1"),
    Attempt(3),
    About(step=7, data="abc", root="/data", source="runs/a", policies=("full",), overrides=("data.side_px=64",)),
    Meta(7, {"family": {"name": "baseline"}}, {"seed": 1}, ("a", "b"), {"eval/full/top1": 0.5}, 56, 1.5, 2, 4, "top1"),
]
# As commit bc067e3 wrote them.
OLD: list[tuple[dict[str, JsonValue], Record]] = [
    (
        {"finished": True, "step": 7, "fingerprint": {"seed": 1}, "best": "step-00000005", "last": "step-00000007"},
        RECORDS[0],
    ),
    ({"finished": False, "trials": "2 finished", "best_trial": "t-1"}, RECORDS[1]),
    ({"attempt": 3}, RECORDS[2]),
    (
        {"checkpoint": "/run/checkpoints/step-00000007", "step": 7, "data": "abc", "root": "/data"},
        About(step=7, data="abc", root="/data", checkpoint="/run/checkpoints/step-00000007"),
    ),
    (
        {
            "source": "runs/a",
            "step": 7,
            "sha256": None,
            "data": "abc",
            "root": "/data",
            "policies": ["full"],
            "attack": None,
            "sides": None,
            "overrides": ["data.side_px=64"],
        },
        RECORDS[3],
    ),
    (
        {
            "format": 1,
            "step": 7,
            "images_seen": 56,
            "epoch": 1.5,
            "fence": 2,
            "workers": 4,
            "fingerprint": {"seed": 1},
            "recipe": {"family": {"name": "baseline"}},
            "classes": ["a", "b"],
            "metrics": {"eval/full/top1": 0.5},
            "best_key": "top1",
        },
        RECORDS[4],
    ),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_read_back_equal_and_carries_its_format(record: Record) -> None:
    content = json.loads(json.dumps(record.to_json()))
    assert type(record).from_json(content, "here") == record
    assert content["format"] == record.FORMAT


@pytest.mark.parametrize(("content", "record"), OLD, ids=lambda each: type(each).__name__)
def test_a_file_without_format_number_reads(content: dict[str, JsonValue], record: Record) -> None:
    assert type(record).from_json(content, "here") == record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_unknown_keys_are_ignored_and_a_newer_format_is_refused(record: Record) -> None:
    assert type(record).from_json({**record.to_json(), "later": [1]}, "here") == record
    with fails(CheckpointError, record.FILE, 99):
        type(record).from_json({**record.to_json(), "format": 99}, "here")


@pytest.mark.parametrize("content", [[], {"step": "x", "attempt": "x"}, {"format": "one"}])
@pytest.mark.parametrize("kind", [Attempt, Meta])
def test_a_damaged_record_is_refused_by_its_file(kind: type[Record], content: object) -> None:
    with fails(CheckpointError, kind.FILE):
        kind.from_json(content, "here")


def test_a_run_that_never_ended_has_an_empty_status(tmp_path: Path) -> None:
    assert records.read_status(tmp_path) == Status()
    (tmp_path / "status.json").write_text("{")
    assert records.read_status(tmp_path) == Status()
    records.write_status(tmp_path, Status(finished=True, step=3))
    assert records.read_status(tmp_path) == Status(finished=True, step=3)


def test_starts_are_counted(tmp_path: Path) -> None:
    assert [records.attempts(tmp_path), records.next_attempt(tmp_path), records.next_attempt(tmp_path)] == [0, 1, 2]
