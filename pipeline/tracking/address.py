"""Where a run is tracked: the keys under `tracking:`, complete URIs, and whether they may be used from here."""

from __future__ import annotations

import fcntl
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from pipeline.config import SECRET, Config
from pipeline.errors import ConfigError, without_secrets

USER = re.compile(r"(?:[^/?#@%\[\]]|%[0-9A-Fa-f]{2})*")  # USER:PASSWORD; a bare % or / begins no code or path
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


def _uri_without_riddles(uri: str | None) -> str | None:
    """`uri` if its user and password end where they seem to. Raises an error that shows no part of it."""
    fault = None if uri is None else uri_fault(uri)
    if fault is not None:
        raise PydanticCustomError(SECRET, "{fault}", {"fault": fault})
    return uri


def uri_fault(uri: str) -> str | None:
    """What is wrong with the part of `uri` that may hold a password, without showing it; None if nothing is."""
    _, colon, rest = uri.partition("://")
    if not colon or rest.startswith("/"):  # a file
        return None
    user, at, place = rest.rpartition("@")
    if re.search(r"[\s'\"\\]", rest) or not USER.fullmatch(user) or (at and not place):
        return (
            "a user name or password is not written as URIs require, and is therefore not shown: write each of its "
            "characters : / ? # [ ] @ % and blanks as %3A %2F %3F %23 %5B %5D %40 %25 %20"
        )
    return None


def _experiment_name(name: str) -> str:
    if not name.strip() or any(part in (".", "..") for part in name.split("/")):
        raise ValueError("the name of an experiment is not blank, and no part of it between slashes is . or ..")
    if not name.isprintable():
        raise ValueError("the name of an experiment has no newline or other control character")
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
        uri: Annotated[
            str | None, AfterValidator(_uri_without_riddles), PlainSerializer(_shown, return_type=str | None)
        ] = None
        experiment: Annotated[str, Field(max_length=500), AfterValidator(_experiment_name)] = "adaptnet"
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
    if fault := uri_fault(uri):
        raise _bad_uri(f"tracking.uri: {fault}")
    uri = _completed(uri)
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


def _completed(uri: str) -> str:
    """`uri`, or MLFLOW_TRACKING_URI where that is the same but for the password, which we store nowhere."""
    full = os.environ.get("MLFLOW_TRACKING_URI", "")
    return full if uri_fault(full) is None and without_secrets(full) == uri else uri


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
