"""Where a run is tracked: the keys under `tracking:`, complete URIs, and whether they may be used from here."""

from __future__ import annotations

import fcntl
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PlainSerializer

from pipeline.config import Config
from pipeline.errors import ConfigError
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
        raise ValueError(f"a registry name must not contain {' '.join(bad)}; use letters, digits, _ . - and spaces")
    if not re.fullmatch(r"\w(.*\S)?", name) or len(name) > 200:
        raise ValueError(
            "a registry name begins with a letter or digit, does not end with a space and has at most 200 characters"
        )
    return name


def _shown(uri: str | None) -> str | None:
    return None if uri is None else without_secrets(uri)


RegisteredName = Annotated[str, AfterValidator(_registered_name)]


def registered_name(name: str) -> str:
    """Returns `name` if the registry accepts it. Raises ConfigError otherwise."""
    try:
        return _registered_name(name)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}", key="name", subject=name) from None


def registered_alias(alias: str) -> str:
    """Returns `alias` if the registry accepts it. Raises ConfigError otherwise."""
    if not re.fullmatch(r"[\w\-]{1,100}", alias) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ConfigError(
            f"--alias (={alias}): an alias has at most 100 letters, digits, _ and -; it is neither `latest` nor a "
            "version such as v3",
            key="--alias",
            subject=alias,
        )
    return alias


with warnings.catch_warnings():
    # pydantic warns that `register` shadows a name of BaseModel: a method of its metaclass, which instances do not have
    warnings.filterwarnings("ignore", message='Field name "register"')

    class TrackingConfig(Config):
        """Where the run's record is sent, and under which name its best checkpoint is registered."""

        # http(s)://HOST:PORT, sqlite:////absolute/path.db, postgresql://...; null: mlflow.db beside the run folder
        uri: Annotated[str | None, PlainSerializer(_shown, return_type=str | None)] = None
        experiment: Annotated[str, Field(min_length=1, max_length=500)] = "adaptnet"
        register: RegisteredName | None = None  # the best checkpoint becomes a new version of this name; null: none
        upload_checkpoints: bool = True  # the best and the last as artifacts; their locations are sent in any case
        also: tuple[Literal["tensorboard"], ...] = ()  # further trackers; tensorboard writes RUN/tensorboard
        parent: Path | None = None  # folder of the run that this one is a part of: the sweep's, for its trials
        patience_s: Annotated[float, Field(ge=0, le=1e6)] = (
            120.0  # how long the end of the run waits for unsent records
        )


def resolve_uri(uri: str | None, run_dir: Path) -> str:
    """The complete tracking URI: by default a database file beside the run folders; paths are made absolute.

    Raises ConfigError if MLflow cannot track to `uri`.
    """
    if uri is None:
        return f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"
    scheme, colon, rest = uri.partition("://")
    kind = scheme.partition("+")[0].lower()
    if not colon or kind not in (*DATABASES, "http", "https"):
        databases = ", ".join(f"{name}://..." for name in DATABASES[1:])
        raise _bad_uri(
            f"tracking.uri (={without_secrets(uri)}): MLflow tracks to http://HOST:PORT, https://..., "
            f"sqlite:////abs/path.db, {databases}, and no longer to folders"
        )
    if kind == "sqlite":
        path = rest.removeprefix("/")
        if not rest.startswith("/") or not path:
            raise _bad_uri(f"tracking.uri (={uri}): name a file, as in sqlite:////absolute/path/mlflow.db")
        return f"{scheme}:///{Path(path).absolute()}"
    if not _host(uri):
        raise _bad_uri("tracking.uri: this is not an address; write http://HOST:PORT, with %-codes in a password")
    return uri


def _bad_uri(message: str) -> ConfigError:
    return ConfigError(message, key="tracking.uri")


def _host(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def database_file(uri: str) -> Path | None:
    """The file of a sqlite URI; None for any other URI."""
    return Path(uri.partition(":///")[2]) if uri.startswith("sqlite") else None


def unusable(uri: str) -> str | None:
    """Why nothing may be sent to `uri` from this machine; None if it may be used.

    Locks of sqlite do not work on a network file system, where two writers damage the file.
    """
    path = database_file(uri)
    kind = file_system(path.parent) if path else ""
    if kind not in NETWORK_FILE_SYSTEMS:
        return None
    return f"{path} is on a network file system ({kind}), where sqlite is not safe"


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, or would hold it; "" if it is unknown."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        lines = [line.split() for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    types = {re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), words[1]): words[2] for words in lines}
    return next((types[str(up)] for up in (path.resolve(), *path.resolve().parents) if str(up) in types), "")


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds an exclusive lock on `path`; yields False if another process holds it and `wait` is off."""
    with open(path, "a") as file:
        yield _lock(file, wait=wait)


def _lock(file: IO[str], *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the lease on the run folder must suffice
        return True
    return True
