"""Checkpoints: complete folders, written in a thread beside the training and verified before they are used.

`step-00000123/` contains net.safetensors, ema.safetensors (if there is a moving average), state.pt (optimizers and
counters, loadable with weights_only), meta.json (`records.Meta`) and, written last, COMPLETE.json (bytes and sha256 of
each file). Only a folder with COMPLETE.json counts.
"""

from __future__ import annotations

import atexit
import errno
import io
import json
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from pipeline import config as configs
from pipeline.errors import AdaptNetError, CheckpointError, ConfigError, JsonValue, ResourceError
from pipeline.family import AnyFamily, FamilyConfig, find
from pipeline.runs.files import move_folder, read_json, remark, sha256, sync_file, sync_folder, write_text
from pipeline.runs.records import META, Meta
from pipeline.training import state as states
from pipeline.training.config import CheckpointConfig
from pipeline.training.state import SavedState, TrainState
from pipeline.training.weights_file import no_weights

COMPLETE = "COMPLETE.json"
STATE = "state.pt"
ID = "id"  # a file in the run folder
OWNER = "OWNER"  # a file in a shared storage: the id of the run folder that the checkpoints beside it are of


class Storage(Protocol):
    """A place for checkpoints; a name is listed only once the checkpoint is complete."""

    def names(self) -> list[str]:
        """Complete checkpoints, oldest step first."""
        ...

    def store(self, folder: Path, name: str) -> None:
        """Moves a finished local folder here; COMPLETE.json becomes visible last."""
        ...

    def fetch(self, name: str) -> Path:
        """A local folder with the checkpoint's files; not verified."""
        ...

    def meta(self, name: str) -> Meta:
        """Its meta.json, without fetching the rest."""
        ...

    def remove(self, name: str) -> None:
        """Deletes a checkpoint, COMPLETE.json first."""
        ...

    def owner(self) -> str | None:
        """The id of the run that these checkpoints are of; None if no run has claimed the place."""
        ...

    def claim(self, owner: str) -> None:
        """Makes `owner` the run that these checkpoints are of."""
        ...

    def where(self, name: str) -> str:
        """The path or URI of a checkpoint, for people."""
        ...


