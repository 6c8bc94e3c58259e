"""The tracker that sends a run to MLflow.

Every call may be repeated: metrics carry the journal's time, and MLflow's key (key, time, step, run, value) rejects
duplicates; files are overwritten by equal ones; the run is found again by a tag that was on disk before it was created.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pipeline import config as configs
from pipeline.errors import JsonValue, ResourceError, without_secrets
from pipeline.runs import provenance
from pipeline.tracking.address import database_file
from pipeline.tracking.client import Client, ExperimentEntity, OwedAnswers, RunEntity, connect
from pipeline.tracking.description import MARK, shortened
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.replay import as_text
from pipeline.tracking.tracker import DatasetUse, Ending, MetricPoint

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow.entities import DatasetInput

PAIRS_PER_CALL = 100  # MLflow's limits
PARAM_CHARS = 6000
TAG_CHARS = 5000
KEY_CHARS = 250
FOLDER_CHARS = 200
ID_TAG = "adaptnet.run_dir_id"
STATUS = {"STOPPED": "SCHEDULED"}  # MLflow has no status for a stopped run that can be resumed; this is the closest
NOTE = "mlflow.note.content"
PARAMS = {"parameters": "net.parameters", "macs": "net.macs"}  # facts that are parameters as well, as columns of runs
KIND = {"mlflow.experimentKind": "custom_model_development"}  # makes MLflow's page open the view of trainings
DIGEST_CHARS = 36  # MLflow's limit


class MlflowTracker:
    """One run folder and its MLflow run. Raises whatever MLflow's client raises if the server is unreachable."""

    takes_files = True

    def __init__(self, uri: str, experiment: str, *, connect: Callable[[str], Client] = connect) -> None:
        self.uri, self.place = uri, without_secrets(uri)
        self.status: str | None = None  # as MLflow has it
        self._experiment, self._connect = experiment, connect
        self._client: Client | None = None
        self._ledger: Ledger | None = None
        self._tags: dict[str, str] = {}  # set by this object
        self._params: dict[str, str] = {}  # as MLflow has them
        self.answers = OwedAnswers()

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None until the server has answered once."""
        return self._ledger.run_id if self._ledger else None

    def open(self, run_dir: Path, recipe: Mapping[str, JsonValue]) -> Ledger:
        """Finds or creates the MLflow run of the folder; restores its experiment, and it, if that was deleted.

        Raises ResourceError if the run alone was deleted, or the server does not restore the experiment.
        """
        client = self.answers.of(self._connect(self.uri))
        ledger = Ledger.open(run_dir)
        ledger.aim(self.uri, self._experiment)
        run = _find_run(client, ledger)
        if run is not None:
            run = self._restored(client, run)
            self._refuse_deleted(run, ledger)
        if run is None:
            experiment = _experiment(client, self.uri, ledger.experiment)
            run = client.create_run(experiment, tags={ID_TAG: ledger.id}, run_name=run_dir.name)
        ledger.attach(run.info.run_id)
        self._params = _describe(client, run.info.run_id, run_dir, recipe)
        self._client, self._ledger, self.status = client, ledger, run.info.status
        return ledger

    def _restored(self, client: Client, run: RunEntity) -> RunEntity:
        """The run; if its experiment was deleted, that is restored first, and all its runs with it."""
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment(run.info.experiment_id)
        if experiment.lifecycle_stage != "deleted":
            return run
        try:
            client.restore_experiment(experiment.experiment_id)
        except MlflowException:  # the user may lack the permission
            raise deleted_experiment(experiment, self.place) from None
        return client.get_run(run.info.run_id)

    def _refuse_deleted(self, run: RunEntity, ledger: Ledger) -> None:
        """Raises ResourceError if the run was deleted."""
        if run.info.lifecycle_stage == "deleted":
            raise ResourceError(
                f"the MLflow run {run.info.run_id} of {ledger.path.parent} was deleted: restore it with `"
                f"MLFLOW_TRACKING_URI={self.place} mlflow runs restore --run-id {run.info.run_id}`, or remove "
                f"{ledger.path} to create a new run",
                key="tracking.json",
                subject=run.info.run_id,
            )

    def log(self, points: Sequence[MetricPoint]) -> None:
        """Logs at most 1000 values."""
        from mlflow.entities import Metric

        metrics = [Metric(_key(p.key), p.value, _milliseconds(p.time), p.step) for p in points]
        self._opened.log_batch(self.run_id, metrics=metrics)

    def log_artifact(self, path: Path, place: str) -> None:
        if path.is_dir():
            self._opened.log_artifacts(self.run_id, str(path), place)
        else:
            self._opened.log_artifact(self.run_id, str(path), place or None)

    def log_summary(self, facts: Mapping[str, str]) -> None:
        for key, value in facts.items():
            if key == "parent":
                run_id = Ledger.peek(Path(value)).run_id  # None until the parent has been sent itself
                self._set_tag("mlflow.parentRunId", run_id or "")
            elif key == "description":
                self._describe_run(shortened(value, TAG_CHARS))
            else:
                self._set_tag(NOTE if key == "note" else _key(f"adaptnet.{key}"), value[:TAG_CHARS])
                if key in PARAMS:
                    self._log_param(PARAMS[key], value)

    def log_inputs(self, datasets: Sequence[DatasetUse]) -> None:
        self._opened.log_inputs(self.run_id, datasets=[_dataset_input(each) for each in datasets])

    def _describe_run(self, text: str) -> None:
        """Sets the run's description, unless a person has written one."""
        if self._tags.get(NOTE) == text:
            return
        present = self._opened.get_run(self.run_id).data.tags.get(NOTE, "")
        if not present.strip() or present.endswith(MARK):
            self._set_tag(NOTE, text)

    def _log_param(self, key: str, value: str) -> None:
        """A parameter of MLflow's never changes; a new value is a tag, as for keys of the recipe."""
        from mlflow.entities import Param

        if key not in self._params:
            self._opened.log_batch(self.run_id, params=[Param(key, value)])
            self._params[key] = value
        elif self._params[key] != value:
            self._set_tag(f"changed.{key}", value)

    def running(self) -> None:
        if self.status != "RUNNING":
            self._set_tag("adaptnet.status", "RUNNING")  # first: a kill in between must not leave STOPPED on it
            self._opened.update_run(self.run_id, status="RUNNING")
            self.status = "RUNNING"

    def finish(self, ending: Ending) -> None:
        status = STATUS.get(ending.status, ending.status)
        if status == self.status:
            return
        if ending.error:
            self._set_tag("adaptnet.error", ending.error[:TAG_CHARS])
        self._set_tag("adaptnet.status", ending.status)  # MLflow calls a stopped run scheduled
        self._opened.set_terminated(self.run_id, status, end_time=_milliseconds(ending.time))
        self.status = status

    @property
    def _opened(self) -> Client:
        assert self._client is not None, "open() comes first"
        return self._client

    def _set_tag(self, key: str, value: str) -> None:
        if value != self._tags.get(key, ""):
            self._opened.set_tag(self.run_id, key, value)
            self._tags[key] = value


