"""Tests of a sweep without Ray: samples, early stopping, objectives, and a sweep that is killed and resumed."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from mlflow_here import database
from raised import fails
from ray.tune.schedulers import ASHAScheduler

from pipeline.compat import ray_tune
from pipeline.data import toy
from pipeline.errors import ConfigError, ResourceError
from pipeline.execution import launch
from pipeline.execution.launch import Result
from pipeline.family import map_sides
from pipeline.registry.resolve import resolve
from pipeline.run_config import ComputeConfig
from pipeline.runs import journal
from pipeline.tracking import connect
from pipeline.tracking.description import is_charted
from pipeline.tracking.ledger import Ledger
from tuning import config, cost, metrics, outcome, overhead, selection, slots, space, sweep, tables
from tuning.config import SchedulerConfig
from tuning.controller import controller
from tuning.events import CostMeasured, NetCost, TrialEnded, TrialJudged
from tuning.outcome import Outcome
from tuning.record import SweepRecord, Trial
from tuning.schedulers import ASHA, Study
from tuning.space import Sample
from tuning.trials import Runner


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "set"
    return toy.make(folder, num_classes=4, train=160, val=80, side_px=32, seed=5)


def load(images: Path, *overrides: str) -> config.Sweep:
    """tuning/sweeps/toy.yaml in this process: four trials of 20 steps of 32 images."""
    return config.load("toy", [*settings(images), *overrides])


def settings(images: Path) -> list[str]:
    """Checkpoints are saved where metrics are logged, so that means are over the same steps after a kill."""
    return [
        f"data.root={images}",
        "compute.workers=0",
        "training.batch_size=32",
        "checkpoint.every=2 steps",
        "logging.every=2 steps",
    ]


def table(run_dir: Path) -> list[list[str]]:
    return list(csv.reader((run_dir / "results.csv").read_text().splitlines()))


class Log:
    """Records the lines of a sweep, and the most trials that ran at a time."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.most = 0

    def say(self, text: str) -> None:
        self.lines.append(text)

    def show(self, trials: Sequence[Trial], running: int) -> None:
        self.most = max(self.most, running)

    def close(self) -> None: ...


# --- the space


MIXED = {
    "family.depth": {"grid": [8, 14]},
    "$rate": {"uniform": [0.3, 0.9]},
    "family.target_rate": {"list": ["$rate", {"value": 1, "times": 2}]},
    "training.optimizer.lr": {"loguniform": [1e-3, 1e-1]},
    "training.epochs": {"integer": [2, 4]},
    "training.ema_decay": {"choice": [None, 0.9], "when": {"family.depth": 14}},
}


def test_a_seed_draws_the_same_samples_however_many_rounds_there_are() -> None:
    cases = space.parse(MIXED)
    first, more = (space.draw_samples(cases, rounds=rounds, seed=3) for rounds in (4, 40))
    assert (
        more[:8] == first == space.draw_samples(cases, rounds=4, seed=3) != space.draw_samples(cases, rounds=4, seed=4)
    )
    assert len(more) == 80 and len({sample.name for sample in more}) == 80
    for sample in more:
        values = sample.values
        assert 0.3 <= values["$rate"] <= 0.9 and values["family.target_rate"] == [values["$rate"], 1, 1]
        assert "$rate" not in sample.overrides and 1e-3 <= values["training.optimizer.lr"] <= 1e-1
        assert ("training.ema_decay" in values) == (values["family.depth"] == 14)
    assert {sample.values["training.epochs"] for sample in more} == {2, 3, 4}
    assert {sample.values["family.depth"] for sample in more[::2]} == {8}
    logs = sorted(sample.values["training.optimizer.lr"] for sample in more)
    assert logs[40] < 0.03  # uniform in the logarithm: half are below 0.01, not below 0.05


def test_cases_are_sampled_in_order_and_fixed_ones_once() -> None:
    cases = space.parse([{"a.b": 1}, {"a.b": {"grid": [2, 3]}, "a.c": {"grid": [4, 5], "when": {"a.b": [3]}}}, MIXED])
    found = space.draw_samples(cases, rounds=2, seed=1)
    assert [sample.case for sample in found] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert [dict(sample.values) for sample in found[:4]] == [
        {"a.b": 1},
        {"a.b": 2},
        {"a.b": 3, "a.c": 4},
        {"a.b": 3, "a.c": 5},
    ]


@pytest.mark.parametrize(
    ("entry", "subject"),
    [
        ({"choice": []}, "[]"),
        ({"uniform": [0.9, 0.1]}, "[0.9, 0.1]"),
        ({"loguniform": [0, 1]}, "[0, 1]"),
        ({"integer": [1, 2.5]}, "[1, 2.5]"),
        ({"uniform": [1]}, "[1]"),
        ({"grid": [1], "choice": [2]}, "grid"),
        ({"choice": [1], "when": {"family.depth": 8}}, "family.depth"),
        ({"list": ["$x"]}, "$x"),
    ],
)
def test_wrong_allowed_values_are_refused_by_key(images: Path, entry: object, subject: str) -> None:
    with fails(ConfigError, "space.family.target_rate", subject):
        load(images, f"space.family.target_rate={json.dumps(entry)}", "search.samples=1")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["space.family.target_rat={grid: [0.4]}"], "family.target_rat"),
        (["space.compute.workers={grid: [1, 2]}"], "space.compute.workers"),
        (["family.target_rate=0.4"], "family.target_rate"),
        (["search.kind=grid"], "search.kind"),
        (["search.kind=optuna"], "search.kind"),
        (["search.sample=3"], "search.sample"),
        (["schedular.kind=none"], "schedular.kind"),
        (["epochs=3"], "epochs"),
        (["objectives={top1: max, gmacs: min, ece: min}"], "objectives"),
        (["curves=['(']"], "curves"),
    ],
)
def test_a_faulty_sweep_is_refused_by_key_before_anything_starts(images: Path, overrides: list[str], key: str) -> None:
    with fails(ConfigError, key):
        load(images, *overrides)