class LocalStorage:
    """A folder that all nodes can reach; storing is a rename."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return sorted(filter(_is_name, (path.parent.name for path in self.root.glob(f"step-*/{COMPLETE}"))))

    def store(self, folder: Path, name: str) -> None:
        move_folder(folder, self.root / name, replace=True)

    def fetch(self, name: str) -> Path:
        return self.root / name

    def meta(self, name: str) -> Meta:
        return read_meta(self.root / name)

    def owner(self) -> str | None:
        path = self.root / OWNER
        return _id_in(path) if path.exists() else None

    def claim(self, owner: str) -> None:
        write_text(self.root / OWNER, owner)

    def remove(self, name: str) -> None:
        (self.root / name / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(self.root / name, ignore_errors=True)

    def where(self, name: str) -> str:
        return str(self.root / name)


class RemoteStorage:
    """A folder on any file system that pyarrow or fsspec opens by URI, with local copies in the folder `cache`.

    If `cache` is not writable, as in another user's run folder, the copies are in a temporary folder of this process.
    """

    def __init__(self, uri: str, cache: Path) -> None:
        self.uri = uri.rstrip("/")
        self._cache = cache
        self._fs, self._root = _open_file_system(self.uri)
        try:
            self._fs.create_dir(self._root, recursive=True)
        except OSError as error:
            raise _no_storage(self.uri, str(error)) from None

    def names(self) -> list[str]:
        from pyarrow import fs

        infos = self._fs.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        names = (Path(info.path).parent.name for info in infos if info.base_name == COMPLETE)
        return sorted(filter(_is_name, names))

    def store(self, folder: Path, name: str) -> None:
        from pyarrow import fs

        target = f"{self._root}/{name}"
        if self._fs.get_file_info(target).type != fs.FileType.NotFound:
            self.remove(name)
        self._fs.create_dir(target, recursive=True)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == COMPLETE):
            fs.copy_files(str(file), f"{target}/{file.name}", destination_filesystem=self._fs)
        shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, name: str) -> Path:
        from pyarrow import fs

        home = self._cache if _writable(self._cache) else _temporary()
        target = home / name
        if self._is_copy(target, name):
            return target
        aside = home / f".{name}-{uuid.uuid4().hex[:8]}"
        aside.mkdir()
        try:
            fs.copy_files(f"{self._root}/{name}", str(aside), source_filesystem=self._fs)
            shutil.rmtree(target, ignore_errors=True)
            move_folder(aside, target)
        except OSError:
            if not self._is_copy(target, name):  # else another process was faster
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target

    def _is_copy(self, folder: Path, name: str) -> bool:
        try:
            verify(folder)
            with self._fs.open_input_stream(f"{self._root}/{name}/{COMPLETE}") as stream:
                return bool(stream.read() == (folder / COMPLETE).read_bytes())
        except (OSError, CheckpointError):
            return False

    def owner(self) -> str | None:
        from pyarrow import fs

        path = f"{self._root}/{OWNER}"
        if self._fs.get_file_info(path).type == fs.FileType.NotFound:
            return None
        with self._fs.open_input_stream(path) as stream:
            return str(stream.read().decode("utf-8", "replace"))

    def claim(self, owner: str) -> None:
        with self._fs.open_output_stream(f"{self._root}/{OWNER}") as stream:
            stream.write(owner.encode())

    def meta(self, name: str) -> Meta:
        with self._fs.open_input_stream(f"{self._root}/{name}/meta.json") as stream:
            return _meta_in(stream.read(), self.where(name))

    def remove(self, name: str) -> None:
        from pyarrow import fs

        mark = f"{self._root}/{name}/{COMPLETE}"
        if self._fs.get_file_info(mark).type == fs.FileType.File:
            self._fs.delete_file(mark)
        self._fs.delete_dir(f"{self._root}/{name}")
        shutil.rmtree(self._cache / name, ignore_errors=True)

    def where(self, name: str) -> str:
        return f"{self.uri}/{name}"


def _writable(folder: Path) -> bool:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


@cache
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="adaptnet-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _open_file_system(uri: str) -> tuple[Any, str]:
    from pyarrow import ArrowException, fs

    try:
        return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (ArrowException, OSError) as first:
        try:
            from fsspec.core import url_to_fs

            opened, path = url_to_fs(uri)
        except Exception as second:  # fsspec's plug-ins raise errors of any class
            message = f"checkpoint.storage (={uri}): cannot be opened: {first}; {second}"
            raise ResourceError(message, key="checkpoint.storage", subject=uri) from None
        return fs.PyFileSystem(fs.FSSpecHandler(opened)), path


def open_storage(config: CheckpointConfig, run_dir: Path) -> Storage:
    """The run's storage: `checkpoint.storage`/<run folder's name>, or `run_dir/checkpoints`."""
    if config.storage is None:
        return _local(run_dir / "checkpoints")
    if "://" in config.storage:
        return RemoteStorage(f"{config.storage.rstrip('/')}/{run_dir.name}", run_dir / "fetched")
    return _local(Path(config.storage).absolute() / run_dir.name)


def claim_storage(storage: Storage, run_dir: Path) -> None:
    """Claims the storage for this run. Raises ConfigError if another run folder of the same name has claimed it.

    If one of the two files that say so is damaged, a storage in the run's own folder is this run's; for a shared one
    CheckpointError is raised.
    """
    path, own = run_dir / ID, isinstance(storage, LocalStorage) and storage.root == run_dir / "checkpoints"
    mine, owner = _id_in(path) if path.exists() else None, storage.owner()
    for held, file in ((mine, str(path)), (owner, f"{storage.where(OWNER)}")):
        if held is not None and not _is_id(held):
            _mend_id(file, own=own)
    mine, owner = (held if held is not None and _is_id(held) else None for held in (mine, owner))
    if mine is None:
        mine = owner if own and owner is not None else uuid.uuid4().hex
        write_text(path, mine)
    if owner is None:
        storage.claim(mine)
    elif owner != mine:
        raise ConfigError(
            f"checkpoint.storage: {storage.where('')} holds the checkpoints of another run folder named "
            f"{run_dir.name}; give this run another name or another storage",
            key="checkpoint.storage",
            subject=storage.where(""),
        )


def _id_in(path: Path) -> str:
    """The id in a file; a text that is none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unreadable"


