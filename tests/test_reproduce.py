"""Claims: the rule of the verdict, rules that are fixed before the runs, and runs that go on as if nothing had been."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow_here import database
from numpy.typing import NDArray
from raised import fails

from jobs import cli
from pipeline import family as families
from pipeline.data import toy
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation.robustness import ResolutionSweep
from pipeline.execution import launch
from pipeline.execution.launch import Result
from pipeline.execution.seeds import SeedRun
from pipeline.family import Policy
from pipeline.runs import records
from pipeline.runs.files import DamagedFile
from tuning.reproduce import claim as claims
from tuning.reproduce import costs, measuring, results, running
from tuning.reproduce.claim import ClaimConfig, LoadedClaim
from tuning.reproduce.kept import KEPT, KeptRuns, recipe_of
from tuning.reproduce.measuring import ClaimFigures
from tuning.reproduce.running import Deadline
from tuning.reproduce.verdict import difference, judge, overall

ROOT = Path(__file__).parents[1]
CLAIM = """
title: Two of ours
source: this test
claimed: A gated net differs from a plain one.
published: none
seeds: 2
overrides:
  training: {batch_size: 8, epochs: 1, schedule: {warmup_epochs: 0}}
  data: {side_px: 16, eval_side_px: 16, eval_resize_px: 16, held_out: 0.25}
  compute: {workers: 0}
  evaluation: {latency_repeats: 0}
arms:
  plain: {recipe: baseline/toy, overrides: {family: {depth: 8, resolutions_px: [8]}}}
  gated: {recipe: convnet_aig/toy, overrides: {family: {depth: 8, thresholds: [0.2, 0.8], controls: [mask]}}}
evaluations:
  lower: {arms: [plain], policies: [native], sides_px: [8]}
statements:
  - says: the gated net is not far below
    a: {arms: [gated], policy: gates-hard}
    b: {arms: [plain], policy: native}
    more_than: -200
  - says: it costs no thousand MACs less
    a: {arms: [gated], policy: gates-hard, figure: macs}
    b: {arms: [plain], policy: native, figure: macs}
    less_than: -1000
  - says: gates are as good as any mixture
    a: {arms: [gated], policy: gates-mask}
    b: {arms: [gated], policies: [gates-0.2, gates-0.8], at_macs_of: {arm: gated, policy: gates-0.2}}
    more_than: -200
    control: true
  - says: lower resolutions do not help by 200 points
    a: {arms: [plain], policy: native@8px, evaluation: lower}
    b: {value: 30}
    less_than: 200
  - says: classes differ in their layers by less than 100
    a: {arms: [gated], policy: gates-hard, figure: class_sd, fact: layers}
    b: {arms: [gated], policy: gates-hard, figure: class_sd, fact: layers, shuffled_labels: true}
    less_than: 100
