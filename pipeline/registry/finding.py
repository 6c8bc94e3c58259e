"""Finds versions in MLflow's registry by name, and trained nets by whatever names them, as folders on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import config as configs
from pipeline.errors import CheckpointError, ConfigError, ResourceError
from pipeline.provenance import without_secrets
from pipeline.registry.model import CARD
from pipeline.tracking import connect, recipe_of, resolve_uri
from pipeline.tracking.address import database_file, failures, reason_of
from pipeline.tracking.carrier import Ledger, status_of
from pipeline.training import checkpoint
from pipeline.training.config import CheckpointConfig

RUNS = Path("runs")  # where runs lie, and their database, if nothing else is said
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w\-]+)|/(?P<version>\d+|latest))")


@dataclass(frozen=True)
class Version:
    """One version of a registered model, as the registry knows it."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str | None
    created: float  # seconds since 1970
    tags: Mapping[str, str]

    @property
    def reference(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The figures of each policy, first the default."""
        found: list[dict[str, Any]] = json.loads(self.tags.get("adaptnet.reports", "[]"))
        return found


def versions(uri: str, name: str | None = None) -> list[Version]:
    """Every version of `name`, or of all names, newest first. Raises ConfigError listing the names there are."""
    path = database_file(uri)
    if path is not None and not path.exists():
        raise ConfigError(
            f"{path}: there is no registry here yet; name another with --uri, e.g. "
            "sqlite:////data/runs/mlflow.db, which lies beside the folders of its runs"
        )
    with asking(uri) as client:
        models = _pages(client.search_registered_models)
        names = [model.name for model in models]
        if name is not None and name not in names:
            raise ConfigError(
                f"{name}: the registry has no model of that name; there are: {', '.join(names) or 'none'}"
            )
        aliases: dict[tuple[str, int], tuple[str, ...]] = {}
        for model in models:
            for alias, version in sorted(model.aliases.items()):
                aliases[model.name, int(version)] = (*aliases.get((model.name, int(version)), ()), alias)
        found = search(client, f"name = '{name}'" if name else None)
    stamped = [replace(v, aliases=aliases.get((v.name, v.version), ())) for v in found]
    return sorted(stamped, key=lambda version: (version.name, -version.version))


def lookup(reference: str, uri: str) -> Version:
    """The version behind `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/latest`.

    Raises ConfigError listing what there is where the name, version or alias is unknown.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"{reference}: write models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest")
    found = versions(uri, match["name"])
    if match["alias"] is not None:
        wanted = [version for version in found if match["alias"] in version.aliases]
    else:
        wanted = [v for v in found if match["version"] in ("latest", str(v.version))]
    if not wanted:
        there = [f"{v.version}{''.join(f' @{alias}' for alias in v.aliases)}" for v in found]
        raise ConfigError(f"{reference}: no such version or alias; {match['name']} has: {', '.join(there) or 'none'}")
    return wanted[0]


def run_folder(version: Version, uri: str) -> Path | None:
    """The folder of the run that a version came from, if it is on this machine and still that run's."""
    if version.run_id is None:
        return None
    with asking(uri) as client:
        tags = client.get_run(version.run_id).data.tags
    folder = Path(tags.get("adaptnet.run_dir", ""))
    here = (folder / "config.yaml").is_file() and Ledger.peek(folder).run_id == version.run_id
    return folder if here else None


def address(uri: str | None) -> str:
    """The registry's address in full; runs/mlflow.db here if none is given."""
    return resolve_uri(uri, RUNS / "any")


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
    if not names:
        raise CheckpointError(f"{folder}: this run has no whole checkpoint yet")
    best = status_of(folder).get("best")
    return storage.fetch(best if best in names else names[-1])


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest whole checkpoint; 0 where there is none yet."""
    if not (run_dir / "config.yaml").is_file():
        return 0
    section = configs.validate(CheckpointConfig, recipe_of(run_dir).get("checkpoint", {}), f"{run_dir}: recipe")
    names = checkpoint.open_storage(section, run_dir).names()
    return checkpoint.step_of(names[-1]) if names else 0


def _fetch(version: Version, uri: str, cache: Path | None) -> Path:
    """The model's folder of a version: where it lies, if that is on this machine, else a copy of it."""
    import mlflow.artifacts

    with asking(uri) as client:
        source = client.get_model_version_download_uri(version.name, str(version.version))
        if source.startswith(("file:", "/")):
            return _model_in(Path(mlflow.artifacts.download_artifacts(source, tracking_uri=uri)), version)
        home = cache or Path.home() / ".cache" / "adaptnet" / "models"
        sha256 = version.tags.get("adaptnet.weights_sha256", "unknown")
        target = home / f"{version.name}-{version.version}-{sha256[:16]}"
        if not target.is_dir():
            aside = home / f".{target.name}.{uuid.uuid4().hex[:8]}"
            try:
                got = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(aside), tracking_uri=uri))
                os.replace(got, target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return _model_in(target, version)


def _model_in(folder: Path, version: Version) -> Path:
    cards = sorted(folder.glob(f"artifacts/*/{CARD}"))
    if not cards:
        raise CheckpointError(f"{version.reference}: its files at {folder} are missing or no model of adaptnet's")
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
        ) from error
