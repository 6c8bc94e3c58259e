"""Private parts of Ray Train: a trainer without its SIGINT handler and Ray Data, and how a worker was lost."""

from __future__ import annotations

from collections.abc import Mapping

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import callbacks, exceptions

from pipeline.compat import require

TRIED = "2.60"
require("ray", TorchTrainer, ("_register_sigint_handler", "_create_default_callbacks"), tried=TRIED)
require("ray", callbacks, ("DatasetsCallback",), tried=TRIED)
require("ray", exceptions, ("WorkerHealthCheckFailedError",), tried=TRIED)

PROCESS_LOSSES = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError)
GLOO_PEER_LOST = ("closed by peer", "remote worker")  # gloo raises a plain RuntimeError where another rank is gone


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer for torch without two of its parts.

    Its SIGINT handler would end the workers before they have saved; the driver handles Ctrl-C itself. Its Ray Data
    callback would start a process for data sets that a run does not have.
    """

    def _register_sigint_handler(self, controller: object) -> None: ...

    def _create_default_callbacks(self) -> list[object]:
        made = super()._create_default_callbacks()
        return [each for each in made if not isinstance(each, callbacks.DatasetsCallback)]


def worker_failures(error: Exception) -> list[Exception]:
    """The workers' errors of a failed training, those of lost processes first; [error] where it names no worker."""
    by_rank: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    return sorted(by_rank.values(), key=lambda each: not process_lost(each)) or [error]


def process_lost(failure: Exception) -> bool:
    """Whether a worker's process ended without an error of its own: it was killed, or its node was lost."""
    if isinstance(failure, exceptions.WorkerHealthCheckFailedError):
        failure = failure.health_check_failure
    return isinstance(failure, PROCESS_LOSSES)


def failure_texts(by_rank: Mapping[int, Exception]) -> list[str]:
    """Why the workers of a start failed, lost processes first."""
    order = sorted(by_rank.items(), key=lambda each: (not process_lost(each[1]), each[0]))
    return [failure_text(rank, failure) for rank, failure in order]


def failure_text(rank: int, failure: Exception) -> str:
    """Why a worker failed, in a line: "rank 1 raised ValueError: no such label"."""
    if isinstance(failure, exceptions.WorkerHealthCheckFailedError):
        failure = failure.health_check_failure
    cause = getattr(failure, "cause", None) or failure
    if isinstance(failure, OutOfMemoryError):
        return f"rank {rank}: Ray ended it because its node ran out of memory"
    if isinstance(failure, NodeDiedError) or "node has died" in str(failure):
        return f"rank {rank}: its node was lost"
    if isinstance(failure, PROCESS_LOSSES):
        return f"rank {rank}: its process was lost"
    line = (str(cause).strip().splitlines() or [""])[-1][:500]
    return f"rank {rank} raised {type(cause).__name__}: {line}"


def peer_lost(failure: Exception) -> bool:
    """Whether a worker failed because another rank's connection closed."""
    return any(part in str(failure) for part in GLOO_PEER_LOST)
