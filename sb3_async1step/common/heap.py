"""Settings of the C library's memory allocator."""

import ctypes
import os
import platform

# Parameters of glibc's mallopt(), see the manual page mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# The largest value that glibc accepts
MMAP_THRESHOLD = 32 * 2**20
TRIM_THRESHOLD = 256 * 2**20


def keep_freed_memory() -> None:
    """
    Let glibc keep up to 256 MiB of freed memory, from now on and for the whole process.

    The images and activations of a batch take megabytes, which are allocated and freed at each step. In threads, glibc
    returns them to the operating system each time, and allocating them again takes longer than some of the arithmetic.
    Settings that the user has made (``MALLOC_...``, ``GLIBC_TUNABLES``) take precedence. With other C libraries,
    nothing is changed.
    """
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_set or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
