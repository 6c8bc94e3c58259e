"""Applies one function to many tasks in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pipeline.errors import ResourceError

T = TypeVar("T")
R = TypeVar("R")


def num_cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(work: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    """(position of the task, work(task)), in the order of completion; a single worker or task runs in this process.

    Raises the errors of `work`, and ResourceError if a process was killed.
    """
    if min(workers, len(tasks)) <= 1:
        yield from ((position, work(task)) for position, task in enumerate(tasks))
        return
    before = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    with ProcessPoolExecutor(min(workers, len(tasks)), spawn, _follow_parent) as pool:
        positions = {pool.submit(work, task): position for position, task in enumerate(tasks)}
        try:
            for future in as_completed(positions):
                yield positions.pop(future), future.result()
        except BrokenProcessPool:
            raise ResourceError(
                f"a worker process was killed, most likely out of memory; use fewer than {workers} workers",
                key="--workers",
                subject=workers,
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
            raise


def _follow_parent() -> None:
    """Leaves interrupts to the parent process, and ends this process when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
