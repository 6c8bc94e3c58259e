"""The driver of a training: `train(config, run_dir)`. It is idempotent: a start resumes from an empty folder."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config as configs
from pipeline import family as families
from pipeline import run_config, zoo
from pipeline.data.augment import mix_operations
from pipeline.data.index import Splits, open_splits
from pipeline.data.store import Progress
from pipeline.data.stream import Stream
from pipeline.errors import (
    AdaptNetError,
    CheckpointError,
    ConfigError,
    DataError,
    JsonValue,
    ResourceError,
    without_secrets,
)
from pipeline.evaluation import from_weights
from pipeline.evaluation.evaluate import load_reports
from pipeline.execution import cluster, teaching, worker
from pipeline.execution.asking import Asking
from pipeline.execution.guardians import report_failures
from pipeline.execution.watch import RunWatch
from pipeline.execution.watched import WatchAddress, watched
from pipeline.execution.worker import WorkerConfig
from pipeline.family import Report
from pipeline.registry.publishing import register_best
from pipeline.run_config import ComputeConfig, RunConfig
from pipeline.runs import records
from pipeline.runs.beats import LONG, UNWATCHED, Beats
from pipeline.runs.files import remark, write_text
from pipeline.runs.journal import Journal
from pipeline.runs.lease import Lease
from pipeline.runs.records import Status
from pipeline.tracking import Uploader
from pipeline.training import checkpoint, torchvision_weights, weights_file
from pipeline.training.checkpoint import Storage
from pipeline.training.step import num_micros, single_images
from pipeline.training.teachers.base import TeacherConfig
from pipeline.training.teachers.trained import TrainedTeacherConfig

if TYPE_CHECKING:  # importing Ray takes seconds
    from ray.train import UserCallback

    from pipeline.compat.ray_train import Trainer

RAYS_OF_MEMORY = re.compile(r"Memory on the node \([^)]*\) was [^()]*\([0-9.]+\)")
RAY_LOG = "ray.log"  # what Ray's C++ code printed into the driver's standard error


@dataclass(frozen=True)
class Result:
    """The outcome of a call of `train`. `finished` is False after a request to stop; the same call then resumes.

    checkpoint: where the best one is; of a run that was stopped the newest, from which it resumes.
    """

    run_dir: Path
    finished: bool
    step: int
    reports: Sequence[Report]
    checkpoint: str | None
    run_id: str | None  # id of the run in the tracker
    tracking_uri: str  # URI of that tracker, without secrets
    version: str | None  # `models:/NAME/VERSION` if `tracking.register` is set


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    allow_changed: Sequence[str] = (),
    progress: Progress | None = None,
    on_start: Callable[[], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Result:
    """Trains `config` in `run_dir`, tracks the run and registers its best checkpoint.

    Resumes from the newest complete checkpoint if there is one. `progress` is called while the index is built,
    `on_start` once this driver holds the folder's lease, `notify` with what a person must know at once, such as a hang;
    it is called from other threads. `allow_changed` are recipe keys that may differ from the
    checkpoint's fingerprint. Raises ResourceError if another driver holds the folder or workers were lost more often
    than `compute.max_failures`, and the AdaptNetError that a worker raised.
    """
    config = absolute(config)
    _check_place(run_dir)
    new = not run_dir.exists()
    run_dir = make_folder(run_dir)
    lease = Lease(run_dir).acquire(waiting=progress and (lambda text: progress(text, 0, 0)))
    try:
        (run_dir / "stop").unlink(missing_ok=True)
        for error in run_dir.glob("error-*.json"):
            error.unlink()
        if on_start is not None:
            on_start()
        with RunWatch(run_dir, config.compute, notify) as watch:
            with watched(watch.address(), None, config.compute.hang_after_s) as beats:
                order = WorkerConfig(configs.as_mapping(config), str(run_dir), lease.fence, tuple(allow_changed))
                return _train(config, order, Watched(watch, beats), progress)
    finally:
        if new and not (run_dir / "config.yaml").exists():
            lease.withdraw()
        else:
            lease.release()


@dataclass(frozen=True)
class Watched:
    """The watch of a run, and the driver's own signs of progress."""

    watch: RunWatch
    beats: Beats

    def over(self, progress: Progress | None) -> Progress:
        """`progress`, each call of which is a sign."""

        def beat(what: str, done: int, total: int) -> None:
            self.beats.count += 1
            if progress is not None:
                progress(what, done, total)

        return beat