def _is_id(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def _mend_id(file: str, *, own: bool) -> None:
    """Remarks that a run's id is damaged. Raises CheckpointError if the checkpoints may be another run's."""
    if not own or Path(file).is_dir():
        raise CheckpointError(
            f"{file}: damaged; it says which run folder the checkpoints in checkpoint.storage are of. If they are this "
            f"run's, remove {OWNER} there and {ID} in the run folder; else give this run another name",
            key=Path(file).name,
            subject=file,
        )
    remark(Path(file), "it is rewritten, since the checkpoints are in the run's own folder")


def _is_name(name: str) -> bool:
    return re.fullmatch(r"step-\d{8,}", name) is not None


def _local(root: Path) -> LocalStorage:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_storage(str(root), str(error.strerror)) from None
    return LocalStorage(root)


def _no_storage(place: str, why: str) -> ResourceError:
    return ResourceError(
        f"checkpoint.storage: {place} cannot be created ({why})", key="checkpoint.storage", subject=place
    )


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removeprefix("step-"))


class Checkpointer:
    """Rank 0's writer: copies the state immediately and writes the copy in a thread, one at a time.

    The next `save` or `wait` raises an error of the writing thread.
    """

    def __init__(
        self, storage: Storage, staging: Path, config: CheckpointConfig, damaged: Collection[str] = ()
    ) -> None:
        """damaged: names of checkpoints that are neither counted nor removed."""
        self.storage, self._config = storage, config
        self._staging = staging
        self._staging.mkdir(parents=True, exist_ok=True)
        for left in self._staging.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._scores: dict[str, float | None] = {}
        for name in set(storage.names()) - set(damaged):
            with suppress(CheckpointError):  # one without a readable meta.json is not counted either
                self._scores[name] = _score(storage.meta(name), config.best)

    def save(self, state: TrainState, meta: Meta, extra: Mapping[str, object], *, wait: bool) -> str:
        """Saves `state`, with `extra` in state.pt beside it. Returns where the checkpoint will be."""
        self.wait()
        mapping = {name: to_cpu(value) for name, value in {**states.to_mapping(state), **extra}.items()}
        name = name_of(state.step)
        self._thread = threading.Thread(target=self._run, args=(name, mapping, meta), name="checkpoint")
        self._thread.start()
        if wait:
            self.wait()
        return self.storage.where(name)

    def wait(self) -> None:
        """Waits for the writing thread. Raises its error, e.g. ResourceError if the disk is full."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, name: str, mapping: Mapping[str, object], meta: Meta) -> None:
        folder = self._staging / f".writing-{uuid.uuid4().hex[:8]}"
        try:
            write(folder, mapping, meta)
            self.storage.store(folder, name)
            self._scores[name] = _score(meta, self._config.best)
            self._retire()
        except OSError as error:
            self._error = _disk_error(error, self.storage.where(name), self.storage.names())
        except BaseException as error:  # raised by the next save or wait
            self._error = error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _retire(self) -> None:
        """Removes all but the newest `keep_last` and the best `keep_best`."""
        names = sorted(self._scores)
        ranked = sorted((n for n in names if self._scores[n] is not None), key=lambda n: (self._scores[n], n))
        best = ranked[len(ranked) - self._config.keep_best :] if self._config.keep_best else []
        for name in set(names) - set(names[-self._config.keep_last :]) - set(best):
            self.storage.remove(name)
            del self._scores[name]

    def best(self) -> str | None:
        """Name of the best checkpoint in the storage, of the newest if none has a score; None before the first.

        With `checkpoint.best: last` none has a score.
        """
        scored = [(score, name) for name, score in self._scores.items() if score is not None]
        return max(scored)[1] if scored else max(self._scores, default=None)

    @property
    def scored(self) -> bool:
        """Whether any checkpoint has been evaluated."""
        return any(score is not None for score in self._scores.values())

    def best_whole(self) -> str | None:
        """Name of the best checkpoint that verifies; damaged ones are no longer counted."""
        while (name := self.best()) is not None:
            try:
                verify(self.storage.fetch(name))
                break
            except CheckpointError:
                del self._scores[name]
        return name


def _disk_error(error: OSError, where: str, complete: Sequence[str]) -> AdaptNetError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else (error.strerror or str(error))
    return ResourceError(
        f"checkpoint {where}: {reason}; it was discarded. Complete checkpoints: {', '.join(complete) or 'none'}. "
        "Free space or set checkpoint.storage, then run the same command: it resumes from the newest complete one",
        key="checkpoint.storage",
        subject=where,
    )


def _score(meta: Meta, key: str | None) -> float | None:
    return meta.metrics.get(key or meta.best_key or "")


def to_cpu(value: object) -> object:
    """A deep copy of nested containers with every tensor on the CPU, contiguous."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value


