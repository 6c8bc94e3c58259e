"""The user's environment variables that change what a verb does: they are honoured, or refused, but never ignored."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

from pipeline import config as configs
from pipeline.errors import ConfigError, JsonValue, without_secrets

if TYPE_CHECKING:
    from pipeline.run_config import RunConfig

HONOURED = {  # keys of the recipe: the variables that they are taken from where neither command nor recipe sets them
    "tracking.uri": "MLFLOW_TRACKING_URI",
    "tracking.experiment": "MLFLOW_EXPERIMENT_NAME",
    "compute.address": "RAY_ADDRESS",
}
REFUSED = {  # variables that MLflow's own clients follow
    "MLFLOW_RUN_ID": "a run folder decides which MLflow run it is; unset it",
    "MLFLOW_EXPERIMENT_ID": "an experiment is chosen by its name: MLFLOW_EXPERIMENT_NAME, or tracking.experiment",
}
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def recipe_layer(variables: Mapping[str, str] | None = None) -> dict[str, JsonValue]:
    """What `variables`, by default this process's, set in a recipe, as a nested mapping; laid below the recipe.

    Raises ConfigError for a variable that cannot be honoured.
    """
    variables = os.environ if variables is None else variables
    for name, way in REFUSED.items():
        if variables.get(name):
            raise ConfigError(f"{name} (={variables[name]}): {way}", key=name, subject=variables[name])
    registry = variables.get("MLFLOW_REGISTRY_URI")
    if registry and registry != variables.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "MLFLOW_REGISTRY_URI: models are registered where runs are tracked; unset it, or set MLFLOW_TRACKING_URI "
            "to the same server",
            key="MLFLOW_REGISTRY_URI",
        )
    ray = variables.get("RAY_ADDRESS", "")
    if "://" in ray:
        raise ConfigError(
            f"RAY_ADDRESS (={ray}): trainings join a Ray cluster by HOST:PORT of its head; unset it, or use `adaptnet "
            "submit --where ray --address URL` for a job server",
            key="RAY_ADDRESS",
            subject=ray,
        )
    given = {key: variables[name] for key, name in HONOURED.items() if variables.get(name)}
    return configs.nested({key: value for key, value in given.items() if (key, value) != ("compute.address", "local")})


def tracking_uri() -> str | None:
    """What MLFLOW_TRACKING_URI names; None if it is unset or empty."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def origins(config: RunConfig, source: str, overrides: Sequence[str], layer: Mapping[str, JsonValue]) -> list[str]:
    """Lines for `--show`: where the value of each key in HONOURED is from."""
    from pipeline import run_config

    mapping, lines = configs.as_mapping(config), []
    found = run_config.origins(list(HONOURED), source, overrides, layer)
    for key, variable in HONOURED.items():
        origin = found[key].replace("environment", f"the variable {variable}")
        lines.append(f"# {key}: {without_secrets(str(configs.at(mapping, key)))} is from {origin}")
    return lines


def spare_loopback(variables: MutableMapping[str, str] | None = None) -> None:
    """Keeps a proxy of the environment from what listens on this machine: MLflow servers, Ray, Chromium."""
    variables = os.environ if variables is None else variables
    if not any(variables.get(name) or variables.get(name.upper()) for name in PROXIES):
        return
    spared = variables.get("no_proxy") or variables.get("NO_PROXY") or ""
    hosts = dict.fromkeys([*filter(None, map(str.strip, spared.split(","))), *LOOPBACK])
    variables["no_proxy"] = variables["NO_PROXY"] = ",".join(hosts)
