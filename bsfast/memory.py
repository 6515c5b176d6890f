"""Memory that tensors free, kept for the next ones: the setting of the C library that training on a CPU wants."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
_SETTINGS = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 256 * 1024 * 1024}


def keep_freed_memory() -> bool:
    """Make glibc keep the memory that tensors free, for this process, instead of giving it back to the system.

    By default every large tensor is new memory, whose pages the system clears one by one as they are first written;
    for a training step of a large network on a CPU that can cost as much as the arithmetic. With this setting the
    process keeps the most memory it ever needed, and some between what is in use. The environment variables
    ``MALLOC_MMAP_MAX_``, ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_TOP_PAD_`` do the same from the start; call it before
    the first large tensor. It works for stock PyTorch, too. No effect on CUDA memory.

    Returns:
        Whether the C library is glibc and took the settings; nothing is changed otherwise.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, value) == 1 for option, value in _SETTINGS.items()]
    return all(taken)
