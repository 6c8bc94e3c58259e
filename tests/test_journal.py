"""Tests of the journal: every line is read exactly once, whichever process was killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from disks import full_disk
from raised import fails

from pipeline.errors import ResourceError
from pipeline.runs import journal
from pipeline.runs.journal import Journal, SystemSampler, Tail, first_values, gpu_values, read, read_all


def metric(step: int, value: float, key: str = "a", fence: int = 0) -> dict[str, Any]:
    return {"key": key, "step": step, "value": value, "fence": fence}


def test_a_record_contains_attempt_fence_step_and_time(tmp_path: Path) -> None:
    writer = Journal(tmp_path, attempt=3, fence=7)
    before = time.time()
    writer.metrics(10, {"train/loss": 0.1, "train/lr": 1e-3})
    writer.event("checkpoint", step=10, where="/x", share=float("nan"))
    loss, rate, event = read_all(writer.path)
    assert loss == {"attempt": 3, "fence": 7, "step": 10, "key": "train/loss", "value": 0.1, "time": loss["time"]}
    assert rate["time"] == loss["time"] and abs(loss["time"] - before) < 5
    assert (event["event"], event["step"], event["where"], event["fence"]) == ("checkpoint", 10, "/x", 7)


def test_a_line_that_is_cut_at_any_byte_costs_no_other_line(tmp_path: Path) -> None:
    Journal(tmp_path).metrics(0, {"a": 1.0})
    whole = (tmp_path / "rank0.jsonl").read_bytes()
    for cut in range(1, len(whole) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "rank0.jsonl").write_bytes(whole + whole[:cut])
        seen, offset = read(folder / "rank0.jsonl")
        assert len(seen) == 1 + (cut == len(whole))  # a torn line is not read, and may still be completed
        Journal(folder).metrics(1, {"a": 2.0})
        later, _ = read(folder / "rank0.jsonl", offset)
        assert [r["value"] for r in later][-1:] == [2.0]
        assert len(list(read_all(folder / "rank0.jsonl"))) == 2 + (cut >= len(whole) - 1)


def test_a_reader_of_a_growing_journal_reads_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CHUNK_BYTES", 100)  # less than a line, so that every chunk ends inside one
    writer, tail = Journal(tmp_path), Tail(tmp_path)
    seen: list[Any] = []
    for step in range(30):
        writer.metrics(step, {"a" * (1 + step % 7 * 40): step})
        if step % 4 == 0:
            Journal(tmp_path, "driver").event("tick", step=step)
            seen += tail.read()
    seen += tail.read()
    assert sorted(r["step"] for r in seen if "key" in r) == list(range(30))
    assert [r["step"] for r in seen if "event" in r] == list(range(0, 30, 4))
    assert tail.read() == []
    from_end = Tail(tmp_path, from_end=True)
    writer.metrics(30, {"a": 1.0})
    assert [r["step"] for r in from_end.read()] == [30]


WRITER = """
import itertools, pathlib, sys
from pipeline.runs.journal import Journal
writer = Journal(pathlib.Path(sys.argv[1]))
for step in itertools.count(int(sys.argv[2])):
    writer.metrics(step, {"key%d" % key: step for key in range(40)})
