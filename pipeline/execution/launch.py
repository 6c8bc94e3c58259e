"""What the driver does: `train(config, run_dir)`. Idempotent: starting is resuming from nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config as configs
from pipeline import run_config
from pipeline.data.index import Splits, open_splits
from pipeline.data.store import Progress
from pipeline.data.stream import Stream
from pipeline.errors import AdaptNetError, ConfigError, ResourceError
from pipeline.evaluation import from_weights
from pipeline.evaluation.evaluate import load_reports
from pipeline.execution import cluster, worker
from pipeline.execution.worker import Order
from pipeline.family import Report
from pipeline.registry.publishing import register_best
from pipeline.run_config import ComputeConfig, RunConfig
from pipeline.runs import records
from pipeline.runs.files import write_text
from pipeline.runs.lease import Lease
from pipeline.runs.provenance import without_secrets
from pipeline.tracking import Uploader
from pipeline.training import checkpoint
from pipeline.training.step import num_micros


@dataclass(frozen=True)
class Result:
    """What a run has come to. `finished` is False where it was asked to stop; the same call goes on from there."""

    run_dir: Path
    finished: bool
    step: int
    reports: Sequence[Report]
    checkpoint: str | None
    run_id: str | None  # of the MLflow run
    tracking_uri: str  # where that run is, without secrets
    version: str | None  # `models:/NAME/VERSION`, where `tracking.register` is set


DIED = ("OOM killer", "closed by peer", "remote worker")  # Ray's words for a worker that ended without one, and gloo's


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    allow_changed: Sequence[str] = (),
    progress: Progress | None = None,
    on_start: Callable[[], None] | None = None,
) -> Result:
    """Trains `config` in `run_dir`, from its newest whole checkpoint or from nothing, tracks it and registers the best.

    Another driver on the same folder is refused. `progress` hears of the index being built; `on_start` is called
    once this driver holds the folder. Raises the AdaptNetError that a worker met, or ResourceError where workers were
    lost more often than `compute.max_failures`.
    """
    config = absolute(config)
    _check_place(run_dir)
    new = not run_dir.exists()
    run_dir = make_folder(run_dir)
    lease = Lease(run_dir).acquire()
    try:
        (run_dir / "stop").unlink(missing_ok=True)
        for left in run_dir.glob("error-*.json"):
            left.unlink()
        if on_start is not None:
            on_start()
        _check(config)
        splits = open_splits(config.data, config.seed, progress)
        _check_batches(config, splits)
        from_weights.check_policies(config, splits)
        storage = checkpoint.open_storage(config.checkpoint, run_dir)
        checkpoint.claim_storage(storage, run_dir)
        if config.training.start_from is not None and not storage.names():  # needed for the first step alone
            checkpoint.weights_file(config.training.start_from)
        fingerprint = run_config.fingerprint(config, splits.train.identity)
        write_config(run_dir, config, fingerprint, allow_changed)
        recipe = configs.as_mapping(config)
        with Uploader(run_dir, config.tracking, recipe, command=sys.argv, fence=lease.fence) as uploader:
            if not _is_finished(run_dir, fingerprint):
                _run(config, Order(recipe, str(run_dir), lease.fence, tuple(allow_changed)))
            return conclude(config, run_dir, uploader)
    finally:
        if new and not (run_dir / "config.yaml").exists():
            lease.withdraw()
        else:
            lease.release()


def absolute(config: RunConfig) -> RunConfig:
    """Paths made absolute, since workers run in other folders."""
    data = config.data.model_copy(update={"root": config.data.root.absolute()})
    if data.index is not None:
        data = data.model_copy(update={"index": data.index.absolute()})
    start = config.training.start_from
    training = config.training.model_copy(update={"start_from": start.absolute() if start else None})
    storage = config.checkpoint.storage
    if storage is not None and "://" not in storage:
        storage = str(Path(storage).absolute())
    saving = config.checkpoint.model_copy(update={"storage": storage})
    return config.model_copy(update={"data": data, "training": training, "checkpoint": saving})


def make_folder(run_dir: Path) -> Path:
    """The run's folder, there and writable. Raises ResourceError where it is not."""
    run_dir = run_dir.absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(f"run folder {run_dir}: cannot be written ({error.strerror}); take another") from None
    return run_dir


def _check_place(run_dir: Path) -> None:
    """Raises ConfigError for a folder of runs, a sweep's among them."""
    if (run_dir / "config.yaml").exists() and "sweep" in configs.read_mapping(run_dir / "config.yaml"):
        raise ConfigError(f"run folder {run_dir}: holds a sweep; give the run a folder of its own with --run-dir")
    inside = [path.parent.name for path in sorted(run_dir.glob("*/config.yaml"))]
    if inside and not (run_dir / "config.yaml").exists():
        raise ConfigError(
            f"run folder {run_dir}: holds other runs ({', '.join(inside[:3])}); give the run a folder of its own, e.g. "
            f"--run-dir {run_dir / 'NAME'}"
        )


