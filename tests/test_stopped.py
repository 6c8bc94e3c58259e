"""What is printed and recorded of a run that was stopped: it is so."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from jobs import cli
from jobs.verbs import train
from pipeline import run_config
from pipeline.data import toy
from pipeline.execution import launch
from pipeline.execution.seeds import SeedRun
from pipeline.runs.records import read_status, write_status
from pipeline.tracking import summaries
from pipeline.training import checkpoint

SMALL = ["family.depth=8", "training.batch_size=8", "training.epochs=2", "compute.workers=0", "tracking.register=null"]
SMALL += ["evaluation.latency_repeats=0", "evaluation.every=2 steps"]


def test_a_stopped_run_names_the_checkpoint_that_it_resumes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest; and none is the best before an evaluation."""
    images = toy.make(tmp_path / "set", num_classes=2, train=16, val=8, side_px=32)
    config = run_config.load("baseline/toy", [f"data.root={images}", *SMALL])
    run_dir = tmp_path / "runs" / "run"
    result = launch.train(config, run_dir, on_start=(run_dir / "stop").touch)
    names = checkpoint.open_storage(config.checkpoint, run_dir).names()
    assert not result.finished and names == [checkpoint.name_of(result.step)] and result.step < 2
    assert result.checkpoint is not None and Path(result.checkpoint).name == names[-1]
    assert read_status(run_dir).best is None and read_status(run_dir).last == names[-1]
    train._print_result(result, "baseline")
    assert f"resumes from {result.checkpoint}\n" in (text := capsys.readouterr().out) and "best" not in text
    assert summaries(run_dir)[0].status == "STOPPED"
    whole = launch.train(config, run_dir)
    assert whole.finished and whole.checkpoint is not None and Path(whole.checkpoint).name == read_status(run_dir).best
    assert summaries(run_dir)[0].status == "FINISHED"


def test_a_stop_before_the_workers_start_forgets_neither_the_step_nor_the_best(tmp_path: Path) -> None:
    """Of a run that had been evaluated; Ray is not even started."""
    images = toy.make(tmp_path / "set", num_classes=2, train=16, val=8, side_px=32)
    run_dir = tmp_path / "run"
    launch.train(run_config.load("baseline/toy", [f"data.root={images}", *SMALL]), run_dir)
    before = read_status(run_dir)
    write_status(run_dir, replace(before, finished=False))
    words = [each for each in SMALL if each != "compute.workers=0"]
    config = run_config.load("baseline/toy", [f"data.root={images}", *words, "compute.workers=1"])
    result = launch.train(config, run_dir, on_start=(run_dir / "stop").touch)
    after = read_status(run_dir)
    assert not result.finished and not after.finished
    assert (after.step, after.best, after.last) == (before.step, before.best, before.last) and after.best is not None


@pytest.mark.parametrize(("saved", "words"), [(False, "interrupted"), (True, "")])
def test_a_run_that_has_saved_is_not_called_interrupted(
    saved: bool, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def verb() -> None:
        raise typer.Exit(cli.INTERRUPTED) if saved else KeyboardInterrupt

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    printed = capsys.readouterr()
    assert ended.value.code == cli.INTERRUPTED and bool(words) == ("interrupted" in printed.out + printed.err)


def test_a_fault_of_ours_is_printed_without_the_passwords_in_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def verb() -> None:
        raise RuntimeError("postgresql://me:hu/s@h@host/db is away")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    printed = capsys.readouterr()
    assert ended.value.code == 1 and "postgresql://me@host/db is away" in printed.err and "Traceback" in printed.err
    assert "hu/" not in printed.err


def test_a_signal_before_the_run_removes_an_old_request_is_not_lost(tmp_path: Path) -> None:
    """SIGTERM that arrived while the folder's lease was taken: the run saves and stops."""
    images = toy.make(tmp_path / "set", num_classes=2, train=16, val=8, side_px=32)
    config = run_config.load("baseline/toy", [f"data.root={images}", *SMALL])
    result = train.followed(SeedRun(config, tmp_path / "run"), (), {signal.SIGTERM})
    assert not result.finished and result.step < 2
