"""Sends a folder that was made from runs to their MLflow runs, as artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline import config as configs
from pipeline.errors import ResourceError
from pipeline.runs.provenance import without_secrets
from pipeline.tracking.address import (
    TrackingConfig,
    connect,
    database_file,
    failures,
    reason_of,
    resolve_uri,
    unusable,
)
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.uploader import recipe_of


def send_folder(
    run_dirs: Sequence[Path], folder: Path, place: str, uri: str | None = None
) -> tuple[list[str], list[str]]:
    """Logs `folder` under `place` to the MLflow run of each run's folder that has been sent there before.

    Returns the runs' ids, and what went wrong, a line for each address: nothing is raised. `uri` replaces the recipes'.
    """
    sent: list[str] = []
    known: tuple[type[Exception], ...] = (*failures(), ResourceError)
    faults: dict[str, str] = {}
    for run_dir in run_dirs:
        run_id = Ledger.peek(run_dir).run_id
        if run_id is None:  # it was never sent
            continue
        address = _address(run_dir, uri)
        if address in faults:  # which would keep everybody waiting once more
            continue
        try:
            _send(run_dir, address, run_id, folder, place)
        except known as error:
            gone = (
                getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
            )  # the server is there, the run is not
            where = without_secrets(address)
            faults[str(run_dir) if gone else address] = f"{where}: the report is not logged there ({_reason(error)})"
            continue
        sent.append(run_id)
    return sent, list(faults.values())


def _address(run_dir: Path, uri: str | None) -> str:
    config = configs.validate(TrackingConfig, recipe_of(run_dir).get("tracking", {}), f"{run_dir}: recipe.tracking")
    return resolve_uri(uri or config.uri, run_dir)


def _send(run_dir: Path, address: str, run_id: str, folder: Path, place: str) -> None:
    file = database_file(address)
    if file is not None and not file.exists():
        raise ResourceError(f"no such database; {run_dir} was sent to {Ledger.peek(run_dir).uri}, name it with --uri")
    why = unusable(address)
    if why is not None:
        raise ResourceError(why)
    client = connect(address)
    client.get_run(run_id)  # fails where the server is away, while artifacts may be reached without it
    client.log_artifacts(run_id, str(folder), place)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ResourceError) else reason_of(error)
