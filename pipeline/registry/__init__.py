"""The registry: trained nets as folders that work without MLflow, and as versions that people look up by name.

A model's folder holds net.safetensors (the moving average where there is one), recipe.yaml (the whole RunConfig),
card.json (what it is, with the weights' checksum and the figures of each policy) and reports/reports.json. A version
is that folder inside an MLflow model made from code: nothing is pickled, and the code that ran the net goes along.

Names are imported when they are asked for: looking a version up needs neither torch nor MLflow's client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.registry.cards import Card, Difference, card, differences
    from pipeline.registry.catalogue import RUNS, Match, Version, address, lookup, matching, versions
    from pipeline.registry.finding import newest_step, pull, resolve, run_folder
    from pipeline.registry.model import Answers, LoadedModel, Trained, describe, load_model, predict, write_model_folder
    from pipeline.registry.publishing import conclude, publish, publish_run, register_late
    from pipeline.registry.requests import ANSWER_KEYS, check_rows, encoded_of, named, policy_for

HOMES = {
    "cards": ("Card", "Difference", "card", "differences"),
    "catalogue": ("RUNS", "Match", "Version", "address", "lookup", "matching", "versions"),
    "finding": ("newest_step", "pull", "resolve", "run_folder"),
    "model": ("Answers", "LoadedModel", "Trained", "describe", "load_model", "predict", "write_model_folder"),
    "publishing": ("conclude", "publish", "publish_run", "register_late"),
    "requests": ("ANSWER_KEYS", "check_rows", "encoded_of", "named", "policy_for"),
}

__all__ = [
    "ANSWER_KEYS",
    "RUNS",
    "Answers",
    "Card",
    "Difference",
    "LoadedModel",
    "Match",
    "Trained",
    "Version",
    "address",
    "card",
    "check_rows",
    "conclude",
    "describe",
    "differences",
    "encoded_of",
    "load_model",
    "lookup",
    "matching",
    "named",
    "newest_step",
    "policy_for",
    "predict",
    "publish",
    "publish_run",
    "pull",
    "register_late",
    "resolve",
    "run_folder",
    "versions",
    "write_model_folder",
]


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            return getattr(import_module(f"pipeline.registry.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
