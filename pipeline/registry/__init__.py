"""The registry: trained nets as folders that work without MLflow, and as versions that people look up by name.

A model's folder holds net.safetensors (the moving average where there is one), recipe.yaml (the whole RunConfig),
card.json (what it is, with the weights' checksum and the figures of each policy) and reports/reports.json. A version
is that folder inside an MLflow model made from code: nothing is pickled, and the code that ran the net goes along.
"""

from pipeline.registry.finding import RUNS, Version, address, lookup, newest_step, resolve, run_folder, versions
from pipeline.registry.model import Answers, LoadedModel, Trained, describe, load_model, predict, write_model_folder
from pipeline.registry.publishing import conclude, publish, publish_run, register_late

__all__ = [
    "RUNS",
    "Answers",
    "LoadedModel",
    "Trained",
    "Version",
    "address",
    "conclude",
    "describe",
    "load_model",
    "lookup",
    "newest_step",
    "predict",
    "publish",
    "publish_run",
    "register_late",
    "resolve",
    "run_folder",
    "versions",
    "write_model_folder",
]
