"""A profile says where the time of a step goes and changes nothing; log points say how fast the training computes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny
import torch

from pipeline import run_config
from pipeline.data import toy
from pipeline.execution import launch
from pipeline.runs import journal
from pipeline.training import profiling, speed
from pipeline.training.loop import train
from pipeline.training.profiling import StepProfiler, TraceSpan, summary
from pipeline.training.state import TrainState
from pipeline.training.step import train_step

STEPS = 3
DONE = list[tuple[int, str | None]]


def _trained(folder: Path, *, steps: int, done: DONE | None = None) -> TrainState:
    """The state after some steps, profiled if `done` is given, which gets what the profiler reports."""
    current = tiny.fresh(tiny.training())
    plan, events = tiny.plan(current.net, tiny.training(), total_steps=steps), tiny.Recorder(folder / "saves")
    if done is None:
        train(plan, current, tiny.batches(0), events)
        return current
    with StepProfiler(STEPS, tiny.CPU, folder, lambda at, table: done.append((at, table))) as profiler:
        train(plan, current, profiler.batches(tiny.batches(0)), events, take_step=profiler.around(train_step))
    return current


def test_a_profiled_training_has_the_weights_of_another(tmp_path: Path) -> None:
    done: DONE = []
    plain, profiled = (
        _trained(tmp_path / name, steps=12, done=each) for name, each in (("plain", None), ("profiled", done))
    )
    for name, value in tiny.tensors(plain).items():
        assert torch.equal(value, tiny.tensors(profiled)[name]), name
    ((at, table),) = done
    folder = tmp_path / "profiled" / profiling.FOLDER
    assert at == profiling.UNRECORDED + profiling.WARMING + STEPS and table is not None
    assert (folder / profiling.TABLE).read_text() == table + "\n" and "aten::addmm" in table
    found = profiling.read_trace(folder / profiling.TRACE)
    assert found.steps == STEPS and found.step_s > 0 and not found.kernels and not found.launches
    assert 0 < found.training_share < 1 and 0 < found.data_share < 1 and 0 <= found.idle_share < 1
    forward, backward, update = ("aten::linear", "autograd::engine::evaluate_function: AddmmBackward0", "Optimizer")
    calls = {each.name: each.calls for each in found.operators}
    assert calls[forward] == calls[backward] == 2 * STEPS and update not in calls


def test_a_training_that_ends_within_the_warm_up_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done: DONE = []
    _trained(tmp_path, steps=4, done=done)
    assert done == [(4, None)] and not (tmp_path / profiling.FOLDER).exists()


def _span(name: str, category: str, start: float, length: float, thread: str = "1") -> TraceSpan:
    return TraceSpan(name, category, ("p", thread), start, length)


def test_shares_and_counts_are_those_of_the_recorded_steps() -> None:
    spans = [
        *(_span(f"ProfilerStep#{number}", "user_annotation", 100.0 * number, 100.0) for number in (5, 6)),
        *(_span(profiling.WAITING, "user_annotation", start, 25.0) for start in (500.0, 600.0)),
        *(_span(profiling.TRAINING, "user_annotation", start, 60.0) for start in (525.0, 625.0)),
        *(_span("gemm", "kernel", start, 40.0, "stream") for start in (530.0, 550.0, 640.0)),  # two overlap
        _span("gemm", "kernel", 400.0, 50.0, "stream"),  # before
        *(_span("cudaLaunchKernel", "cuda_runtime", start, 1.0) for start in (526.0, 527.0, 626.0, 499.0)),
        *(_span("cudaStreamSynchronize", "cuda_runtime", start, 9.0) for start in (570.0, 700.0)),
        _span("aten::linear", "cpu_op", 530.0, 10.0),
        _span("aten::addmm", "cpu_op", 531.0, 7.0),
        _span("aten::addmm", "cpu_op", 531.0, 7.0, "2"),
    ]
    found = summary(spans)
    assert (found.steps, found.step_s) == (2, pytest.approx(100e-6))
    assert found.training_share == pytest.approx(0.6) and found.data_share == pytest.approx(0.25)
    assert found.idle_share == pytest.approx(1 - (60 + 40) / 200)
    assert (found.launches, found.waits, found.num_operators) == (1.5, 0.5, 1.5)
    assert [(each.name, each.microseconds, each.calls) for each in found.kernels] == [("gemm", 120.0, 3)]
    assert {each.name: each.microseconds for each in found.operators} == {"aten::linear": 3.0, "aten::addmm": 14.0}
    assert "the GPU is idle 50.0%" in found.text(1.5)


def test_a_trace_without_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}]}).encode()))
    with pytest.raises(ValueError):
        profiling.read_trace(path)


def test_a_profile_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / profiling.FOLDER).write_text("a file where the folder belongs")
    done: DONE = []
    profiled = _trained(tmp_path, steps=12, done=done)
    plain = _trained(tmp_path / "plain", steps=12)
    for name, value in tiny.tensors(plain).items():
        assert torch.equal(value, tiny.tensors(profiled)[name]), name
    ((at, text),) = done
    assert at == profiling.UNRECORDED + profiling.WARMING + STEPS and text is not None and "FileExistsError" in text


def test_a_log_point_counts_three_forward_passes_of_each_image_by_its_side() -> None:
    current = tiny.fresh(tiny.training())
    plan = tiny.plan(current.net, tiny.training())
    macs = speed.macs_by_side(current.net, (tiny.SIDE,), tiny.CPU)
    assert macs == {tiny.SIDE: 3 * tiny.SIDE**2 * 8 + 8 * tiny.CLASSES}
    object.__setattr__(plan, "macs", macs)
    object.__setattr__(plan, "peak_macs_per_s", 1e6)
    counted, micros = speed.Speed(plan), next(tiny.batches(0, 2))
    for _ in range(5):
        counted.count(micros)
    values = counted.flush(2.0)
    assert values["time/macs_per_s"] == pytest.approx(3 * macs[tiny.SIDE] * 5 * 8 / 2.0)
    assert values["time/macs_share_of_peak"] == pytest.approx(values["time/macs_per_s"] / 1e6)
    assert values["memory/peak_bytes"] > 1e6
    assert set(counted.flush(1.0)) == {"memory/peak_bytes"}  # nothing was counted since


def test_what_is_not_known_of_the_speed_is_left_out() -> None:
    plan = tiny.plan(tiny.fresh(tiny.training()).net, tiny.training())
    counted = speed.Speed(plan)
    counted.count(next(tiny.batches(0)))
    assert set(counted.flush(1.0)) == {"memory/peak_bytes"}


def test_a_peak_is_measured_once_for_each_device_and_precision(tmp_path: Path) -> None:
    first = speed.matrix_peak(tiny.CPU, autocast=False, folder=tmp_path)
    assert first > 1e8 and speed.matrix_peak(tiny.CPU, autocast=False, folder=tmp_path) == first
    (path,) = tmp_path.iterdir()
    path.write_text("{damaged")
    assert speed.matrix_peak(tiny.CPU, autocast=False, folder=tmp_path) > 1e8
    assert json.loads(path.read_text())["macs_per_s"] > 1e8


def test_a_run_with_a_profile_writes_it_and_logs_its_speed(tmp_path: Path) -> None:
    images = toy.make(tmp_path / "set", num_classes=4, train=64, val=16, side_px=16, seed=5)
    own = [f"data.root={images}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "tracking.register=null"]
    own += ["compute.workers=0", "training.batch_size=16", "training.epochs=3", "evaluation.latency_repeats=0"]
    own += ["logging.every=2 steps", "profile=2", "data.side_px=16"]
    launch.train(run_config.load("baseline/toy", own), tmp_path / "run")
    records = list(journal.read_all(tmp_path / "run" / "journal" / "rank0.jsonl"))
    (event,) = [record for record in records if record.get("event") == "profile"]
    assert event["step"] == 7 and "a step: " in event["text"]
    logged = {record["key"] for record in records if "key" in record}
    assert {"time/macs_per_s", "time/macs_share_of_peak", "memory/peak_bytes"} <= logged
    written = {path.name for path in (tmp_path / "run" / profiling.FOLDER).iterdir()}
    assert written == {profiling.TRACE, profiling.TABLE}
