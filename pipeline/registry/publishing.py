"""Creates versions in MLflow's registry: one for each net, even if processes are killed or servers unreachable."""

from __future__ import annotations

import base64
import io
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from pipeline import config as configs
from pipeline.errors import JsonValue, ResourceError, without_secrets
from pipeline.evaluation.evaluate import load_reports
from pipeline.family import Report
from pipeline.installation import CODE, TOP
from pipeline.registry import logged_models
from pipeline.registry.catalogue import Version
from pipeline.registry.client_store import search_versions, version_row
from pipeline.registry.model import FIGURES, load_model, weights_of, write_model_folder
from pipeline.registry.model_store import VersionRow
from pipeline.registry.resolve import run_storage
from pipeline.registry.session import session
from pipeline.runs import files, provenance, records
from pipeline.runs.records import Meta
from pipeline.tracking import TrackingConfig, Uploader, resolve_uri, tracking_config
from pipeline.tracking.client import Client, LoggedModelEntity
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.mlflow import TAG_CHARS
from pipeline.training import checkpoint

FINAL = Path("evaluations") / "final"  # folder, within a run, of the reports that are published with the net
CANDIDATE = "candidate"
LONGEST_PAUSE_S = 15.0  # longest pause between retries while the server is unreachable
REQUIREMENTS = (
    *("mlflow", "torch", "torchvision", "numpy", "pydantic", "PyYAML", "safetensors", "pillow", "psutil"),
    "pandas",
)


def publish(
    source: Path,
    reports: Sequence[Report],
    name: str,
    *,
    run_id: str,
    uri: str,
    alias: str = CANDIDATE,
    evaluated_on: str | None = None,
    remarks: Mapping[str, str] | None = None,
) -> Version:
    """Registers the net of a checkpoint's folder as a new version of `name`, and points `alias` at it.

    Idempotent: for the same run, step and weights the existing version is returned, and the alias is moved only if it
    is missing or points to an older version. A version is created once all its files are stored. `remarks` (licence,
    note) become tags, also of a version that exists already. Raises ResourceError if the server does not answer,
    CheckpointError if the checkpoint is damaged.
    """
    checkpoint.verify(source)
    meta, sha256 = checkpoint.read_meta(source), files.sha256(weights_of(source))
    extra = {f"adaptnet.{key}": value for key, value in (remarks or {}).items()}
    same = {"adaptnet.step": str(meta.step), "adaptnet.weights_sha256": sha256}
    shown = f"{checkpoint.name_of(meta.step)}-{sha256[:8]}"
    with session(uri) as client:
        made = _first(client, name, run_id, same)
        if made is not None:
            for key, value in extra.items():
                client.set_model_version_tag(name, str(made.version), key, value)
        else:
            _make_name(client, name)
            tags = same | _version_tags(meta, reports, evaluated_on) | extra
            logged = logged_models.ensure(client, run_id, shown, tags)
            _upload(client, source, reports, logged, evaluated_on)
            new = version_row(
                client.create_model_version(
                    name,
                    logged.artifact_location,
                    run_id,
                    tags=tags,
                    description=_description(meta, reports),
                    model_id=logged.model_id,
                )
            )
            made = _first(client, name, run_id, same) or new
            if made.version < new.version:  # another process was faster
                _delete(client, new)
        logged_models.link(client, run_id, shown, made)
        holder = client.get_registered_model(name).aliases.get(alias)
        if holder is None or int(holder) < made.version:
            client.set_registered_model_alias(name, alias, str(made.version))
    return Version(made.name, made.version, (), made.run_id, made.created, made.tags)


def _first(client: Client, name: str, run_id: str, same: Mapping[str, str]) -> VersionRow | None:
    """The oldest version of a run with these tags."""
    rows = search_versions(client, f"name = '{name}' and run_id = '{run_id}'")
    equal = [row for row in rows if same.items() <= row.tags.items()]
    return min(equal, key=lambda row: row.version, default=None)


def _delete(client: Client, row: VersionRow) -> None:
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # the user may lack the permission; then two versions of the same files remain
        client.delete_model_version(row.name, str(row.version))


def _make_name(client: Client, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _upload(
    client: Client, source: Path, reports: Sequence[Report], logged: LoggedModelEntity, evaluated_on: str | None
) -> None:
    """Stores the MLflow model of a checkpoint as a logged model of the run; repeating it stores equal files."""
    with tempfile.TemporaryDirectory(prefix="adaptnet-publish-") as scratch:
        folder = write_model_folder(source, reports, Path(scratch) / "model", evaluated_on=evaluated_on)
        save_mlflow_model(folder, Path(scratch) / "mlflow")
        logged_models.store(client, logged, Path(scratch) / "mlflow", step=checkpoint.read_meta(source).step)


def save_mlflow_model(folder: Path, destination: Path) -> None:
    """Wraps a model folder as an MLflow model whose code is `pyfunc_model.py`, with this package beside it.

    Raises CheckpointError if the net cannot be loaded.
    """
    import mlflow.pyfunc
    import pandas  # type: ignore[import-untyped]
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array

    load_model(folder)  # a net that cannot be loaded is not published
    columns = [("label", DataType.string), ("probability", DataType.double), ("macs", DataType.double)]
    columns += [("policy", DataType.string)]
    lists = [("labels", Array(DataType.string)), ("probabilities", Array(DataType.double))]
    signature = ModelSignature(
        inputs=Schema([ColSpec(AnyType())]),  # base64 text, bytes, a path, or nested lists of an array
        outputs=Schema([ColSpec(kind, name) for name, kind in [*columns, *lists]]),
        params=ParamSchema(
            [
                ParamSpec("policy", DataType.string, ""),  # "": the net's default
                ParamSpec("budget", DataType.string, ""),
                ParamSpec("top_k", DataType.long, 5),
            ]
        ),
    )
    mlflow.pyfunc.save_model(
        destination,
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"model": str(folder)},
        code_paths=[str(CODE / TOP)],
        signature=signature,
        input_example=pandas.DataFrame({"image": [base64.b64encode(_example_image()).decode()]}),
        model_config={"files": ""},
        pip_requirements=requirements(),
    )


