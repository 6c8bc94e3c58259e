"""Tests of the values of recipes, sweeps and sites: what is plausible and wrong is refused by its key, and YAML is read
by the rules of YAML 1.2 or refused, soon."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
from implausible import AS_WRITTEN, NOT_YAML, OF_FAMILIES, OF_RECIPES, OF_SITES, OF_SWEEPS
from raised import fails

from jobs.schedulers import profile
from pipeline import run_config
from pipeline.config import MAX_SHOWN, as_mapping, dump_yaml, parse_override, parse_yaml
from pipeline.errors import ConfigError
from tuning import config as sweeps


def short(value: object) -> str:
    return str(value)[:50].replace("\n", " ")


def refused(recipe: str, override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config.load(recipe, [override], data_home="/data")
    assert key in caught.value.keys, f"{override}: {caught.value}"
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("first", range(0, len(OF_RECIPES), 20))
def test_what_cannot_be_meant_is_refused_by_its_key(first: int) -> None:
    for override, key in OF_RECIPES[first : first + 20]:
        refused("baseline/toy", override, key)


def test_what_a_family_cannot_mean_is_refused_by_its_key() -> None:
    for recipe, override, key in OF_FAMILIES:
        refused(recipe, override, key)


def test_what_a_sweep_cannot_mean_is_refused_by_its_key() -> None:
    for override, key in OF_SWEEPS:
        with pytest.raises(ConfigError) as caught:
            sweeps.load("toy", [override], data_home="/data")
        assert key in caught.value.keys, f"{override}: {caught.value}"


def test_what_a_site_cannot_mean_is_refused_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    for text, key in OF_SITES:
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            profile.load(str(path))
        assert any(each.startswith(key) for each in caught.value.keys), f"{text}: {caught.value}"


def test_the_lists_are_as_long_as_promised() -> None:
    assert len(OF_RECIPES) + len(OF_FAMILIES) + len(OF_SWEEPS) + len(OF_SITES) >= 200


@pytest.mark.parametrize("text", NOT_YAML, ids=short)
def test_a_text_that_cannot_be_built_is_refused_within_a_second(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    gc.freeze()  # what other tests have left is not searched
    try:
        began = time.thread_time()
        with fails(ConfigError, "yaml", path):
            run_config.load(str(path))
        assert time.thread_time() - began < 1
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(("text", "value"), AS_WRITTEN)
def test_a_scalar_is_what_yaml_1_2_says(text: str, value: object) -> None:
    found = parse_yaml(f"a: {text}", "here")
    assert found == {"a": value} and type(found["a"]) is type(value)
    assert parse_yaml(dump_yaml({"a": text}), "here") == {"a": text}, "a text stays one"
    assert parse_yaml(dump_yaml({"a": value}), "here") == {"a": value}


def test_a_key_is_a_text_as_it_is_written() -> None:
    assert parse_yaml("{1: a, on: b, null: c, 010: d, 1.50: e}", "here") == {
        "1": "a", "on": "b", "null": "c", "010": "d", "1.50": "e",
    }  # fmt: skip


def test_aliases_and_merges_within_bounds_are_read() -> None:
    text = "base: &base {lr: 0.1, kind: sgd}\nmine: {<<: *base, lr: 0.2}\nlist: [*base, *base]"
    assert parse_yaml(text, "here") == {
        "base": {"lr": 0.1, "kind": "sgd"},
        "mine": {"lr": 0.2, "kind": "sgd"},
        "list": [{"lr": 0.1, "kind": "sgd"}] * 2,
    }


def test_a_message_shows_the_beginning_of_a_long_value() -> None:
    with pytest.raises(ConfigError) as caught:
        run_config.load("baseline/toy", [f"training.precision={'x' * 100_000}"], data_home="/data")
    assert MAX_SHOWN < len(str(caught.value)) < 3 * MAX_SHOWN
    with fails(ConfigError, "override"):
        parse_override(".".join("a" * 1000) + "=1")


STORED = {  # as an older version accepted it
    "training": {"epochs": 2.0, "schedule": {"kind": "steps", "milestones": [30.0, 60.0], "factor": 0.1}},
    "data": {"mean": [123.0, 116.0, 103.0], "std": [58.0, 57.0, 57.0]},
}


def test_a_stored_recipe_with_such_values_is_read_and_its_overrides_are_judged() -> None:
    new = as_mapping(run_config.load("baseline/toy", data_home="/data"))
    old = run_config.lay(run_config.lay(new, {"training": STORED["training"]}), {"data": STORED["data"]})
    read = run_config.from_stored(old, "a run")
    assert read.data.mean == (123.0, 116.0, 103.0) and read.training.epochs == 2
    assert run_config.from_stored(old, "a run", ["data.root=/other"]).data.mean == read.data.mean
    with fails(ConfigError, "evaluation.policies"):
        run_config.from_stored(old, "a run", ["evaluation.policies=[]"])
    with fails(ConfigError, "data.mean"):
        run_config.from_mapping(old, "a new run")
