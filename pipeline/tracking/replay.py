"""Carries what a run folder holds to MLflow: one idempotent pass, and the ledger of what has been sent."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline import config as configs
from pipeline.errors import ResourceError
from pipeline.runs import journal, provenance, records
from pipeline.runs.journal import FirstValues, Record
from pipeline.runs.provenance import without_secrets
from pipeline.tracking.address import TrackingConfig, connect, database_file
from pipeline.tracking.ledger import Ledger

METRICS_PER_CALL = 1000  # MLflow's limits
PAIRS_PER_CALL = 100
PARAM_CHARS = 6000
TAG_CHARS = 5000
KEY_CHARS = 250
ID_TAG = "adaptnet.run_dir_id"
STATUS_EVENTS = ("driver-started", "driver-ended")  # of the journal `driver`


class Replay:
    """One connection between a run folder and MLflow. After an error the same object may be asked again."""

    def __init__(self, run_dir: Path, uri: str, config: TrackingConfig, recipe: Mapping[str, Any]) -> None:
        self._run_dir, self._uri, self._config, self._recipe = run_dir, uri, config, recipe
        self.ledger = Ledger.open(run_dir)
        self.num_metrics = 0  # sent by this object
        self._client: Any = None
        self._first: dict[str, FirstValues] = {}
        self._read: dict[str, int] = {}  # bytes of each journal
        self._pending: list[Record] = []  # read and not yet sent
        self._events: list[Record] = []
        self._checkpoints_sent = 0
        self._parent: str | None = None  # the parent's run, once it is named there
        self._note = ""  # as MLflow has it
        self.status: str | None = None  # as MLflow has it

    def send(self, *, final: bool) -> None:
        """Sends all that is new; with `final` also plots, the best and the last checkpoint, and how the run ended.

        Raises whatever MLflow's client raises where the server is away.
        """
        if self._client is None:
            client = connect(self._uri)
            self._open_run(client)
            self._describe(client)
            self._client = client
        self._send_metrics()
        self._send_places()
        self._send_parent()
        self._send_note()
        if final:
            draw_curves(self._run_dir)
        self._send_files()
        if final and self._config.upload_checkpoints:
            self._send_checkpoints()
        self._send_status(final=final)

    # --- the run

    def _open_run(self, client: Any) -> None:
        """Finds this folder's MLflow run, or makes it; sets `ledger.run_id`."""
        ledger = self.ledger
        ledger.aim(self._uri, self._config.experiment)
        run = _find_run(client, ledger)
        if run is not None and run.info.lifecycle_stage == "deleted":
            raise ResourceError(
                f"the MLflow run {run.info.run_id} of {self._run_dir} was deleted there: bring it back with `mlflow "
                f"runs restore --run-id {run.info.run_id}`, or remove {ledger.path} to begin a new one"
            )
        if run is None:
            experiment = _experiment(client, self._uri, ledger.experiment)
            run = client.create_run(experiment, tags={ID_TAG: ledger.id}, run_name=self._run_dir.name)
        if run.info.run_id != ledger.run_id:
            ledger.run_id, ledger.offsets, ledger.files = run.info.run_id, {}, {}
            ledger.save()
        self.status = run.info.status

    def _describe(self, client: Any) -> None:
        """Parameters, once; tags for what has changed since, and for where the run came from."""
        from mlflow.entities import Param, RunTag

        run_id = self.ledger.run_id
        known = client.get_run(run_id).data.params
        params = {_key(k): _text(v)[:PARAM_CHARS] for k, v in configs.flat(self._recipe).items()}
        new = [Param(key, value) for key, value in params.items() if key not in known]
        tags = self._tags() | {f"changed.{k}": v for k, v in params.items() if known.get(k, v) != v}
        pairs = [RunTag(_key(key), value[:TAG_CHARS]) for key, value in tags.items()]
        for start in range(0, len(new), PAIRS_PER_CALL):
            client.log_batch(run_id, params=new[start : start + PAIRS_PER_CALL])
        for start in range(0, len(pairs), PAIRS_PER_CALL):
            client.log_batch(run_id, tags=pairs[start : start + PAIRS_PER_CALL])

    def _tags(self) -> dict[str, str]:
        found = provenance.read(self._run_dir)
        git, sweep = found.pop("git", None) or {}, _sweep(self._run_dir)
        tags = {f"adaptnet.{key}": value for key, value in configs.flat(found).items()}
        tags |= {f"adaptnet.git.{key}": value for key, value in git.items()}
        tags |= {"adaptnet.run_dir": str(self._run_dir), "mlflow.source.name": "adaptnet"}
        tags |= {"mlflow.user": found["user"]} if "user" in found else {}
        tags |= {"mlflow.source.git.commit": git["commit"]} if git else {}
        tags |= {"adaptnet.sweep": sweep} if sweep else {}
        return {key: _text(value) for key, value in tags.items()}

    # --- metrics and events

    def _send_metrics(self) -> None:
        self._flush()
        for path in journal.paths(self._run_dir / "journal"):
            while self._read_on(path):
                self._flush()

    def _read_on(self, path: Path) -> bool:
        """Reads the next piece of a journal; what must be sent of it becomes pending. False at the end."""
        before = self._read.get(path.name, 0)
        records, after = journal.read(path, before)
        if after == before:
            return False
        first = self._first.setdefault(path.name, FirstValues())
        metrics = [record for record in records if first.take(record)]
        self._events += [record for record in records if "event" in record]
        if after > self.ledger.offsets.get(path.name, 0):
            self._pending = metrics
        self._read[path.name] = after
        return True

    def _flush(self) -> None:
        from mlflow.entities import Metric

        while self._pending:
            batch = self._pending[:METRICS_PER_CALL]
            metrics = [Metric(_key(r["key"]), r["value"], _milliseconds(r["time"]), r["step"]) for r in batch]
            self._client.log_batch(self.ledger.run_id, metrics=metrics)
            self.num_metrics += len(batch)
            del self._pending[:METRICS_PER_CALL]
        sent = self.ledger.offsets
        further = {name: offset for name, offset in self._read.items() if offset > sent.get(name, 0)}
        if further:
            sent.update(further)
            self.ledger.save()

    def _send_places(self) -> None:
        """checkpoints.json: where each checkpoint was put."""
        saved = [record for record in self._events if record["event"] == "checkpoint"]
        if len(saved) == self._checkpoints_sent:
            return
        places = [{key: record.get(key) for key in ("step", "where", "time")} for record in saved]
        self._client.log_text(self.ledger.run_id, json.dumps(places, indent=1), "checkpoints.json")
        self._client.set_tag(self.ledger.run_id, "adaptnet.checkpoint", _text(places[-1]["where"])[:TAG_CHARS])
        self._checkpoints_sent = len(saved)

    def _send_parent(self) -> None:
        """Names the run that this one is a part of, as soon as that one is known to MLflow."""
        parent = self._config.parent
        run_id = Ledger.peek(parent).run_id if parent is not None else None
        if run_id is not None and run_id != self._parent:
            self._client.set_tag(self.ledger.run_id, "mlflow.parentRunId", run_id)
            self._parent = run_id

    def _send_note(self) -> None:
        """note.md, where there is one, as the run's description."""
        path = self._run_dir / "note.md"
        note = without_secrets(path.read_text(encoding="utf-8"))[:TAG_CHARS] if path.is_file() else ""
        if note != self._note:
            self._client.set_tag(self.ledger.run_id, "mlflow.note.content", note)
            self._note = note

    def _send_status(self, *, final: bool) -> None:
        """FINISHED, FAILED or KILLED once all else is there; RUNNING again where the run was taken up again."""
        last: Record = next((r for r in reversed(self._events) if r["event"] in STATUS_EVENTS), {"event": None})
        ended = final and last["event"] == "driver-ended"
        status = last["status"] if ended else "RUNNING"
        if status == self.status:
            return
        if not ended:
            self._client.update_run(self.ledger.run_id, status=status)
        else:
            if last.get("error"):
                self._client.set_tag(self.ledger.run_id, "adaptnet.error", _text(last["error"])[:TAG_CHARS])
            self._client.set_terminated(self.ledger.run_id, status, end_time=_milliseconds(last["time"]))
        self.status = status

    # --- files

    def _send_files(self) -> None:
        for path in _files(self._run_dir):
            name = path.relative_to(self._run_dir)
            stamp = [path.stat().st_size, path.stat().st_mtime_ns]
            if self.ledger.files.get(str(name)) == stamp:
                continue
            folder = None if len(name.parts) == 1 else name.parent.as_posix()
            self._client.log_artifact(self.ledger.run_id, str(path), folder)
            self.ledger.files[str(name)] = stamp
            self.ledger.save()

    def _send_checkpoints(self) -> None:
        """The best and the newest whole checkpoint, with tags that name them."""
        from pipeline.training import checkpoint
        from pipeline.training.config import CheckpointConfig

        section = configs.validate(CheckpointConfig, self._recipe.get("checkpoint", {}), "recipe: checkpoint")
        storage = checkpoint.open_storage(section, self._run_dir)
        names = storage.names()
        wanted = {"last": names[-1] if names else None, "best": records.read_status(self._run_dir).best}
        for role, name in wanted.items():
            if name not in names:
                continue
            stamp = [storage.where(name), storage.meta(name).step]
            if self.ledger.files.get(f"checkpoints/{name}") != stamp:
                folder = storage.fetch(name)
                checkpoint.verify(folder)
                self._client.log_artifacts(self.ledger.run_id, str(folder), f"checkpoints/{name}")
                self.ledger.files[f"checkpoints/{name}"] = stamp
                self.ledger.save()
            self._client.set_tag(self.ledger.run_id, f"adaptnet.checkpoint.{role}", f"checkpoints/{name}")