def _check(config: RunConfig) -> None:
    """What can be refused before anything is started."""
    if config.compute.address is None:
        check_device(config.compute)


def check_device(compute: ComputeConfig) -> None:
    import torch

    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "compute.device (=cuda): torch sees no GPU here; set compute.device=cpu, or take a GPU build of torch"
        )


def _check_batches(config: RunConfig, splits: Splits) -> None:
    """Every number of workers that the run may have gets its images, and no empty micro-batch."""
    compute, batch_size = config.compute, config.training.batch_size
    stream = Stream(splits.train, config.data, seed=config.seed, batch_size=batch_size)
    for world in range(max(1, compute.fewest_workers), max(1, compute.most_workers) + 1):
        num_micros(stream.row_bounds(world), world, compute.max_batch_per_worker)


def write_config(run_dir: Path, config: RunConfig, fingerprint: dict[str, Any], allowed: Sequence[str]) -> None:
    """Dumps the recipe beside its fingerprint. Raises CheckpointError if the folder holds a run of another recipe."""
    path = run_dir / "config.yaml"
    if path.exists():
        saved = configs.read_mapping(path).get("fingerprint", {})
        checkpoint.check_fingerprint(saved, fingerprint, allowed, str(run_dir))
    text = configs.dump_yaml({"recipe": configs.as_mapping(config), "fingerprint": fingerprint})
    write_text(path, text)


def _is_finished(run_dir: Path, fingerprint: dict[str, Any]) -> bool:
    status = records.read_status(run_dir)
    return status.finished and status.fingerprint == fingerprint


def _run(config: RunConfig, order: Order) -> None:
    run_dir = Path(order.run_dir)
    if config.compute.workers == 0:
        worker.work(Order(**{**vars(order), "under_ray": False}))
        return
    with cluster.cluster(config.compute):
        try:
            _trainer(config.compute, order).fit()
        except Exception as error:  # Ray wraps what a worker raised in kinds of its own
            left = records.error_left(run_dir)
            if left is not None:
                raise left from error
            if isinstance(error, AdaptNetError):
                raise
            raise _lost(config, run_dir, error) from error


def _lost(config: RunConfig, run_dir: Path, error: Exception) -> ResourceError:
    compute, training, words = config.compute, config.training, _cause(error)
    short = " If it was killed because memory was short, make training.batch_size"
    short += f" (={training.batch_size}) or compute.max_batch_per_worker smaller."
    return ResourceError(
        f"{run_dir}: the workers failed more often than compute.max_failures (={compute.max_failures}) or could not be "
        f"started within compute.start_patience_s (={compute.start_patience_s:g}): {words}."
        f"{short if any(each in words for each in DIED) else ''} The same command goes on from the newest checkpoint"
    )


def _cause(error: Exception) -> str:
    """The last line of the workers' errors; of one that has died, for the others' loss of it is no cause."""
    found = [str(each) for each in getattr(error, "worker_failures", {}).values()] or [str(error)]
    found.sort(key=lambda text: DIED[0] not in text)
    return (found[0].strip().splitlines() or [type(error).__name__])[-1][:500].rstrip(" .")


def _trainer(compute: ComputeConfig, order: Order) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Leaves Ctrl-C to the driver; Ray's own handler would end the workers before they have saved.

        Does without Ray Data, which would start a process for the data sets that it is not given.
        """

        def _register_sigint_handler(self, controller: Any) -> None: ...

        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if type(each).__name__ != "DatasetsCallback"]

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
            callbacks=[_give_up_on_user_errors()],
        ),
    )


def _give_up_on_user_errors() -> Any:
    """A callback that ends the run where a worker met an AdaptNetError: trying again would meet it again."""
    from ray.train import UserCallback

    class GiveUp(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                cause = getattr(error, "cause", error)
                if isinstance(cause, AdaptNetError):
                    raise cause

    return GiveUp()


def conclude(config: RunConfig, run_dir: Path, uploader: Uploader) -> Result:
    """Reads what the workers left; publishes the best checkpoint where the run is finished and has a name for it."""
    status = records.read_status(run_dir)
    version = register_best(run_dir, config.tracking, uploader)
    storage = checkpoint.open_storage(config.checkpoint, run_dir)
    return Result(
        run_dir=run_dir,
        finished=status.finished,
        step=status.step,
        reports=load_reports(run_dir / "evaluations" / from_weights.FINAL) if status.finished else (),
        checkpoint=storage.where(status.best) if status.best else None,
        run_id=uploader.run_id,
        tracking_uri=without_secrets(uploader.uri),
        version=version.reference if version else None,
    )
