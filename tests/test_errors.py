"""Errors survive being pickled to another process and being stored as a record on disk."""

from __future__ import annotations

import json
import pickle

import pytest

from pipeline import errors
from pipeline.errors import AdaptNetError, DivergedError, UndecodableError, from_record

EXAMPLES: list[AdaptNetError] = [
    *(
        kind("what happened", key="training.epochs", subject=3)
        for kind in (errors.ConfigError, errors.DataError, errors.ResourceError, errors.CheckpointError)
    ),
    errors.ConfigError("two faults", keys=("data.root", "training.lr")),
    errors.ContractError("of a family"),
    UndecodableError(4, {1: "truncated", 3: "no image"}),
    DivergedError("loss is nan", step=17, checkpoint="runs/a/step-10"),
    DivergedError("loss is nan", step=0, checkpoint=None),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: error.kind)
def test_an_error_comes_back_equal_from_a_pickle_and_from_json(error: AdaptNetError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), from_record(json.loads(json.dumps(error.to_record())))):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_a_record_from_before_errors_had_keys_is_still_read() -> None:
    old = {"kind": "DivergedError", "message": "loss is nan", "step": 3, "checkpoint": "step-2"}
    found = from_record(old)
    assert isinstance(found, DivergedError) and (found.step, found.checkpoint) == (3, "step-2")
    assert isinstance(from_record({"kind": "OfAnotherVersion", "message": "text"}), AdaptNetError)


def test_a_key_is_the_first_of_the_keys() -> None:
    assert errors.ConfigError("", keys=("a", "b")).key == "a"
    assert errors.ConfigError("", key="a").keys == ("a",)
