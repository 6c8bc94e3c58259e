"""Checkpoints: folders that are there whole or not at all, written beside the training, checked before they are used.

`step-00000123/` holds net.safetensors, ema.safetensors (with a moving average), state.pt (optimizers and counters,
loadable with weights_only), meta.json (what it is and of which recipe) and, written last, COMPLETE.json (bytes and
sha256 of each file). Only a folder with COMPLETE.json counts.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline import config as configs
from pipeline.errors import AdaptNetError, CheckpointError, ConfigError, ResourceError
from pipeline.family import AnyFamily, FamilyConfig, find
from pipeline.runs.files import move_folder, sync_file, sync_folder
from pipeline.runs.records import META, Meta, read_status
from pipeline.training import state as states
from pipeline.training.config import CheckpointConfig
from pipeline.training.state import TrainState

COMPLETE = "COMPLETE.json"
OWNER = "OWNER"  # in a storage that runs share: the id of the run folder whose checkpoints lie beside it
PARALLEL = "module."  # before each name of a net that DataParallel or DDP held


class Storage(Protocol):
    """A place for checkpoints; a name is listed only once all of it is there."""

    def names(self) -> list[str]:
        """Complete checkpoints, oldest step first."""
        ...

    def store(self, folder: Path, name: str) -> None:
        """Moves a finished local folder here; COMPLETE.json becomes visible last."""
        ...

    def fetch(self, name: str) -> Path:
        """A local folder with the checkpoint's files."""
        ...

    def meta(self, name: str) -> Meta:
        """Its meta.json, without fetching the rest."""
        ...

    def remove(self, name: str) -> None: ...

    def owner(self) -> str | None:
        """The id of the run that these checkpoints are of; None where none has claimed the place."""
        ...

    def claim(self, owner: str) -> None: ...

    def where(self, name: str) -> str: ...


class LocalStorage:
    """A folder that all nodes see; storing is a rename."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob(f"step-*/{COMPLETE}"))

    def store(self, folder: Path, name: str) -> None:
        move_folder(folder, self.root / name, replace=True)

    def fetch(self, name: str) -> Path:
        return self.root / name

    def meta(self, name: str) -> Meta:
        return read_meta(self.root / name)

    def owner(self) -> str | None:
        path = self.root / OWNER
        return path.read_text(encoding="utf-8") if path.exists() else None

    def claim(self, owner: str) -> None:
        (self.root / OWNER).write_text(owner, encoding="utf-8")

    def remove(self, name: str) -> None:
        (self.root / name / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(self.root / name, ignore_errors=True)

    def where(self, name: str) -> str:
        return str(self.root / name)


class RemoteStorage:
    """A folder on any file system that pyarrow or fsspec opens by URI; copies lie in `cache` while they are kept here.

    Where `cache` cannot be written, as in somebody else's run folder, they lie in a temporary folder of this process.
    """

    def __init__(self, uri: str, cache: Path) -> None:
        self.uri = uri.rstrip("/")
        self._cache = cache
        self._fs, self._root = _open_file_system(self.uri)
        try:
            self._fs.create_dir(self._root, recursive=True)
        except OSError as error:
            raise ResourceError(f"checkpoint.storage: cannot make {self.uri} ({error})") from None

    def names(self) -> list[str]:
        from pyarrow import fs

        found = self._fs.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        return sorted(Path(info.path).parent.name for info in found if info.base_name == COMPLETE)

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
            return str(stream.read().decode())

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

            found, path = url_to_fs(uri)
        except Exception as second:  # fsspec's plug-ins raise what they like
            raise ResourceError(f"checkpoint.storage (={uri}): cannot be opened: {first}; {second}") from None
        return fs.PyFileSystem(fs.FSSpecHandler(found)), path


def open_storage(config: CheckpointConfig, run_dir: Path) -> Storage:
    """The run's storage: `checkpoint.storage`/<run folder's name>, or `run_dir/checkpoints`."""
    if config.storage is None:
        return _local(run_dir / "checkpoints")
    if "://" in config.storage:
        return RemoteStorage(f"{config.storage.rstrip('/')}/{run_dir.name}", run_dir / "fetched")
    return _local(Path(config.storage).absolute() / run_dir.name)


def claim_storage(storage: Storage, run_dir: Path) -> None:
    """Makes the storage this run's. Raises ConfigError where another run folder of the same name has it."""
    path = run_dir / "id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    mine, owner = path.read_text(encoding="utf-8"), storage.owner()
    if owner is None:
        storage.claim(mine)
    elif owner != mine:
        raise ConfigError(
            f"checkpoint.storage: {storage.where('')} holds the checkpoints of another run folder named "
            f"{run_dir.name}; give this run another name or another storage"
        )