def _holds_sweep(path: Path) -> bool:
    """False of a damaged file, too: `write_config` decides about that."""
    with suppress(ConfigError):
        return path.exists() and "sweep" in configs.read_mapping(path)
    return False


def _train(config: RunConfig, order: WorkerConfig, seen: Watched, progress: Progress | None) -> Result:
    """What follows once the lease is held."""
    run_dir, beats = Path(order.run_dir), seen.beats
    _check(config)
    beats.enter("reading the index of the images", LONG)
    splits = open_splits(config.data, config.seed, seen.over(progress))
    _check_train(config.data.root, splits)
    beats.enter("checking the recipe", LONG)
    _check_batches(config, splits)
    from_weights.check_policies(config, splits)
    storage = checkpoint.open_storage(config.checkpoint, run_dir)
    checkpoint.claim_storage(storage, run_dir)
    if config.training.start_from is not None and not storage.names():  # needed for the first step only
        weights_file.locate(config.training.start_from)
    folder, identified = _teacher(config, run_dir, splits.train.classes)
    order = replace(order, teacher=None if folder is None else str(folder))
    fingerprint = run_config.fingerprint(identified, splits.train.identity)
    write_config(run_dir, config, fingerprint, order.allow_changed)
    with Uploader(run_dir, config.tracking, order.recipe, command=sys.argv, fence=order.fence) as uploader:
        with seen.watch.journal(uploader.journal):
            if not _is_finished(run_dir, fingerprint) and not _run(config, order, seen, uploader.journal):
                _stopped_unstarted(run_dir, storage, fingerprint, uploader.journal)
            beats.enter("sending the last records to the tracker", UNWATCHED)  # bounded by tracking.patience_s
            return conclude(config, run_dir, uploader)


def absolute(config: RunConfig) -> RunConfig:
    """`config` with absolute paths: workers run in other folders."""
    data = config.data.model_copy(update={"root": config.data.root.absolute()})
    if data.index is not None:
        data = data.model_copy(update={"index": data.index.absolute()})
    start = config.training.start_from
    if start is not None and not torchvision_weights.are_named(start):
        start = start.absolute()
    changes = {"start_from": start, "teacher": _absolute(config.training.teacher)}
    training = config.training.model_copy(update=changes)
    storage = config.checkpoint.storage
    if storage is not None and "://" not in storage:
        storage = str(Path(storage).absolute())
    saving = config.checkpoint.model_copy(update={"storage": storage})
    return config.model_copy(update={"data": data, "training": training, "checkpoint": saving})


def _teacher(config: RunConfig, run_dir: Path, classes: Sequence[str]) -> tuple[Path | None, RunConfig]:
    """The teacher's folder, and the recipe as in the fingerprint. A finished run may have lost its teacher."""
    try:
        folder = teaching.locate(config, run_dir)
        return folder, teaching.identified(config, None if folder is None else teaching.pin(folder, classes))
    except AdaptNetError:
        status = records.read_status(run_dir)
        source = status.fingerprint.get(teaching.SOURCE)
        if not status.finished or not isinstance(source, str):
            raise
        return None, run_config.with_teacher(config, source)


def _absolute(teacher: TeacherConfig) -> TeacherConfig:
    if not isinstance(teacher, TrainedTeacherConfig) or teacher.source.startswith(("models:", zoo.SCHEME)):
        return teacher
    return teacher.model_copy(update={"source": str(Path(teacher.source).absolute())})


def make_folder(run_dir: Path) -> Path:
    """Makes the run's folder and returns its absolute path. Raises ResourceError if it cannot be written."""
    run_dir = run_dir.absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(
            f"run folder {run_dir}: cannot be written ({error.strerror}); choose another with --run-dir",
            key="--run-dir",
            subject=run_dir,
        ) from None
    return run_dir


