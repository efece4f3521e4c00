"""Settings of the C library's memory allocator."""

import ctypes
import os
import platform
import time
from pathlib import Path

# Parameters of glibc's mallopt(), see the manual page mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# The largest value that glibc accepts
MMAP_THRESHOLD = 32 * 2**20
TRIM_THRESHOLD = 256 * 2**20
# Seconds between two looks at the process's memory, and by how much it may grow before freed memory is returned
TRIM_INTERVAL = 10.0
MUCH_GROWTH = 256 * 2**20
# Linux's sizes of this process in pages, see the manual page proc(5)
STATM = Path("/proc/self/statm")


def find_glibc() -> ctypes.CDLL | None:
    """
    :return: the C library, if it is glibc and the user has made no settings of its heap (``MALLOC_...``,
        ``GLIBC_TUNABLES``)
    """
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_set or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def keep_freed_memory() -> None:
    """
    Let glibc keep up to 256 MiB of freed memory, from now on and for the whole process.

    The images and activations of a batch take megabytes, which are allocated and freed at each step. In threads, glibc
    returns them to the operating system each time, and allocating them again takes longer than some of the arithmetic.
    Settings that the user has made take precedence. With other C libraries, nothing is changed.
    """
    glibc = find_glibc()
    if glibc is not None:
        glibc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        glibc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def read_resident_memory() -> int:
    """
    :return: resident memory of this process in bytes, where there is a ``STATM``
    """
    n_pages = int(STATM.read_text().split()[1])
    return n_pages * os.sysconf("SC_PAGE_SIZE")


class HeapTrimmer:
    """
    Returns freed memory to the operating system whenever the process has grown by 256 MiB.

    glibc does so at the heap's end only. Of what environments and networks free before it, not all is used again, so
    that the heap of a long training would grow all the time.
    """

    def __init__(self) -> None:
        self._glibc = find_glibc() if STATM.exists() else None
        self._due = time.monotonic() + TRIM_INTERVAL
        self._n_bytes = read_resident_memory() if self._glibc is not None else 0

    def trim_when_due(self) -> None:
        """Look at the process's memory if the last time was ``TRIM_INTERVAL`` seconds ago."""
        if self._glibc is None or time.monotonic() < self._due:
            return
        if read_resident_memory() > self._n_bytes + MUCH_GROWTH:
            self._glibc.malloc_trim(0)
            self._n_bytes = read_resident_memory()
        self._due = time.monotonic() + TRIM_INTERVAL
