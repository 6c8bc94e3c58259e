"""A client on an MLflow server or database, the types of what it returns, and what its errors mean."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, cast

from pipeline.errors import without_secrets
from pipeline.runs.files import move_file
from pipeline.tracking.address import database_file, locked

T_co = TypeVar("T_co", covariant=True)


class RunInfo(Protocol):
    """What identifies a run, and its state."""

    run_id: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    lifecycle_stage: str  # active or deleted
    artifact_uri: str
    experiment_id: str


class RunData(Protocol):
    """What has been logged to a run; of each metric the last value."""

    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


class ModelOutput(Protocol):
    """That a run has made a logged model."""

    model_id: str


class RunOutputsEntity(Protocol):
    """What a run has made."""

    model_outputs: Sequence[ModelOutput]


class LoggedModelEntity(Protocol):
    """A logged model as MLflow returns it."""

    model_id: str
    source_run_id: str
    artifact_location: str
    creation_timestamp: int
    tags: Mapping[str, str]


class RunEntity(Protocol):
    """A run as MLflow returns it."""

    info: RunInfo
    data: RunData
    outputs: RunOutputsEntity | None


class ExperimentEntity(Protocol):
    """An experiment as MLflow returns it."""

    experiment_id: str
    name: str
    lifecycle_stage: str
    tags: Mapping[str, str]


class VersionEntity(Protocol):
    """A model version as MLflow returns it; MLflow writes numbers as text in places."""

    name: str
    version: int | str
    run_id: str | None
    creation_timestamp: int  # milliseconds since 1970
    tags: Mapping[str, str]
    source: str
    current_stage: str


class ModelEntity(Protocol):
    """A registered model as MLflow returns it."""

    name: str
    aliases: Mapping[str, str]
    tags: Mapping[str, str]
    description: str | None
    creation_timestamp: int | None
    last_updated_timestamp: int | None


class EntityPage(Protocol[T_co]):
    """A page of a search; `token` requests the next page and is empty on the last one."""

    token: str | None

    def __iter__(self) -> Iterator[T_co]: ...


class Client(Protocol):
    """The calls of MlflowClient that adaptnet makes."""

    def get_run(self, run_id: str | None) -> RunEntity: ...
    def create_run(self, experiment_id: str, *, tags: Mapping[str, str], run_name: str) -> RunEntity: ...
    def update_run(self, run_id: str | None, *, status: str) -> None: ...
    def set_terminated(self, run_id: str | None, status: str, *, end_time: int) -> None: ...
    def search_runs(
        self, experiment_ids: Sequence[str], *, filter_string: str, run_view_type: int
    ) -> Sequence[RunEntity]: ...
    def log_batch(
        self,
        run_id: str | None,
        *,
        metrics: Sequence[object] = (),
        params: Sequence[object] = (),
        tags: Sequence[object] = (),
    ) -> None: ...
    def set_tag(self, run_id: str | None, key: str, value: str) -> None: ...
    def log_artifact(self, run_id: str | None, local_path: str, artifact_path: str | None) -> None: ...
    def log_artifacts(self, run_id: str | None, local_dir: str, artifact_path: str) -> None: ...
    def get_experiment(self, experiment_id: str) -> ExperimentEntity: ...
    def get_experiment_by_name(self, name: str) -> ExperimentEntity | None: ...
    def restore_experiment(self, experiment_id: str) -> None: ...
    def create_experiment(
        self, name: str, *, artifact_location: str | None, tags: Mapping[str, str] | None = None
    ) -> str: ...
    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None: ...
    def log_inputs(self, run_id: str | None, *, datasets: Sequence[object]) -> None: ...
    def get_registered_model(self, name: str) -> ModelEntity: ...
    def create_registered_model(
        self, name: str, tags: Mapping[str, str] | None = None, description: str | None = None
    ) -> ModelEntity: ...
    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None: ...
    def search_registered_models(
        self, filter_string: str | None = None, *, max_results: int, page_token: str | None
    ) -> EntityPage[ModelEntity]: ...
    def get_model_version(self, name: str, version: str) -> VersionEntity: ...
    def create_model_version(
        self,
        name: str,
        source: str,
        run_id: str | None,
        *,
        tags: Mapping[str, str],
        description: str,
        model_id: str | None = None,
    ) -> VersionEntity: ...
    def create_logged_model(
        self, experiment_id: str, *, name: str, source_run_id: str, tags: Mapping[str, str], model_type: str
    ) -> LoggedModelEntity: ...
    def search_logged_models(
        self, experiment_ids: Sequence[str], *, filter_string: str
    ) -> Sequence[LoggedModelEntity]: ...
    def log_model_artifacts(self, model_id: str, local_dir: str) -> None: ...
    def set_logged_model_tags(self, model_id: str, tags: Mapping[str, str]) -> None: ...
    def finalize_logged_model(self, model_id: str, status: str) -> None: ...
    def log_outputs(self, run_id: str, models: Sequence[object]) -> None: ...
    def delete_model_version(self, name: str, version: str) -> None: ...
    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None: ...
    def get_model_version_download_uri(self, name: str, version: str) -> str: ...
    def search_model_versions(
        self, filter_string: str | None, *, max_results: int, page_token: str | None
    ) -> EntityPage[VersionEntity]: ...


class OwedAnswers:
    """Notes how long a server has owed an answer. `of` gives a client whose calls are noted.

    Uploads of files are not: they take as long as the files are large, and end by themselves if the server is silent.
    """

    def __init__(self) -> None:
        self._asked: float | None = None

    def owed_s(self) -> float:
        """Seconds that the newest call has waited; 0 between calls."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def of(self, client: Client) -> Client:
        return cast(Client, NotedClient(client, self))

    def noted(self, call: Callable[..., object]) -> Callable[..., object]:
        """`call`, noted while it runs."""

        def asked(*args: object, **options: object) -> object:
            self._asked = time.monotonic()
            try:
                return call(*args, **options)
            finally:
                self._asked = None

        return asked


