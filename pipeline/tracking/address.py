"""Where a run is tracked: the keys under `tracking:`, full addresses, and a client on one of them."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PlainSerializer

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.runs.files import move_file
from pipeline.runs.provenance import without_secrets

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "cifs", "smb3", "smbfs", "ceph", "9p", "afs"),
    *("panfs", "wekafs", "pvfs2", "fuse.glusterfs", "fuse.sshfs", "fuse.ceph", "fuse.juicefs", "fuse.beegfs"),
)
MOUNTS = Path("/proc/mounts")


def _registered_name(name: str) -> str:
    bad = sorted(set(re.sub(r"[\w.\- ]", "", name)))
    if bad:
        raise ValueError(f"a registry name may not hold {' '.join(bad)}; use letters, digits, _ . - and spaces")
    if not re.fullmatch(r"\w(.*\S)?", name) or len(name) > 200:
        raise ValueError("a registry name begins with a letter or digit, ends in no space and has at most 200 letters")
    return name


def _shown(uri: str | None) -> str | None:
    return None if uri is None else without_secrets(uri)


RegisteredName = Annotated[str, AfterValidator(_registered_name)]


def registered_name(name: str) -> str:
    """`name`, if the registry takes it. Raises ConfigError where it does not."""
    try:
        return _registered_name(name)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def registered_alias(alias: str) -> str:
    """`alias`, if the registry takes it. Raises ConfigError where it does not."""
    if not re.fullmatch(r"[\w\-]{1,100}", alias) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ConfigError(
            f"--alias (={alias}): an alias has up to 100 letters, digits, _ and -; not `latest`, nor a version as v3"
        )
    return alias


with warnings.catch_warnings():
    # pydantic takes `register` for one of BaseModel's own names: its metaclass has a method of that name, instances not
    warnings.filterwarnings("ignore", message='Field name "register"')

    class TrackingConfig(Config):
        """Where the run's record is sent, and what its best checkpoint is called in the registry."""

        # http(s)://HOST:PORT, sqlite:////absolute/path.db, postgresql://...; null: mlflow.db beside the run folder
        uri: Annotated[str | None, PlainSerializer(_shown, return_type=str | None)] = None
        experiment: Annotated[str, Field(min_length=1, max_length=500)] = "adaptnet"
        register: RegisteredName | None = None  # the best checkpoint becomes a new version of this name; null: none
        upload_checkpoints: bool = True  # the best and the last as artifacts; their places are sent in any case
        parent: Path | None = None  # folder of the run that this one is a part of: the sweep's, for its trials
        patience_s: Annotated[float, Field(ge=0)] = 120.0  # at the end of the run, for what has not been sent yet


def resolve_uri(uri: str | None, run_dir: Path) -> str:
    """The tracking URI in full: a database file beside the run folders where none is given, paths made absolute.

    Raises ConfigError for what MLflow cannot track to.
    """
    if uri is None:
        return f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"
    scheme, colon, rest = uri.partition("://")
    kind = scheme.partition("+")[0].lower()
    if not colon or kind not in (*DATABASES, "http", "https"):
        raise ConfigError(
            f"tracking.uri (={without_secrets(uri)}): MLflow tracks to http://HOST:PORT, https://..., sqlite:////abs/path.db"
            f", {', '.join(f'{name}://...' for name in DATABASES[1:])}, and no longer to folders"
        )
    if kind == "sqlite":
        path = rest.removeprefix("/")
        if not rest.startswith("/") or not path:
            raise ConfigError(f"tracking.uri (={uri}): name a file, as in sqlite:////absolute/path/mlflow.db")
        return f"{scheme}:///{Path(path).absolute()}"
    if not _host(uri):
        raise ConfigError("tracking.uri: this is no address; write http://HOST:PORT, with %-codes in a password")
    return uri


def _host(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def database_file(uri: str) -> Path | None:
    """The file of a sqlite URI; None for any other."""
    return Path(uri.partition(":///")[2]) if uri.startswith("sqlite") else None


def unusable(uri: str) -> str | None:
    """Why nothing may be sent to `uri` from this machine; None where it may.

    sqlite's locks do not hold on a network file system, where two writers damage the file.
    """
    path = database_file(uri)
    kind = file_system(path.parent) if path else ""
    if kind not in NETWORK_FILE_SYSTEMS:
        return None
    return f"{path} lies on a network file system ({kind}), where sqlite is not safe"


def file_system(path: Path) -> str:
    """The type of the file system that `path` is on, or would be; "" where that cannot be told."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        lines = [line.split() for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    mounts = {re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), words[1]): words[2] for words in lines}
    return next((mounts[str(up)] for up in (path.resolve(), *path.resolve().parents) if str(up) in mounts), "")


def connect(uri: str) -> Any:
    """An MlflowClient on `uri`; a new database gets its tables first, once, however many processes ask at a time."""
    # MLflow reads settings from the environment alone. It would report its use to its makers, draw progress bars in
    # our threads, and repeat a request for minutes, even one that has made a run or version before its answer was lost.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password that stands in it
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient

    for name, level in (
        ("mlflow", logging.WARNING),
        ("alembic", logging.WARNING),
        ("mlflow.utils.environment", logging.ERROR),
    ):
        logging.getLogger(name).setLevel(level)  # the last one misses pip in environments that were made without it
    path = database_file(uri)
    if path is not None:
        _initialise(uri, path)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _initialise(uri: str, path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts = (path.parent / "mlartifacts").as_uri()
    with locked(path.with_name(f"{path.name}.lock"), wait=True):
        if not path.exists():  # made aside, for a process killed in between would leave tables that MLflow cannot mend
            aside = path.with_name(f".{path.name}.new")
            aside.unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{aside}", artifacts).engine.dispose()
            move_file(aside, path)
        SqlAlchemyStore(uri, artifacts)


def failures() -> tuple[type[Exception], ...]:
    """What a client raises where the server is away, refuses, or its driver is not installed."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, ImportError)


def reason_of(error: BaseException) -> str:
    """An error's kind and first line, without secrets."""
    if code := re.search(r"failed with error code (401|403)\b", str(error)):  # as MLflow's client says it
        return refusal(int(code[1]))
    lines = without_secrets(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


def refusal(code: int) -> str:
    """What a server means by an HTTP status that refuses."""
    if code == 401:
        return (
            "it refuses this name and password (HTTP 401); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "to yours"
        )
    return f"HTTP {code}" + (", you are not permitted this" if code == 403 else "")


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds an exclusive lock on `path`; gives False where another process has it and `wait` is off."""
    with open(path, "a") as file:
        yield _lock(file, wait=wait)


def _lock(file: IO[str], *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the lease on the run folder has to do
        return True
    return True
