"""Divide torch's intra-op threads among the workers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

# torch's setting belongs to the process, and several models may learn at the same time
_lock = threading.Lock()
_requests: list[int] = []
_original = 1


@contextmanager
def intra_op_threads_for(n_workers: int) -> Iterator[None]:
    """
    Give each worker an equal share of torch's intra-op threads inside the ``with`` block, at least one.

    When blocks overlap, the smallest share counts; the last block to end restores the original number.

    :param n_workers: number of workers that compute at the same time
    """
    global _original
    with _lock:
        if not _requests:
            _original = th.get_num_threads()
        share = max(1, _original // n_workers)
        _requests.append(share)
        th.set_num_threads(min(_requests))
    try:
        yield
    finally:
        with _lock:
            _requests.remove(share)
            th.set_num_threads(min(_requests, default=_original))
