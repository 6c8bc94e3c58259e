"""Memory: freed tensors kept for the next step, and errors that say that there is none left."""

from __future__ import annotations

import ctypes
import threading

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h of glibc
SETTINGS = {
    M_TRIM_THRESHOLD: 1 << 30,  # bytes at the end of a heap that are kept; what lies between others stays anyway
    M_TOP_PAD: 64 << 20,  # asked for at once: whole heaps, where threads after the first have many, so none is undone
}
IN_MAIN_THREAD = {M_MMAP_MAX: 0}  # no allocation has memory of its own, to be given back when it is freed
IN_OTHERS = {M_MMAP_THRESHOLD: 32 << 20}  # none below so many bytes has; a thread's heap ends at 64 MiB

SPENT = (  # of RuntimeErrors: torch on a GPU and on a CPU, its libraries, the C++ library beneath DALI
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "allocation failed",
    "bad_alloc",
)


def words_if_spent(error: BaseException) -> str | None:
    """What an exception says of memory that could not be had, one line; None where it is about something else."""
    text = next((line for line in str(error).splitlines() if any(each in line for each in SPENT)), None)
    if isinstance(error, MemoryError):
        return text or "Python had none left"
    return text.strip()[:300] if text is not None and isinstance(error, RuntimeError) else None


def keep_freed_memory() -> bool:
    """Keeps freed tensors' memory in this process, up to all it ever held, for good; False if libc is not glibc.

    As it comes, glibc returns a step's activations to the kernel and has them back, zeroed page by page, in the next
    step. Without that baseline/cifar10_small at batch 128 on two cores trained at 876 instead of 719 images/s, and 32
    images of 224 px passed ConvNet-AIG-50 in 1.2 s instead of 1.6 to 2.0.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    main = threading.current_thread() is threading.main_thread()  # Ray trains in another
    settings = SETTINGS | (IN_MAIN_THREAD if main else IN_OTHERS)
    taken = [mallopt(name, value) == 1 for name, value in settings.items()]
    return all(taken)