"""


def test_killed_writers_leave_complete_calls(tmp_path: Path) -> None:
    draw, start = random.Random(3), 0
    cut: list[int] = []
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(start)])
        path, size = tmp_path / "rank0.jsonl", path_size(tmp_path / "rank0.jsonl")
        while path_size(path) == size:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        records = list(read_all(path))
        cut.append(max(record["step"] for record in records))  # this call may have been in flight
        start = cut[-1] + 1
    steps = [record["step"] for record in records]
    assert steps == sorted(steps)  # only the end of an interrupted call is lost, and nothing is repeated
    assert all(steps.count(step) == 40 for step in range(start) if step not in cut)
    assert all(1 <= steps.count(step) <= 40 for step in cut)


def path_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_the_first_value_of_a_key_and_step_wins() -> None:
    written = [metric(10, 1.0), metric(20, 2.0), metric(10, 9.0), metric(15, 1.5), metric(20, 9.0), metric(15, 9.0)]
    assert [(r["step"], r["value"]) for r in first_values(written)] == [(10, 1.0), (20, 2.0), (15, 1.5)]
    assert len(first_values([metric(1, 1.0, "a"), metric(1, 1.0, "b"), {"event": "x", "key": "a", "step": 2}])) == 2


def test_lines_of_a_driver_that_lost_its_lease_are_ignored() -> None:
    written = [metric(1, 1.0, fence=1), metric(2, 2.0, fence=2), metric(3, 9.0, fence=1), metric(3, 3.0, fence=2)]
    assert [r["value"] for r in first_values(written)] == [1.0, 2.0, 3.0]


def test_curves_have_rising_steps_and_one_value_each(tmp_path: Path) -> None:
    writer = Journal(tmp_path)
    for step, value in ((2, 0.2), (4, 0.4), (3, 0.3), (4, 9.0)):
        writer.metrics(step, {"a": value})
    Journal(tmp_path, "node0").metrics(0, {"b": 1.0})
    assert journal.curves(tmp_path) == {"a": [(2, 0.2), (3, 0.3), (4, 0.4)], "b": [(0, 1.0)]}


def test_a_full_disk_is_reported_and_costs_no_line_before_or_after(tmp_path: Path) -> None:
    (tmp_path / "rank0.jsonl").symlink_to("/dev/full")
    with fails(ResourceError, "journal", subject="rank0.jsonl"):
        Journal(tmp_path).metrics(0, {"a": 1.0})
    (tmp_path / "file").touch()
    with fails(ResourceError, "journal", subject=tmp_path / "file"):
        Journal(tmp_path / "file" / "journal")
    writer = Journal(tmp_path, "other")
    writer.metrics(0, {"a": 1.0})
    with full_disk(writer.path.stat().st_size), fails(ResourceError, "journal", subject=writer.path):
        writer.metrics(1, {"a": 1.0})
    writer.metrics(2, {"a": 1.0})
    assert [r["step"] for r in read_all(writer.path)] == [0, 2]


def test_system_metrics_continue_their_count_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "node0.jsonl"

    def samples() -> int:
        return path.read_text().count("cpu_utilization_percentage") if path.exists() else 0

    for _ in range(2):
        before = samples()
        with SystemSampler(Journal(tmp_path, "node0"), every_s=0.05):
            while samples() < before + 3:
                time.sleep(0.05)
    records = list(read_all(tmp_path / "node0.jsonl"))
    steps = [r["step"] for r in records if r["key"] == "system/node0/cpu_utilization_percentage"]
    assert steps == list(range(len(steps))) and len(steps) > 4
    values = {r["key"].rpartition("/")[2]: r["value"] for r in records}
    assert 0 <= values["cpu_utilization_percentage"] <= 100 and 0 < values["system_memory_usage_percentage"] < 100
    assert values["process_memory_usage_megabytes"] > 5 and values["disk_available_megabytes"] > 0


NVIDIA_SMI = """#!/bin/sh
case "$1" in
--id=GPU-b) echo "1, 20, 10, 100" ;;
--id=*) exit 6 ;;
*) printf "0, 10, 10, 100\\n1, 20, 10, 100\\n" ;;
esac
"""


@pytest.mark.parametrize(("gpus", "read"), [(["GPU-b"], {"1"}), (["GPU-slice"], {"0", "1"}), (None, {"0", "1"})])
def test_the_gpus_of_the_job_alone_are_read_where_nvidia_smi_knows_them(
    gpus: list[str] | None, read: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    writer = Journal(tmp_path, "node0")
    with SystemSampler(writer, 0.05, gpus):
        while not (records := list(read_all(writer.path))):
            time.sleep(0.05)
    assert {r["key"].split("gpu_")[1].split("_")[0] for r in records if "gpu_" in r["key"]} == read


def test_gpus_are_read_from_the_output_of_nvidia_smi() -> None:
    values = gpu_values("0, 37, 1000, 4000\n1, [N/A], 512, 4000\n2, [N/A], [N/A], [N/A]\nno line of its own\n")
    assert values == {
        "gpu_0_utilization_percentage": 37,
        "gpu_0_memory_usage_megabytes": pytest.approx(1048.576),
        "gpu_0_memory_usage_percentage": 25,
        "gpu_1_memory_usage_megabytes": pytest.approx(536.870912),
        "gpu_1_memory_usage_percentage": 12.8,
    }
