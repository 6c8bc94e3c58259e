"""The output of `adaptnet sweep`: a table on a terminal, lines elsewhere, Ctrl-C, exit codes."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from jobs import cli
from jobs.verbs import sweep as verb
from jobs.verbs.train import stop_on_signals
from tuning import config, sweep
from tuning.outcome import Outcome
from tuning.record import Trial
from tuning.space import Sample

OVER = config.SweepConfig(name="a", recipe="b", space={}, objectives={"mean/top1": "max"})


def trial(number: int, state: str, **facts: Any) -> Trial:
    return Trial(Sample(number, 0, {"family.depth": 8 + number}), state=state, **facts)  # type: ignore[arg-type]


def drawn(trials: list[Trial], over: config.SweepConfig = OVER) -> str:
    """The output of a terminal for these trials."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Live(console=console, auto_refresh=False) as live:
        verb.LiveTable(console, live, over).show(trials, 1)
        live.refresh()
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_on_a_terminal_the_table_shows_the_state_of_each_trial() -> None:
    trials = [
        trial(0, "finished", step=20, total_steps=20, judged={5: 0.25, 10: 0.5}, metrics={"mean/top1": 0.75}),
        trial(1, "running", step=7, total_steps=20, judged={5: 0.375}),
        trial(2, "planned"),
    ]
    rows = [line.split() for line in drawn(trials).splitlines() if line.startswith(" 0")]
    assert rows[-2:] == [
        ["000-depth-8", "finished", "20/20", "0.5", "0.75"],
        ["001-depth-9", "running", "7/20", "0.375"],
    ]
    assert "1 finished, 1 running, 1 planned" in drawn(trials)
    assert "newest top1" in drawn(trials) and "mean/top1" in drawn(trials)
    by_error = OVER.model_copy(update={"scheduler": config.SchedulerConfig(metric="ece")})
    assert "newest ece" in drawn(trials, by_error)


def test_of_many_trials_the_table_keeps_those_that_run() -> None:
    many = [trial(number, "finished") for number in range(90)] + [trial(90, "running")]
    table = verb._table(many, OVER)
    assert table.row_count == verb.MOST_ROWS
    assert "090-depth-98" in drawn(many) and "000-depth-8" not in drawn(many)


def standing(run_dir: Path, *, finished: bool, failed: dict[str, str] | None = None) -> Outcome:
    """The outcome of a sweep with one trial."""
    return Outcome(run_dir, finished, [["trial"], ["000"]], failed=failed or {}, tally="1 trial")


def swept(folder: Path, monkeypatch: pytest.MonkeyPatch, course: Callable[[Path], Outcome], *words: str) -> object:
    """The command's exit status if `course` stands in for the sweep."""

    def run(_: config.Sweep, run_dir: Path, **__: Any) -> Outcome:
        run_dir.mkdir()
        return course(run_dir)

    monkeypatch.setattr(sweep, "run", run)
    with pytest.raises(SystemExit) as left:
        cli.main(["sweep", "toy", f"data.root={folder}", "--run-dir", str(folder / "sweep"), *words])
    return left.value.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, cli.STOPPED)])
def test_ctrl_c_asks_for_a_save_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    def course(run_dir: Path) -> Outcome:
        os.kill(os.getpid(), number)
        assert (run_dir / "stop").exists()
        return standing(run_dir, finished=False)

    assert swept(tmp_path, monkeypatch, course, "--register", "mine") == code
    printed = capsys.readouterr().out
    assert ("press Ctrl-C again" in printed) == (number == signal.SIGINT)
    assert (
        "stopped; the same command resumes" in printed
        and "nothing is registered until the sweep has finished" in printed
    )


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def course(run_dir: Path) -> Outcome:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("continues")

    assert swept(tmp_path, monkeypatch, course) == cli.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failed_trial_is_named_with_its_reason_and_the_way_to_try_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = swept(tmp_path, monkeypatch, lambda folder: standing(folder, finished=True, failed={"000": "not finite"}))
    printed = capsys.readouterr().out
    assert code == verb.SOME_FAILED and "failed: 000: not finite" in printed and "--retry-failed" in printed


def test_what_ctrl_c_says_is_not_drawn_over_by_the_table(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Live(console=console, auto_refresh=False) as live, stop_on_signals(tmp_path):
        verb.LiveTable(console, live, OVER).show([trial(0, "running")], 1)
        live.refresh()
        os.kill(os.getpid(), signal.SIGINT)
        live.refresh()
    assert "\x1b[2Kstopping at the next save; press Ctrl-C again" in console.file.getvalue()  # type: ignore[attr-defined]
