"""The learning rate by batch size: the rates of a step, what a recipe must name, and what the command says."""

from __future__ import annotations

import pytest
import tiny
from raised import fails
from typer.testing import CliRunner

from jobs.verbs.train import app
from pipeline import run_config
from pipeline.errors import ConfigError
from pipeline.training.optimizers.sgd import SgdConfig
from pipeline.training.step import Meter, train_step


@pytest.mark.parametrize(("how", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_every_rate_of_a_step_follows_the_batch(how: str, factor: float) -> None:
    reference = {} if how == "none" else {"reference_batch": 2}
    others = {"shape": SgdConfig(lr=0.3)}
    settings = tiny.training(scale_lr=how, other_optimizers=others, schedule={"kind": "constant"}, **reference)
    config = tiny.TinyConfig(shaped=True)
    current = tiny.fresh(settings, config)
    lr = train_step(tiny.plan(current.net, settings, config), current, next(tiny.batches(0)), Meter())
    rates = {name: each.param_groups[0]["lr"] for name, each in current.optimizers.items()}
    assert rates == pytest.approx({"main": 0.1 * factor, "shape": 0.3 * factor})
    assert lr == pytest.approx(0.1 * factor)


def test_a_reference_is_needed_for_scaling_and_refused_without() -> None:
    with fails(ConfigError, "training.reference_batch"):
        run_config.load("baseline/toy", ["training.scale_lr=linear"])
    with fails(ConfigError, "training.reference_batch"):
        run_config.load("baseline/toy", ["training.reference_batch=64"])


def test_the_batch_of_the_recipe_is_the_reference_unless_one_is_named() -> None:
    def training(*overrides: str) -> run_config.TrainingConfig:
        return run_config.load("baseline/toy", run_config.with_batch_size("baseline/toy", overrides, 512)).training

    own = run_config.load("baseline/toy").training.batch_size
    assert (training().batch_size, training().lr_scale) == (512, 1.0)
    assert training("training.scale_lr=linear").lr_scale == 512 / own
    assert training("training.scale_lr=sqrt", "training.reference_batch=128").lr_scale == 2.0


def test_without_scaling_a_fingerprint_is_that_of_older_versions() -> None:
    now = run_config.fingerprint(run_config.load("baseline/toy"), "images")
    assert "training.reference_batch" not in now
    assert run_config.translated({key: now[key] for key in now if key != "training.scale_lr"}) == now


def test_the_command_shows_what_it_did() -> None:
    given = ["baseline/toy", "--batch-size", "512", "training.scale_lr=linear", "--show"]
    shown = CliRunner().invoke(app, given, catch_exceptions=False).output
    config = run_config.load("baseline/toy", run_config.with_batch_size("baseline/toy", [given[3]], 512))
    assert f"# {config.training.scaling}" in shown.splitlines()
