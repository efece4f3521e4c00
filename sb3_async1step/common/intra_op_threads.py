"""Divide PyTorch's intra-op threads among the workers."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

# Several models may learn at the same time. The number of threads to restore is the one before the first of them began
_lock = threading.Lock()
_n_blocks = 0
_original = 1


def count_usable_cores() -> int:
    """
    :return: number of cores that this process may use
    """
    # Only Linux has sched_getaffinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def intra_op_threads_for(n_workers: int) -> Iterator[None]:
    """
    Give each worker an equal share of PyTorch's intra-op threads inside the ``with`` block, but at least one.

    :param n_workers: number of workers that compute at the same time
    """
    global _original, _n_blocks
    with _lock:
        if _n_blocks == 0:
            _original = th.get_num_threads()
        _n_blocks += 1
    # The number is set for the calling thread, and inherited by the threads that it starts
    th.set_num_threads(max(1, _original // n_workers))
    try:
        yield
    finally:
        th.set_num_threads(_original)
        with _lock:
            _n_blocks -= 1