class NotedClient:
    """A client whose calls are noted by an `OwedAnswers`."""

    def __init__(self, client: Client, answers: OwedAnswers) -> None:
        self._client, self._answers = client, answers

    def __getattr__(self, name: str) -> object:
        call = getattr(self._client, name)
        return call if name.startswith("log_artifact") else self._answers.noted(call)


def connect(uri: str) -> Client:
    """A client on `uri`. A new database gets its tables first, once, however many processes connect at a time."""
    _configure()
    from mlflow import MlflowClient

    for name, level in (
        ("mlflow", logging.WARNING),
        ("alembic", logging.WARNING),
        ("mlflow.utils.environment", logging.ERROR),  # warns in environments that were created without pip
    ):
        logging.getLogger(name).setLevel(level)
    path = database_file(uri)
    if path is not None:
        _initialise(uri, path)
    return cast(Client, MlflowClient(tracking_uri=uri, registry_uri=uri))


def _configure() -> None:
    """Settings that MLflow reads from the environment only.

    By default it sends usage data to its makers, draws progress bars in our threads, and repeats a request for minutes,
    even one that has created a run or a version before its answer was lost.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the URL may contain a password
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"  # else a call returns before its values are sent
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def _initialise(uri: str, path: Path) -> None:
    """Creates the tables beside `path` and renames the file: MLflow cannot repair tables left half-made by a kill."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts = (path.parent / "mlartifacts").as_uri()
    with locked(path.with_name(f"{path.name}.lock"), wait=True):
        if not path.exists():
            aside = path.with_name(f".{path.name}.new")
            aside.unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{aside}", artifacts).engine.dispose()
            move_file(aside, path)
        SqlAlchemyStore(uri, artifacts)


def failures() -> tuple[type[Exception], ...]:
    """What a client raises if the server is unreachable or refuses, or if its database driver is not installed."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, ImportError)


def reason_of(error: BaseException) -> str:
    """The class and first line of an error, without secrets."""
    status = getattr(error, "get_http_status_code", None)  # a method of MlflowException
    if callable(status) and status() in (401, 403):
        return refusal(status())
    lines = without_secrets(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


def refusal(code: int) -> str:
    """What an HTTP status by which a server refuses a request means."""
    if code == 401:
        return (
            "it refuses this name and password (HTTP 401); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "to yours"
        )
    return f"HTTP {code}" + (", you are not permitted to do this" if code == 403 else "")