def _sweep(run_dir: Path) -> str | None:
    """The name of the sweep whose folder this is; None for any other run's."""
    path = run_dir / "config.yaml"
    section = configs.read_mapping(path).get("sweep") if path.is_file() else None
    return section.get("name") if isinstance(section, dict) else None


def _find_run(client: Any, ledger: Ledger) -> Any:
    """The MLflow run of the ledger's id; None where the server has none."""
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
    found = client.search_runs([experiment.experiment_id], filter_string=wanted, run_view_type=ViewType.ALL)
    return found[0] if found else None


def _experiment(client: Any, uri: str, name: str) -> str:
    """Id of the experiment `name`, made where it is not there; a file database keeps its artifacts beside it."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = database_file(uri)
        place = None if path is None else (path.parent / "mlartifacts").as_uri() + "/" + quote(name, safe="")
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        raise ResourceError(
            f"tracking.experiment (={name}) was deleted in MLflow: bring it back with `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or take another name"
        )
    return str(experiment.experiment_id)


def _key(name: str) -> str:
    """`name` as MLflow takes a key: other characters replaced, and a path that is its own shortest form."""
    path = posixpath.normpath("/" + re.sub(r"[^\w.\- :/]", "_", name))
    return path.strip("/")[:KEY_CHARS].rstrip("/") or "_"


def _text(value: Any) -> str:
    return without_secrets(value if isinstance(value, str) else json.dumps(value, default=str))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _files(run_dir: Path) -> list[Path]:
    """The small files that go up as they are."""
    patterns = ("*.yaml", "*.csv", "environment.json", "requirements.txt", "git.diff", "bad_images.json", "status.json")
    nested = ("evaluations/*/*.json", "plots/*.png")
    return sorted(path for pattern in (*patterns, *nested) for path in run_dir.glob(pattern) if path.is_file())


def draw_curves(run_dir: Path) -> None:
    """plots/loss.png and plots/top1.png from the journals, for the curves that are there."""
    from matplotlib.figure import Figure

    found = journal.curves(run_dir / "journal")
    for name, wanted in (("loss", "train/(loss|ce)"), ("top1", "train/top1|eval/.*/top1")):
        chosen = {key: points for key, points in found.items() if re.fullmatch(wanted, key)}
        if not chosen:
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=name, title=f"{run_dir.name}: {name}")
        for key, points in sorted(chosen.items()):
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 50 else None)
        axes.grid(alpha=0.3)
        axes.legend()
        (run_dir / "plots").mkdir(exist_ok=True)
        figure.savefig(run_dir / "plots" / f"{name}.png", dpi=120)