def write(folder: Path, mapping: Mapping[str, object], meta: Meta) -> None:
    """Writes a checkpoint's files into a new folder, COMPLETE.json last, each flushed to disk."""
    from safetensors.torch import save

    folder.mkdir(parents=True)
    rest = dict(mapping)
    for name in ("net", "ema"):
        if name in rest:
            (folder / f"{name}.safetensors").write_bytes(save(cast(dict[str, Tensor], rest.pop(name))))
    buffer = io.BytesIO()  # torch's and safetensors' own writers hide the reason for a failed write
    torch.save(rest, buffer)
    (folder / STATE).write_bytes(buffer.getbuffer())
    _write_json(folder / META, meta.to_json())
    files = sorted(folder.iterdir())
    for file in files:
        sync_file(file)
    _write_json(folder / COMPLETE, {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files})
    sync_file(folder / COMPLETE)
    sync_folder(folder)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_meta(folder: Path) -> Meta:
    """meta.json of a checkpoint. Raises CheckpointError if it is missing, unreadable or of a newer format."""
    try:
        return _meta_in((folder / META).read_bytes(), str(folder))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no readable meta.json, so this is no checkpoint ({error})", key=META, subject=folder
        ) from None


def _meta_in(content: bytes, where: str) -> Meta:
    try:
        return Meta.from_json(json.loads(content), where)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: meta.json is damaged ({error})", key=META, subject=where) from None


def verify(folder: Path) -> None:
    """Raises CheckpointError, with the file as its subject, if a file is missing, short or changed."""
    try:
        expected = _expected(read_json(folder / COMPLETE))
    except (OSError, ValueError):
        raise _damaged(folder, f"has no whole {COMPLETE}: it was not written completely") from None
    for name, (size, checksum) in expected.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state_of_file = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise _damaged(path, f"{state_of_file}: the checkpoint is damaged")
        try:
            same = sha256(path) == checksum
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from None
        if not same:
            raise _damaged(path, f"differs from its checksum in {COMPLETE}: the checkpoint is damaged")