def _local(root: Path) -> LocalStorage:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"checkpoint.storage: cannot make {root} ({error.strerror})") from None
    return LocalStorage(root)


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removeprefix("step-"))


class Checkpointer:
    """Rank 0's writer: takes a copy of the state at once and writes it in a thread, one at a time.

    An error of the writing thread is raised by the next `save` or `wait`.
    """

    def __init__(
        self, storage: Storage, staging: Path, config: CheckpointConfig, damaged: Collection[str] = ()
    ) -> None:
        """`damaged` names checkpoints that are left alone: neither counted nor removed."""
        self.storage, self._config = storage, config
        self._staging = staging
        self._staging.mkdir(parents=True, exist_ok=True)
        for left in self._staging.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._scores: dict[str, float | None] = {}
        for name in set(storage.names()) - set(damaged):
            with suppress(CheckpointError):  # one without a readable meta.json is left alone too
                self._scores[name] = _score(storage.meta(name), config.best)

    def save(self, state: TrainState, meta: Meta, extra: Mapping[str, Any], *, wait: bool) -> str:
        """Saves `state`; `extra` goes into state.pt beside it. Returns where it will lie."""
        self.wait()
        mapping = _to_cpu({**states.to_mapping(state), **extra})
        name = name_of(state.step)
        self._thread = threading.Thread(target=self._run, args=(name, mapping, meta), name="checkpoint")
        self._thread.start()
        if wait:
            self.wait()
        return self.storage.where(name)

    def wait(self) -> None:
        """Until nothing is in flight. Raises what the writing thread met: ResourceError where the disk is full."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, name: str, mapping: dict[str, Any], meta: Meta) -> None:
        folder = self._staging / f".writing-{uuid.uuid4().hex[:8]}"
        try:
            write(folder, mapping, meta)
            self.storage.store(folder, name)
            self._scores[name] = _score(meta, self._config.best)
            self._retire()
        except OSError as error:
            self._error = _disk_error(error, self.storage.where(name), self.storage.names())
        except BaseException as error:  # handed to the caller of save or wait
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
        """Name of the best checkpoint kept, else of the newest; None before the first."""
        scored = [(score, name) for name, score in self._scores.items() if score is not None]
        return max(scored)[1] if scored else max(self._scores, default=None)

    def best_whole(self) -> str | None:
        """The best one whose files are those that were written; others are no longer counted."""
        while (name := self.best()) is not None:
            try:
                verify(self.storage.fetch(name))
                break
            except CheckpointError:
                del self._scores[name]
        return name


def _disk_error(error: OSError, where: str, kept: Sequence[str]) -> AdaptNetError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else (error.strerror or str(error))
    return ResourceError(
        f"checkpoint {where}: {reason}; nothing of it was kept, complete before it: {', '.join(kept) or 'none'}. "
        "Free space or set checkpoint.storage, then give the same command: the run goes on from the newest complete one"
    )


def _score(meta: Meta, key: str | None) -> float | None:
    return meta.metrics.get(key or meta.best_key or "")


def _to_cpu(value: Any) -> Any:
    """A copy of every tensor in nested containers, on the CPU and contiguous, sharing nothing with the state."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def write(folder: Path, mapping: Mapping[str, Any], meta: Meta) -> None:
    """Writes a checkpoint's files into a new folder, COMPLETE.json last, each flushed to the disk."""
    from safetensors.torch import save

    folder.mkdir(parents=True)
    rest = dict(mapping)
    for name in ("net", "ema"):
        if name in rest:
            (folder / f"{name}.safetensors").write_bytes(save(rest.pop(name)))
    buffer = io.BytesIO()  # torch's and safetensors' own writers hide why a disk refuses
    torch.save(rest, buffer)
    (folder / "state.pt").write_bytes(buffer.getbuffer())
    _write_json(folder / META, meta.to_json())
    files = sorted(folder.iterdir())
    for file in files:
        sync_file(file)
    _write_json(folder / COMPLETE, {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files})
    sync_file(folder / COMPLETE)
    sync_folder(folder)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_meta(folder: Path) -> Meta:
    """meta.json of a checkpoint. Raises CheckpointError where it is missing, unreadable or of a newer format."""
    try:
        return _meta_in((folder / META).read_bytes(), str(folder))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no readable meta.json, so this is no checkpoint ({error})", key=META, subject=folder
        ) from None


