"""The console command: user errors, exit statuses, listings, signals, and that a refused start leaves no files."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from jobs import cli, tables
from jobs.verbs import train
from pipeline.data.toy import make
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


def test_a_mistyped_verb_gets_the_nearest(say) -> None:
    code, text = say("tran", "convnet_aig/toy")
    assert code == 2 and "tran: no such verb" in text and "did you mean train?" in text


def test_version_and_recipes_are_told(say) -> None:
    code, text = say("--version")
    assert code == 0 and text.startswith("adaptnet 0.")
    code, text = say("train", "--list")
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert code == 0 and lines["convnet_aig/toy"].startswith("A gated ResNet-14")
    code, text = say("sweep", "--list")
    assert code == 0 and "\ntoy  " in text and "How does accuracy on the toy set" in text
    code, text = say("sweep", "toy", "--show")
    assert code == 0 and text.count("family.target_rate=0.4") == 2 and "kind: asha" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "convnet_aig/toy", "name=a/b"), ['name (="a/b")', "up to 120 letters"]),
        (("train", "convnet_aig/toy", "family.target_rate=2"), ["family.target_rate (=2)", "less than or equal to 1"]),
        (("runs", "list", "nowhere"), ["nowhere: no such folder"]),
        (("evaluate", "README.md"), ["README.md: no such folder", "run's folder"]),
        (("evaluate", "nowhere", "training.epochs=3"), ["an evaluation does not use training.epochs"]),
        (("data", "toy", "here", "--classes", "1"), ["--classes", "greater than or equal to 2"]),
        (("data", "info", "nowhere"), ["nowhere: no such folder"]),
        (("models", "list"), ["no registry here yet", "--uri"]),
        (("sweep", "toi"), ["toi: no such sweep", "did you mean toy?"]),
        (("sweep", "toy", "--trial", "x"), ["--trial (=x)", "--register NAME"]),
        (
            ("sweep", "toy", "--register", "a", "--trial", "002-target_rate-0.4"),
            ["no such trial", "did you mean 002-target_rate-0.4_lr-0.0309183?"],
        ),
    ],
)
def test_an_error_names_the_thing_and_the_way_out(
    say, arguments: tuple[str, ...], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = say(*arguments)
    assert code == 2
    for word in words:
        assert word in text
    assert "valid array" not in text and "Traceback" not in text


@pytest.mark.parametrize("fault", ["evaluation.policies=[gates-soft]", "data.root=nowhere", "training.batch_size=1"])
def test_a_refused_start_leaves_no_run_behind(say, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "toy", train=20, val=20)
    code, text = say("train", "convnet_aig/toy", "data.root=toy", "compute.workers=2", fault)
    assert code == 2 and fault.partition("=")[2].strip("[]") in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "toy"]
    assert not list((tmp_path / "runs").iterdir())


def test_every_verbs_help_shows_examples_that_can_be_copied(say) -> None:
    for arguments in (("train",), ("evaluate",), ("data", "import"), ("data", "pack"), ("bench", "step"), ("runs",)):
        _, text = say(*arguments, "--help")
        examples = [line.strip() for line in text.splitlines() if line.strip().startswith("adaptnet ")]
        assert examples and not any(line.rstrip().endswith("\\") for line in examples)
        after = [text.splitlines()[n + 1] for n, line in enumerate(text.splitlines()) if line.strip() in examples]
        assert not any(line.strip() for line in after), f"an example of {arguments} goes on in a second line"


def test_a_latency_on_cores_that_others_held_is_called_doubtful() -> None:
    quiet, busy = (_report(Latency(1, 1.0, 1.1, 1000.0, "cpu", 2, waited_share=share)) for share in (0.02, 0.4))
    assert "busy" not in tables.of_reports([quiet])
    assert "threads waited 40% of the time for a core), measure again" in tables.of_reports([quiet, busy])


def _report(entry: Latency) -> Report:
    return Report("a", 1, 1.0, None, 0.0, 1.0, 1.0, 1.0, latency=[entry])


def test_what_lies_beside_runs_is_passed_over_and_a_wrong_name_is_not(say, tmp_path: Path) -> None:
    for name in ("run", "mlartifacts"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "config.yaml").write_text("recipe: {}")
    code, text = say("runs", "sync", *map(str, (tmp_path / "run", tmp_path / "mlartifacts", tmp_path / "typo")))
    assert code == 2
    assert f"{tmp_path}/mlartifacts: no run folder, passed over" in text
    assert f"{tmp_path}/typo: " in text.partition("adaptnet: ")[2]
    code, text = say("runs", "sync", str(tmp_path / "mlartifacts"))
    assert code == 2 and "passed over" not in text


def test_ctrl_c_that_is_ignored_stays_so_and_a_second_one_leaves_at_once(tmp_path: Path) -> None:
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
