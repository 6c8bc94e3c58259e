"""Private parts of torch's DataLoader: ending its workers without raising how they ended."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pipeline.compat import require

TRIED = "2.14"
require("torch", _utils, ("signal_handling._remove_worker_pids",), tried=TRIED)
require("torch", _MultiProcessingDataLoaderIter, ("_shutdown_workers",), tried=TRIED)


def shut_down_workers(batches: Iterator[object]) -> None:
    """Ends the worker processes behind `iter(DataLoader(...))`.

    About one worker in many aborts while Python ends. torch's SIGCHLD handler would raise that in this process, though
    it changes nothing that was measured, so the workers are first removed from the handler's list.
    """
    assert isinstance(batches, _MultiProcessingDataLoaderIter)
    _utils.signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]
    batches._worker_pids_set = False
    batches._shutdown_workers()
