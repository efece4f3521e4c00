"""How many cores there are for workers."""

import os


def count_usable_cores() -> int:
    """
    :return: number of cores that this process may use
    """
    # Only Linux has sched_getaffinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