"""


# ---- the rule


def answers(*shares: float, images: int = 400, seed: int = 0) -> NDArray[np.float64]:
    """Hits [S, N] in 0 and 100 of one seed for each share that is right, all on the same images."""
    difficulty = np.random.default_rng(seed).permutation(np.linspace(0, 1, images))
    return np.stack([100.0 * (difficulty < share) for share in shares])


@pytest.mark.parametrize(
    ("a", "b", "more_than", "verdict"),
    [
        ((0.90, 0.91, 0.90), (0.80, 0.81, 0.80), 1.0, "confirmed"),
        ((0.80, 0.81, 0.80), (0.90, 0.91, 0.90), 1.0, "refuted"),
        ((0.90, 0.91, 0.90), (0.90, 0.91, 0.90), 1.0, "refuted"),
        ((0.90, 0.91, 0.90), (0.89, 0.90, 0.89), 1.0, "not resolved"),
        ((0.95, 0.70, 0.90), (0.80, 0.80, 0.80), 1.0, "not resolved"),
        ((0.95,), (0.10,), 1.0, "not resolved"),
    ],
)
def test_the_verdict_is_where_the_whole_interval_lies(
    a: tuple[float, ...], b: tuple[float, ...], more_than: float, verdict: str
) -> None:
    seeds = tuple(range(len(a)))
    found = difference(seeds, answers(*a), answers(*b))
    assert judge(found, more_than=more_than) == verdict
    swapped = difference(seeds, answers(*b), answers(*a))
    assert judge(swapped, less_than=-more_than) == verdict


def test_one_seed_and_no_seed_are_never_resolved() -> None:
    found = difference((1,), answers(0.9), answers(0.1))
    assert found.low is None and judge(found, more_than=0) == judge(None, less_than=0) == "not resolved"


def test_a_claim_is_refuted_by_one_statement_and_confirmed_by_all() -> None:
    assert overall(["confirmed", "confirmed"]) == "confirmed"
    assert overall(["confirmed", "not resolved"]) == "not resolved"
    assert overall(["confirmed", "not resolved", "refuted"]) == "refuted"


def test_a_figure_with_one_value_for_each_seed_is_tested_over_seeds() -> None:
    a, b = np.array([[3.0], [3.1], [3.05]]), np.array([[1.0], [1.1], [1.0]])
    assert judge(difference((1, 2, 3), a, b), more_than=1) == "confirmed"
    assert judge(difference((1, 2, 3), a, b), more_than=2.03) == "not resolved"


def test_a_mixture_has_the_mean_cost_of_the_target() -> None:
    macs = [30.0, 10.0, 20.0]
    for target in (10.0, 12.5, 20.0, 29.0):
        shares = measuring.mixture(macs, target)
        assert sum(shares) == pytest.approx(1) and np.dot(shares, macs) == pytest.approx(target)
    assert measuring.mixture(macs, 99.0) == [1, 0, 0] and np.isnan(measuring.mixture(macs, 9.0)).all()


# ---- the files


@pytest.mark.parametrize("change", ["more_than: -1\n    less_than: 1", "sure: true"])
def test_a_statement_has_one_threshold_and_no_unknown_key(tmp_path: Path, change: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CLAIM.replace("more_than: -200", change, 1))
    with pytest.raises(ConfigError):
        claims.read(str(path))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("arms: [gated], policy: gates-mask", "arms: [other], policy: gates-mask"),
        ("evaluation: lower", "evaluation: x"),
    ],
)
def test_what_a_statement_names_exists(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CLAIM.replace(old, new, 1))
    with pytest.raises(ConfigError):
        claims.read(str(path))


def test_an_unknown_claim_is_an_error_about_the_claim() -> None:
    with fails(ConfigError, "claim", "trianer"):
        claims.read("trianer")


def policies_of(claim: LoadedClaim, arm: str) -> dict[str, Policy]:
    """The policies of an arm's net, which is built without memory."""
    config = claim.arms[arm].family
    family = families.find(config.name)
    with torch.device("meta"):
        net = family.build(config, 10)
    return {policy.name: policy for policy in family.policies(config, net)}


def evaluated(config: ClaimConfig, claim: LoadedClaim, arm: str, evaluation: str) -> set[str]:
    """The names of the policies that an evaluation of an arm gives."""
    found = policies_of(claim, arm)
    if evaluation == measuring.FINAL:
        wanted = claim.arms[arm].evaluation.policies
        return {name for name in found if wanted is None or name in wanted}
    extra = config.evaluations[evaluation]
    chosen = [policy for name, policy in found.items() if extra.policies is None or name in extra.policies]
    swept = ResolutionSweep(extra.sides_px, extra.up_again).of(chosen) if extra.sides_px else chosen
    return {policy.name for policy in swept}


@pytest.mark.parametrize("name", claims.names())
def test_each_shipped_claim_names_recipes_and_policies_that_exist(name: str) -> None:
    claim = claims.load(name, data_home="/data")
    for quantity in claim.config.quantities():
        for arm in quantity.arms:
            named = {*quantity.policies, quantity.policy, quantity.shares_of} - {None}
            assert named <= evaluated(claim.config, claim, arm, quantity.evaluation), f"{name}: {arm}"
        if quantity.at_macs_of:
            other = quantity.at_macs_of
            assert other.policy in evaluated(claim.config, claim, other.arm, measuring.FINAL), f"{name}: {other}"
    for config in claim.arms.values():
        assert config.checkpoint.best == "last" and config.data.held_out > 0 and config.seed == 1
    assert any(statement.published for statement in claim.config.statements) or claim.config.published


