"""Finds versions in MLflow's registry by name, and trained nets by whatever names them, as folders on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import config as configs
from pipeline.errors import CheckpointError, ConfigError, ResourceError
from pipeline.registry import store_reader
from pipeline.registry.catalogue import Version, address, lookup
from pipeline.registry.model import CARD, describe
from pipeline.runs import records
from pipeline.runs.files import move_folder, whole_folder
from pipeline.runs.provenance import without_secrets
from pipeline.tracking import connect, recipe_of
from pipeline.tracking.address import failures, reason_of
from pipeline.tracking.ledger import Ledger
from pipeline.training import checkpoint
from pipeline.training.config import CheckpointConfig

ORIGIN = "origin.json"  # of a pulled folder: which version it is


def run_folder(version: Version, uri: str) -> Path | None:
    """The folder of the run that a version came from, if it is on this machine and still that run's."""
    if version.run_id is None:
        return None
    run = store_reader.run(uri, version.run_id)
    folder = Path(run.tags.get("adaptnet.run_dir", "") if run else "")
    here = (folder / "config.yaml").is_file() and Ledger.peek(folder).run_id == version.run_id
    return folder if here else None


def resolve(reference: str, uri: str | None = None, *, cache: Path | None = None) -> Path:
    """A local folder that `describe` and `load_model` take, for a version, a run's folder, a checkpoint's or a model's.

    A run's folder stands for its best checkpoint, for its newest while it trains. A version of a remote store is
    fetched into `cache` (default: the user's), once. `uri` is the registry; default: runs/mlflow.db here.
    """
    if reference.startswith("models:"):
        return _fetch(lookup(reference, address(uri)), address(uri), cache)
    folder = Path(reference)
    if not folder.is_dir():
        what = "a file" if folder.is_file() else "no such folder"
        raise ConfigError(f"{reference}: {what}; give a run's folder, a checkpoint's, or models:/NAME@ALIAS")
    if (folder / "meta.json").is_file() or (folder / CARD).is_file():
        return folder
    if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file():
        raise ConfigError(f"{reference}: give the run's folder, {folder.parent}, or that of one checkpoint in this one")
    section = configs.validate(CheckpointConfig, recipe_of(folder).get("checkpoint", {}), f"{folder}: recipe")
    storage = checkpoint.open_storage(section, folder.absolute())
    names = storage.names()
    if not names and (trials := sorted(path.parent.name for path in folder.glob("trials/*/config.yaml"))):
        best = records.read_status(folder).best_trial or trials[0]
        raise ConfigError(f"{folder}: a sweep; name one of its {len(trials)} trials, e.g. {folder / 'trials' / best}")
    if not names:
        raise CheckpointError(f"{folder}: this run has no whole checkpoint yet")
    chosen = records.read_status(folder).best
    return storage.fetch(chosen if chosen in names else names[-1])


def pull_version(reference: str, folder: Path, uri: str | None = None, *, cache: Path | None = None) -> Version:
    """Copies a version's model folder to `folder`, whole or not at all; it works there without MLflow.

    Raises ConfigError where `folder` exists, CheckpointError where the version's files are damaged.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name a new folder")
    version = lookup(reference, address(uri))
    source = _fetch(version, address(uri), cache)
    describe(source)
    origin = {"version": version.reference, "registry": without_secrets(address(uri)), "run_id": version.run_id}
    try:
        with whole_folder(folder) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)
            describe(aside)
            (aside / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{folder}: the model cannot be written there ({error.strerror})") from None
    return version


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest whole checkpoint; 0 where there is none yet."""
    if not (run_dir / "config.yaml").is_file():
        return 0
    section = configs.validate(CheckpointConfig, recipe_of(run_dir).get("checkpoint", {}), f"{run_dir}: recipe")
    names = checkpoint.open_storage(section, run_dir).names()
    return checkpoint.step_of(names[-1]) if names else 0


def _fetch(version: Version, uri: str, cache: Path | None) -> Path:
    """The model's folder of a version: where it lies, if that is on this machine, else a copy of it."""
    with asking(uri) as client:
        source = client.get_model_version_download_uri(version.name, str(version.version))
        if source.startswith(("file:", "/")):
            return _model_in(_download(source, uri, version), version)
        home = cache or Path.home() / ".cache" / "adaptnet" / "models"
        sha256 = version.tags.get("adaptnet.weights_sha256", "unknown")
        origin = hashlib.sha256(f"{without_secrets(uri)} {source}".encode()).hexdigest()  # other registries' names
        target = home / f"{version.name}-{version.version}-{sha256[:16]}-{origin[:8]}"
        if not target.is_dir():
            aside = home / f".{target.name}.{uuid.uuid4().hex[:8]}"
            try:
                got = _download(source, uri, version, aside)
                _check(got, version)
                move_folder(got, target)
            except OSError:
                if not target.is_dir():  # another process was not quicker
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return _model_in(target, version)


def _download(source: str, uri: str, version: Version, destination: Path | None = None) -> Path:
    """Raises CheckpointError where the registry answers and the files cannot be had all the same."""
    import mlflow.artifacts

    place = str(destination) if destination else None
    try:
        return Path(mlflow.artifacts.download_artifacts(source, dst_path=place, tracking_uri=uri))
    except failures() as error:
        run = store_reader.run(uri, version.run_id) if version.run_id else None
        why = ""
        if run is None:
            why = f"; the MLflow run {version.run_id} that kept them is gone: register the net anew from its folder"
        elif run.deleted:
            why = f"; their run is deleted: `mlflow runs restore --run-id {version.run_id}` brings it back"
        shown = without_secrets(source)
        raise CheckpointError(f"{version.reference}: no files to be had at {shown} ({reason_of(error)}){why}") from None


def _check(folder: Path, version: Version) -> None:
    """Raises CheckpointError where what was fetched is damaged, so that it is not kept."""
    try:
        describe(_model_in(folder, version))
    except CheckpointError as error:
        told = str(error).replace(f"{folder}/", "")
        raise CheckpointError(f"{version.reference}: its files in the registry are no good: {told}") from None


def _model_in(folder: Path, version: Version) -> Path:
    cards = sorted(folder.glob(f"artifacts/*/{CARD}"))
    if not cards:
        raise CheckpointError(f"{version.reference}: its files at {folder} are missing or no model of adaptnet's")
    registered = version.tags.get("adaptnet.weights_sha256")
    try:
        written = json.loads(cards[0].read_text(encoding="utf-8"))["weights"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{cards[0]}: cannot be read ({type(error).__name__}: {error})") from None
    if registered not in (None, written):
        raise CheckpointError(f"{version.reference}: the weights at {folder} are not those that were registered")
    return cards[0].parent


def search(client: Any, wanted: str | None) -> list[Version]:
    return [version_of(found) for found in _pages(lambda **page: client.search_model_versions(wanted, **page))]


def version_of(found: Any) -> Version:
    created = float(found.creation_timestamp) / 1000
    return Version(found.name, int(found.version), (), found.run_id, created, dict(found.tags))


def _pages(ask: Callable[..., Any]) -> list[Any]:
    """All that a paged search finds."""
    found: list[Any] = []
    token = None
    while True:
        page = ask(max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


@contextmanager
def asking(uri: str) -> Iterator[Any]:
    """A client on `uri`; what it meets becomes a ResourceError without secrets."""
    try:
        yield connect(uri)
    except failures() as error:
        raise ResourceError(
            f"registry {without_secrets(uri)}: {reason_of(error)}. See that it runs and that this address is right, "
            "then give the same command again"
        ) from None  # a traceback would show MLflow's own words, with a password that stands in the address
