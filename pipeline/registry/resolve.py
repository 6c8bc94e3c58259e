"""Finds trained nets by whatever names them (a version, a run, a checkpoint, a model), as folders on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from pathlib import Path

from pipeline import config as configs
from pipeline import zoo
from pipeline.errors import CheckpointError, ConfigError, ResourceError, without_secrets
from pipeline.registry import store_reader
from pipeline.registry.catalogue import Version, address, lookup
from pipeline.registry.model import CARD, describe
from pipeline.registry.session import session
from pipeline.runs import records, seed_runs
from pipeline.runs.files import move_folder, whole_folder, write_json
from pipeline.tracking import recipe_of
from pipeline.tracking.client import failures, reason_of
from pipeline.tracking.ledger import Ledger
from pipeline.training import checkpoint
from pipeline.training.config import CheckpointConfig

ORIGIN = "origin.json"  # file in a pulled folder that records its version


def run_folder(version: Version, uri: str) -> Path | None:
    """The folder of the run that a version came from, if it is on this machine and still belongs to that run."""
    if version.run_id is None:
        return None
    run = store_reader.run(uri, version.run_id)
    folder = Path(run.tags.get("adaptnet.run_dir", "") if run else "")
    here = (folder / "config.yaml").is_file() and Ledger.peek(folder).run_id == version.run_id
    return folder if here else None


def resolve(reference: str, uri: str | None = None, *, cache: Path | None = None, nets: Path | None = None) -> Path:
    """A local folder that `describe` and `load_model` accept.

    reference: a version, a net of the zoo, or the folder of a run, a checkpoint or a model. A run's folder means its
    best checkpoint, or its newest while it trains. A version in a remote store is downloaded once into `cache`
    (default: the user's). `uri` is the registry (default: runs/mlflow.db here), `nets` the zoo's folder (default: the
    shipped one).
    Raises ConfigError if nothing has this name, CheckpointError if its files are missing or damaged.
    """
    if reference.startswith("models:"):
        return _fetch(lookup(reference, address(uri)), address(uri), cache)
    if reference.startswith(zoo.SCHEME):
        return zoo.folder(reference, nets)
    folder = Path(reference)
    if not folder.is_dir():
        what = "a file" if folder.is_file() else "no such folder"
        raise _no_net(
            reference, f"{what}; give the folder of a run or of a checkpoint, models:/NAME@ALIAS, or zoo:NAME"
        )
    if (folder / "meta.json").is_file() or (folder / CARD).is_file():
        return folder
    if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file():
        raise _no_net(reference, f"give the folder of the run, {folder.parent}, or that of one checkpoint in it")
    return _checkpoint_of(folder)


def _no_net(reference: str, why: str) -> ConfigError:
    return ConfigError(f"{reference}: {why}", key="source", subject=reference)


def _checkpoint_of(run_dir: Path) -> Path:
    """The best checkpoint of a run, or its newest while it trains."""
    if seeds := seed_runs.seeds_in(run_dir):
        runs = ", ".join(str(seed_runs.folder_of(run_dir, seed)) for seed in seeds)
        raise _no_net(str(run_dir), f"a group of {len(seeds)} seeds; name one of its runs: {runs}")
    storage = run_storage(run_dir)
    names = storage.names()
    if not names and (trials := sorted(path.parent.name for path in run_dir.glob("trials/*/config.yaml"))):
        example = run_dir / "trials" / (records.read_status(run_dir).best_trial or trials[0])
        raise _no_net(str(run_dir), f"a sweep; name one of its {len(trials)} trials, e.g. {example}")
    if not names:
        raise CheckpointError(f"{run_dir}: this run has no complete checkpoint yet", key="source", subject=run_dir)
    best = records.read_status(run_dir).best
    return storage.fetch(best if best in names else names[-1])


def run_storage(run_dir: Path) -> checkpoint.Storage:
    """Where the run of this folder stores its checkpoints. Raises ConfigError if it is not a run folder."""
    section = configs.validate(
        CheckpointConfig, configs.section(recipe_of(run_dir), "checkpoint"), f"{run_dir}: recipe"
    )
    return checkpoint.open_storage(section, run_dir.absolute())


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest complete checkpoint; 0 if there is none yet."""
    names = run_storage(run_dir).names() if (run_dir / "config.yaml").is_file() else []
    return checkpoint.step_of(names[-1]) if names else 0


def pull_version(reference: str, folder: Path, uri: str | None = None, *, cache: Path | None = None) -> Version:
    """Copies the model folder of a version to `folder`, completely or not at all; it works there without MLflow.

    Raises ConfigError if `folder` exists, CheckpointError if the version's files are damaged.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name a new folder", key="folder", subject=folder)
    version = lookup(reference, address(uri))
    source = _fetch(version, address(uri), cache)
    describe(source)
    origin = {"version": version.reference, "registry": without_secrets(address(uri)), "run_id": version.run_id}
    try:
        with whole_folder(folder) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)
            describe(aside)
            write_json(aside / ORIGIN, origin)
    except OSError as error:
        raise ResourceError(
            f"{folder}: the model cannot be written there ({error.strerror})", key="folder", subject=folder
        ) from None
    return version


def _fetch(version: Version, uri: str, cache: Path | None) -> Path:
    """The model folder of a version: where the store has it, if that is on this machine, else a downloaded copy."""
    with session(uri) as client:
        source = client.get_model_version_download_uri(version.name, str(version.version))
        if source.startswith(("file:", "/")):
            return _model_in(_download(source, uri, version), version)
        home = cache or Path.home() / ".cache" / "adaptnet" / "models"
        sha256 = version.tags.get("adaptnet.weights_sha256", "unknown")
        origin = hashlib.sha256(f"{without_secrets(uri)} {source}".encode()).hexdigest()  # registries may share names
        target = home / f"{version.name}-{version.version}-{sha256[:16]}-{origin[:8]}"
        if not target.is_dir():
            _download_into(target, source, uri, version)
    return _model_in(target, version)


def _download_into(target: Path, source: str, uri: str, version: Version) -> None:
    """Downloads to a folder beside `target`, checks the files, and moves them; another process may be faster."""
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder = _download(source, uri, version, aside)
        _check(folder, version)
        move_folder(folder, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _download(source: str, uri: str, version: Version, destination: Path | None = None) -> Path:
    """Raises CheckpointError if the registry answers but the files cannot be downloaded."""
    import mlflow.artifacts

    place = str(destination) if destination else None
    try:
        return Path(mlflow.artifacts.download_artifacts(source, dst_path=place, tracking_uri=uri))
    except failures() as error:
        shown = without_secrets(source)
        why = f"its files cannot be downloaded from {shown} ({reason_of(error)})"
        raise _damaged(version, why + _lost(version, uri)) from None


def _lost(version: Version, uri: str) -> str:
    """What is known about the run that stored a version's files."""
    run = store_reader.run(uri, version.run_id) if version.run_id else None
    if run is None:
        return f"; the MLflow run {version.run_id} that held them no longer exists: register the net again"
    if run.deleted:
        return f"; their run is deleted: `mlflow runs restore --run-id {version.run_id}` restores it"
    return ""


def _check(folder: Path, version: Version) -> None:
    """Raises CheckpointError if what was downloaded is damaged, so that it does not stay in the cache."""
    try:
        describe(_model_in(folder, version))
    except CheckpointError as error:
        reason = str(error).replace(f"{folder}/", "")
        raise _damaged(version, f"its files in the registry are damaged: {reason}") from None


def _damaged(version: Version, why: str, key: str = "source") -> CheckpointError:
    return CheckpointError(f"{version.reference}: {why}", key=key, subject=version.reference)


def _model_in(folder: Path, version: Version) -> Path:
    """The model folder among the artifacts of a version, with the weights that were registered."""
    cards = sorted(folder.glob(f"artifacts/*/{CARD}"))
    if not cards:
        raise _damaged(version, f"its files at {folder} are missing, or are not a model of adaptnet")
    registered = version.tags.get("adaptnet.weights_sha256")
    try:
        written = json.loads(cards[0].read_text(encoding="utf-8"))["weights"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{cards[0]}: cannot be read ({type(error).__name__}: {error})", key=CARD, subject=cards[0]
        ) from None
    if registered not in (None, written):
        raise _damaged(version, f"the weights at {folder} are not those that were registered", "weights")
    return cards[0].parent