# ---- the runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few images, a claim's file, and an empty tracking database for runs."""
    home = tmp_path_factory.mktemp("claims")
    toy.make(home / "images", num_classes=2, train=24, val=8, side_px=16, seed=5)
    (home / "tiny.yaml").write_text(CLAIM)
    (home / "runs").mkdir()
    shutil.copyfile(database().path, home / "runs" / "mlflow.db")
    return home


def load(home: Path, *overrides: str) -> LoadedClaim:
    images = [f"data.root={home}/images", f"tracking.uri=sqlite:///{home}/runs/mlflow.db"]
    return claims.load(str(home / "tiny.yaml"), [*images, "tracking.register=null", *overrides])


def train(run: SeedRun) -> Result:
    return launch.train(run.config, run.folder)


def figures(claim: LoadedClaim, folder: Path, keep: Path | None = None) -> ClaimFigures:
    return ClaimFigures(claim, folder, KeptRuns(claim, keep))


def tried(
    home: Path,
    folder: Path,
    train_one: Callable[[SeedRun], Result] = train,
    count: int = 2,
    keep: Path | None = None,
) -> None:
    claim = load(home)
    images = running.images_of(claim)
    running.open_folder(claim, folder, images, resume=(folder / running.CLAIM).exists())
    running.train(figures(claim, folder, keep), running.plan(claim, folder, count), train_one, Deadline(None), images)


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    """The folder of a claim whose second run was stopped; the same call went on with it."""
    folder, started = home / "runs" / "tiny", list[str]()

    def stop_the_second(run: SeedRun) -> Result:
        started.append(run.folder.name)
        return train(run) if len(started) == 1 else Result(run.folder, False, 0, (), None, None, "", None)

    tried(home, folder, stop_the_second)
    assert started == ["plain-s1", "gated-s1"]
    partial = results.read(folder)
    assert partial["seeds"] == {"plain": [1], "gated": []} and partial["verdict"] == "not resolved"
    tried(home, folder)
    return folder


def test_seeds_come_outermost_and_no_finished_run_is_repeated(home: Path, done: Path) -> None:
    runs = running.plan(load(home), done, 2)
    assert [each.name for each in runs] == ["plain-s1", "gated-s1", "plain-s2", "gated-s2"]
    assert set(running.remaining(figures(load(home), done), runs).values()) == {0}
    tried(home, done)
    assert {records.attempts(each.run.folder) for each in runs} == {1}


def test_the_result_has_each_statement_with_its_interval_and_the_files_hash(home: Path, done: Path) -> None:
    result = results.read(done)
    assert result["seeds"] == {"plain": [1, 2], "gated": [1, 2]} and result["sha256"] == load(home).sha256
    assert json.loads((done / running.CLAIM).read_text())["sha256"] == result["sha256"]
    verdicts = [each["verdict"] for each in result["statements"]]
    assert (
        verdicts == ["confirmed", "refuted", "confirmed", "confirmed", "confirmed"] and result["verdict"] == "refuted"
    )
    assert all(each["found"]["seeds"] == [1, 2] for each in result["statements"])
    last = records.read_status(done / "plain-s1")
    assert last.best == last.last


def test_the_first_seed_of_each_arm_is_registered_as_claim_and_arm(home: Path, tmp_path: Path) -> None:
    claim = claims.load(str(home / "tiny.yaml"), [f"data.root={home}/images"])
    runs = running.plan(claim, tmp_path, 2)
    names = ["tiny-plain", "tiny-gated", None, None]
    assert [each.run.config.tracking.register for each in runs] == names
    beside = claim.tracked(tmp_path / "runs").arms["plain"].tracking.uri
    assert beside == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_the_same_seeds_give_the_same_table(home: Path, done: Path) -> None:
    shutil.copytree(done, again := home / "runs" / "again", ignore=shutil.ignore_patterns("*-s2", "result.json"))
    tried(home, again)
    first, second = results.read(done), results.read(again)
    assert results.rows(first) == results.rows(second) and first["policies"] == second["policies"]