def _describe(client: Client, run_id: str, run_dir: Path, recipe: Mapping[str, JsonValue]) -> dict[str, str]:
    """Sends the recipe as parameters, once; tags for what has changed since, and for where the run came from.

    Returns the parameters that MLflow has.
    """
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    params = {_key(k): as_text(v)[:PARAM_CHARS] for k, v in configs.flat(recipe).items()}
    new = [Param(key, value) for key, value in params.items() if key not in known]
    tags = _origin(run_dir) | {f"changed.{k}": v for k, v in params.items() if known.get(k, v) != v}
    pairs = [RunTag(_key(key), value[:TAG_CHARS]) for key, value in tags.items()]
    for start in range(0, len(new), PAIRS_PER_CALL):
        client.log_batch(run_id, params=new[start : start + PAIRS_PER_CALL])
    for start in range(0, len(pairs), PAIRS_PER_CALL):
        client.log_batch(run_id, tags=pairs[start : start + PAIRS_PER_CALL])
    return {**params, **known}


def _origin(run_dir: Path) -> dict[str, str]:
    """Tags that say where the run came from: environment, code, folder, sweep."""
    environment = provenance.read(run_dir)
    git, sweep = environment.get("git"), _sweep(run_dir)
    facts = {key: value for key, value in environment.items() if key != "git"}
    tags: dict[str, object] = {f"adaptnet.{key}": value for key, value in configs.flat(facts).items()}
    tags |= {f"adaptnet.git.{key}": value for key, value in (git or {}).items()}
    tags |= {"adaptnet.run_dir": str(run_dir), "mlflow.source.name": "adaptnet"}
    tags |= {"mlflow.user": environment["user"]} if "user" in environment else {}
    tags |= {"mlflow.source.git.commit": git["commit"]} if git else {}
    tags |= {"adaptnet.sweep": sweep} if sweep else {}
    tags |= {"adaptnet.recipe": recipe} if (recipe := provenance.recipe_of(environment)) else {}
    return {key: as_text(value) for key, value in tags.items()}