def _expected(content: JsonValue) -> dict[str, tuple[int, str]]:
    """The size and checksum of each file by COMPLETE.json. Raises ValueError if it does not name a checkpoint's."""
    entries = content if isinstance(content, dict) else {}
    expected = {
        name: (size, checksum)
        for name, entry in entries.items()
        if "/" not in name and isinstance(entry, dict)
        if isinstance(size := entry.get("bytes"), int) and isinstance(checksum := entry.get("sha256"), str)
    }
    if len(expected) < len(entries) or not {META, STATE} <= set(expected):
        raise ValueError("not the files of a checkpoint")
    return expected


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}", key=COMPLETE, subject=path)


def newest_good(storage: Storage, on_damaged: Callable[[str, str], None]) -> str | None:
    """Name of the newest checkpoint that verifies; None if there is no checkpoint.

    on_damaged(name, reason) is called for each one that is skipped. Raises CheckpointError if all are damaged.
    """
    names = storage.names()
    for name in reversed(names):
        try:
            verify(storage.fetch(name))
            return name
        except CheckpointError as error:
            on_damaged(name, str(error))
    if names:
        raise CheckpointError(
            f"{storage.where('')}: all {len(names)} checkpoints are damaged ({', '.join(names)}); remove them to start "
            "again from step 0, or restore a copy",
            key="checkpoints",
            subject=storage.where(""),
        )
    return None


def read(folder: Path) -> SavedState:
    """The mapping for `state.restore`, with the `extra` that was saved beside it; tensors on the CPU."""
    from safetensors.torch import load_file

    try:
        mapping = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        for name in ("net", "ema"):
            if (folder / f"{name}.safetensors").exists():
                mapping[name] = load_file(folder / f"{name}.safetensors")
    except Exception as error:  # torch and safetensors raise a dozen classes for damaged files
        message = f"{folder}: cannot be read ({type(error).__name__}: {error})"
        raise CheckpointError(message, key="state.pt", subject=folder) from None
    return cast(SavedState, mapping)


def differences(saved: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Fingerprint keys whose values differ: {key: (saved, now)}."""
    keys = sorted({*saved, *now})
    return {key: (saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)}


EPOCHS = "training.epochs"


def check_fingerprint(
    saved: Mapping[str, object],
    now: Mapping[str, object],
    allowed: Sequence[str],
    where: str,
    why_not_extended: Callable[[float], str | None] = lambda before: "",
) -> list[str]:
    """The keys that differ and are allowed to. Raises CheckpointError with the keys that are not.

    why_not_extended: why a run of so many epochs cannot go on with today's number; None if it can.
    """
    changed = differences(saved, now)
    refused = {key: pair for key, pair in changed.items() if key not in allowed}
    before = refused.get(EPOCHS, (None, None))[0]
    reason = why_not_extended(before) if isinstance(before, int | float) else ""
    if reason is None:
        del refused[EPOCHS]
    if refused:
        reasons = {EPOCHS: f" ({reason})" if reason else ""}
        lines = [f"  {key}: {old!r} there, {new!r} now{reasons.get(key, '')}" for key, (old, new) in refused.items()]
        way_out = "Use a new run folder, the old values, or --allow-changed KEY for each key meant to change"
        text = "\n".join([f"{where} belongs to another recipe:", *lines, way_out])
        raise CheckpointError(text, keys=tuple(refused), subject=where)
    return sorted(changed)


def load_net(folder: Path) -> tuple[nn.Module, AnyFamily, FamilyConfig, Meta]:
    """(net in eval mode on the CPU, family, its config, meta) of a checkpoint; the net is the moving average if any."""
    from safetensors.torch import load_file

    meta = read_meta(folder)
    family = find(str(meta.family.get("name")))
    config = configs.validate_stored(family.config, meta.family, f"{folder}: recipe.family")
    net = family.build(config, len(meta.classes))
    ema = folder / "ema.safetensors"
    try:
        net.load_state_dict(load_file(ema if ema.exists() else folder / "net.safetensors"))
    except Exception as error:  # safetensors and torch raise several classes
        raise no_weights(folder, f"weights do not load ({type(error).__name__}: {error})") from None
    return net.eval(), family, config, meta