def test_a_changed_file_and_other_overrides_are_refused(home: Path, done: Path, tmp_path: Path) -> None:
    with fails(ConfigError, "--resume"):
        running.open_folder(load(home), done, "images", resume=False)
    with fails(CheckpointError, "claim.overrides"):
        running.open_folder(load(home, "training.epochs=2"), done, "images", resume=True)
    with fails(CheckpointError, "claim.images"):
        running.open_folder(load(home), done, "others", resume=True)
    same = load(home, "logging.every=7 steps")
    running.open_folder(same, done, running.images_of(same), resume=True)
    (tmp_path / "tiny.yaml").write_text(CLAIM.replace("more_than: -200", "more_than: -201"))
    changed = claims.load(str(tmp_path / "tiny.yaml"), [f"data.root={home}/images"])
    with fails(CheckpointError, "claim.sha256"):
        running.open_folder(changed, done, "images", resume=True)
    running.open_folder(load(home), tmp_path / "begun", "images", resume=False)
    assert running.open_folder(changed, tmp_path / "begun", "images", resume=False)  # no run has begun


def test_a_section_is_a_function_of_the_result_and_replaces_itself_alone(done: Path, tmp_path: Path) -> None:
    result, path = results.read(done), tmp_path / "RESULTS.md"
    other = {**result, "claim": "another", "planned_seeds": 3}
    results.update(path, other)
    results.update(path, result)
    first = path.read_text()
    results.update(path, {**result, "verdict": "confirmed"})
    assert path.read_text() != first
    results.update(path, result)
    assert path.read_text() == first and results.markdown(other) in first and results.markdown(result) in first
    assert "2 of 3 seeds" in first


def test_a_run_is_asked_to_stop_once_the_time_is_over(tmp_path: Path) -> None:
    with Deadline(0).over(tmp_path):
        for _ in range(60):
            if (tmp_path / "stop").exists():
                break
            time.sleep(0.1)
    assert (tmp_path / "stop").exists() and Deadline(0).is_over and not Deadline(None).is_over


def test_the_cost_is_that_of_three_forward_passes(home: Path) -> None:
    found = costs.of_arm(load(home).arms["plain"], 2)
    assert found.images == 18 and found.gmacs == pytest.approx(3 * found.macs * 18 / 1e9) and found.images_per_s > 0


