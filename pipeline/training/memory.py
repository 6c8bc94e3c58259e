"""Stops glibc from returning freed memory to the kernel; recognises out-of-memory errors."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h of glibc
SETTINGS = {
    M_TRIM_THRESHOLD: 1 << 30,  # bytes at the end of a heap that are not returned; those in the middle never are
    M_TOP_PAD: 64 << 20,  # grow heaps by 64 MiB, the size of a thread's heap, so that no thread's arena is trimmed
}
IN_MAIN_THREAD = {M_MMAP_MAX: 0}  # never serve an allocation by mmap, which would be returned when it is freed
RETURNING = {M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 1 << 20}
IN_OTHERS = {M_MMAP_THRESHOLD: 32 << 20}  # mmap only above so many bytes, because a thread's heap ends at 64 MiB

OUT_OF_MEMORY = (  # messages of torch on a GPU and on a CPU, of its libraries, and of the C++ library that DALI uses
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "allocation failed",
    "bad_alloc",
)


def oom_message(error: BaseException) -> str | None:
    """The line of an exception that reports memory running out; None if the exception is about something else."""
    text = next((line for line in str(error).splitlines() if any(each in line for each in OUT_OF_MEMORY)), None)
    if isinstance(error, MemoryError):
        return text or "Python could not allocate"
    return text.strip()[:300] if text is not None and isinstance(error, RuntimeError) else None


def keep_freed_memory() -> bool:
    """Makes this process keep freed memory for later allocations, permanently; False if libc is not glibc.

    By default glibc returns a step's activations to the kernel and gets them back, zeroed page by page, in the next
    step. Without that baseline/cifar10_small at batch 128 on two cores trained at 876 instead of 719 images/s, and 32
    images of 224 px passed ConvNet-AIG-50 in 1.2 s instead of 1.6 to 2.0.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    main = threading.current_thread() is threading.main_thread()  # Ray trains in another
    settings = SETTINGS | (IN_MAIN_THREAD if main else IN_OTHERS)
    accepted = [mallopt(name, value) == 1 for name, value in settings.items()]
    return all(accepted)


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Large allocations within the block go back to the kernel when they are freed; afterwards `keep_freed_memory`.

    Otherwise a heap that has once grown to the limit would leave nothing to the other allocators of this process.
    """
    with suppress(OSError, AttributeError, TypeError):
        for name, value in RETURNING.items():
            ctypes.CDLL(None).mallopt(name, value)
    try:
        yield
    finally:
        keep_freed_memory()