@pytest.mark.parametrize("space_", ["family.depth={grid: [8, 9]}", "family.target_rate={normal: [0, 1]}"])
def test_a_sample_that_the_recipe_refuses_is_named(images: Path, space_: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(images, f"space.{space_}")
    assert refused.value.key.startswith("family")


@pytest.mark.parametrize("bounds", [[0, math.inf], [math.nan, 1]])
def test_bounds_must_be_finite(bounds: list[float]) -> None:
    with fails(ConfigError, "space.a.b", bounds):
        space.parse({"a.b": {"uniform": bounds}})


def test_a_grid_that_depends_on_a_variable_is_refused() -> None:
    hidden = {"$d": {"choice": [8, 14]}, "a.b": "$d", "a.c": {"grid": [1, 2], "when": {"a.b": 14}}}
    with fails(ConfigError, "space.a.c", "a.b"):
        space.parse(hidden)


def test_a_condition_that_never_holds_is_refused() -> None:
    never = {"a.b": {"grid": [2, 3]}, "a.c": {"choice": [4], "when": {"a.b": [3, 5]}}}
    with fails(ConfigError, "space.a.c", 5):
        space.parse(never)
    of_another = {"$x": {"uniform": [0, 1]}, "a.b": {"choice": ["$x", 1]}, "a.c": {"choice": [4], "when": {"a.b": 0.5}}}
    space.parse(of_another)


def test_the_samples_of_every_shipped_sweep_are_valid_recipes() -> None:
    wanted = {"toy", "aig_target_rate", "arrn_laplacian_dropout", "ranet_growth", "shape_adaptor_init"}
    assert wanted < set(config.names())
    for name in wanted:
        found = config.load(name, ["data.root=/data"])
        assert found.samples() and config.title(name).endswith("?")
    shapes = config.load("shape_adaptor_random_shapes", ["data.root=/data", "search.samples=3"])
    assert [sample.case for sample in shapes.samples()] == [0, 1, 2, 2, 2]
    nets = [cost.build(shapes.recipe(sample), 100) for sample in shapes.samples()]
    assert map_sides(nets[0], 32) == [32] * 2 + [16] * 2 + [8] * 3 + [4] * 3 + [2] * 3
    assert len({tuple(map_sides(net, 32)) for net in nets}) == 5


def test_objectives_that_no_trial_reports_are_refused() -> None:
    policies = ["32px", "16px"]
    for good in ({"top1": "max"}, {"16px/top1": "max", "mean/gmacs": "min"}, {"mparameters": "min"}):
        metrics.check_objectives(config.SweepConfig(name="a", recipe="b", space={}, objectives=good), policies, 10)
    with fails(ConfigError, "objectives", "18px/top1"):
        wrong = config.SweepConfig(name="a", recipe="b", space={}, objectives={"18px/top1": "max"})
        metrics.check_objectives(wrong, policies, 10)
    with fails(ConfigError, "objectives", "memory_mib"):
        wrong = config.SweepConfig(name="a", recipe="b", space={}, objectives={"top1": "max", "memory_mib": "min"})
        metrics.check_objectives(wrong, policies, 10)

    with fails(ConfigError, "objectives", "top5"):  # of four classes
        wrong = config.SweepConfig(name="a", recipe="b", space={}, objectives={"top5": "max"})
        metrics.check_objectives(wrong, policies, 4)


# --- what ends early, and what is chosen


def test_asha_decides_the_same_after_a_replay() -> None:
    """Trials report in a fixed order; at some reports ASHA is created anew and all earlier reports are replayed."""
    choose = random.Random(1)
    reports = [(trial, epoch, choose.random()) for epoch in range(1, 10) for trial in "abcdefghi"]

    def decisions(ends: Collection[int]) -> list[bool]:
        replayed: list[tuple[str, float, float]] = []
        found, asha, over = list[bool](), ASHA(ASHA_CONFIG, 9), set[str]()
        for number, report in enumerate(reports):
            if number in ends:
                asha = ASHA(ASHA_CONFIG, 9)
                for earlier in replayed:
                    asha.should_stop(*earlier)
            if report[0] not in over:
                replayed.append(report)
                found.append(asha.should_stop(*report))
                over |= {report[0]} if found[-1] else set()
        return found

    whole = decisions([])
    assert whole == decisions([7, 8, 20, 41]) == decisions(range(1, 81))
    assert 3 < sum(whole) < 9  # of nine trials some end early, not all


ASHA_CONFIG = SchedulerConfig(kind="asha", grace_epochs=1, reduction=3)


def test_asha_stops_a_trial_that_is_not_among_the_best_third_so_far() -> None:
    """Computed by hand: the threshold is the two-thirds percentile of earlier results at that rung."""
    asha = ASHA(ASHA_CONFIG, 9)
    values = [0.5, 0.4, 0.6, 0.1, 0.55]
    assert [asha.should_stop(str(n), 1, value) for n, value in enumerate(values)] == [False, True, False, True, False]
    assert not asha.should_stop("0", 2, 0.0)  # between rungs nothing is judged
    assert not any(ASHA(SchedulerConfig(), 9).should_stop("a", epoch, -epoch) for epoch in range(1, 10))
    with fails(ConfigError, "scheduler.grace_epochs", 20):
        ASHA(SchedulerConfig(kind="asha", grace_epochs=20), 9)


def trial(number: int, state: str, **metrics: float) -> Trial:
    return Trial(Sample(number, 0, {"a": number}), state=state, metrics=metrics)  # type: ignore[arg-type]


def test_the_frontier_holds_finished_trials_and_the_first_objective_chooses_the_best() -> None:
    trials = [
        trial(0, "finished", top1=0.7, gmacs=2.0),
        trial(1, "finished", top1=0.8, gmacs=3.0),
        trial(2, "finished", top1=0.6, gmacs=2.5),
        trial(3, "stopped", top1=0.9, gmacs=1.0),
        trial(4, "finished", top1=0.8, gmacs=4.0),
    ]
    setting = config.SweepConfig(name="a", recipe="b", space={})
    assert [t.number for t in selection.frontier(setting, trials)] == [0, 1]
    chosen = selection.best(setting, trials)
    assert chosen is not None and chosen.number == 1
    cheap = selection.best(setting.model_copy(update={"objectives": {"gmacs": "min"}}), trials)
    assert cheap is not None and cheap.number == 0


def test_a_sweeps_end_gives_a_note_a_tally_and_pictures(images: Path, tmp_path: Path) -> None:
    long = "step 3: the loss is not finite | " + "and so on " * 20
    trials = [
        trial(0, "finished", top1=0.7, gmacs=2.0),
        trial(1, "finished", top1=0.8, gmacs=3.0),
        trial(2, "stopped", top1=0.9, gmacs=1.0),
        trial(3, "failed"),
        trial(4, "refused"),
    ]
    for number, reason in ((2, "ASHA"), (3, long), (4, "max_gmacs: 9 above 5")):
        trials[number].reason = reason
    found = outcome.conclude(load(images), tmp_path, trials)
    assert found.finished and found.best == "001-a-1" and found.frontier == ["000-a-0", "001-a-1"]
    assert found.tally == "2 finished, 1 stopped (1 by ASHA), 1 failed, 1 refused (1 by max_gmacs)"
    assert {"frontier.png", "parallel.png"} == {path.name for path in (tmp_path / "plots").iterdir()}
    note = (tmp_path / "note.md").read_text()
    assert "How does accuracy" in note and f"{found.tally}; best: 001-a-1; plots/frontier.png" in note
    assert len({line.count("|") for line in note.splitlines() if line.startswith("|")}) == 1
    assert max(len(cell) for row in found.rows for cell in row) <= tables.CELL_CHARS
    assert long in (tmp_path / "results.csv").read_text()


def test_a_screen_shows_the_facts_that_the_family_names_and_no_table_the_profile(images: Path) -> None:
    metrics = {"top1": 0.7, "gmacs": 2.0, "gates-hard/layers": 3.0, "gates-hard/other": 1.0, "side_px/00": 32.0}
    table = tables.rows(load(images), [Trial(Sample(0, 0, {"a": 0}), state="finished", metrics=metrics)])
    assert table[0][-4:] == ["top1", "gmacs", "gates-hard/layers", "gates-hard/other"]
    assert tables.brief(load(images), table)[0][-3:] == ["top1", "gmacs", "gates-hard/layers"]


def test_an_optuna_study_draws_the_same_after_a_replay(images: Path) -> None:
    pytest.importorskip("optuna", reason="the extra `optuna` is not installed")
    searched = load(
        images,
        "space=[{$a: {uniform: [0, 1]}, $b: {choice: [[1], [2]]}}, {$c: {integer: [1, 9]}}]",
        "search={kind: optuna, samples: 30, seed: 2}",
        "objectives={top1: max}",
    )

    def result(values: dict[str, object]) -> dict[str, float]:
        return {"top1": float(values.get("$a", 0.1))}  # type: ignore[arg-type]

    def drawn(study: Study, first: int, last: int) -> list[tuple[int, dict[str, object]]]:
        found = []
        for number in range(first, last):
            found.append(study.ask(number))
            study.tell(number, None if number == 4 else result(found[-1][1]))
        return found

    whole = drawn(Study(searched.config, searched.cases), 0, 30)
    again = Study(searched.config, searched.cases)
    assert drawn(again, 0, 17) == whole[:17]  # a resumed sweep replays these
    assert drawn(again, 17, 30) == whole[17:]
    late = [values["$a"] for case, values in whole[15:] if case == 0]
    assert len(late) > 8 and sum(late) / len(late) > 0.6  # it searches where top1 is high


def test_a_study_may_have_one_key_with_other_values_in_another_case(images: Path) -> None:
    """Optuna requires one distribution for each name."""
    pytest.importorskip("optuna", reason="the extra `optuna` is not installed")
    cases = "space=[{$a: {choice: [1, 2]}}, {$a: {choice: [3, 4, 5]}}, {$a: {uniform: [6, 7]}}]"
    searched = load(images, cases, "search={kind: optuna, samples: 30, seed: 2}", "objectives={top1: max}")
    study = Study(searched.config, searched.cases)
    for number in range(12):
        case, values = study.ask(number)
        assert case == (0 if values["$a"] < 3 else 1 if values["$a"] < 6 else 2)
        study.tell(number, {"top1": 0.5})


def test_a_study_without_optuna_is_refused_and_leaves_no_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    searched = ["space={family.target_rate: {uniform: [0.4, 0.7]}}", "search.kind=optuna"]
    with fails(ConfigError, "search.kind", "optuna"):
        sweep.run(load(images, *searched), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_misspelt_key_under_a_condition_of_a_study_is_found(images: Path) -> None:
    slip = {"family.depth": {"choice": [8, 14]}, "family.targetrate": {"choice": [0.4], "when": {"family.depth": 14}}}
    for seed in range(6):
        with fails(ConfigError, "family.targetrate"):
            load(images, f"space={json.dumps(slip)}", f"search={{kind: optuna, samples: 3, seed: {seed}}}")


# --- whole sweeps, in this process


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted sweep."""
    run_dir = tmp_path_factory.mktemp("sweeps") / "whole"
    shutil.copyfile(database().path, run_dir.parent / "mlflow.db")
    found = sweep.run(load(images), run_dir)
    assert found.finished and found.best
    return run_dir


def trained_out(trial: Path) -> bool:
    """Whether a trial that was to stop early reached its end first, as happens on a busy machine."""
    return bool(json.loads((trial / "status.json").read_text())["finished"])


def test_a_sweep_writes_tables_and_its_runs_are_in_mlflow(images: Path, whole: Path) -> None:
    heading, *rows = table(whole)
    states = {row[heading.index("state")] for row in rows}
    assert len(rows) == 4 and states == {"finished", "stopped (ASHA)"}
    assert {"frontier.png", "parallel.png"} <= {path.name for path in (whole / "plots").iterdir()}
    client = connect(f"sqlite:///{whole.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("adaptnet").experiment_id
    (parent,) = client.search_runs([experiment], "attributes.run_name = 'whole'")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(child.info.run_name for child in children) == [row[0] for row in rows]
    assert (
        "How does accuracy" in parent.data.tags["mlflow.note.content"]
        and rows[0][0] in parent.data.tags["mlflow.note.content"]
    )
    assert parent.info.status == "FINISHED" and parent.data.metrics["trials/ended"] == 4
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"results.csv", "config.yaml", "plots"} <= artifacts
    for child in children:
        run_dir = whole / "trials" / child.info.run_name
        wanted = {(r["key"], r["step"]) for r in records(run_dir) if is_charted(r["key"])}
        keys = {key for key, _ in wanted}
        sent = [(key, point.step) for key in keys for point in client.get_metric_history(child.info.run_id, key)]
        assert sorted(sent) == sorted(wanted)


def records(run_dir: Path) -> list[journal.Record]:
    return journal.first_values(journal.read_all(run_dir / "journal" / "rank0.jsonl"))


def test_a_trial_stops_at_ashas_step_and_the_others_at_their_end_each_step_once(whole: Path) -> None:
    for event in json.loads((whole / "results.json").read_text()):
        steps = sorted(r["step"] for r in records(whole / "trials" / event["trial"]) if r["key"] == "train/lr")
        status = json.loads((whole / "trials" / event["trial"] / "status.json").read_text())
        assert len(steps) == len(set(steps))
        if event["state"] == "finished":
            assert status["finished"] and status["step"] == 20
        else:
            assert event["step"] == max(map(int, event["judged"])) in (5, 10)  # of the rungs at epochs 1, 2 and 4
            assert event["metrics"]["top1"] == event["judged"][str(event["step"])]


def test_a_finished_sweep_is_not_trained_again(images: Path, whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.glob("trials/*/journal/rank0.jsonl")}
    log = Log()
    assert sweep.run(load(images), whole, watcher=log).finished
    assert not started(log.lines)
    assert before == {path: path.read_bytes() for path in whole.glob("trials/*/journal/rank0.jsonl")}


def test_another_space_or_image_set_in_the_same_folder_is_refused_by_key(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    with fails(ConfigError, "space", whole):
        sweep.run(load(images, "space.family.target_rate={grid: [0.4, 0.5]}"), whole)
    with fails(ConfigError, "recipe.training.epochs", whole):
        sweep.run(load(images, "training.epochs=5"), whole)
    others = toy.make(tmp_path / "set", num_classes=4, train=160, val=80, side_px=32, seed=6)
    with fails(ConfigError, "recipe.data.identity", whole):
        sweep.run(load(others), whole)
    trial_folder = next((whole / "trials").iterdir())
    with fails(ConfigError, "--run-dir", trial_folder):
        sweep.run(load(images), trial_folder)
    with fails(ConfigError, "--run-dir", whole):
        launch.train(load(images).base, whole)


def test_more_samples_keep_a_sweeps_identity_and_another_seed_changes_it(images: Path) -> None:
    first = load(images).identity("x")
    assert load(images, "search.samples=9", "concurrency=1", "checkpoint.every=7 steps").identity("x") == first
    assert load(images, "search.seed=2").identity("x") != first != load(images).identity("y")


def test_an_identity_of_an_earlier_version_is_that_of_the_same_sweep_today(images: Path) -> None:
    """Commit bc067e3 stored keys that have no effect, and no kind of the loss."""
    now = load(images).identity("x")
    inert = {"optimizer.betas": [0.9, 0.999], "schedule.factor": 0.1, "schedule.milestones": []}
    old = now | {f"recipe.training.{key}": value for key, value in inert.items()}
    del old["recipe.training.loss.kind"]
    assert config.translated(old) == config.translated(now) == now
    assert config.translated(old | {"recipe.training.epochs": 9.0}) != now


def test_an_override_may_make_a_key_of_the_sweeps_file_inert(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "recipe: convnet_aig/toy\noverrides: {data: {shuffle: block, lanes: 8}}\nspace: {seed: {grid: [1, 2]}}\n"
    )
    loaded = config.load(str(path), [f"data.root={images}", "data.shuffle=full"])
    assert [loaded.recipe(sample).data.shuffle for sample in loaded.samples()] == ["full", "full"]
    assert config.load(str(path), [f"data.root={images}"]).base.data.lanes == 8


def test_a_refusal_names_the_bound() -> None:
    found = NetCost(macs=20_000_000, parameters=300_000)
    assert found.refusal(config.Bounds(max_gmacs=0.02, max_mparameters=0.3, max_minutes=1)) is None
    assert found.refusal(config.Bounds(max_gmacs=0.01)) == "max_gmacs: 0.02 above 0.01"
    assert found.refusal(config.Bounds(max_mparameters=0.2)) == "max_mparameters: 0.3 above 0.2"


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The free resources of a simulated Ray cluster with one node of two CPUs; a test may change them."""
    import ray

    now = {"CPU": 2.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: now)
    return now


def test_trials_of_two_workers_run_one_by_one_on_two_cpus(two_cpus: dict[str, float]) -> None:
    pair = ComputeConfig(workers=2, device="cpu")
    assert slots.slots(pair) == 1 and slots.free(pair, 0) == 1 and slots.free(pair, 1) == 0
    two_cpus["CPU"] = 0.0  # once the first trial's workers are there
    assert slots.free(pair, 1) == 0 and slots.free(pair, 0) == 0  # or another user's
    assert slots.slots(ComputeConfig(workers=1, device="cpu")) == 2
    with fails(ResourceError, "compute.workers", 3):
        slots.slots(ComputeConfig(workers=3, device="cpu"))


@pytest.mark.long
def test_overhead_is_a_trials_time_against_its_training_and_needs_every_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, swept, failed = list[int](), list[int](), dict[str, str]()

    def run(loaded: config.Sweep, run_dir: Path) -> Outcome:
        swept.extend(loaded.recipe(sample).seed for sample in loaded.samples())
        time.sleep(0.6)
        return Outcome(run_dir, finished=True, failed=failed)

    monkeypatch.setattr(launch, "train", lambda recipe, _: alone.append(recipe.seed))
    monkeypatch.setattr(sweep, "run", run)
    training, trial = overhead.overhead("convnet_aig/toy", ["compute.workers=0"])
    assert (alone, swept) == ([1, 1, 2, 3], [1, 2, 3])  # the first warms up
    assert trial.peer == training.name and trial.rate >= 0.2 > training.rate
    failed["001"] = "not finite"
    with fails(ResourceError, "--sweep", "001: not finite"):
        overhead.overhead("convnet_aig/toy", ["compute.workers=0"])


def test_an_objective_that_no_trial_reports_leaves_no_folder(images: Path, tmp_path: Path) -> None:
    with fails(ConfigError, "objectives", "gates-soft/top1"):
        sweep.run(load(images, "objectives={gates-soft/top1: max}"), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("wrong", "key"),
    [("scheduler.grace_epochs=20", "scheduler.grace_epochs"), ("scheduler.metric=top5", "scheduler.metric")],
)
def test_a_scheduler_that_would_judge_nothing_leaves_no_folder(
    images: Path, tmp_path: Path, wrong: str, key: str
) -> None:
    with fails(ConfigError, key):
        sweep.run(load(images, wrong), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.long
def test_samples_above_a_bound_are_refused_and_a_failed_trial_fails_alone(images: Path, tmp_path: Path) -> None:
    lrs = "space.training.optimizer.lr={grid: [0.05, 100]}"
    limited = ["space.family.target_rate=0.5", "space.family.depth={grid: [8, 14]}", lrs, "bounds.max_gmacs=0.015"]
    diverging = "training.optimizer.weight_decay=10"  # at a rate of 100 weights grow a thousandfold in each step
    constant = ("training.schedule.kind=constant", "training.schedule.warmup_epochs=0", "training.epochs=1")
    mine = load(images, *limited, diverging, *constant)
    log = Log()
    found = sweep.run(mine, tmp_path / "sweep", watcher=log)
    assert found.tally == "1 finished, 1 failed, 2 refused (2 by max_gmacs)"
    (reason,) = found.failed.values()
    assert reason.startswith("step ") and "not finite" in reason
    assert len(list((tmp_path / "sweep" / "trials").iterdir())) == 2
    refused = [each.reason for each in SweepRecord(tmp_path / "sweep", 99).trials if each.state == "refused"]
    assert len(refused) == 2 and all(reason.startswith("max_gmacs: 0.0") for reason in refused)
    before = len(log.lines)
    assert sweep.run(mine, tmp_path / "sweep", watcher=log).failed
    assert not started(log.lines[before:])
    assert sweep.run(mine, tmp_path / "sweep", watcher=log, retry_failed=True).failed
    assert len(started(log.lines[before:])) == 1
    assert any("evaluation.every (=1 epochs)" in line for line in log.lines)
    logged = journal.curves(tmp_path / "sweep" / "journal")["trials/ended"]
    assert logged == [(1, 1.0), (2, 2.0), (3, 2.0)]  # the failed trial's second attempt counts too


def started(lines: Sequence[str]) -> list[str]:
    """The lines of trials that start or resume."""
    return [line for line in lines if line.endswith((": starts", ": resumes"))]


def began(run_dir: Path, *samples: Sample) -> SweepRecord:
    """The record of a driver that was killed after it had drawn these samples."""
    run_dir.mkdir()
    record = SweepRecord(run_dir, 1)
    for sample in samples:
        record.add(sample)
    return record


def test_a_sample_measured_before_a_kill_is_refused_after_it(images: Path, tmp_path: Path) -> None:
    mine = load(images, "space={family.depth: {grid: [8, 14]}}", "bounds.max_mparameters=0.1")
    record = began(tmp_path / "sweep", *mine.samples())
    record.write(CostMeasured(1, macs=9, parameters=200_000))
    record.close()
    with controller(mine, tmp_path / "sweep", 2, Log()) as driver:
        driver.planner.plan(retry_failed=False)
        assert [trial.state for trial in driver.record.trials] == ["planned", "refused"]
        assert driver.record.trials[1].reason == "max_mparameters: 0.2 above 0.1"
        assert tables.tally(driver.record.trials) == "1 refused (1 by max_mparameters), 1 planned"


def drawing(images: Path, *depths: int) -> tuple[config.Sweep, list[Sample]]:
    """A study whose first samples have these depths, and the samples."""
    for seed in range(60):
        search = f"search={{kind: optuna, samples: 4, seed: {seed}}}"
        try:
            mine = load(images, "space={family.depth: {choice: [8, 9]}}", "objectives={top1: max}", search)
        except ConfigError:  # a sample that is checked in advance has 9
            continue
        study = Study(mine.config, mine.cases)
        found = [Sample(number, *study.ask(number)) for number in range(len(depths))]
        if [sample.values["family.depth"] for sample in found] == list(depths):
            return mine, found
    raise AssertionError(depths)


def test_a_studys_invalid_sample_is_refused_by_the_next_driver_too(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra `optuna` is not installed")
    mine, made = drawing(images, 8, 9)
    began(tmp_path / "sweep", *made).close()
    with controller(mine, tmp_path / "sweep", 2, Log()) as driver:
        driver.planner.plan(retry_failed=False)
        assert [trial.state for trial in driver.record.trials] == ["planned", "refused"]
        assert "sample 1 (family.depth=9)" in driver.record.trials[1].reason


def test_the_best_trial_is_registered_as_candidate(images: Path, whole: Path) -> None:
    found = sweep.run(load(images), whole)
    version = outcome.register(found, "from-a-sweep")
    client = connect(f"sqlite:///{whole.parent}/mlflow.db")
    made = client.get_model_version_by_alias("from-a-sweep", "candidate")
    assert int(made.version) == version.version
    assert client.get_run(made.run_id).info.run_name == found.best
    with fails(ConfigError, "source", whole):  # a sweep is no run
        resolve(str(whole))
    with fails(ConfigError, "--trial", "00"):
        outcome.register(found, "from-a-sweep", "00")
    ended = next(row[0] for row in table(whole) if row[table(whole)[0].index("state")] == "stopped (ASHA)")
    if not trained_out(whole / "trials" / ended):
        with fails(ConfigError, "--trial", ended):
            outcome.register(found, "from-a-sweep", ended)


def test_a_named_trial_is_registered_instead_of_the_best(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [trial(number, "finished", top1=0.5 + 0.1 * number, gmacs=1.0) for number in range(2)]
    for each in trials:
        (tmp_path / "trials" / each.name).mkdir(parents=True)
        ledger = Ledger.open(tmp_path / "trials" / each.name)
        ledger.run_id = f"run-of-{each.number}"
        ledger.save()
    found = outcome.conclude(load(images), tmp_path, trials, run_id="parent", uri="sqlite:///x")
    sent = list[tuple[str, str, str]]()
    monkeypatch.setattr(
        outcome, "publish_run", lambda at, name, *, run_id, uri: sent.append((at.name, name, run_id)) or 1
    )
    outcome.register(found, "net")
    outcome.register(found, "net", "000-a-0")
    assert sent == [("001-a-1", "net", "run-of-1"), ("000-a-0", "net", "run-of-0")]


def copied(whole: Path, folder: Path) -> Path:
    shutil.copyfile(whole.parent / "mlflow.db", folder / "mlflow.db")
    return Path(shutil.copytree(whole, folder / "whole"))


def test_a_new_driver_replays_earlier_judgements_to_asha(images: Path, whole: Path, tmp_path: Path) -> None:
    assert not ASHA(load(images).config.scheduler, 4).should_stop("another", 1.0, 0.0)  # the first at a rung continues
    with controller(load(images), copied(whole, tmp_path), 99, Log()) as driver:
        assert driver.decisions.should_stop(trial(9, "running"), 1.0, 0.0)


def test_a_trial_that_was_stopped_and_saved_before_a_kill_is_not_trained_again(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = copied(whole, tmp_path)
    path = run_dir / "journal" / "sweep.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"state": "stopped"' not in line))
    (run_dir / "results.csv").unlink()
    name = next(row[0] for row in table(whole) if "stopped (ASHA)" in row)
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = Ledger.peek(run_dir / "trials" / name).run_id
    client.update_run(run_id, status="RUNNING")  # the state after a kill
    log = Log()
    assert sweep.run(load(images), run_dir, watcher=log).finished
    assert table(run_dir) == table(whole)
    assert not started(log.lines)
    assert client.get_run(run_id).info.status == ("FINISHED" if trained_out(run_dir / "trials" / name) else "SCHEDULED")


def test_a_trial_saved_before_the_step_at_which_it_is_to_stop_is_planned_again(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    with controller(load(images), copied(whole, tmp_path), 99, Log()) as driver:
        judged = next(trial for trial in driver.record.trials if trial.ends_by == "ASHA")
        judged.state = "running"
        for step, state in ((judged.ends_at - 1, "planned"), (judged.ends_at, "stopped")):
            runner = Runner(judged, load(images).recipe(judged.sample), driver.folder.of(judged))
            runner.result = Result(runner.folder, False, step, (), None, None, "", None)
            driver.conclude(runner)
            assert judged.state == state


@pytest.mark.faults  # its result depends on the speed of the machine
def test_a_trial_above_max_minutes_is_stopped_with_its_results_so_far(images: Path, tmp_path: Path) -> None:
    one = ["space={family.target_rate: {grid: [0.5]}}", "scheduler.kind=none", "bounds.max_minutes=0.005"]
    mine, run_dir = load(images, *one, "training.epochs=400"), tmp_path / "sweep"
    assert sweep.run(mine, run_dir).tally == "1 stopped (1 by max_minutes)"
    heading, row = table(run_dir)
    reached = int(row[heading.index("step")])
    assert "stopped (max_minutes)" in row and 0 < reached < 2000
    path = run_dir / "journal" / "sweep.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"overtime"' not in line and '"ended"' not in line))
    assert sweep.run(mine, run_dir).tally == "1 stopped (1 by max_minutes)"
    assert int(table(run_dir)[1][heading.index("step")]) >= reached and float(table(run_dir)[1][-1]) > 0


class Stopping(Log):
    """Asks the sweep to stop at the first evaluation."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._run_dir = run_dir

    def say(self, text: str) -> None:
        super().say(text)
        if "at epoch" in text:
            (self._run_dir / "stop").touch()


@pytest.mark.long
def test_a_stopped_sweep_saves_its_trial_and_resumes_there(images: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "whole"
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    log = Stopping(run_dir)
    found = sweep.run(load(images), run_dir, watcher=log)
    assert not found.finished and len(list((run_dir / "trials").iterdir())) == 1
    assert not json.loads((run_dir / "status.json").read_text())["finished"]
    assert sweep.run(load(images), run_dir).finished
    assert table(run_dir) == table(whole)


EARLIER_RECORD = """\
{"event": "drawn", "number": 0, "case": 0, "values": {"a": 1}, "attempt": 0, "fence": 1, "step": null, "time": 1.0}
{"event": "drawn", "number": 1, "case": 0, "values": {"a": 2}, "attempt": 0, "fence": 1, "step": null, "time": 1.0}
{"event": "priced", "number": 0, "macs": 9, "parameters": 4, "attempt": 0, "fence": 1, "step": null, "time": 1.0}
{"event": "refused", "number": 0, "reason": "max_gmacs: 9 above 5", "attempt": 0, "fence": 1, "step": null, "time": 1.0}
{"event": "judged", "number": 1, "epoch": 1.0, "value": 0.5, "ends": true, "attempt": 0, "fence": 1, "step": 5, "time": 1.0}
{"event": "ended", "number": 1, "state": "stopped", "reason": "ASHA", "metrics": {"top1": 0.5}, "attempt": 0, "fence": 1, "step": 5, "time": 1.0}
{"attempt": 0, "fence": 1, "step": 1, "key": "trials/ended", "value": 1.0, "time": 1.0}
"""  # noqa: E501


def test_the_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Lines as commit bc067e3 wrote them."""
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "sweep.jsonl").write_text(EARLIER_RECORD)
    record = SweepRecord(tmp_path, 2)
    refused, stopped = record.trials
    assert (refused.state, refused.reason, refused.cost) == ("refused", "max_gmacs: 9 above 5", NetCost(9, 4))
    assert (stopped.state, stopped.ends_by, stopped.ends_at, stopped.step) == ("stopped", "ASHA", 5, 5)
    assert stopped.judged == {5: 0.5} and stopped.metrics == {"top1": 0.5} and record.num_ends == 1
    record.write(TrialEnded(1, "finished", "", 7, {}))
    written = json.loads((tmp_path / "journal" / "sweep.jsonl").read_text().splitlines()[-1])
    assert list(written) == list(json.loads(EARLIER_RECORD.splitlines()[5]))
    record.close()


def test_another_signature_of_asha_is_reported() -> None:
    class Changed:
        def on_trial_add(self, trial: object) -> None: ...

        def on_trial_result(self, tune_controller: object, trial: object, result: object) -> None: ...

    ray_tune.check_signatures(ASHAScheduler)
    with fails(ResourceError, "ray"):
        ray_tune.check_signatures(Changed)


def test_half_a_line_of_a_killed_writer_is_ignored(tmp_path: Path) -> None:
    first = SweepRecord(tmp_path, 1)
    first.add(Sample(0, 0, {"a": 1}))
    first.close()
    with open(tmp_path / "journal" / "sweep.jsonl", "a") as file:
        file.write('{"event": "ended", "number": 0, "sta')
    second = SweepRecord(tmp_path, 2)
    assert [trial.state for trial in second.trials] == ["planned"]
    second.write(TrialEnded(0, "failed", "x", 3, {}))
    second.close()
    assert [(trial.state, trial.step) for trial in SweepRecord(tmp_path, 3).trials] == [("failed", 3)]


def test_events_of_a_driver_that_lost_its_lease_are_ignored(tmp_path: Path) -> None:
    first = SweepRecord(tmp_path, 1)
    first.add(Sample(0, 0, {"a": 1}))
    second = SweepRecord(tmp_path, 2)
    second.write(TrialJudged(0, step=5, epoch=1, value=0.5, ends=False))
    first.write(TrialEnded(0, "failed", "its cluster was gone", 3, {}))
    assert [(trial.state, trial.judged) for trial in SweepRecord(tmp_path, 3).trials] == [("planned", {5: 0.5})]


class Overtaken(Log):
    """Takes the sweep's lease away at the first evaluation."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._run_dir = run_dir

    def say(self, text: str) -> None:
        super().say(text)
        if "at epoch" in text:
            lease = json.loads((self._run_dir / "lease.json").read_text())
            (self._run_dir / "lease.json").write_text(json.dumps(lease | {"fence": lease["fence"] + 1}))


class Releasing(Log):
    """Lets the process that holds a trial release it once the sweep has reported that it waits."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def say(self, text: str) -> None:
        super().say(text)
        if "another driver trains it (" in text:
            (self._folder / "release").touch()


HOLD = """
import sys, time
from pathlib import Path
from pipeline.runs.lease import Lease
held = Lease(Path(sys.argv[1])).acquire()
Path(sys.argv[1], "held").touch()
while not Path(sys.argv[1], "release").exists():
    time.sleep(0.05)
held.release()
"""


def test_a_sweep_waits_for_a_trial_that_another_driver_trains(images: Path, tmp_path: Path) -> None:
    one = load(images, "space={family.target_rate: {grid: [0.5]}}", "scheduler.kind=none", "training.epochs=1")
    folder = tmp_path / "sweep" / "trials" / one.samples()[0].name
    folder.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=Path(__file__).parents[1])
    wait_until(lambda: (folder / "held").exists())
    log = Releasing(folder)
    assert sweep.run(one, tmp_path / "sweep", watcher=log).tally == "1 finished"
    assert other.wait() == 0
    assert sum("another driver trains it (" in line for line in log.lines) == 1


def test_a_driver_that_has_lost_its_lease_ends(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "sweep"
    with fails(ResourceError, "lease.json", run_dir):
        sweep.run(load(images, "training.epochs=40"), run_dir, watcher=Overtaken(run_dir))
    for folder in (run_dir / "trials").iterdir():  # its threads are still of this process
        (folder / "stop").touch()
        wait_until(lambda folder=folder: json.loads((folder / "lease.json").read_text())["released"])


@pytest.mark.faults
def test_a_sweep_killed_twice_ends_like_an_uninterrupted_one(images: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "whole"
    shutil.copyfile(database().path, tmp_path / "mlflow.db")
    choose = random.Random(7)
    words = [sys.executable, "-m", "jobs.cli", "sweep", "toy", *settings(images), "--run-dir", str(run_dir)]
    for _ in range(2):
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, cwd=Path(__file__).parents[1])
        before = ended(run_dir)
        wait_until(lambda before=before: ended(run_dir) > before or process.poll() is not None)  # noqa: B023
        time.sleep(choose.uniform(0, 2))
        assert process.poll() is None, (tmp_path / "log").read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sweep.run(load(images), run_dir).finished
    assert table(run_dir) == table(whole)
    for event in json.loads((whole / "results.json").read_text()):
        here, there = (learned(place / "trials" / event["trial"], event["step"]) for place in (run_dir, whole))
        assert here == there and len(here) > 10


def learned(run_dir: Path, last: int) -> dict[tuple[str, int], float]:
    """The first logged values of training and evaluation up to step `last`, without times."""
    kinds = ("train/", "eval/")
    return {
        (r["key"], r["step"]): r["value"] for r in records(run_dir) if r["step"] <= last and r["key"].startswith(kinds)
    }


def ended(run_dir: Path) -> int:
    path = run_dir / "journal" / "sweep.jsonl"
    return path.read_text().count('"event": "ended"') if path.exists() else 0


def wait_until(done, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_memory_of_a_step_is_what_autograd_saves() -> None:
    """Autograd saves the convolution's input and the ReLU's output, each once, and does not count the weights."""
    import torch

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
    assert cost.memory_mib(net, 16) == pytest.approx((3 + 8) * 16 * 16 * 4 / 2**20)
    assert map_sides(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2), torch.nn.Conv2d(4, 4, 3)), 17) == [8, 6]
