"""The logged model of a published net: as such MLflow shows it on the page of its run, and links it to its versions.

Every call may be repeated: a logged model is found again by its name and run, and is an output of the run once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.registry.model_store import VersionRow
from pipeline.tracking.client import Client, LoggedModelEntity

KIND = "image-classifier"
VERSIONS = "mlflow.modelVersions"


def ensure(client: Client, run_id: str, name: str, tags: Mapping[str, str]) -> LoggedModelEntity:
    """The logged model `name` of the run, created if it is missing; its files may be missing."""
    experiment = client.get_run(run_id).info.experiment_id
    known = _find(client, experiment, run_id, name)
    return known or client.create_logged_model(
        experiment, name=name, source_run_id=run_id, tags=dict(tags), model_type=KIND
    )


def _find(client: Client, experiment: str, run_id: str, name: str) -> LoggedModelEntity | None:
    """The oldest logged model of the run with this name."""
    same_name = client.search_logged_models([experiment], filter_string=f"name = '{name}'")
    of_run = [model for model in same_name if model.source_run_id == run_id]
    return min(of_run, key=lambda model: model.creation_timestamp, default=None)


def link(client: Client, run_id: str, name: str, version: VersionRow) -> None:
    """Notes a registered version with its logged model; nothing happens to one that has none, as of earlier versions.

    MLflow's own registration writes this tag, by which its pages lead from one to the other.
    """
    model = _find(client, client.get_run(run_id).info.experiment_id, run_id, name)
    if model is None:
        return
    noted = json.loads(model.tags.get(VERSIONS, "[]"))
    new = {"name": version.name, "version": str(version.version)}
    if new not in noted:
        client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps([*noted, new])})


def store(client: Client, model: LoggedModelEntity, folder: Path, *, step: int) -> None:
    """Uploads an MLflow model as the files of a logged model, which then is ready and an output of its run."""
    from mlflow.entities import LoggedModelOutput

    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(model.source_run_id).outputs
    known = {output.model_id for output in outputs.model_outputs} if outputs is not None else set()
    if model.model_id not in known:
        client.log_outputs(model.source_run_id, [LoggedModelOutput(model.model_id, step)])
