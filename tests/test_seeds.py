"""One recipe with several seeds: runs like any others below one parent, killed and resumed without training twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow_here import database
from raised import fails

from jobs import cli
from pipeline import config as configs
from pipeline import run_config
from pipeline.data import toy
from pipeline.errors import CheckpointError, ConfigError, DivergedError
from pipeline.execution import launch, seeds
from pipeline.execution.launch import Result
from pipeline.execution.seeds import SeedRun
from pipeline.run_config import RunConfig
from pipeline.runs import records, seed_runs
from pipeline.tracking import connect
from pipeline.tracking.ledger import Ledger


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few images and an empty tracking database for runs."""
    home = tmp_path_factory.mktemp("seeds")
    toy.make(home / "images", num_classes=2, train=16, val=8, side_px=16, seed=5)
    (home / "runs").mkdir()
    shutil.copyfile(database().path, home / "runs" / "mlflow.db")
    return home


def recipe(home: Path, *overrides: str) -> RunConfig:
    small = ["family.depth=8", "family.resolutions_px=[8]", "training.batch_size=8", "training.epochs=1"]
    images = [f"data.root={home}/images", "data.side_px=16", "data.eval_side_px=16", "data.eval_resize_px=16"]
    alone = ["compute.workers=0", "tracking.register=null", "evaluation.latency_repeats=0", "name=net"]
    return run_config.load("baseline/toy", [*small, *images, *alone, "training.schedule.warmup_epochs=0", *overrides])


def train(run: SeedRun) -> Result:
    return launch.train(run.config, run.folder)


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The group of two finished seeds, of which the second was stopped and resumed."""
    runs = seeds.plan(recipe(home), 2, home / "runs" / "net")
    group = seeds.create(runs)

    def stop_the_second(run: SeedRun) -> Result:
        return train(run) if run.config.seed == 1 else Result(run.folder, False, 0, (), None, None, "", None)

    stopped = seeds.train(runs, stop_the_second)
    assert not stopped.finished and [result.finished for result in stopped.results] == [True, False]
    assert not records.read_status(group).finished
    assert seeds.train(runs, train).finished
    return group


def test_each_seed_is_the_run_that_it_would_be_alone(trained: Path, home: Path) -> None:
    assert seed_runs.seeds_in(trained)[:2] == (1, 2)
    run_dir = home / "runs" / "net-s2"
    assert seed_runs.folder_of(trained, 2) == run_dir and seed_runs.stem_of(run_dir.name) == "net"
    alone = home / "alone" / "runs" / "net"
    alone.parent.mkdir(parents=True)
    shutil.copyfile(database().path, alone.parent / "mlflow.db")
    launch.train(recipe(home, "seed=2"), alone)
    weights = [folder / "checkpoints" / "step-00000002" / "net.safetensors" for folder in (run_dir, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.long
def test_a_finished_seed_is_not_trained_again_and_more_seeds_may_follow(trained: Path, home: Path) -> None:
    attempts = {seed: records.attempts(seed_runs.folder_of(trained, seed)) for seed in (1, 2)}
    runs = seeds.plan(recipe(home), 3, home / "runs" / "net")
    seeds.create(runs)
    assert seeds.train(runs, train).finished
    assert {seed: records.attempts(seed_runs.folder_of(trained, seed)) for seed in (1, 2)} == attempts
    assert (
        records.read_status(trained).finished and len((trained / "results.csv").read_text().splitlines()) == 1 + 3 * 3
    )
    client = connect(f"sqlite:///{home}/runs/mlflow.db")
    parent = client.get_run(str(Ledger.peek(trained).run_id))
    children = [Ledger.peek(seed_runs.folder_of(trained, seed)).run_id for seed in (1, 2, 3)]
    tags = [client.get_run(str(child)).data.tags["mlflow.parentRunId"] for child in children]
    assert tags == [parent.info.run_id] * 3
    assert parent.info.status == "FINISHED" and parent.data.metrics["seeds/finished"] == 3
    history = client.get_metric_history(parent.info.run_id, "seeds/finished")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_group_is_of_one_recipe(trained: Path, home: Path) -> None:
    with fails(CheckpointError, "training.optimizer.lr"):
        seeds.create(seeds.plan(recipe(home, "training.optimizer.lr=0.2"), 2, home / "runs" / "net"))
    with fails(ConfigError, "name"):
        seeds.plan(recipe(home, f"name={'x' * 119}"), 2, home / "runs" / "net")
    with fails(ConfigError, "source", trained.name):
        from pipeline.registry.resolve import resolve

        resolve(str(trained))


def test_seeds_that_would_be_evaluated_on_other_images_are_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "images" / "train", tmp_path / "images")
    runs = seeds.plan(recipe(home, f"data.root={tmp_path}/images"), 2, tmp_path / "runs" / "net")
    seeds.create(runs)
    with fails(ConfigError, "data.root"):
        seeds.train(runs, train)


def test_a_seed_that_diverges_does_not_keep_the_others_from_training(home: Path, tmp_path: Path) -> None:
    runs = seeds.plan(recipe(home, f"tracking.uri=sqlite:///{tmp_path}/none.db"), 3, tmp_path / "net")
    seeds.create(runs)
    tried: list[int] = []

    def diverge(run: SeedRun) -> Result:
        tried.append(run.config.seed)
        if run.config.seed == 2:
            raise DivergedError("lost", step=1, checkpoint=None)
        return Result(run.folder, True, 1, (), None, None, "", None)

    outcome = seeds.train(runs, diverge)
    assert tried == [1, 2, 3] and list(outcome.diverged) == ["net-s2"] and not outcome.finished


def test_the_command_prints_means_with_their_spread_and_n(
    trained: Path, home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(configs.dump_yaml(configs.as_mapping(recipe(home))))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(path), "--seeds", "2", "--run-dir", str(home / "runs" / "net")])
    assert not ended.value.code
    printed = capsys.readouterr().out
    native = next(line.split() for line in printed.splitlines()[::-1] if line.startswith("native"))
    assert native[-1] == str(len(seeds.finished_runs(trained))) and "net-seeds" in printed