def _example_image() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (120, 90, 60)).save(buffer, "JPEG")
    return buffer.getvalue()


def requirements() -> list[str]:
    """The packages that a process needs to run a published model, in the versions installed here."""
    dali = [
        d.metadata["Name"] for d in metadata.distributions() if (d.metadata["Name"] or "").startswith("nvidia-dali")
    ]
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in (*REQUIREMENTS, *sorted(set(dali)))]


def _version_tags(meta: Meta, reports: Sequence[Report], evaluated_on: str | None) -> dict[str, str]:
    figures = [{key: value for key, value in report.to_json().items() if key in FIGURES} for report in reports]
    recipe, training = meta.recipe, configs.section(meta.recipe, "training")
    started = training.get("start_from")
    tags = {
        "adaptnet.family": str(meta.family["name"]),
        "adaptnet.recipe": str(recipe.get("name")),
        "adaptnet.dataset": Path(str(configs.section(recipe, "data").get("root", "unknown"))).name,
        "adaptnet.data": str(meta.data_identity),
        "adaptnet.fingerprint": configs.fingerprint(meta.fingerprint),
        "adaptnet.reports": json.dumps(figures),
    }
    tags |= {f"adaptnet.{key}": str(training[key]) for key in ("epochs", "batch_size") if key in training}
    tags |= {"adaptnet.seed": str(recipe["seed"])} if "seed" in recipe else {}
    tags |= {"adaptnet.net": _settings(meta.family)}
    tags |= {"adaptnet.evaluated_on": evaluated_on} if evaluated_on else {}
    tags |= {"adaptnet.start_from": str(started)} if started else {}
    return tags | ({"adaptnet.imported": json.dumps(meta.imported)} if meta.imported else {})


def _settings(family: Mapping[str, JsonValue]) -> str:
    """The settings of a net on one line: "depth=14, target_rate=0.7"."""
    pairs = configs.flat({key: value for key, value in family.items() if key != "name"})
    return ", ".join(f"{key}={value}" for key, value in pairs.items())[:TAG_CHARS]


def _description(meta: Meta, reports: Sequence[Report]) -> str:
    text = f"{meta.family['name']} trained by {meta.recipe.get('name')}, step {meta.step}"
    figures = [f"{r.policy}: top-1 {100 * r.top1:.2f} % at {r.macs_mean / 1e6:.3f} MMACs" for r in reports]
    return "; ".join([text, *figures])[:TAG_CHARS]


def publish_run(
    run_dir: Path,
    name: str,
    *,
    run_id: str,
    uri: str,
    alias: str = CANDIDATE,
    remarks: Mapping[str, str] | None = None,
) -> Version | None:
    """Registers the best checkpoint of a finished run with its final reports; None if the run is not finished."""
    status = records.read_status(run_dir)
    if not status.finished or status.best is None:
        return None
    home, recipe = run_dir / FINAL, provenance.recipe_of(provenance.read(run_dir))
    return publish(
        run_storage(run_dir).fetch(status.best),
        load_reports(home),
        name,
        run_id=run_id,
        uri=uri,
        alias=alias,
        evaluated_on=records.read_about(home).data,
        remarks={**({"recipe": recipe} if recipe else {}), **(remarks or {})},
    )


def register_late(run_dir: Path, uri: str | None = None) -> Version | None:
    """Registers a finished run that `tracking.sync` has sent if its recipe names it; None if it does not."""
    config, run_id = tracking_config(run_dir), Ledger.peek(run_dir).run_id
    if config.register is None or run_id is None:
        return None
    return publish_run(run_dir, config.register, run_id=run_id, uri=resolve_uri(uri or config.uri, run_dir))


def register_best(run_dir: Path, config: TrackingConfig, uploader: Uploader) -> Version | None:
    """Registers the best checkpoint of a finished run if `tracking.register` names it, before the uploader ends.

    Waits for an unreachable server for at most `tracking.patience_s`, for a silent one a few seconds; then an event in
    the journal says how to register later, and None is returned, as it is if there is nothing to register.
    """
    if config.register is None or not records.read_status(run_dir).finished:
        return None
    name, deadline, pause = config.register, time.monotonic() + config.patience_s, 1.0
    while True:
        try:
            run_id = uploader.ready(max(0.0, deadline - time.monotonic()))
            if run_id is None:
                raise ResourceError("the tracking server has not answered", key="tracking.uri")
            return publish_run(run_dir, name, run_id=run_id, uri=uploader.uri)
        except ResourceError as error:
            if not uploader.sends or uploader.silent or time.monotonic() + pause > deadline:
                hint = f"adaptnet runs sync {run_dir}"
                uploader.journal.event("not-registered", name=name, reason=without_secrets(str(error)), hint=hint)
                return None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
