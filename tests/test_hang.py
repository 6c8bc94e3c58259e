"""A frozen process is reported with the time and its Python line; the run resumes from its newest checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from ray_here import Head
from test_launch import alive, command, end_of, events, images, log_of, on, passed, recipe, wait_for, weights, whole

from pipeline.runs import journal

__all__ = ["images", "recipe", "whole"]  # fixtures


def of_driver(run_dir: Path, kind: str) -> list[journal.Record]:
    written = run_dir / "journal" / "driver.jsonl"
    return [r for r in journal.read_all(written) if r.get("event") == kind] if written.exists() else []


@pytest.mark.faults
@pytest.mark.ray
def test_a_stopped_rank_is_told_and_the_run_restarts_with_the_same_weights(
    images: Path, whole: Path, ray_head: Head, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = command(
        images, run_dir, on(ray_head), "compute.workers=2", "compute.hang_after_s=8", "compute.max_failures=9"
    )
    wait_for(lambda: passed(run_dir, 5), "the first checkpoint", process=process)
    wait_for(lambda: len(ray_head.workers()) == 2, "the end of earlier workers", process=process)
    victim = ray_head.workers()[-1]
    victim.send_signal(signal.SIGSTOP)
    wait_for(lambda: bool(of_driver(run_dir, "hang")), "the report", process=process)
    assert end_of(process) == 0, log_of(run_dir)
    assert not alive(victim)
    hang, restart = of_driver(run_dir, "hang")[0], of_driver(run_dir, "restart")[0]
    assert "is stopped (state T)" in hang["reason"] and hang["reason"] in restart["reason"]
    printed = (run_dir.parent / f"{run_dir.name}.log").read_text()
    report = (run_dir / hang["report"]).read_text()
    for text in (printed, report):
        assert f"process {victim.pid}" in text and "in train_step" in text  # where the other rank waits
        assert "last journal event" in text
    assert "(raylet)" not in printed
    assert events(run_dir, "resumed")
    assert weights(run_dir) == weights(whole)
