"""The console command: user errors, exit statuses, listings, signals, and that a refused start leaves no files."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import drawn_nets
import pytest
from raised import fails

from jobs import cli, tables
from jobs.verbs import train
from pipeline.data.toy import make
from pipeline.errors import ConfigError
from pipeline.family import Latency, Report
from pipeline.runs.journal import Journal


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process: (exit code, what it printed)."""

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def test_version_and_recipes_are_listed(say) -> None:
    code, text = say("--version")
    assert code == 0 and text.startswith("adaptnet 0.")
    code, text = say("train", "--list")
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert code == 0 and lines["convnet_aig/toy"].startswith("A gated ResNet-14")
    code, text = say("sweep", "--list")
    assert code == 0 and "\ntoy  " in text
    code, text = say("sweep", "toy", "--show")
    assert code == 0 and text.count("family.target_rate=0.4") == 2 and "kind: asha" in text


@pytest.mark.parametrize(
    ("arguments", "key", "subject"),
    [
        (("tran", "convnet_aig/toy"), "verb", "tran"),
        (("train", "convnet_aig/toy", "name=a/b"), "name", "a/b"),
        (("train", "convnet_aig/toy", "family.target_rate=2"), "family.target_rate", "2"),
        (("runs", "list", "nowhere"), "folder", "nowhere"),
        (("evaluate", "runs/x", "--eps", "4/255"), "--eps", None),
        (("evaluate", "runs/x", "--down-and-up"), "--sides", None),
        (("export", "runs/x", "--policy", "p", "--batch", "x"), "--batch", "x"),
        (("models", "lookup", "--max-macs", "50%"), "--max-macs", "50%"),
        (("predict", "runs/x", "a.jpg", "--budget", "1G", "--policy", "p"), "--policy", "1G"),
        (("bench", "loader"), "root", None),
        (("bench", "loader", "x", "--read-latency", "soon"), "--read-latency", "soon"),
        (("sweep", "toi"), "sweep", "toi"),
        (("sweep", "toy", "--trial", "x"), "--trial", "x"),
        (("sweep", "toy", "--register", "a", "--trial", "002-target_rate-0.4"), "--trial", "002-target_rate-0.4"),
    ],
)
def test_a_user_error_names_the_option_and_the_value(
    arguments: tuple[str, ...], key: str, subject: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with fails(ConfigError, key, subject=subject):
        cli.app(args=list(arguments), prog_name="adaptnet")


def test_a_user_error_is_one_message_without_a_traceback_and_exits_with_2(say) -> None:
    code, text = say("tran", "convnet_aig/toy")
    assert code == 2 and text.startswith("adaptnet: ") and "Traceback" not in text
    assert "train?" in text, "the closest verb is suggested"
    code, text = say("data", "toy", "here", "--classes", "1")
    assert code == 2 and "--classes" in text and "Traceback" not in text


@pytest.mark.parametrize("fault", ["evaluation.policies=[gates-soft]", "data.root=nowhere", "training.batch_size=1"])
def test_a_refused_start_leaves_no_run_behind(say, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "toy", train=20, val=20)
    code, text = say("train", "convnet_aig/toy", "data.root=toy", "compute.workers=2", fault)
    assert code == 2 and fault.partition("=")[2].strip("[]") in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "toy"]
    assert not list((tmp_path / "runs").iterdir())


def test_the_help_shows_each_example_on_one_line(say) -> None:
    for arguments in (("train",), ("evaluate",), ("data", "import"), ("data", "pack"), ("bench", "step"), ("runs",)):
        _, text = say(*arguments, "--help")
        examples = [line.strip() for line in text.splitlines() if line.strip().startswith("adaptnet ")]
        assert examples and not any(line.rstrip().endswith("\\") for line in examples)
        after = [text.splitlines()[n + 1] for n, line in enumerate(text.splitlines()) if line.strip() in examples]
        assert not any(line.strip() for line in after), f"an example of {arguments} continues on a second line"


def test_a_latency_measured_on_a_busy_machine_is_marked() -> None:
    quiet, busy = (_report(Latency(1, 1.0, 1.1, 1000.0, "cpu", 2, waited_share=share)) for share in (0.02, 0.4))
    assert "busy" not in tables.of_reports([quiet])
    assert "threads waited 40% of the time for a core), measure again" in tables.of_reports([quiet, busy])


def _report(entry: Latency) -> Report:
    return Report("a", 1, 1.0, None, 0.0, 1.0, 1.0, 1.0, latency=[entry])


def test_sync_skips_folders_that_are_no_runs_and_reports_a_wrong_name(say, tmp_path: Path) -> None:
    for name in ("run", "mlartifacts"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "config.yaml").write_text("recipe: {}")
    code, text = say("runs", "sync", *map(str, (tmp_path / "run", tmp_path / "mlartifacts", tmp_path / "typo")))
    assert code == 2
    assert f"{tmp_path}/mlartifacts: not a run folder, skipped" in text
    assert f"{tmp_path}/typo: " in text.partition("adaptnet: ")[2]
    code, text = say("runs", "sync", str(tmp_path / "mlartifacts"))
    assert code == 2 and "skipped" not in text


def test_an_ignored_ctrl_c_stays_ignored_and_a_second_ctrl_c_quits_at_once(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.stop_on_signals(tmp_path):
            os.kill(os.getpid(), signal.SIGINT)
        assert not (tmp_path / "stop").exists()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt), train.stop_on_signals(tmp_path) as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert (tmp_path / "stop").exists() and received == {signal.SIGINT}
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_runs_are_listed_with_their_best_top1(say, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    (run / "journal").mkdir(parents=True)
    (run / "config.yaml").write_text("recipe: {}")
    with closing(Journal(run / "journal", attempt=1, fence=1)) as journal:
        for step, top1 in enumerate((0.5, 0.7, 0.6)):
            journal.metrics(step, {"eval/native/top1": top1, "final/native/top1": 0.9})
    code, text = say("runs", "list", str(tmp_path))
    assert code == 0 and text.splitlines()[0].split()[3:6] == ["best", "top-1", "%"]
    assert "70.00" in text and "mine" in text and "60.00" not in text


def test_what_the_policies_do_is_said_once_for_each_kind() -> None:
    drawn = [(n, drawn_nets.report(f"exit-{n}", 0, 3)) for n in (1, 2, 3)]
    reports = [replace(report, kind="exit", settings={"exit": n}) for n, report in drawn]
    said = [line for line in tables.of_reports(reports, "ranet").splitlines() if ": " in line]
    assert sum("takes the answer of exit" in line for line in said) == 1
    assert "takes the answer" not in tables.of_reports(reports)