def _sweep(run_dir: Path) -> str | None:
    """The name of the sweep whose folder this is; None for the folder of any other run."""
    path = run_dir / "config.yaml"
    name = configs.section(configs.read_mapping(path), "sweep").get("name") if path.is_file() else None
    return None if name is None else str(name)


def _find_run(client: Client, ledger: Ledger) -> RunEntity | None:
    """The MLflow run with the ledger's id; None if the server has none."""
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    if ledger.run_id is not None:
        try:
            return client.get_run(ledger.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    experiment = client.get_experiment_by_name(ledger.experiment)
    if experiment is None:
        return None
    wanted = f"tags.`{ID_TAG}` = '{ledger.id}'"
    runs = client.search_runs([experiment.experiment_id], filter_string=wanted, run_view_type=ViewType.ALL)
    return runs[0] if runs else None


def _experiment(client: Client, uri: str, name: str) -> str:
    """The id of the experiment `name`, created if it is missing; a file database keeps its artifacts beside it."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = database_file(uri)
        place = None if path is None else (path.parent / "mlartifacts").as_uri() + "/" + _folder_name(name)
        try:
            return str(client.create_experiment(name, artifact_location=place, tags=KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        raise deleted_experiment(experiment, without_secrets(uri))
    if not KIND.keys() & experiment.tags.keys():
        with suppress(MlflowException):  # the user may lack the permission
            for key, kind in KIND.items():
                client.set_experiment_tag(experiment.experiment_id, key, kind)
    return str(experiment.experiment_id)


def _dataset_input(used: DatasetUse) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=used.name,
        digest=used.identity[:DIGEST_CHARS],
        source_type="local",
        source=json.dumps({"uri": used.root}),
        profile=json.dumps({"num_images": used.num_images, "num_classes": used.num_classes}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", used.context)])


def _folder_name(experiment: str) -> str:
    """The name of the experiment's folder of artifacts, which may be shorter than that of the experiment."""
    name = quote(experiment, safe="")
    return name if len(name) <= FOLDER_CHARS else f"{name[:FOLDER_CHARS]}-{sha256(name.encode()).hexdigest()[:16]}"


def deleted_experiment(experiment: ExperimentEntity, place: str) -> ResourceError:
    """The error for an experiment that was deleted at the server `place`."""
    number = experiment.experiment_id
    return ResourceError(
        f"tracking.experiment (={experiment.name}) was deleted in MLflow: restore it, and its runs with it, with `"
        f"MLFLOW_TRACKING_URI={place} mlflow experiments restore --experiment-id {number}`, or choose another name",
        key="tracking.experiment",
        subject=experiment.name,
    )


def _key(name: str) -> str:
    """`name` as MLflow accepts a key: other characters replaced, and no part empty, `.` or `..`."""
    path = posixpath.normpath("/" + re.sub(r"[^\w.\- :/]", "_", name))
    return path.strip("/")[:KEY_CHARS].rstrip("/") or "_"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
