"""Predicting: answers equal the evaluation's, the policy is the best within the budget, bad images affect no others."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raised import fails

from jobs.cli import main
from pipeline.data.index import open_index
from pipeline.deploy import evaluations, predicting
from pipeline.deploy.predicting import Choice, Classified, Predictor, Unreadable
from pipeline.errors import ConfigError
from pipeline.evaluation.frontier import Budget, best_within, parse_budget
from pipeline.family import Report

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def exits(finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return predicting.load(str(finished["ranet"]), device="cpu", cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pictures(finished: dict[str, Path]) -> list[Path]:
    """The files of the val split, in the order of its rows."""
    root = finished["ranet"].parents[1] / "images5"
    val = sorted((root / "val").rglob("*.jpg"))
    index = open_index(root)
    names = [index.file(row) for row in range(len(index))]
    return [root / name for name in names if name.startswith("val/") and len(val)]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("0.8G", 8e8, "macs"), ("300M", 3e8, "macs"), ("2e", None, None), ("5ms", 5, "ms"), ("0.1 s", 100, "ms"),
     ("50%", 0.5, "share"), ("1200000", 1.2e6, "macs"), ("0%", None, None), ("-3G", None, None), ("fast", None, None)],
)  # fmt: skip
def test_budgets_are_parsed_in_their_units(text: str, amount: float | None, unit: str) -> None:
    if amount is None:
        with pytest.raises(ConfigError):
            parse_budget(text)
    else:
        assert parse_budget(text) == Budget(pytest.approx(amount), unit, text)  # type: ignore[arg-type]


def test_no_policy_within_the_budget_beats_the_chosen_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        costs = generator.integers(1, 6, 5).astype(float)
        reports = [
            Report(f"p{n}", 10, top1 / 5, None, 0.0, 1, 1, 1.0) for n, top1 in enumerate(generator.integers(0, 5, 5))
        ]
        budget = Budget(float(generator.integers(1, 6)), "macs", "b")
        affordable = [n for n in range(5) if costs[n] <= budget.amount]
        if not affordable:
            with pytest.raises(ConfigError):
                best_within(reports, costs.tolist(), budget)
            continue
        best = best_within(reports, costs.tolist(), budget)
        assert best in affordable
        assert all((reports[n].top1, -costs[n]) <= (reports[best].top1, -costs[best]) for n in affordable)


def test_answers_equal_those_of_the_evaluation(exits: Predictor, pictures: Sequence[Path]) -> None:
    net = evaluations.find(exits.source)
    for report in exits.reports:
        arrays = net.newest.details(report.policy)
        assert arrays is not None
        answers = [a for a in exits.answers(pictures, report.policy, top=1) if isinstance(a, Classified)]
        assert [exits.model.classes.index(a.labels[0]) for a in answers] == arrays["predicted"].tolist()
        if not report.policy.startswith("budget"):  # early exit rounds batches, so its cost depends on them
            assert [a.macs for a in answers] == arrays["macs"].tolist()


def test_the_budget_holds_on_the_images_of_the_evaluation(exits: Predictor, pictures: Sequence[Path]) -> None:
    whole = predicting.full_macs(exits.reports)
    for share in (0.3, 0.5, 0.7, 1.0):
        choice = exits.choose(Budget(share, "share", f"{share:.0%}"), None, [])
        answers = [a for a in exits.answers(pictures, choice.policy) if isinstance(a, Classified)]
        assert np.mean([a.macs for a in answers]) <= 1.02 * share * whole
        assert predicting.exceeded(choice, answers, whole) is None
        costlier = [Classified(a.file, a.labels, a.probabilities, whole * share * 1.03) for a in answers]
        assert predicting.exceeded(choice, costlier, whole)


@pytest.mark.long
def test_times_are_measured_once_for_a_net_and_device(exits: Predictor, pictures: Sequence[Path]) -> None:
    first = exits.choose(parse_budget("10s"), None, pictures)
    assert first.cost is not None and 0 < first.cost < 1e4
    (stored,) = exits.cache.glob("*.json")
    document = json.loads(stored.read_text())
    assert set(document["milliseconds"]) == {report.policy for report in exits.reports} and document["batch"] == 1
    document["milliseconds"] = dict.fromkeys(document["milliseconds"], 7.0)
    stored.write_text(json.dumps(document))
    assert exits.choose(parse_budget("8ms"), None, []).cost == 7.0
    with pytest.raises(ConfigError):
        exits.choose(parse_budget("6ms"), None, [])


def test_good_images_are_classified_and_bad_ones_listed(
    exits: Predictor, pictures: Sequence[Path], tmp_path: Path
) -> None:
    bad = {"empty.jpg": b"", "text.jpg": b"no image", "cut.jpg": pictures[0].read_bytes()[:200]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for a writer
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", 1 << 36)
    odd = ("pipe.jpg", "huge.jpg", *bad)
    mixed = [tmp_path / "gone.jpg", *pictures[:2], *(tmp_path / name for name in odd), pictures[2]]
    found = list(exits.answers(mixed, "exit-1", batch_size=2))
    assert [each.file for each in found] == [str(path) for path in mixed]
    assert [isinstance(each, Unreadable) for each in found] == [True, False, False, *[True] * 5, False]
    good = [each for each in found if isinstance(each, Classified)]
    alone = [each for each in exits.answers(pictures[:3], "exit-1") if isinstance(each, Classified)]
    assert [(each.file, each.labels, each.macs) for each in good] == [(a.file, a.labels, a.macs) for a in alone]
    for one, other in zip(good, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)


def test_a_broken_image_among_others_ends_with_1_and_alone_with_2(
    finished: dict[str, Path], pictures: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(pictures[0].read_bytes()[:200])
    for given, status in (([broken, pictures[0]], 1), ([broken], 2)):
        assert run("predict", finished["ranet"], *given, "--policy", "exit-1") == status
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and str(broken) in printed.err
        assert (str(pictures[0]) in printed.out) == (status == 1)


def test_images_are_given_as_files_folders_patterns_or_by_standard_input(
    finished: dict[str, Path],
    pictures: Sequence[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answered(*arguments: object) -> list[str]:
        assert run("predict", finished["ranet"], *arguments, "--policy", "exit-1", "--json") == 0
        return [each["file"] for each in json.loads(capsys.readouterr().out)["images"]]

    folder = pictures[0].parent
    inside = [str(path) for path in sorted(folder.iterdir())]
    assert answered(folder) == answered(f"{folder}/*.jpg") == answered(*inside) == inside
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(inside)))
    assert answered("-") == inside


def test_the_command_shows_policy_reason_and_cost(
    finished: dict[str, Path],
    pictures: Sequence[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(finished["convnet_aig"].parents[1])
    assert run("predict", "models:/gated@candidate", pictures[0], pictures[1], "--budget", "100%", "--top", 2) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "100%" in printed[0] and "top-1" in printed[0]
    assert printed[1].startswith(f"{pictures[0]}: ") and printed[1].count(" %") == 2 and "MACs)" in printed[1]
    assert printed[-1].startswith("2 images, ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nothing.jpg"], 2),  # no image has an answer
        (["--budget", "1%", "x.jpg"], 2),
        (["--policy", "exit-9", "x.jpg"], 2),
        (["--policy", "exit-1", "--budget", "50%", "x.jpg"], 2),
        (["nowhere/*.jpg"], 2),
        (["--budget", "5ms", "nothing.jpg"], 2),
    ],
)
def test_the_command_ends_with_an_error_if_it_cannot_answer(
    finished: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    code: int,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("predict", finished["ranet"], *arguments) == code
    assert capsys.readouterr().err


def test_a_budget_in_milliseconds_needs_an_image_that_can_be_read(exits: Predictor, tmp_path: Path) -> None:
    predictor = replace(exits, cache=tmp_path)
    with fails(ConfigError, "--budget"):
        predictor.choose(parse_budget("5ms"), None, [tmp_path / "nothing.jpg"])


def test_a_choice_without_a_budget_is_the_nets_default(exits: Predictor) -> None:
    default: Any = exits.reports[0].policy
    assert exits.choose(None, None, []) == Choice(default, "the net's default; --budget chooses another")
