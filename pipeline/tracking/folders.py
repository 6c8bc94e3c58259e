"""Uploads a folder (report, sweep) as an artifact of each run it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ResourceError, without_secrets
from pipeline.tracking.address import database_file, resolve_uri, unusable
from pipeline.tracking.client import connect, failures, reason_of
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.uploader import tracking_config


def send_folder(
    run_dirs: Sequence[Path], folder: Path, place: str, uri: str | None = None
) -> tuple[list[str], list[str]]:
    """Logs `folder` under `place` to the MLflow run of each run folder that has been sent there before.

    Returns the ids of the runs, and a message for each address that failed: nothing is raised. `uri` replaces that of
    the recipes.
    """
    sent: list[str] = []
    known: tuple[type[Exception], ...] = (*failures(), ResourceError)
    faults: dict[str, str] = {}
    for run_dir in run_dirs:
        run_id = Ledger.peek(run_dir).run_id
        if run_id is None:  # it was never sent
            continue
        address = resolve_uri(uri or tracking_config(run_dir).uri, run_dir)
        if address in faults:  # it would keep the user waiting once more
            continue
        try:
            _send(run_dir, address, run_id, folder, place)
        except known as error:
            missing = getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"  # the run, not the server
            where = without_secrets(address)
            faults[str(run_dir) if missing else address] = f"{where}: the report is not logged there ({_reason(error)})"
            continue
        sent.append(run_id)
    return sent, list(faults.values())


def _send(run_dir: Path, address: str, run_id: str, folder: Path, place: str) -> None:
    file = database_file(address)
    if file is not None and not file.exists():
        raise ResourceError(
            f"no such database; {run_dir} was sent to {Ledger.peek(run_dir).uri}, name it with --uri",
            key="--uri",
            subject=file,
        )
    reason = unusable(address)
    if reason is not None:
        raise ResourceError(reason, key="--uri", subject=file)
    client = connect(address)
    client.get_run(run_id)  # fails if the server is unreachable, while artifacts may be reached without it
    client.log_artifacts(run_id, str(folder), place)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ResourceError) else reason_of(error)
