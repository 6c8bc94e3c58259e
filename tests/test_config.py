"""Tests of the recipe language: numbers, unknown keys, overrides, merging, names filled in, durations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError
from raised import fails

from pipeline import run_config
from pipeline.config import (
    Config,
    Duration,
    Span,
    as_mapping,
    dump_yaml,
    fingerprint,
    flat,
    interpolate,
    merge,
    parse_override,
    parse_yaml,
    read_mapping,
    validate,
)
from pipeline.data.config import DataConfig
from pipeline.errors import ConfigError


class Optimizer(Config):
    lr: float = 0.1
    kind: Literal["sgd", "adamw"] = "sgd"


class Recipe(Config):
    batch_size: int
    label: str = "x"
    nesterov: bool = True
    optimizer: Optimizer = Optimizer()
    milestones: tuple[int, ...] = ()
    every: Span = Duration(value=1, unit="epochs")


def recipe(**keys: object) -> Recipe:
    return validate(Recipe, {"batch_size": 4} | keys, "here")


def refused(key: str, **keys: object) -> None:
    with fails(ConfigError, key):
        recipe(**keys)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e5", 1e5), ("3.0e-4", 3e-4), ("-.5e+2", -50.0), ("1_000e2", 1e5), ("7", 7), ("0.5", 0.5)],
)
def test_a_number_is_a_number(text: str, value: float) -> None:
    found = parse_yaml(f"lr: {text}", "here")["lr"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["e5", "3e", "n02e7x", "1e5a", "'3e-4'"])
def test_a_word_stays_a_word(text: str) -> None:
    assert isinstance(parse_yaml(f"name: {text}", "here")["name"], str)


def test_a_dumped_mapping_is_read_back_equal() -> None:
    mapping = {"a": {"lr": 3e-4, "text": "3e-4", "yes": "yes", "none": None}, "list": [1, 2.5, "x"], "big": 1e20}
    assert parse_yaml(dump_yaml(mapping), "here") == mapping
    config = recipe(optimizer={"lr": 1e-5}, milestones=[3, 4], every="500 steps")
    assert validate(Recipe, parse_yaml(dump_yaml(as_mapping(config)), "here"), "here") == config


def test_an_unknown_key_is_refused_by_name_with_the_nearest_known_one() -> None:
    refused("optimizer.lrr", optimizer={"lrr": 1})
    refused("batchsize", batchsize=1)
    with fails(ConfigError, "shufle", "block"):
        validate(DataConfig, {"root": "/x", "shufle": "block"}, "here")


def test_every_fault_is_named_at_once_with_its_value() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"optimizer": {"lr": "fast", "kind": "adam"}, "extra": 1}, "recipe.yaml")
    assert set(caught.value.keys) == {"batch_size", "optimizer.lr", "optimizer.kind", "extra"}
    assert len(str(caught.value).splitlines()) == 5  # the recipe, and a line for each fault


def test_values_are_not_converted_to_another_type() -> None:
    refused("batch_size", batch_size="4")
    refused("batch_size", batch_size=True)
    refused("batch_size", batch_size=4.5)
    refused("nesterov", nesterov=1)
    refused("nesterov", nesterov="yes")
    refused("label", label=3)
    refused("optimizer.lr", optimizer={"lr": float("nan")})
    assert recipe(optimizer={"lr": 1}).optimizer.lr == 1.0  # an integer is a real number
    assert recipe(milestones=[1, 2]).milestones == (1, 2)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        recipe().batch_size = 5  # type: ignore[misc]


def test_an_override_is_a_nested_mapping_whose_value_is_yaml() -> None:
    assert parse_override("training.optimizer.lr=3e-4") == {"training": {"optimizer": {"lr": 3e-4}}}
    assert parse_override("data.root=/a=b") == {"data": {"root": "/a=b"}}
    assert parse_override("workers=[1, 4]") == {"workers": [1, 4]}
    assert parse_override("register=null") == {"register": None}
    assert parse_override("name=") == {"name": None}
    for wrong in ("lr", "=3", "a..b=1", ".a=1"):
        with fails(ConfigError, "override", wrong):
            parse_override(wrong)
    with fails(ConfigError, "yaml", "a=[1"):
        parse_override("a=[1")


def test_mappings_are_merged_key_by_key_and_not_changed() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    over = {"a": {"y": [3]}, "b": {"z": 1}}
    assert merge(base, over) == {"a": {"x": 1, "y": [3]}, "b": {"z": 1}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1} and over == {"a": {"y": [3]}, "b": {"z": 1}}


def test_variables_are_replaced_everywhere_and_unknown_ones_refused() -> None:
    filled = interpolate({"a": ["${home}/x", 3], "b": {"c": "${home}-${home}"}}, {"home": "/h"})
    assert filled == {"a": ["/h/x", 3], "b": {"c": "/h-/h"}}
    with fails(ConfigError, "${hme}", "hme"):
        interpolate({"a": "${hme}"}, {"home": "/h"})
    with fails(ConfigError, "${home}", "home"):
        interpolate({"a": "${home}"}, {"home": None})


def test_a_key_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 1\nb:\n  c: 1\n  c: 2\n")
    with fails(ConfigError, "yaml", path):
        read_mapping(path)


@pytest.mark.parametrize(("content", "key"), [("- 1\n", "file"), ("a: [", "yaml")])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with fails(ConfigError, key, path):
        read_mapping(path)
    with fails(ConfigError, "file", tmp_path / "none.yaml"):
        read_mapping(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with fails(ConfigError, "file", tmp_path / "binary.yaml"):
        read_mapping(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("500 steps", 500, "steps"), ("1 step", 1, "steps"), ("0.5 epochs", 0.5, "epochs"), ("10 minutes", 10, "minutes")],
)
def test_a_duration_is_read_and_printed(text: str, value: float, unit: str) -> None:
    every = recipe(every=text).every
    assert (every.value, every.unit) == (value, unit)
    assert recipe(every=str(every)).every == every
    assert as_mapping(recipe(every=text))["every"] == str(every)


@pytest.mark.parametrize("text", ["0 steps", "-1 steps", "5", "5 hours", "steps", "", 5, None, "1e3 steps"])
def test_other_texts_than_durations_are_refused(text: object) -> None:
    refused("every", every=text)


def test_flat_names_and_fingerprints_follow_the_content() -> None:
    mapping = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": {}}
    assert flat(mapping) == {"a.b": 1, "a.c.d": [1, 2], "e": {}}
    assert fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1}) != fingerprint({"x": 1, "y": 3})


def test_an_error_in_the_data_section_names_its_key() -> None:
    def data(**keys: object) -> DataConfig:
        return validate(DataConfig, {"root": "/x"} | keys, "here")

    with fails(ConfigError, "side_schedule", subject=[5, 160]):
        data(side_schedule=[[5, 160], [0, 128]])
    with fails(ConfigError, "augment.scale", subject=[0.5, 0.1]):
        data(augment={"scale": [0.5, 0.1]})
    with fails(ConfigError, "max_bad_share", subject=2):
        data(max_bad_share=2)
    config = data(side_px=160, side_schedule=[[2, 192], [4, 224]])
    assert [config.side_at(epoch) for epoch in (0, 1, 2, 3, 4, 99)] == [160, 160, 192, 192, 224, 224]
    assert (config.side_for_eval, config.resize_for_eval) == (160, 183)


def test_channels_last_auto_of_older_recipes_is_read() -> None:
    assert run_config.load("baseline/toy", ["training.channels_last=auto"]).training.channels_last is True


@pytest.mark.parametrize(
    ("override", "key", "suggested"),
    [
        ("lr=0.1", "lr", "training.optimizer.lr"),
        ("batch_size=8", "batch_size", "training.batch_size"),
        ("optimizer.lr=0.1", "optimizer", "training.optimizer"),
        ("training.lr=0.1", "training.lr", "training.optimizer.lr"),
        ("training.optimizer=sgd", "training.optimizer", "training.optimizer.kind=sgd"),
        ("training.schedule=late", "training.schedule", "training.schedule.kind=KIND"),
        ("training=3", "training", "training.batch_size=VALUE"),
    ],
)
def test_a_key_in_the_wrong_place_is_answered_with_the_right_one(override: str, key: str, suggested: str) -> None:
    with fails(ConfigError, key) as caught:
        run_config.load("baseline/toy", ["data.root=x", override])
    assert re.search(rf"\b{re.escape(suggested)}\b", str(caught.value)), caught.value
    assert "other_optimizers.lr" not in str(caught.value), "a mapping by name has no such key"