def test_the_command_prints_the_cost_the_table_and_the_page(
    home: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", str(home / "tiny.yaml"), f"data.root={home}/images", "tracking.register=null"]
    words += [f"tracking.uri=sqlite:///{home}/runs/mlflow.db", "--run-dir", str(done), "--resume"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--results", str(tmp_path / "RESULTS.md")])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "every run is finished" in printed and "refuted" in printed
    assert (done / "report" / "index.html").is_file() and "## tiny:" in (tmp_path / "RESULTS.md").read_text()
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--seeds", "3", "--hours", "0"])
    assert ended.value.code == cli.STOPPED and "plain-s3" in capsys.readouterr().out


@pytest.mark.faults
def test_a_killed_command_goes_on_and_gives_the_same_table(home: Path, done: Path, tmp_path: Path) -> None:
    """It is killed with a checkpoint of the first run on disk; the weights are those of a run that was not killed."""
    tiny, folder = tmp_path / "tiny.yaml", tmp_path / "runs" / "tiny"
    tiny.write_text((home / "tiny.yaml").read_text())
    shutil.copytree(home / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("tiny", "again"))
    words = [sys.executable, "-m", "jobs.cli", "reproduce", str(tiny), f"data.root={home}/images"]
    words += ["tracking.register=null", f"tracking.uri=sqlite:///{tmp_path}/runs/mlflow.db", "--run-dir", str(folder)]
    words += ["checkpoint.every=1 steps"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not list(folder.glob("*/checkpoints/step-*/COMPLETE.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    subprocess.run([*words, "--resume"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert results.rows(results.read(folder)) == results.rows(results.read(done))


def test_typing_errors_of_a_claim_are_found_before_it_trains(home: Path, tmp_path: Path) -> None:
    with fails(ConfigError, "checkpoint.best"):
        load(home, "checkpoint.best=eval/native/top1")
    (tmp_path / "typo.yaml").write_text(CLAIM.replace("policy: native", "policy: natve"))
    with fails(ConfigError, "policy"):
        claims.check_policies(claims.load(str(tmp_path / "typo.yaml"), [f"data.root={home}/images"]))


def test_a_file_with_other_text_is_not_written_over(done: Path, tmp_path: Path) -> None:
    other = tmp_path / "README.md"
    other.write_text("# Mine")
    with fails(ConfigError, "--results"):
        results.update(other, results.read(done))
    assert other.read_text() == "# Mine"


# ---- kept runs


@pytest.fixture(scope="module")
def kept(home: Path, done: Path) -> Path:
    """The folder of the kept runs of `done`."""
    folder = home / "kept"
    tried(home, done, no_training, keep=folder)
    return folder


@pytest.fixture
def copied(kept: Path, tmp_path: Path) -> Path:
    """A copy of the kept runs that may be damaged."""
    return Path(shutil.copytree(kept, tmp_path / "copied"))


def no_training(run: SeedRun) -> Result:
    pytest.fail(f"{run.folder.name} is trained again")


def same(a: Path, b: Path, *, but: tuple[str, ...] = ()) -> bool:
    first, second = results.read(a), results.read(b)
    return all(first[key] == second[key] for key in {*first, *second} - {*but})


def commanded(home: Path, run_dir: Path, keep: Path, *words: str, root: str = "") -> int:
    """The exit status of the command."""
    given = ["reproduce", str(home / "tiny.yaml"), f"data.root={root or home / 'images'}", "tracking.register=null"]
    given += [f"tracking.uri=sqlite:///{home}/runs/mlflow.db", "--run-dir", str(run_dir), "--keep", str(keep), *words]
    with pytest.raises(SystemExit) as ended:
        cli.main(given)
    return int(ended.value.code or 0)


def test_kept_runs_alone_give_the_same_result(home: Path, done: Path, kept: Path, tmp_path: Path) -> None:
    tried(home, tmp_path / "anew", no_training, keep=kept)
    assert same(tmp_path / "anew", done) and len(list(kept.glob(f"*/{KEPT}"))) == 4
    assert not list((tmp_path / "anew").glob("*-seeds"))
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    tried(home, done, no_training, keep=kept)
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before


def test_kept_runs_need_neither_run_folders_nor_images(
    home: Path, done: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commanded(home, tmp_path / "anew", kept, root=f"{tmp_path}/gone") == 0
    assert "every run is finished" in capsys.readouterr().out and same(tmp_path / "anew", done)
    with fails(DataError, "data.root"):
        running.images_of(claims.load(str(home / "tiny.yaml"), [f"data.root={tmp_path}/gone"]))


def test_a_claim_goes_on_elsewhere_from_its_kept_runs(home: Path, done: Path, copied: Path, tmp_path: Path) -> None:
    """What is missing is trained, in another folder; the table is that of the claim that was never interrupted."""
    names, trained = {path.name for path in copied.iterdir()}, list[str]()
    for name in ("gated-s2", "plain-s1"):
        shutil.rmtree(copied / name)

    def train_and_note(run: SeedRun) -> Result:
        trained.append(run.folder.name)
        return train(run)

    tried(home, tmp_path / "anew", train_and_note, keep=copied)
    assert trained == ["plain-s1", "gated-s2"] and {path.name for path in copied.iterdir()} == names
    assert same(tmp_path / "anew", done, but=("hours",))
    assert records.read_status(tmp_path / "anew" / "gated-seeds").finished
    measured = figures(load(home), tmp_path / "anew", copied)
    assert results.page(measured, results.read(tmp_path / "anew")) is not None


def test_what_is_kept_gives_the_whole_result_whatever_else_has_begun(home: Path, done: Path, tmp_path: Path) -> None:
    """A run that is not finished counts nowhere, and a finished seed beyond the plan is kept."""
    partial = Path(shutil.copytree(done, tmp_path / "partial"))
    (partial / "gated-s2" / "status.json").unlink()

    def no_time(run: SeedRun) -> Result:
        return Result(run.folder, False, 0, (), None, None, "", None)

    tried(home, partial, no_time, keep=tmp_path / "kept")
    tried(home, tmp_path / "anew", no_time, keep=tmp_path / "kept")
    assert same(partial, tmp_path / "anew") and results.read(partial)["seeds"] == {"plain": [1, 2], "gated": [1]}
    tried(home, Path(shutil.copytree(done, tmp_path / "whole")), no_training, count=1, keep=tmp_path / "all")
    tried(home, tmp_path / "one", no_training, count=1, keep=tmp_path / "all")
    assert same(tmp_path / "whole", tmp_path / "one") and same(tmp_path / "one", done)


def test_an_evaluation_of_an_older_version_is_kept_too(home: Path, done: Path, tmp_path: Path) -> None:
    """It does not say which labels share their logit."""
    older = Path(shutil.copytree(done, tmp_path / "older"))
    for path in older.glob("*/evaluations/*/*.npz"):
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored if name != "tied"}
        np.savez_compressed(path, **arrays)
    tried(home, older, no_training, keep=tmp_path / "kept")
    tried(home, tmp_path / "anew", no_training, keep=tmp_path / "kept")
    assert same(older, tmp_path / "anew")


def test_rows_that_are_not_all_images_in_order_are_kept(home: Path, done: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(done, tmp_path / "other"))
    for path in other.glob("*/evaluations/*/*.npz"):
        with np.load(path) as stored:
            arrays = {name: stored[name] if name == "rows" else stored[name][1:] for name in stored}
        np.savez_compressed(path, **{**arrays, "rows": arrays["rows"][1:] * 1000})
    tried(home, other, no_training, keep=tmp_path / "kept")
    tried(home, tmp_path / "anew", no_training, keep=tmp_path / "kept")
    assert same(other, tmp_path / "anew") and not same(other, done)


def test_a_kept_run_is_small_and_names_no_place(home: Path, kept: Path) -> None:
    for folder in kept.iterdir():
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 100_000
        assert not [path for path in files if str(home).encode() in path.read_bytes()]


def test_kept_runs_of_other_rules_overrides_or_images_are_refused(home: Path, kept: Path, tmp_path: Path) -> None:
    with fails(CheckpointError, "claim.overrides"):
        KeptRuns(load(home, "training.epochs=2"), kept)
    with fails(CheckpointError, "claim.images"):
        KeptRuns(load(home), kept).prepare("others")
    (tmp_path / "tiny.yaml").write_text(CLAIM.replace("more_than: -200", "more_than: -201"))
    with fails(CheckpointError, "claim.sha256"):
        KeptRuns(claims.load(str(tmp_path / "tiny.yaml"), [f"data.root={home}/images"]), kept)
    shutil.copyfile(home / "tiny.yaml", tmp_path / "other.yaml")
    with fails(CheckpointError, "claim.claim"):
        KeptRuns(claims.load(str(tmp_path / "other.yaml"), [f"data.root={home}/images"]), kept)


@pytest.mark.parametrize("change", ["training.optimizer.lr=0.2", "data.eval_resize_px=18", "data.side_px=17"])
def test_kept_runs_of_another_recipe_under_the_same_file_are_refused(home: Path, kept: Path, change: str) -> None:
    """The claim names a recipe, and that file has changed since."""
    claim, key = load(home), change.partition("=")[0]
    plain = load(home, change).arms["plain"]
    with fails(CheckpointError, key):
        KeptRuns(replace(claim, arms={**claim.arms, "plain": plain}), kept)


def test_a_kept_run_with_a_teacher_is_taken_wherever_the_teacher_lies(home: Path) -> None:
    teacher = ["training.teacher.kind=trained", "training.teacher.source=/a/run"]
    moved = ["training.teacher.kind=trained", "training.teacher.source=/another/run"]
    first, second = (recipe_of(load(home, *words).arms["plain"], 1) for words in (teacher, moved))
    assert first == second != recipe_of(load(home).arms["plain"], 1)


FLIPPED = [lambda b: b[:-1], lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :]]


@pytest.mark.parametrize("damage", [*FLIPPED, lambda _: b"", lambda _: b"[]", lambda _: None])
@pytest.mark.parametrize("name", [KEPT, "evaluations/final/gates-hard.npz", "evaluations/final/reports.json"])
def test_a_damaged_kept_run_is_an_error(
    home: Path, copied: Path, name: str, damage: Callable[[bytes], bytes | None]
) -> None:
    path = copied / "gated-s1" / name
    left = damage(path.read_bytes())
    path.unlink() if left is None else path.write_bytes(left)
    with fails(CheckpointError, KEPT):
        KeptRuns(load(home), copied)


def test_each_figure_of_a_kept_record_is_under_its_checksum(home: Path, copied: Path) -> None:
    path = copied / "gated-s1" / KEPT
    whole = json.loads(path.read_text())
    for key, value in {"seconds": 1.0, "commit": "abc", "machine": "another", "sums": {}, "recipe": {}}.items():
        path.write_text(json.dumps({**whole, key: value}))
        with fails(CheckpointError, KEPT):
            KeptRuns(load(home), copied)


def test_a_kept_run_counts_under_its_own_name_alone(home: Path, copied: Path) -> None:
    shutil.copytree(copied / "plain-s1", copied / ".plain-s1.aside")  # what a kill leaves
    assert len(KeptRuns(load(home), copied)) == 4
    (copied / "plain-s1").rename(copied / "plain-s7")
    with fails(CheckpointError, KEPT):
        KeptRuns(load(home), copied)
    (copied / "plain-s7").rename(copied / "plain-s1.old")
    with fails(ConfigError, "--keep"):
        KeptRuns(load(home), copied)


def test_a_folder_that_is_of_no_use_is_named_before_anything_is_trained(
    home: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for words in ((), ("--plan",)):
        assert commanded(home, tmp_path / "runs", tmp_path / "file", *words) == 2
        assert commanded(home, tmp_path / "runs", kept.parent, *words) == 2  # it holds other folders
    assert commanded(home, tmp_path / "runs", tmp_path / "file" / "kept") == 2
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "plain-s2").symlink_to(tmp_path / "nothing")
    assert commanded(home, tmp_path / "runs", tmp_path / "kept") == 2
    assert "Traceback" not in capsys.readouterr().err and not list((tmp_path / "runs").glob("plain-s1"))


def test_a_run_without_answers_by_image_is_named_and_not_kept(home: Path, done: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(done, tmp_path / "broken"))
    (broken / "gated-s1" / "evaluations" / "final" / "gates-hard.npz").write_bytes(b"PK")
    with pytest.warns(DamagedFile), fails(ConfigError, "policy"):
        KeptRuns(load(home), tmp_path / "kept").add("gated", 1, broken / "gated-s1", "images")
    assert not (tmp_path / "kept" / "gated-s1").exists()


def test_of_two_commands_that_keep_a_run_the_first_wins(home: Path, done: Path, tmp_path: Path) -> None:
    one, two = KeptRuns(load(home), tmp_path / "kept"), KeptRuns(load(home), tmp_path / "kept")
    one.add("plain", 1, done / "plain-s1", "images")
    two.add("plain", 1, done / "plain-s1", "images")
    assert one.find("plain", 1) == two.find("plain", 1) is not None


def sections() -> dict[str, str]:
    """{claim: its section} of the shipped results."""
    path = claims.CLAIMS / "RESULTS.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return {match[1]: match[0] for match in re.finditer(r"^## ([^:\n]+):.*?(?=^## |\Z)", text, re.M | re.S)}


def test_each_section_of_the_shipped_results_has_kept_runs() -> None:
    assert set(sections()) <= {path.parent.parent.name for path in (claims.CLAIMS / "kept").glob(f"*/*/{KEPT}")}


@pytest.mark.parametrize("name", sorted(sections()) or [pytest.param("", marks=pytest.mark.skip("no claim is tried"))])
def test_a_section_of_the_shipped_results_is_what_its_kept_runs_give(name: str, tmp_path: Path) -> None:
    section = sections()[name]
    command = re.search(rf"`adaptnet reproduce {name}(.*) --seeds (\d+)`", section)
    assert command is not None
    claim = claims.load(name, shlex.split(command[1]), data_home="/data")
    measured = figures(claim, tmp_path, claims.CLAIMS / "kept" / name)
    assert results.markdown(results.write(measured, int(command[2]))).rstrip() == section.rstrip()