def _meta_in(content: bytes, where: str) -> Meta:
    try:
        return Meta.from_json(json.loads(content), where)
    except ValueError as error:
        raise CheckpointError(f"{where}: meta.json is damaged ({error})", key=META, subject=where) from None


def verify(folder: Path) -> None:
    """Raises CheckpointError naming the file that is missing, short or changed."""
    try:
        expected = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{folder}: no {COMPLETE}: the checkpoint was not written to its end") from None
    for name, entry in expected.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
            raise CheckpointError(f"{path} {found}: the checkpoint is damaged")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its checksum is not the one of {COMPLETE}: the checkpoint is damaged")


def newest_good(storage: Storage, on_damaged: Callable[[str, str], None]) -> str | None:
    """Name of the newest checkpoint that verifies, None where there is none at all.

    on_damaged(name, reason) is called for each one passed over. Raises CheckpointError if all are damaged.
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
            f"{storage.where('')}: none of {len(names)} checkpoints is whole ({', '.join(names)}); remove them to "
            "start anew, or bring back a copy"
        )
    return None


def read(folder: Path) -> dict[str, Any]:
    """The mapping that `state.restore` takes, with whatever `extra` was saved beside it; tensors on the CPU."""
    from safetensors.torch import load_file

    try:
        mapping: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        for name in ("net", "ema"):
            if (folder / f"{name}.safetensors").exists():
                mapping[name] = load_file(folder / f"{name}.safetensors")
    except Exception as error:  # torch and safetensors raise a dozen kinds for damaged files
        raise CheckpointError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from None
    return mapping


def weights_file(path: Path) -> Path:
    """The file of weights that `path` stands for: itself, or that of a checkpoint's, a model's or a run's folder.

    Of a run it is the best checkpoint's, where it lies in the run's folder. Raises CheckpointError where there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder to take weights from")
    if path.is_file():
        return path
    places = [path]
    best = read_status(path).best
    if best is not None:
        places.append(path / "checkpoints" / best)
    for place in places:
        for file in (place / "ema.safetensors", place / "net.safetensors"):
            if file.is_file():
                return file
    raise CheckpointError(
        f"{path}: a folder without weights; looked for ema.safetensors and net.safetensors in "
        f"{' and '.join(map(str, places))}. Name a checkpoint's folder, or a run's that is finished and keeps its "
        "checkpoints in its own folder (checkpoint.storage=null)"
    )


def weights_at(path: Path) -> dict[str, Tensor]:
    """Tensors by name of what `weights_file` finds: a moving average if any, a .safetensors or a .pt file.

    A .pt file is loaded with weights_only and may hold the tensors under `state_dict` or `model`; a prefix that
    DataParallel gave all names is taken off. Raises CheckpointError where there is no such file or it holds no tensors.
    """
    from safetensors.torch import load_file

    path = weights_file(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds
        why = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{path}: no weights can be read ({type(error).__name__}{why and ': '}{why})") from None
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) else found
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name, at its top, under state_dict or under model")
    if all(name.startswith(PARALLEL) for name in tensors):
        return {name.removeprefix(PARALLEL): tensor for name, tensor in tensors.items()}
    return tensors


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fingerprint keys whose values differ: {key: (saved, now)}."""
    keys = sorted({*saved, *now})
    return {key: (saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)}


def check_fingerprint(
    saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], where: str
) -> list[str]:
    """The keys that differ and are allowed to. Raises CheckpointError naming those that are not."""
    changed = differences(saved, now)
    refused = {key: pair for key, pair in changed.items() if key not in allowed}
    if refused:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in refused.items()]
        raise CheckpointError(
            "\n".join(
                [
                    f"{where} is of another recipe:",
                    *lines,
                    "Use a new run folder, the old values, or --allow-changed KEY for each key meant to change",
                ]
            )
        )
    return sorted(changed)


def load_net(folder: Path) -> tuple[nn.Module, AnyFamily, FamilyConfig, Meta]:
    """(net in eval mode on the CPU, family, its config, meta) of a checkpoint; its moving average if there is one."""
    from safetensors.torch import load_file

    meta = read_meta(folder)
    family = find(str(meta.family["name"]))
    config = configs.validate_stored(family.config, meta.family, f"{folder}: recipe.family")
    net = family.build(config, len(meta.classes))
    ema = folder / "ema.safetensors"
    try:
        net.load_state_dict(load_file(ema if ema.exists() else folder / "net.safetensors"))
    except Exception as error:  # safetensors and torch raise several kinds
        raise CheckpointError(f"{folder}: weights do not load ({type(error).__name__}: {error})") from None
    return net.eval(), family, config, meta