def _check_place(run_dir: Path) -> None:
    """Raises ConfigError if `run_dir` is a sweep's folder or holds the folders of other runs."""
    if _holds_sweep(run_dir / "config.yaml"):
        raise ConfigError(
            f"run folder {run_dir}: holds a sweep; give the run a folder of its own with --run-dir",
            key="--run-dir",
            subject=run_dir,
        )
    inside = [path.parent.name for path in sorted(run_dir.glob("*/config.yaml"))]
    if inside and not (run_dir / "config.yaml").exists():
        raise ConfigError(
            f"run folder {run_dir}: holds other runs ({', '.join(inside[:3])}); give the run a folder of its own, e.g. "
            f"--run-dir {run_dir / 'NAME'}",
            key="--run-dir",
            subject=run_dir,
        )


def _check(config: RunConfig) -> None:
    """Raises ConfigError for settings that this machine cannot run. A cluster's nodes are checked later."""
    if config.compute.address is None:
        check_device(config.compute)


def check_device(compute: ComputeConfig) -> None:
    """Raises ConfigError if `compute.device` is cuda and torch finds no GPU on this machine."""
    import torch

    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "compute.device (=cuda): torch finds no GPU here; set compute.device=cpu, or install a GPU build of torch",
            key="compute.device",
            subject="cuda",
        )


def _check_train(root: Path, splits: Splits) -> None:
    """Raises DataError without training images."""
    if not len(splits.train):
        raise DataError(
            f"{root}: no training images, only a val split; give a root with train/<class>/ or train-*.tar, or one "
            "without splits",
            key="data.root",
            subject=root,
        )


def _check_batches(config: RunConfig, splits: Splits) -> None:
    """Raises ConfigError if at any world size that the run may have some worker gets no image, or too few at a time."""
    compute, batch_size = config.compute, config.training.batch_size
    stream = Stream(splits.train, config.data, seed=config.seed, batch_size=batch_size)
    for world in range(max(1, compute.fewest_workers), max(1, compute.most_workers) + 1):
        rows, cap = stream.row_bounds(world), compute.max_batch
        micros = num_micros(rows, world, cap)
        if config.training.cuda_graphs and (reason := _why_unrecorded(config, rows, micros)):
            raise ConfigError(
                f"training.cuda_graphs: a recorded step can only be repeated as it is, but on {world} workers "
                f"{reason}; leave it out, or change that",
                key="training.cuda_graphs",
                subject=reason,
            )
        if compute.max_batch_per_worker == "auto" and config.training.sync_batchnorm and world > 1:
            raise _synchronised_by_trying(world)
        if rows[0] // micros == 1 and (needs := _needs_several(config, world)):
            raise single_images(needs, world, cap if micros > 1 else None)


def _synchronised_by_trying(world: int) -> ConfigError:
    return ConfigError(
        f"compute.max_batch_per_worker (=auto): each of {world} workers tries a step by itself, but "
        "training.sync_batchnorm communicates within the net; give the number of images, or leave it out",
        key="compute.max_batch_per_worker",
        subject="auto",
    )


