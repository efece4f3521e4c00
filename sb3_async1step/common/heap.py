"""The C library's heap."""

import ctypes
import os
import platform

# Parameters of glibc's mallopt(), see its manual page
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# The largest value that it takes
MMAP_THRESHOLD = 32 * 2**20
TRIM_THRESHOLD = 256 * 2**20


def keep_freed_memory() -> None:
    """
    Let glibc keep up to 256 MiB of freed memory, from now on and for the whole process.

    Images and activations of a batch take megabytes, which are asked for and freed at each step. In threads, glibc
    gives them back to the operating system each time, and getting them again costs more than some of the arithmetic.
    Settings of the user's (``MALLOC_...``, ``GLIBC_TUNABLES``) are left alone, and so are other C libraries.
    """
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_set or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