def _why_unrecorded(config: RunConfig, rows: tuple[int, int], micros: int) -> str | None:
    """Why steps differ in shape; None if they do not. rows: the fewest and the most images of a worker in a step."""
    reasons = {
        "training.compile is set, which records the net in its own way": config.training.compile is True,
        "training.sync_batchnorm communicates within the net": config.training.sync_batchnorm,
        "data.side_schedule changes the size of images": bool(config.data.side_schedule),
        "data.side_choices changes the size of images": bool(config.data.side_choices),
        f"steps have {rows[0]} to {rows[1]} images": rows[0] != rows[1],
        f"compute.max_batch_per_worker splits a step into {micros} micro-batches": micros > 1,
        "compute.max_batch_per_worker (=auto) may split a step": config.compute.max_batch_per_worker == "auto",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return found[0] if found else families.find(config.family.name).varying(config.family)


def _needs_several(config: RunConfig, world: int) -> list[str]:
    """What of the recipe would be useless or impossible with micro-batches of one image, by name."""
    import torch
    from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

    mixing = [each.name for each in mix_operations(config.data.augment)]
    if config.training.sync_batchnorm and world > 1:
        return mixing
    with torch.device("meta"):
        net = families.find(config.family.name).build(config.family, 2)
    normed = any(isinstance(module, BatchNorm1d | BatchNorm2d | BatchNorm3d) for module in net.modules())
    return mixing + ["BatchNorm"] * normed


def write_config(run_dir: Path, config: RunConfig, fingerprint: Mapping[str, object], allowed: Sequence[str]) -> None:
    """Writes config.yaml: the recipe and its fingerprint. Raises CheckpointError if it holds another run's."""
    path = run_dir / "config.yaml"
    if path.exists():
        extended = partial(_why_not_extended, run_dir, config)
        try:
            saved = configs.section(configs.read_mapping(path), "fingerprint")
            checkpoint.check_fingerprint(run_config.translated(saved), fingerprint, allowed, str(run_dir), extended)
        except (ConfigError, CheckpointError):
            if not path.is_file() or not _refuted(config, run_dir, fingerprint, allowed):
                raise
            remark(path, "it is written anew, since the run's newest checkpoint has this recipe")
    text = configs.dump_yaml({"recipe": configs.as_mapping(config), "fingerprint": fingerprint})
    write_text(path, text)


def _refuted(config: RunConfig, run_dir: Path, fingerprint: Mapping[str, object], allowed: Sequence[str]) -> bool:
    """Whether the newest readable checkpoint shows that config.yaml is damaged: it was made by today's recipe."""
    storage = checkpoint.open_storage(config.checkpoint, run_dir)
    for name in reversed(storage.names()):
        with suppress(CheckpointError):
            saved = run_config.translated(storage.meta(name).fingerprint)
            return not set(checkpoint.differences(saved, fingerprint)) - set(allowed)
    return False


def _why_not_extended(run_dir: Path, config: RunConfig, before: float) -> str | None:
    """Why the run, of `before` epochs, cannot go on with today's number; None if it can."""
    storage = checkpoint.open_storage(config.checkpoint, run_dir)
    names = storage.names()
    return config.training.why_not_extended(storage.meta(names[-1]).epoch if names else 0.0, before)


def _is_finished(run_dir: Path, fingerprint: Mapping[str, object]) -> bool:
    status = records.read_status(run_dir)
    return status.finished and run_config.translated(status.fingerprint) == fingerprint


def _stopped_unstarted(run_dir: Path, storage: Storage, fingerprint: Mapping[str, JsonValue], journal: Journal) -> None:
    """Writes the status of a run that was asked to stop while its workers started: it is at its newest checkpoint."""
    newest = max(storage.names(), default=None)
    step = checkpoint.step_of(newest) if newest else 0
    best = records.read_status(run_dir).best
    known = best if best in storage.names() else None
    records.write_status(run_dir, Status(False, step, fingerprint, known, newest))
    journal.event("stopped", step=step)


def _with_cpus(config: RunConfig, journal: Journal) -> RunConfig:
    """The recipe with the CPUs that each worker gets, if it leaves that to the node."""
    if config.compute.cpus is not None:
        return config
    compute = cluster.with_cpus(config.compute)
    journal.event("cpus", text=f"each worker has {compute.cpus:g} CPUs, its share of the node")
    return config.model_copy(update={"compute": compute})


def _run(config: RunConfig, order: WorkerConfig, seen: Watched, journal: Journal) -> bool:
    """Trains; False if the run was asked to stop before its workers had started."""
    run_dir, watch = Path(order.run_dir), seen.watch
    if config.compute.workers == 0:
        recipe = configs.as_mapping(_with_cpus(config, journal))
        worker.work(replace(order, recipe=recipe, under_ray=False), seen.beats)
        return True
    seen.beats.enter("starting Ray", UNWATCHED)
    if (run_dir / "stop").exists():
        return False
    with cluster.cluster(config.compute, run_dir / RAY_LOG) as connection:
        seen.beats.enter("waiting for the workers", UNWATCHED)
        _prepare_trainer()
        try:
            with watch.over_ray(connection.ray):
                started = _fit(partial(_train_under_ray, config, order, watch, journal), watch)
        except Exception as error:  # Ray wraps a worker's error in classes of its own
            if watch.error is not None:
                connection.ends_within_s, connection.lost = 1.0, watch.ray_lost
                raise
            stored = records.error_left(run_dir)
            if stored is not None:
                raise stored from error
            if watch.end is not None:
                raise watch.end from error
            if isinstance(error, AdaptNetError):
                raise
            raise _lost(config, run_dir, error, watch.reason) from error
        if not started:
            connection.ends_within_s = 5.0
            failed = records.error_left(run_dir) or watch.end  # of an earlier start of the workers
            if failed is not None:
                raise failed
        return started


def _prepare_trainer() -> None:
    """Imports what `_trainer` needs, which takes seconds: a request to stop must not find a thread that imports."""
    from pipeline.compat import ray_train  # noqa: F401


def _train_under_ray(config: RunConfig, order: WorkerConfig, watch: RunWatch, journal: Journal) -> None:
    config = _with_cpus(config, journal)
    address = watch.address(cluster.own_ip(config.compute))
    _trainer(config.compute, replace(order, recipe=configs.as_mapping(config), watch=address)).fit()


def _fit(train: Callable[[], None], watch: RunWatch) -> bool:
    """`train()` in a thread, so that a Ray that does not answer can be given up. Raises what it raises.

    Returns False as soon as the run is asked to stop, if no worker has started by then.
    """
    fitting = Asking(train, "fit")
    while fitting.lasts and watch.error is None:
        fitting.wait(0.2)
        if watch.stops_unstarted and fitting.lasts:
            return False
    if (error := watch.error or fitting.error) is not None:
        raise error
    return True


def _lost(config: RunConfig, run_dir: Path, error: Exception, reason: str | None) -> ResourceError:
    from pipeline.compat import ray_train

    compute, batch_size = config.compute, config.training.batch_size
    failures = ray_train.worker_failures(error)
    killed = any(ray_train.process_lost(each) or ray_train.peer_lost(each) for each in failures)
    hint = (
        " If a worker was killed because the machine ran out of memory, set training.batch_size "
        f"(={batch_size}) or compute.max_batch_per_worker lower."
    )
    return ResourceError(
        f"{run_dir}: the workers failed more often than compute.max_failures (={compute.max_failures}) or could not be "
        f"started within compute.start_patience_s (={compute.start_patience_s:g}): {reason or _last_line(failures[0])}."
        f"{hint if killed else ''} The same command resumes from the newest checkpoint",
        key="compute.max_failures",
        subject=run_dir,
    )


def _last_line(error: Exception) -> str:
    of_memory = RAYS_OF_MEMORY.search(str(error))  # more telling than Ray's last line, which is advice on Ray
    if of_memory is not None:
        return f"{of_memory[0]}, and Ray ended a process"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:500].rstrip(" .")


def _trainer(compute: ComputeConfig, order: WorkerConfig) -> Trainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from pipeline.compat.ray_train import Trainer

    gpu = cluster.computes_on_gpu(compute)
    return Trainer(
        worker.work,
        train_loop_config=order,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=gpu,
            resources_per_worker=cluster.demand(compute, 1, gpu=gpu),
        ),
        run_config=RunConfig(
            name=f"driver-{order.fence}",
            storage_path=str(Path(order.run_dir) / "ray"),
            failure_config=FailureConfig(max_failures=compute.max_failures, controller_failure_limit=1),
            callbacks=[_on_failures(order.watch)],
        ),
    )


def _on_failures(address: WatchAddress | None) -> UserCallback:
    """A callback that reports to the driver why a start failed.

    It ends the run if a worker raised an AdaptNetError, which a retry would raise again, or if the driver says so.
    """
    from ray.train import UserCallback

    class OnFailures(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
            from pipeline.compat.ray_train import failure_texts

            end = report_failures(address, failure_texts(worker_exceptions)) if address is not None else None
            for error in worker_exceptions.values():
                cause = getattr(error, "cause", error)
                if isinstance(cause, AdaptNetError):
                    raise cause
            if end is not None:
                raise ResourceError(end, key="compute.on_hang")

    return OnFailures()


def conclude(config: RunConfig, run_dir: Path, uploader: Uploader) -> Result:
    """The result from the run's files; registers the best checkpoint if the run is finished and has a name for it."""
    status = records.read_status(run_dir)
    version = register_best(run_dir, config.tracking, uploader)
    storage = checkpoint.open_storage(config.checkpoint, run_dir)
    name = status.best if status.finished else max(storage.names(), default=None)
    return Result(
        run_dir=run_dir,
        finished=status.finished,
        step=status.step,
        reports=load_reports(run_dir / "evaluations" / from_weights.FINAL) if status.finished else (),
        checkpoint=storage.where(name) if name else None,
        run_id=uploader.run_id,
        tracking_uri=without_secrets(uploader.uri),
        version=version.reference if version else None,
    )
